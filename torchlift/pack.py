"""The heart: collect, group, pure, publish.

Every transform is the same four steps. *Collect* finds the modules that a call can reach, and their variables.
*Group* sorts the variables by collection filters. *Pure* turns the call into a function of tensors without side
effect. *Publish* writes what changed back into the real modules. A transform says only how to call the pure function.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift._context import context, entered
from torchlift.errors import (
    AliasError,
    ModifyCollectionError,
    PlainAttributeError,
    PublishError,
    RandomnessError,
    TorchliftWarning,
    TransformedMethodReturnValueError,
    UnsupportedError,
    warn,
)
from torchlift.filters import matches
from torchlift.variables import (
    AT,
    ATTRIBUTE,
    Capture,
    Site,
    Variable,
    assign_collection,
    collection_of,
    own_tensors,
    sow,
)

INSIDE = "_torchlift_inside"  # in the __dict__ of a bound module: the lifted classes whose methods run unlifted on it
_SCALARS = (bool, int, float, str, bytes, type(None), complex)
INTERNALS = frozenset(nn.Module().__dict__) - {"training"}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Slot(NamedTuple):
    """Stands in an argument or attribute for a tensor, a module or a Variable: what goes there differs by run."""

    kind: str
    index: int  # of the entry or the node
    collection: str = ""
    name: str = ""


@dataclasses.dataclass(slots=True)
class Entry:
    """One variable: a tensor, and the first place where it was found."""

    tensor: Tensor
    collection: str
    name: str
    root: int
    store: str
    paths: list[tuple[str, str]]  # every place: (dotted name, the collection it has there)


@dataclasses.dataclass(slots=True)
class Node:
    """One module of the tree, and where in it tensors, children and other references lie."""

    module: nn.Module
    root: int
    path: str
    tensors: list[tuple[str, str, int]]  # (store, key, entry)
    children: list[tuple[str, int]]  # (key, node)
    attributes: list[tuple[str, Any]]  # (key, template with slots)

    def dotted(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


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


def _how_to_split(stream: str) -> str:
    return (
        f"the transform was not told how to treat it: add split_rngs={{{stream!r}: True}} for fresh draws at every "
        "index, False for the same draws at every index"
    )


class Packed:
    """A call taken apart: its roots, their variables (``entries``), and the tensors among its arguments (``leaves``).

    Making one is *collect*: it finds every module and variable that ``fn(module, *args, **kwargs)`` can reach.
    ``label`` is for errors; ``inside`` is the lifted class whose methods run unlifted in the body.

    NOTE [Bind]. The given tensors are never put into the slots of the real module: a second thread would compute with
    them, and an interrupt would leave them there. Each run builds a shadow of the module tree instead: same classes,
    a shallow ``__dict__``, own ``_parameters``, ``_buffers`` and ``_modules``. Building is cheaper than checking
    whether a cached shadow is still true, and Dynamo traces it, so there is one code path. Buffers are bound as
    clones: in-place writes would reach the caller's storage through ``vmap`` and ``grad``.

    NOTE [Alias]. Tensors and modules are told apart by identity: what is reached by several paths is one entry, bound
    at each of its places.
    """

    def __init__(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ):
        self.fn, self.label = fn, label
        self.nodes: list[Node] = []
        self.entries: list[Entry] = []
        self._node_of: dict[int, int] = {}
        self._entry_of: dict[Tensor, int] = {}
        leaves, self._spec = _tree.flatten((args, kwargs))
        self.leaves = leaves
        self.roots = _find_roots(module, leaves)
        for root, top in enumerate(self.roots):
            self._walk(top, root, "")
        for node in self.nodes:
            self._walk_attributes(node)
        self._args = [self._argument(at, leaf) for at, leaf in enumerate(leaves)]
        self.tensor_leaves = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [entry.tensor for entry in self.entries]
        self.nested = AT in module.__dict__  # bound in an outer body: state is published there with its graph
        self.context = {"captures": context.captures, "axes": context.axes}
        self.refused: tuple[tuple[str, str], ...] = context.refused
        self.inside = inside
        self.writable = [False] * len(self.entries)
        self.hidden: frozenset[int] = frozenset()

    # Collect ---------------------------------------------------------------------------------------------------------

    def _walk(self, module: nn.Module, root: int, path: str) -> int:
        if id(module) in self._node_of:
            return self._node_of[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"{self.label}: {path or 'the module'} is a ScriptModule; lift the Python module")
        node = Node(module, root, path, [], [], [])
        self._node_of[id(module)] = at = len(self.nodes)
        self.nodes.append(node)
        for store, key, tensor in own_tensors(module):
            index = self._entry(tensor, collection_of(module, store, key), node, store, key)
            node.tensors.append((store, key, index))
        for key, child in module.__dict__["_modules"].items():
            if child is not None:
                node.children.append((key, self._walk(child, root, node.dotted(key))))
        return at

    def _entry(self, tensor: Tensor, collection: str, node: Node, store: str, key: str) -> int:
        if isinstance(tensor, _compat.UninitializedTensor):
            raise UnsupportedError(
                f"{self.label}: {node.dotted(key)!r} is not initialised yet; call the lazy module once before lifting it"
            )
        index = self._entry_of.get(tensor)
        if index is None:
            self._entry_of[tensor] = index = len(self.entries)
            self.entries.append(Entry(tensor, collection, node.dotted(key), node.root, store, []))
        if store != ATTRIBUTE or not self.entries[index].paths:
            self.entries[index].paths.append((node.dotted(key), collection))
        return index

    def _walk_attributes(self, node: Node) -> None:
        derived = _derived_attributes(node.module)
        for key, value in node.module.__dict__.items():
            if key in INTERNALS or type(value) in _SCALARS or key in derived:
                continue
            template, found = self._template(value, node, key)
            if found:
                node.attributes.append((key, template))

    def _template(self, value: Any, node: Node, key: str) -> tuple[Any, bool]:
        """``value`` with slots for the tensors, modules and Variables in it, and whether there are any."""
        if isinstance(value, Tensor):
            # NOTE [Closures]. A tensor in a plain attribute is an entry like any other, so that it keeps its gradient.
            return _Slot("tensor", self._entry(value, ATTRIBUTE, node, ATTRIBUTE, key)), True
        if isinstance(value, nn.Module):
            return (_Slot("module", self._node_of[id(value)]), True) if id(value) in self._node_of else (value, False)
        if isinstance(value, Variable):
            return _Slot("variable", self._node_of[id(value.module)], value.collection, value.name), True
        children = _children(value)
        if children is None:
            return value, False
        pairs = [self._template(child, node, key) for child in children]
        return _Container(value, [template for template, _ in pairs]), any(found for _, found in pairs)

    def _argument(self, at: int, leaf: Any) -> _Slot:
        if isinstance(leaf, nn.Module):
            return _Slot("module", self._node_of[id(leaf)])
        if isinstance(leaf, Variable):
            return _Slot("variable", self._node_of[id(leaf.module)], leaf.collection, leaf.name)
        return _Slot("leaf", at)

    @property
    def has_hooks(self) -> bool:
        """Whether any module has hooks, which a captured graph would run once and never again."""
        roots = {0} if self.inside is not None else set()  # the hooks of a lifted root run around the call
        return any(
            node.module.__dict__[hooks] and not _derived_attributes(node.module)
            for at, node in enumerate(self.nodes)
            if at not in roots
            for hooks in _HOOKS
        )

    @property
    def device(self) -> torch.device:
        """Where the call computes, as far as its tensors tell."""
        for tensor in (*self.tensors, *(leaf for leaf in self.leaves if isinstance(leaf, Tensor))):
            return tensor.device
        return torch.get_default_device()

    # Group -----------------------------------------------------------------------------------------------------------

    def group(self, role: Callable[[str], Any]) -> list[Any]:
        """The role of each entry, by its collection.

        Raises:
            AliasError: a tensor has paths whose collections have different axes.
        """
        roles = []
        for entry in self.entries:
            asked = [(path, role(collection).axis) for path, collection in entry.paths]
            if any(axis != asked[0][1] for _, axis in asked):
                listed = ", ".join(f"{path!r} asks for axis {axis}" for path, axis in asked)
                raise AliasError(f"{self.label}: one tensor has several names: {listed}; give them the same axis")
            roles.append(role(entry.collection))
        self.hidden = frozenset(i for i, r in enumerate(roles) if r.hidden)
        return roles

    def allow(self, writable: Callable[[str], bool], how_to: Callable[[str], str]) -> None:
        """Says which collections a body may change, and what to add where it may not."""
        self.writable = [entry.collection != ATTRIBUTE and writable(entry.collection) for entry in self.entries]
        self._writable_collection, self._how_to_write = writable, how_to

    def refuse(self, streams: Sequence[str], how_to: Callable[[str], str] = _how_to_split) -> None:
        """Says which random streams a body may not draw from, and what to add to be allowed."""
        told = tuple((s, f"{self.label}: drew from the random stream {s!r}; {how_to(s)}") for s in streams)
        self.refused = (*context.refused, *told)

    def snapshot(self) -> list[Tensor]:
        """The tensor of each entry; what publish may write into as a copy, for a pure call that runs again later."""
        return [
            tensor.clone() if writable and entry.store == "_buffers" else tensor
            for tensor, writable, entry in zip(self.tensors, self.writable, self.entries, strict=True)
        ]

    # Pure ------------------------------------------------------------------------------------------------------------

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the call, with these tensors in the place of its own."""
        leaves = list(self.leaves)
        for at, tensor in zip(self.tensor_leaves, tensors, strict=True):
            leaves[at] = tensor
        return leaves

    def pure(
        self, tensors: Sequence[Tensor], leaves: Sequence[Any], attributes: Mapping[tuple[int, str], Any] | None = None
    ) -> tuple[Any, Update]:
        """The call as a function of a tensor for each entry and a value for each leaf of its arguments.

        Without side effects, but for draws from random generators. ``attributes`` are plain attributes, by node and
        name, that differ from the modules' own.
        """
        bound = [
            tensor.clone() if entry.store == "_buffers" else tensor
            for tensor, entry in zip(tensors, self.entries, strict=True)
        ]
        versions = [_compat.version(tensor) for tensor in bound]
        shadows = self._shadows(bound)
        for (at, key), value in (attributes or {}).items():
            shadows[at].__dict__[key] = value
        before = [list(shadow.__dict__.items()) for shadow in shadows]
        frame = Capture(_Any(self.context["captures"]))
        slots = [self._fill(slot, shadows, bound, leaves) for slot in self._args]
        positional, keywords = _tree.unflatten(slots, self._spec)
        refuses_draws = any(stream == rng.DROPOUT for stream, _ in self.refused) and not _compat.is_tracing()
        drawn = rng.default_states() if refuses_draws else ()
        captures = (frame,) if self.context["captures"] else ()
        with entered(**{**self.context, "captures": captures, "refused": self.refused}):
            out = self.fn(shadows[0], *positional, **keywords)
        if refuses_draws and rng.drew(drawn):
            rng.restore_defaults(drawn)
            raise RandomnessError(next(why for stream, why in self.refused if stream == rng.DROPOUT))
        self._check_output(out)
        changes, values = self._read_back(shadows, bound, versions, before)
        sown = [(site, value) for site, values in frame.sown.items() for value in values]
        return out, Update(values, [v for _, v in sown], Meta(tuple(changes), tuple(s for s, _ in sown)))

    def _shadows(self, bound: Sequence[Tensor]) -> list[nn.Module]:
        shadows = []
        for node in self.nodes:
            shadow = object.__new__(type(node.module))
            fields = shadow.__dict__
            fields.update(node.module.__dict__)
            for store in ("_parameters", "_buffers", "_modules"):
                fields[store] = dict(fields[store])
            for store, key, index in node.tensors:
                if index in self.hidden:
                    del fields[store][key]
                else:
                    fields[store][key] = bound[index]
            fields[AT] = (node.root, node.path)
            shadows.append(shadow)
        for node, shadow in zip(self.nodes, shadows, strict=True):
            for key, child in node.children:
                shadow.__dict__["_modules"][key] = shadows[child]
            for key, template in node.attributes:
                shadow.__dict__[key] = self._fill(template, shadows, bound, ())
        if self.inside is not None:
            fields = shadows[0].__dict__
            fields[INSIDE] = (*fields.get(INSIDE, ()), self.inside)
        return shadows

    def _fill(self, slot: Any, shadows: Sequence[nn.Module], bound: Sequence[Tensor], leaves: Sequence[Tensor]) -> Any:
        if isinstance(slot, _Container):
            return slot.rebuild([self._fill(child, shadows, bound, leaves) for child in slot.children])
        if not isinstance(slot, _Slot):
            return slot
        if slot.kind == "tensor":
            return bound[slot.index]
        if slot.kind == "leaf":
            return leaves[slot.index]
        if slot.kind == "variable":
            return Variable(shadows[slot.index], slot.collection, slot.name)
        return shadows[slot.index]

    def _check_output(self, out: Any) -> None:
        for leaf in _tree.flatten(out)[0]:
            if isinstance(leaf, (nn.Module, Variable)):
                raise TransformedMethodReturnValueError(
                    f"{self.label}: returned a {type(leaf).__name__}, expected tensors: a module or Variable means "
                    "nothing outside of the transform; return its tensors, or what you compute with it"
                )

    def _read_back(
        self, shadows: list[nn.Module], bound: list[Tensor], versions: list[int], before: list[list[tuple[str, Any]]]
    ) -> tuple[list[Change], list[Tensor]]:
        changes: list[Change] = []
        values: list[Tensor] = []
        copied: set[int] = set()
        for at, (node, shadow) in enumerate(zip(self.nodes, shadows, strict=True)):
            fields = shadow.__dict__
            known = set()
            for store, key, index in node.tensors:
                if index in self.hidden:
                    continue
                known.add((store, key))
                now = fields[store].get(key)
                if now is not bound[index]:
                    how = "rebind"
                elif index not in copied and self._was_written(shadow, index, now, versions[index]):
                    how = "copy"
                    copied.add(index)
                else:
                    continue
                self._check_writable(node, key, index, now)
                changes.append(Change(how, at, store, key, index, self.entries[index].collection))
                values.append(now)
            for store, key, tensor in own_tensors(shadow):
                if (store, key) not in known:
                    collection = collection_of(shadow, store, key)
                    self._check_creatable(node, key, collection)
                    changes.append(Change("create", at, store, key, -1, collection))
                    values.append(tensor)
            self._check_attributes(node, fields, before[at])
        return changes, values

    def _was_written(self, owner: nn.Module, index: int, now: Tensor, version: int) -> bool:
        if self.entries[index].store != "_buffers":
            return False  # a parameter is bound as it is: what was written in place is written
        if _compat.is_compiling():  # a version is not known while Dynamo traces: what may be written is taken to be
            return self.writable[index]
        # NOTE [Batch norm]. torch's batch_norm writes the running statistics without counting it in their version.
        return _compat.version(now) != version or (
            owner.training and now.is_floating_point() and _calls_batch_norm(type(owner))
        )

    def _check_writable(self, node: Node, key: str, index: int, now: Any) -> None:
        entry = self.entries[index]
        if not self.writable[index]:
            raise ModifyCollectionError(
                f"{self.label}: changed {node.dotted(key)!r} of collection {entry.collection!r}, which is read-only "
                f"there; {self._how_to_write(entry.collection)}"
            )
        if now is None:
            raise UnsupportedError(f"{self.label}: deleted {node.dotted(key)!r} in the body; delete it outside")

    def _check_creatable(self, node: Node, key: str, collection: str) -> None:
        if not self._writable_collection(collection):
            raise ModifyCollectionError(
                f"{self.label}: created {node.dotted(key)!r} in collection {collection!r}, which is read-only there; "
                f"{self._how_to_write(collection)}"
            )

    def _check_attributes(self, node: Node, fields: dict[str, Any], before: list[tuple[str, Any]]) -> None:
        """NOTE [Plain attributes]. A tensor left on a module would be a dead tracer there, a changed number is lost."""
        if len(fields) == len(before) and all(map(operator.is_, fields.values(), [value for _, value in before])):
            return
        old = dict(before)
        derived = _derived_attributes(node.module)
        bound = {id(leaf) for _, value in before for leaf in _tree.flatten(value)[0]}
        for key, value in fields.items():
            if key in derived or key in INTERNALS or value is old.get(key, fields):
                continue
            where = f"{self.label}: assigned {node.dotted(key)!r} in the body"
            if any(isinstance(leaf, Tensor) and id(leaf) not in bound for leaf in _tree.flatten(value)[0]):
                raise PlainAttributeError(
                    f"{where}, a tensor in a plain attribute, which would outlive the transform; declare it with "
                    f"torchlift.variable(self, 'state', {key!r}, init_fn) and set its .value, or hand it out with sow"
                )
            if type(value) in _SCALARS and value != old.get(key, fields) and not _compat.is_compiling():
                warn(
                    f"{where}: {old.get(key)!r} -> {value!r}, which is not kept: a body may run once, more often or "
                    f"never in a call; declare it with torchlift.variable(self, 'state', {key!r}, init_fn)",
                    TorchliftWarning,
                )

    # Publish ---------------------------------------------------------------------------------------------------------

    def publish(self, update: Update) -> None:
        """Writes new state into the real modules as the body did, and sows what was sown.

        NOTE [Publish]. What was written in place is copied into its own storage, so that optimizers, DDP and
        ``state_dict`` aliases keep holding it; what was rebound is rebound: copying it would break programs that
        plain torch runs ("modified by an inplace operation"). Detached, unless the module is itself bound in an outer
        body. All is checked before anything is written.
        """
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            self._check_publishable(change, value)
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            self._write(self.nodes[change.node].module, change, value if self.nested else value.detach())
        for site, value in zip(update.meta.sites, update.sown, strict=True):
            sow(self.module_at(site), site.collection, site.name, value)

    def _check_publishable(self, change: Change, value: Tensor) -> None:
        owner = self.nodes[change.node].module
        level = -1 if change.entry < 0 else _compat.functorch_level(self.entries[change.entry].tensor)
        if _compat.functorch_level(value) > level and AT not in owner.__dict__:
            raise PublishError(
                f"{self.label}: {self.nodes[change.node].dotted(change.key)!r} of collection {change.collection!r} "
                "changed under an outer torch.func transform, whose values cannot be written into the module; take "
                f"the new state as an output: torchlift.apply(module, {{}}, ..., mutable=[{change.collection!r}])"
            )

    def _write(self, owner: nn.Module, change: Change, value: Tensor) -> None:
        tensors = owner.__dict__[change.store]
        if change.how == "create" and change.key not in tensors:
            if change.store == "_parameters":
                owner.register_parameter(change.key, nn.Parameter(value) if not self.nested else value)
            else:
                owner.register_buffer(change.key, value)
                assign_collection(owner, change.key, change.collection)
        elif change.how == "copy" or isinstance(tensors[change.key], nn.Parameter):
            with contextlib.nullcontext() if self.nested else torch.no_grad():
                tensors[change.key].copy_(value)
        else:
            tensors[change.key] = value

    def module_at(self, site: Site) -> nn.Module:
        for node in self.nodes:
            if node.root == site.root and node.path == site.path:
                return node.module
        return self.roots[site.root]


class _Any:
    """The filter of a body's own capture: whatever one of the captures around it asks for."""

    def __init__(self, captures: Sequence[Capture]):
        self.captures = captures

    def __contains__(self, name: str) -> bool:
        return any(matches(capture.filter, name) for capture in self.captures)


class _Container:
    """A list, tuple, dict or dataclass with slots in it, from which a like one is built for each run."""

    def __init__(self, like: Any, children: list[Any]):
        self.like, self.children = like, children

    def rebuild(self, children: list[Any]) -> Any:
        like = self.like
        if isinstance(like, dict):
            new = copy.copy(like)
            new.update(zip(like, children))
            return new
        if isinstance(like, list):
            return children
        if isinstance(like, tuple):
            return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
        new = copy.copy(like)
        for field, child in zip(dataclasses.fields(like), children, strict=True):
            object.__setattr__(new, field.name, child)
        return new


def _children(value: Any) -> list[Any] | None:
    if type(value) is list or isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if _tree.is_node(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _modules_in(value: Any, found: list[nn.Module]) -> None:
    if isinstance(value, nn.Module):
        found.append(value)
    elif isinstance(value, Variable):
        found.append(value.module)
    else:
        for child in _children(value) or ():
            _modules_in(child, found)


def _find_roots(module: nn.Module, leaves: Sequence[Any]) -> list[nn.Module]:
    """The modules that a call can reach, less those that are submodules of another one."""
    found = [module]
    _modules_in([leaf for leaf in leaves if not isinstance(leaf, Tensor)], found)
    scanned: set[int] = set()
    for candidate in found:  # grows as plain attributes hold further modules
        for submodule in candidate.modules():
            if id(submodule) not in scanned:
                scanned.add(id(submodule))
                for key, value in submodule.__dict__.items():
                    if key not in INTERNALS and type(value) not in _SCALARS:
                        _modules_in(value, found)
    if len(found) == 1:
        return found
    roots: list[nn.Module] = []
    for candidate in found:
        covered = any(candidate in set(other.modules()) for other in found if other is not candidate)
        mutual = candidate is module  # the lifted module stays first, also where a part of it refers back to it
        if (mutual or not covered) and all(candidate is not root for root in roots):
            roots.append(candidate)
    return roots


@functools.lru_cache(maxsize=None)
def _calls_batch_norm(cls: type) -> bool:
    codes = [value.__code__ for base in cls.__mro__ for value in vars(base).values() if hasattr(value, "__code__")]
    return any("batch_norm" in name for code in codes for name in code.co_names)


def _derived_attributes(module: nn.Module) -> tuple[str, ...]:
    """Plain attributes that a forward pre-hook computes anew from parameters before each call (weight norm, pruning)."""
    hooks = module.__dict__["_forward_pre_hooks"]
    if not hooks:
        return ()
    return tuple(
        name
        for hook in hooks.values()
        for name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        if isinstance(name, str)
    )
