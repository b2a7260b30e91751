"""One call of a lifted loop: the body as the engine wants it, and what the engine returns as the user wants it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, fingerprint, metadata, rng, stacked_classes, stacking
from torchlift._context import context, entered
from torchlift.changes import Change, Meta, Update
from torchlift.engine import loop
from torchlift.engine.opaque import opaque_run
from torchlift.engine.run import run
from torchlift.engine.spans import iteration
from torchlift.errors import (
    ArgumentError,
    AxisError,
    CarryError,
    IterationError,
    RandomnessError,
    TorchliftCompileWarning,
    TorchliftError,
    UnsupportedError,
    warn,
)
from torchlift.given import by_value
from torchlift.groups import Groups
from torchlift.pack import Packed
from torchlift.transforms.compiling import constant, settings, static_of, token
from torchlift.transforms.lengths import broadcast, length_of
from torchlift.transforms.options import check_axes
from torchlift.transforms.profiling import names_of
from torchlift.variables import ATTRIBUTE

_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True)
class _Result:
    """What is static about what an iteration returns; the same in each."""

    ys: _tree.Spec
    sown: _tree.Spec
    meta: Meta  # of the variables that come out stacked
    carried: tuple[Change, ...]


class Iterations:
    """One call of a loop: the body as the engine wants it, and what the engine returns as the user wants it.

    ``axes`` has, for each leaf of the arguments, the axis that is scanned over, or ``broadcast``; the carry is the
    first argument. ``levels`` is how many axes the nest of loops has, ``lengths`` their sizes, if they are known.
    """

    def __init__(
        self, groups: Groups, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str,
        inside: type | None, axes: list[Any], sizes: tuple[int, ...] | None, *, levels: int = 1,
        transform: Callable[..., Any] | None = None, metadata_params: Mapping[Any, Any] | None = None,
        lengths: tuple[int, ...] | None = None,
    ):  # fmt: skip
        self.label, self.levels, self.groups, self.transform = label, levels, groups, transform
        self.argument_names = names = lambda: _tree.argument_names(args, kwargs)
        if stacking.is_pending(module):
            leaves, _ = _tree.flatten((args, kwargs))
            stacked_classes.materialize(module, length_of(label, sizes, [], [], [], leaves, names, axes, 1)[0])
        self.packed = packed = Packed(fn, module, args, kwargs, label, inside)
        self.roles = packed.group(groups.role)
        packed.allow(lambda c: groups.role(c).writable, _how_to_write)
        packed.refuse(groups.untold_streams(rng.positions()))
        self.axes = axes
        self.attributes = metadata.without_axis(packed, [role.axis for role in self.roles], metadata_params or {})
        self.lengths = lengths or length_of(
            label, sizes, packed.entries, packed.tensors, self.roles, packed.leaves, names, axes, levels
        )
        self.carried = [at for at, role in enumerate(self.roles) if role.carried]
        self.scanned = [at for at, role in enumerate(self.roles) if role.axis is not None]
        self.shared = [at for at, role in enumerate(self.roles) if role.axis is None and not role.carried]
        self.device = packed.device  # read here: in a body, to ask a tensor from outside even for this is to use it
        self.carry_tree, (carry, self.carry_spec) = args[0], _tree.flatten(args[0])
        self.carry = [_as_tensor(leaf, self.device) for leaf in carry]
        count = len(carry)
        self.xs_at = [at for at, axis in enumerate(axes) if axis is not broadcast and at >= count and axis is not None]
        self.const_at = [at for at in range(count, len(axes)) if at not in self.xs_at]
        packed.by_value = by_value(packed.fillable, self.xs_at)
        self.uniform, self.begin = False, rng.positions()
        self.starts: dict[int, dict[str, tuple[int, int]]] = {}

    # Body ------------------------------------------------------------------------------------------------------------

    def body(self, consts: Any, carry: Any, x: Any) -> Any:
        """One iteration: ``(consts, carry, x) -> (carry, y)``, each a pair of variables and argument leaves."""
        tensors: list[Any] = [None] * len(self.roles)
        for places, values in ((self.shared, consts[0]), (self.carried, carry[0]), (self.scanned, x[0])):
            for at, value in zip(places, values, strict=True):
                tensors[at] = value
        leaves: list[Any] = [*carry[1], *[None] * (len(self.axes) - len(carry[1]))]
        for places, values in ((self.const_at, consts[1]), (self.xs_at, x[1])):
            for at, value in zip(places, values, strict=True):
                leaves[at] = value
        if self.transform is not None:
            tensors = self._transformed(tensors)
        with self._streams(x[2]):
            roots = self.packed.places(outermost=iteration() is None)
            try:
                out, update = self.packed.pure(tensors, leaves, self.attributes, roots)
            except Exception as error:
                if not _compat.is_compiling():  # Dynamo has no notes
                    self._note(error, leaves)
                raise
        new_carry, ys = self._checked(out, carry[1])
        return self._sorted(tensors, update, new_carry, ys)

    def _note(self, error: Exception, leaves: Sequence[Any]) -> None:
        """Adds to an error of a body which iteration it was, and what that was given: the wrong axis, easily."""
        if isinstance(error, TorchliftError):
            return
        with contextlib.suppress(Exception):  # a note is not worth another error
            named = list(zip(self.argument_names(), leaves))
            scanned = [(name, leaf) for name, leaf in (named[at] for at in self.xs_at) if isinstance(leaf, Tensor)]
            given = [f"{name} of shape {tuple(leaf.shape)}" for name, leaf in scanned]
            at = iteration()
            where = "an iteration" if at is None else f"iteration {at} of {math.prod(self.lengths)}"
            note = f"{self.label}: {where} was given {', '.join(given) or 'the carry alone'}; see in_axes="
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)

    def _checked(self, out: Any, given: Sequence[Any]) -> tuple[list[Any], Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            kind = "a tensor" if isinstance(out, Tensor) else type(out).__name__
            raise CarryError(
                f"{self.label}: the body returned {kind}, expected a pair (carry, ys), with None for no ys"
            )
        leaves, spec = _tree.flatten_like(out[0], self.carry_spec)
        if spec != self.carry_spec:
            got, expected = _tree.paths(out[0]), _tree.paths(self.carry_tree)
            raise CarryError(
                f"{self.label}: the carry changed its structure: got {_tree.kind(out[0])} with leaves {got}, "
                f"expected {_tree.kind(self.carry_tree)} with leaves {expected}, as in the carry that went in"
            )
        leaves = [_as_tensor(leaf, self.device) for leaf in leaves]
        if not all(_fits(new, old) for new, old in zip(leaves, given, strict=True)):
            for path, new, old in zip(_tree.paths(self.carry_tree), leaves, given, strict=True):
                if not _fits(new, old):
                    raise CarryError(
                        f"{self.label}: carry{path} changed: got {_described(new)}, expected {_described(old)}, as in "
                        "the carry that went in; cast or reshape what is returned, or start from a carry like that"
                    )
        return leaves, out[1]

    def _sorted(self, tensors: list[Tensor], update: Update, new_carry: list[Any], ys: Any) -> Any:
        """The iteration's results: what is carried on, what comes out of each iteration, and what is static."""
        state = {at: tensors[at] for at in self.carried}
        stacked: list[tuple[Change, Tensor]] = []
        carried: list[Change] = []
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            if change.entry < 0 and self.groups.role(change.collection).carried:
                raise CarryError(
                    f"{self.label}: created {change.key!r} in {change.collection!r}, which is carried, expected the "
                    "variables that were there before; declare it before the loop"
                )
            if change.entry in state:
                if not _fits(value, old := tensors[change.entry]):
                    name = self.packed.entries[change.entry].name
                    raise CarryError(
                        f"{self.label}: {name!r} in {change.collection!r}, which is carried, changed: got "
                        f"{_described(value)}, expected {_described(old)}, as before the loop; write a value "
                        "like that, or declare the variable as what it becomes"
                    )
                state[change.entry] = value
                carried.append(change)
            else:
                stacked.append((change, value if self.packed.nested else value.detach()))
        if self.uniform:
            new = {change.entry: value for change, value in stacked}
            stacked = [(change, new.get(change.entry, tensors[change.entry])) for change in self._written(self.scanned)]
            carried = self._written(self.carried)
        y_leaves, y_spec = _tree.flatten(ys)
        sown, sown_spec = _tree.flatten(update.sown)
        meta = Meta(tuple([change for change, _ in stacked]), update.meta.sites)
        static = token(_Result(y_spec, sown_spec, meta, tuple(carried)))
        y_leaves = [_as_tensor(leaf, self.device) for leaf in y_leaves]
        return ([state[at] for at in self.carried], new_carry), (y_leaves, [v for _, v in stacked], sown, static)

    def _written(self, places: Sequence[int]) -> list[Change]:
        """A change of each buffer that may change: the same in all iterations, which need not have changed the same."""
        found = []
        for at in places:
            entry = self.packed.entries[at]
            if self.packed.writable[at] and entry.store == "_buffers":
                node, _, key, collection = entry.places[0]
                found.append(Change("copy", node, "_buffers", key, at, collection))
        return found

    def _streams(self, index: Any) -> entered:
        """NOTE [Streams in loops]. An iteration that is recomputed draws from its streams as it did at first; a stream
        that is not split starts anew in each."""
        if index is None or _compat.is_tracing():
            return entered()
        at = int(index)
        if at in self.starts:
            return entered(streams=self.starts[at])
        rng.rewind({name: where for name, where in self.begin.items() if not self.groups.splits(name)})
        self.starts[at] = rng.positions()
        return entered()

    def _transformed(self, tensors: list[Any]) -> list[Any]:
        """The tensors, with ``data_transform`` applied to the groups: shared, carried, scanned."""
        assert self.transform is not None
        groups = [[at for at in places if self.packed.entries[at].store != ATTRIBUTE]
                  for places in (self.shared, self.carried, self.scanned)]  # fmt: skip
        trees: list[dict[str, dict[str, Any]]] = [{}, {}, {}]
        for tree, places in zip(trees, groups, strict=True):
            for at in places:
                entry = self.packed.entries[at]
                tree.setdefault(entry.collection, {})[entry.name] = tensors[at]
        streams = tuple({name: where} for name, where in rng.positions().items())
        found = self.transform(tuple(trees), streams)
        if not _is_like(found, trees):
            raise ArgumentError(
                f"{self.label}: data_transform returned {type(found).__name__}, expected (variable_groups, rng_groups) "
                "with every variable of the groups that it got"
            )
        changed, _ = found
        new = list(tensors)
        for tree, places in zip(changed, groups, strict=True):
            for at in places:
                entry = self.packed.entries[at]
                new[at] = tree[entry.collection][entry.name]
        return new

    # Loop ------------------------------------------------------------------------------------------------------------

    def loop(
        self, register: Callable[[tuple[bool | str, ...]], str], *, compile: Any, **options: Any
    ) -> tuple[Any, Any] | None:
        """Runs the loop and publishes its state; the carry as the user's tree, and the engine's ys.

        None, with nothing done, where a graph of ``torch.compile`` around it would have to break.

        ``register`` makes the body known for a graph of ``torch.compile`` around the loop, and returns its key; an
        empty one where the loop has to be plain.
        """
        packed, length = self.packed, math.prod(self.lengths)
        tensors = packed.snapshot()
        consts = ([tensors[at] for at in self.shared], [constant(packed.leaves[at]) for at in self.const_at])
        carry = ([tensors[at] for at in self.carried], self.carry)
        xs = loop.Stacked((
            [self._to_front(tensors[at], self.roles[at].axis, self.levels) for at in self.scanned],
            [self._to_front(packed.leaves[at], self.axes[at], 1) for at in self.xs_at],
            torch.arange(length) if self.begin else None,
        ))  # fmt: skip
        options = {**options, "shared_draws": self.groups.splits(rng.DROPOUT) is False}
        if packed.has_hooks(skip_root=packed.inside is not None):
            compile = False
        if compile is not False and (reason := fingerprint.opaque(packed.leaves)) is not None:
            compile = False
            if not _compat.is_compiling():
                warn_plain(self.label, reason)
        if _compat.is_compiling():
            known = ""
            if compile is not False and not packed.nested and length:
                known = register(settings([node.module for node in packed.nodes]))
            if known:
                refused = dict(packed.refused).get(rng.DROPOUT)
                out, ys = opaque_run(
                    known, consts, carry, xs, length, compile=compile, refused=refused,
                    names=["\n".join(self.names())], **options
                )  # fmt: skip
                if isinstance(out, str):
                    return None
                state, leaves = out
            else:
                body = loop.Body(self.body, self.label, self.label)
                (state, leaves), ys = loop.plain_run(body, consts, carry, xs, length, **_plain_options(options))
        else:
            key: Any = self.label
            try:
                key = key if compile is False else (fingerprint.of_packed(packed), fingerprint.of_value(self.transform))
            except UnsupportedError as error:  # what the body depends on cannot be told
                compile = False
                warn_plain(self.label, error)
            drawn = rng.default_states() if any(s == rng.DROPOUT for s, _ in packed.refused) else None
            body = loop.Body(self.body, key, self.label, self.names)
            states = rng.default_states()
            try:
                (state, leaves), ys = run(body, consts, carry, xs, length, compile=compile, **options)
            except IterationError:
                # Iterations that change different variables: once more, with all that may change.
                self.uniform, self.starts = True, {}
                rng.write_states(states)
                rng.rewind(self.begin)
                (state, leaves), ys = run(body, consts, carry, xs, length, compile=False, **options)
            if drawn is not None and not _compat.is_tracing() and rng.drew(drawn):
                rng.write_states(drawn)
                raise RandomnessError(dict(packed.refused)[rng.DROPOUT])
        assert isinstance(ys, loop.Stacked)
        y_leaves, changed, sown, static = ys.tree
        static = static_of(static)
        self._publish(state, changed, sown, static)
        return _tree.unflatten(leaves, self.carry_spec), (y_leaves, static)

    def names(self, index: int = 0) -> tuple[str, ...]:
        """What the roots are called in traces: the same in each iteration."""
        return names_of(self.packed.roots)

    def _to_front(self, value: Any, axis: int, levels: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = axis % (value.ndim - levels + 1)
        value = value.movedim(tuple(range(axis, axis + levels)), tuple(range(levels)))
        return value.flatten(0, levels - 1) if levels > 1 else value

    def _to_place(self, value: Tensor, axis: int, levels: int = 1) -> Tensor:
        if not -value.ndim <= axis < value.ndim:
            raise AxisError(
                f"{self.label}: out axis {axis} does not exist in a value of {value.ndim} dimensions, the scanned one "
                "included"
            )
        if levels == 1:
            return value.movedim(0, axis)
        value = value.unflatten(0, self.lengths)
        axis = axis % (value.ndim - levels + 1)
        return value.movedim(tuple(range(levels)), tuple(range(axis, axis + levels)))

    def _publish(self, state: list[Tensor], changed: list[Tensor], sown: list[Any], static: _Result) -> None:
        changed = [
            self._to_place(value, self.groups.role(change.collection).out_axis or 0, self.levels)
            for value, change in zip(changed, static.meta.changes, strict=True)
        ]
        carried = [state[self.carried.index(change.entry)] for change in static.carried]
        values = _tree.unflatten(sown, static.sown)
        sown = [self._sown(value, site.collection) for value, site in zip(values, static.meta.sites, strict=True)]
        meta = Meta((*static.meta.changes, *static.carried), static.meta.sites)
        self.packed.publish(Update([*changed, *carried], sown, meta))

    def _sown(self, tree: Any, collection: str) -> Any:
        axis = self.groups.sown_axis(collection)
        return _tree.map_leaves(lambda v: self._to_place(v, axis, self.levels) if isinstance(v, Tensor) else v, tree)

    def placed(self, ys: Any, out_axes: Any) -> Any:
        """The ys, with the iterations on the axis where each belongs."""
        leaves, static = ys
        tree = _tree.unflatten(leaves, static.ys)
        out_axes = tuple(out_axes) if isinstance(out_axes, list) else out_axes
        # Dynamo cannot flatten a None that is part of what it takes for a constant.
        one = not isinstance(out_axes, (tuple, dict))
        axes = [out_axes] * len(leaves) if one else _tree.broadcast_prefix(out_axes, tree, f"{self.label}: out_axes")
        check_axes(axes, f"{self.label}: out_axes", (broadcast, None))
        names = _tree.paths(tree) if any(axis is broadcast for axis in axes) else [""] * len(axes)
        placed = [self._placed_leaf(leaf, axis, name) for leaf, axis, name in zip(leaves, axes, names, strict=True)]
        return _tree.unflatten(placed, static.ys)

    def _placed_leaf(self, leaf: Any, axis: Any, name: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if axis is not broadcast and axis is not None:
            return self._to_place(leaf, axis)
        if not leaf.shape[0]:
            raise AxisError(
                f"{self.label}: ys{name} has no value, since there is no iteration; expected at least one where the "
                f"out axis is {axis!r}: give it an axis"
            )
        if not _compat.is_tracing() and not _compat.all_equal(leaf):
            raise AxisError(
                f"{self.label}: ys{name} differs between iterations, but its out axis is {axis!r}; give it an axis"
            )
        return leaf[0]


def _is_like(found: Any, groups: Sequence[Any]) -> bool:
    """Whether what a ``data_transform`` returned has all that it was given."""
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[0], (tuple, list)):
        return False
    return len(found[0]) == len(groups) and all(
        isinstance(new, Mapping)
        and all(name in new.get(collection, ()) for collection in old for name in old[collection])
        for new, old in zip(found[0], groups, strict=True)
    )


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """What a plain loop in a graph takes: no remat while someone captures what is sown, for the reason in ``remat``."""
    left_out = ("unroll", *(("remat", "lengths", "every") if context.captures else ()))
    return {name: value for name, value in options.items() if name not in left_out}


def _how_to_write(collection: str) -> str:
    return (
        f"give it an axis, variable_axes={{{collection!r}: 0}}, for a value of its own in each iteration, or carry it "
        f"through the loop, variable_carry={collection!r}"
    )


def _as_tensor(leaf: Any, device: torch.device) -> Any:
    return torch.as_tensor(leaf, device=device) if type(leaf) in _NUMBERS else leaf


def _fits(new: Any, old: Any) -> bool:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return new.dtype == old.dtype and new.shape == old.shape
    return new is old or (not isinstance(new, Tensor) and not isinstance(old, Tensor) and new == old)


_warned: set[str] = set()


def warn_plain(label: str, error: object) -> None:
    """Says, once, that a loop runs as the plain one, since it cannot be told what its body depends on."""
    message = f"{label} runs as a plain Python loop: {error}"
    if message not in _warned:
        _warned.add(message)
        warn(message, TorchliftCompileWarning)


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {list(leaf.shape)}"
    return repr(leaf)
