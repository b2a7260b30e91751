"""What a body did to the modules that it was given: the tensors that it changed, and what it may not change."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat
from torchlift.collecting import Collected
from torchlift.containers import Held, changed_attributes, tensors_in
from torchlift.errors import (
    ModifyCollectionError,
    PlainAttributeError,
    TorchliftWarning,
    UnsupportedError,
    warn,
)
from torchlift.given import FilledError, Given
from torchlift.nodes import SCALARS, STORES, Node
from torchlift.unseen import can_compare, code_of, renormalises, same_values, unseen_writes
from torchlift.variables import ATTRIBUTE, COLLECTIONS, Site, collection_of

# In the memory of a tree: what a body wrote last time, may write unseen, and may write at all.
_WRITTEN, _UNSEEN, _ALLOWED = "written", "unseen", "allowed"


class Change(NamedTuple):
    """What a body did to one tensor: ``copy`` into it, ``rebind`` its name, or ``create`` it."""

    how: str
    node: int
    store: str
    key: str
    entry: int  # -1 for a created one
    collection: str


@dataclasses.dataclass(frozen=True)
class Meta:
    """What belongs to the tensors of an :class:`Update`; static, so it passes through any transform as a leaf does."""

    changes: tuple[Change, ...]
    sites: tuple[Site, ...]  # one for each sown value, in order


class Update(NamedTuple):
    """New state that a body produced: one tensor for each change, one value for each sown site."""

    changed: list[Tensor]
    sown: list[Any]
    meta: Meta


class Changeable(Collected):
    """A call, collected, that knows which of its variables a body may change, and tells which it did."""

    fn: Callable[..., Any]
    hidden: frozenset[int] = frozenset()  # the entries that a body does not see
    isolated = False  # whether parameters that are written in place must not be the module's own
    one_of_many = False  # whether the body runs in the name of other modules too
    # Of the arguments (NOTE [Given containers]): by position those that are handed on by value, and how many come
    # before the user's; what of a result reaches those who are given the arguments; whether changes are put there.
    by_value: frozenset[int] = frozenset()
    before = 0
    handed_on: Callable[[Any], Any] = staticmethod(lambda out: out)
    fills = False
    filled: list[tuple[int, Any]] | None = None  # what a run put into its arguments
    _writable: list[bool] | None  # of each entry; None: not asked for yet

    def allow(self, writable: Callable[[str], bool], how_to: Callable[[str], str]) -> None:
        """Says which collections a body may change, and what to add where it may not."""
        self._writable_collection, self._how_to_write = writable, how_to
        # Dynamo lets nothing be set around the body of a higher-order operator, where it may be asked for.
        self._writable = self._allowed() if _compat.is_compiling() else None

    @property
    def writable(self) -> list[bool]:
        """Whether a body may change each entry. Found when asked for: a body that changes nothing does not ask."""
        if self._writable is None:
            self._writable = self._allowed()
        return self._writable

    def _allowed(self) -> list[bool]:
        last = None if self.memory is None else self.memory.keys.get(_ALLOWED)
        collections = {entry.collection for entry in self.entries} if last is None else last[0]
        known = {collection: self._writable_collection(collection) for collection in collections}
        if last is not None and last[0] == known:
            return last[1]
        allowed = [entry.store != ATTRIBUTE and known[entry.collection] for entry in self.entries]
        if self.memory is not None:
            self.memory.keys[_ALLOWED] = (known, allowed)
        return allowed

    @property
    def unseen(self) -> tuple[bool, list[int], bool]:
        """Whether buffers may be written uncounted, what parameters may be written in place, and whether it seeds."""
        code = code_of(self.fn)
        known = None if self.memory is None else self.memory.keys.get(_UNSEEN)
        if known is not None and known[0] == code and all(cls.forward is forward for cls, forward in known[1].items()):
            return known[2]
        modules = [node.module for node in self.nodes]
        uncounted, into_all, into, seeds = unseen_writes(self.fn, modules)
        writers = [
            at
            for at, module in enumerate(modules)
            if into_all or weakref.ref(type(module)) in into or renormalises(module)
        ]
        places = [place for at in self._beneath(writers) for place in self.nodes[at].tensors]
        written = list(dict.fromkeys(index for store, _, index in places if store == "_parameters"))
        found = uncounted, written, seeds
        if self.memory is not None:
            self.memory.keys[_UNSEEN] = (code, {type(module): type(module).forward for module in modules}, found)
        return found

    def _beneath(self, nodes: Sequence[int]) -> set[int]:
        """These modules, and all that they have as submodules."""
        found: set[int] = set()
        work = [*nodes]
        while work:
            at = work.pop()
            if at not in found:
                found.add(at)
                work += [child for _, child in self.nodes[at].children]
        return found

    @property
    def copied(self) -> list[int]:
        """The entries that a body gets copies of; see NOTE [Buffers]."""
        if not self.isolated or not self.unseen[1] or _compat.is_tracing() or _compat.functorch_active():
            return self.buffers
        return [*self.buffers, *self.unseen[1]]

    def _uncounted(self, given: Sequence[Tensor], bound: Sequence[Tensor], counted: set[int]) -> set[int]:
        """The buffers that were written without a count; see NOTE [Unseen writes]."""
        if not self.unseen[0] or _compat.is_tracing() or _compat.functorch_active() or not can_compare():
            return set()
        apart = [i for i in self.buffers if i not in counted and not bound[i].is_meta]
        return {i for i in apart if not same_values(bound[i], given[i])}

    def _read_parameters(
        self, bound: Sequence[Tensor], counted: set[int], changes: list[Change], values: list[Tensor]
    ) -> None:
        """Appends the parameters that were written in place, of which the real ones are not."""
        for at, node in enumerate(self.nodes):
            for store, key, index in node.tensors:
                if store == "_parameters" and index in counted and not _is_noted(changes, index):
                    if self.isolated:
                        self._check_writable(node, key, index, bound[index])
                    if self.writable[index]:
                        changes.append(Change("copy", at, store, key, index, self.entries[index].collection))
                        values.append(bound[index])

    def _read_back(
        self, at: int, fields: dict[str, Any], given: Sequence[Tensor], bound: list[Tensor], counted: set[int],
        changes: list[Change], values: list[Tensor],
    ) -> None:  # fmt: skip
        """Appends what the body did to the tensors of one module."""
        node = self.nodes[at]
        own = [(key, i) for store, key, i in node.tensors if store == "_buffers" and fields[store].get(key) is bound[i]]
        known, written = 0, self._written(node, own, given, bound, counted) if own else ()
        for store, key, index in node.tensors:
            if index in self.hidden:
                continue
            known += 1
            now = fields[store].get(key)
            if now is not bound[index]:
                how = "rebind"
            elif store == "_buffers" and index in written:
                how = "copy"
            else:
                continue
            self._check_writable(node, key, index, now)
            again = how == "copy" and len(self.entries[index].places) > 1
            if not again or not _is_noted(changes, index):
                changes.append(Change(how, at, store, key, index, self.entries[index].collection))
                values.append(now)
        tensors = (*fields["_parameters"].values(), *fields["_buffers"].values())
        if known == len([tensor for tensor in tensors if tensor is not None]):
            return
        places = {(store, key) for store, key, index in node.tensors if index not in self.hidden}
        for store in STORES:
            for key, tensor in fields[store].items():
                if tensor is not None and (store, key) not in places:
                    collection = fields.get(COLLECTIONS, {}).get(key) or collection_of(node.module, store, key)
                    self._check_creatable(node, key, collection)
                    changes.append(Change("create", at, store, key, -1, collection))
                    values.append(tensor)

    def _read_written(self, given: Sequence[Tensor], bound: list[Tensor], counted: set[int]) -> Sequence[Change]:
        """What the body wrote in all modules, in which each tensor is in its place.

        Of a tree that is remembered that is what it was last time, where the same was counted and counts tell all.
        """
        asked = (counted, self.hidden, self.writable)
        known = None if self.memory is None else self.memory.keys.get(_WRITTEN)
        if known is not None and known[0] == asked and all(cls.forward is forward for cls, forward in known[1].items()):
            return known[2]
        changes: list[Change] = []
        told, forwards = True, {}  # of the classes that count their statistics; a class may be given another
        for at, node in enumerate(self.nodes):
            # Written, but not counted, are statistics in training alone.
            if not node.has_buffers or not (counted or node.module.training):
                continue
            own = [(key, i) for store, key, i in node.tensors if store == "_buffers" and i not in self.hidden]
            if self._statistics(node, own, bound):
                told = told and bool(_counters(node, own))
                forwards[type(node.module)] = type(node.module).forward
            written = self._written(node, own, given, bound, counted)
            for key, index in own:
                if index in written and not (len(self.entries[index].places) > 1 and _is_noted(changes, index)):
                    self._check_writable(node, key, index, bound[index])
                    changes.append(Change("copy", at, "_buffers", key, index, self.entries[index].collection))
        if self.memory is not None and told:
            self.memory.keys[_WRITTEN] = (asked, forwards, changes)
        return changes

    def _statistics(self, node: Node, own: Sequence[tuple[str, int]], bound: Sequence[Tensor]) -> list[int]:
        """Which of a module's buffers torch's batch_norm may write."""
        writes = node.module.training and _calls_batch_norm(type(node.module))
        return [i for _, i in own if bound[i].is_floating_point()] if writes else []

    def _written(
        self, node: Node, own: Sequence[tuple[str, int]], given: Sequence[Tensor], bound: Sequence[Tensor],
        counted: set[int],
    ) -> set[int]:  # fmt: skip
        """Which of a module's ``own`` buffers, by key and entry, were written; ``counted`` in any case."""
        statistics = self._statistics(node, own, bound)
        if _compat.is_compiling():
            written = set()
            for _, i in own:
                if (i in statistics and self.writable[i]) or _compat.was_written_in_trace(bound[i]):
                    written.add(i)
            return written
        # NOTE [Batch norm]. torch's batch_norm writes the running statistics without counting it in their version. The
        # counter beside them tells, in torch's own layers; elsewhere the values do, or in a transform are taken to.
        if not statistics:
            return counted
        if counters := _counters(node, own):
            return counted.union(statistics) if any(i in counted for i in counters) else counted
        return counted.union([i for i in statistics if i not in counted and _may_differ(bound[i], given[i])])

    def _check_writable(self, node: Node, key: str, index: int, now: Any) -> None:
        if not self.writable[index]:
            raise ModifyCollectionError(self._read_only(node, key, index))
        if now is None:
            raise UnsupportedError(f"{self.label}: deleted {node.dotted(key)!r} in the body; delete it outside")

    def _read_only(self, node: Node, key: str, index: int) -> str:
        collection = self.entries[index].collection
        return (
            f"{self.label}: changed {node.dotted(key)!r} of collection {collection!r}, which is read-only there; "
            f"{self._how_to_write(collection)}"
        )

    def _check_creatable(self, node: Node, key: str, collection: str) -> None:
        if not self._writable_collection(collection):
            raise ModifyCollectionError(
                f"{self.label}: created {node.dotted(key)!r} in collection {collection!r}, which is read-only there; "
                f"{self._how_to_write(collection)}; or declare it before the call"
            )

    def _check_modules(self, node: Node, own: dict[str, Any], old: dict[str, Any]) -> None:
        for key in {**old, **own}:
            if own.get(key) is not old.get(key):
                what = "added" if old.get(key) is None else "replaced" if own.get(key) is not None else "removed"
                raise UnsupportedError(
                    f"{self.label}: {what} the submodule {node.dotted(key)!r} in the body, which is not kept: a body "
                    "may run once, more often or never in a call; do it in __init__, or call the module once without"
                )

    def _check_attributes(self, node: Node, fields: dict[str, Any], old: dict[str, Any]) -> None:
        """NOTE [Plain attributes]. A tensor left on a module would be a dead tracer there, a changed number is lost."""
        for key, value, with_tensor in changed_attributes(node.module, fields, old):
            where = f"{self.label}: assigned {node.dotted(key)!r} in the body"
            if with_tensor:
                raise PlainAttributeError(f"{where}, {outlives('attribute', key)}")
            if type(value) in SCALARS and value != old.get(key, fields) and not _compat.is_compiling():
                warn(
                    f"{where}: {old.get(key)!r} -> {value!r}, which is not kept: a body may run once, more often or "
                    f"never in a call; declare it with torchlift.variable(self, 'state', {key!r}, init_fn)",
                    TorchliftWarning,
                )

    def _check_given(self, given: Given, out: Any, leaves: Sequence[Any]) -> None:
        """Refuses what the body put into its arguments, or notes it for :meth:`hand_over`."""
        changed = given.changed(None if self.fills else self.handed_on(out))
        filled = given.contents(changed, list(leaves)) if changed and self.fills else None
        if self.fills:
            self.filled = filled
        if changed and filled is None:
            name = given.name(changed[0])
            raise FilledError(
                f"{self.label}: the body changed {name}, in a {type(given.found[changed[0]][0]).__name__} among its "
                "arguments, which would be lost: a body gets containers of its own, with its own tensors; return the "
                "new value, hand it out with sow, or keep it in a buffer of the module"
            )

    def hand_over(self, filled: list[tuple[int, Any]] | None) -> None:
        """Puts into the caller's containers what a run has ``filled`` into those that it was given."""
        if filled and self.fillable is not None:
            Given(*self.fillable, self.by_value).fill(filled, self.leaves)

    def _check_containers(
        self, held: Sequence[tuple[int, str, Any, list[Held]]], shadows: Sequence[nn.Module],
        error: BaseException | None = None,
    ) -> None:  # fmt: skip
        """As for attributes; takes out of plain lists and dicts what was put into them, after an ``error`` too."""
        refused: list[tuple[Node, str, Any]] = []
        kept: list[tuple[Node, str, Any]] = []
        for at, key, value, containers in held:
            node, fields = self.nodes[at], shadows[at].__dict__
            # One with slots was made for this run. torch's recurrent layers keep their weights in a list besides, and
            # put what takes their place into it, or make a new list, which counts as an attribute.
            own = any(key == name for name, _ in node.attributes)
            if own and fields.get(key) is not value:
                continue
            replaced = [*fields["_parameters"].values(), *fields["_buffers"].values()] if own else []
            for container in containers:
                if any(all(tensor is not known for known in replaced) for tensor in tensors_in(container.added())):
                    container.restore()
                    refused.append((node, key, container.container))
                elif (self.isolated or self.one_of_many) and not own and container.changed():
                    container.restore()
                    kept.append((node, key, container.container))
        if refused and error is None:
            node, key, container = refused[0]
            raise PlainAttributeError(
                f"{self.label}: put a tensor into {node.dotted(key)!r} in the body, "
                + outlives(type(container).__name__, key)
            )
        if kept and error is None:
            node, key, container = kept[0]
            where = f"{self.label}: changed what is in {node.dotted(key)!r}, a {type(container).__name__}, in the body"
            declare = f"declare it with torchlift.variable(self, 'state', {key!r}, init_fn)"
            if self.one_of_many:
                raise FilledError(f"{where}, which runs in the name of other modules with one of their own; {declare}")
            if not _compat.is_compiling():
                warn(f"{where}, which is not kept: apply changes nothing in a module; {declare}", TorchliftWarning)


def outlives(kind: str, key: str) -> str:
    """Why no tensor may be left in a plain attribute, or list or dict there, and what to do instead."""
    return (
        f"a tensor in a plain {kind}, which would outlive the transform; declare it with "
        f"torchlift.variable(self, 'state', {key!r}, init_fn) and set its .value, or hand it out with sow"
    )


def _counters(node: Node, own: Sequence[tuple[str, int]]) -> list[int]:
    """Which of the buffers of one of torch's batch norms count the calls that write its statistics."""
    if not _is_torchs_own(type(node.module).forward):
        return []
    return [i for name, i in own if name == "num_batches_tracked"]


def _is_noted(changes: Sequence[Change], index: int) -> bool:
    """Whether it is among ``changes`` already, by another of its names, that an entry was written."""
    return any(change.entry == index and change.how == "copy" for change in changes)


def _may_differ(now: Tensor, before: Tensor) -> bool:
    unknown = _compat.is_tracing() or _compat.functorch_level(now) >= 0 or now.is_meta
    return unknown or not same_values(now, before)


@torch.compiler.assume_constant_result  # Dynamo calls it, rather than trace it
def _calls_batch_norm(cls: Any) -> bool:
    return _names_batch_norm(cls)


@functools.cache
def _names_batch_norm(cls: Any) -> bool:
    codes = [value.__code__ for base in cls.__mro__ for value in vars(base).values() if hasattr(value, "__code__")]
    return any("batch_norm" in name for code in codes for name in code.co_names)


@functools.cache
def _is_torchs_own(forward: Any) -> bool:
    """Whether a forward, which a class may be given anew, is that of one of torch's layers."""
    return inspect.unwrap(forward).__module__.startswith("torch.nn.")
