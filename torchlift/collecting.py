"""Collect: every module and variable that a call can reach, told apart by identity."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.errors import UnsupportedError
from torchlift.given import can_fill
from torchlift.nodes import (
    COMPILED,
    COMPILED_CALL,
    HOOKS,
    INTERNALS,
    SCALARS,
    SCRIPTED,
    Entry,
    Memory,
    Node,
    Place,
    remember,
    remembered,
)
from torchlift.references import Container, elements
from torchlift.unread import Unread
from torchlift.variables import AT, ATTRIBUTE, PARAMS, UninitializedTensor, Variable, collection_of, outer_place

INSIDE = "_torchlift_inside"  # in the __dict__ of a bound module: the lifted classes whose methods run unlifted on it
_IDLE = "_torchlift_idle"  # an attribute of hooks that do nothing in a body
CONTAINERS = (list, dict, set, collections.deque)


class Slot(NamedTuple):
    """Stands in an argument or attribute for a tensor, a module or a Variable: what goes there differs by run."""

    kind: str
    index: int  # type: ignore[assignment]  # of the entry or the node; nobody calls tuple.index
    collection: str = ""
    name: str = ""


class _Registrar:
    """NOTE [Rebinding under Dynamo]. ``module.buffer = tensor`` asks whether ``module.register_buffer`` is that of
    ``nn.Module``; Dynamo takes the method of a module that it made itself for another, and stops at what follows."""

    def __init__(self, module: nn.Module):
        self.module, self.__func__ = module, nn.Module.register_buffer

    def __call__(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        nn.Module.register_buffer(self.module, name, tensor, persistent)


RootPlace = tuple[int, str, nn.Module]  # in the outermost body: the number of a root, a path from it, and that root


class Collected:
    """A call taken apart: its roots, their variables (``entries``), and the leaves of its arguments.

    NOTE [Alias]. Tensors and modules are told apart by identity: what is reached by several paths is one entry, bound
    at each of its places. A module that is a submodule of another collected one is covered by it; what remains are
    the roots, the lifted module first.
    """

    nodes: list[Node]
    entries: list[Entry]
    tensors: list[Tensor]  # of each entry
    buffers: list[int]  # which entries are buffers
    containers: list[tuple[int, str]]  # (node, key) of the plain attributes that can grow

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], label: str):
        self.label = label
        self.leaves, self.spec = _tree.flatten((args, kwargs))
        self.tensor_leaves = [at for at, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        # The arguments, if there is something in them that a body could put something into.
        fillable = not _tree.is_positional(self.spec) and any(map(can_fill, (*args, *kwargs.values())))
        self.fillable = (args, kwargs) if fillable else None
        self._collect(module)

    def _collect(self, module: nn.Module) -> None:
        self.roots = [module]
        self._slots: list[Slot] | None = None  # None: the arguments hold no module; their leaves are what goes in
        given: list[nn.Module] = []
        if len(self.tensor_leaves) < len(self.leaves):
            for leaf in self.leaves:
                if isinstance(leaf, (nn.Module, Variable)):
                    modules_in(leaf, given)
        # What Dynamo traces is a module of its own; a bound one lives for one call.
        lasting = not given and not _compat.is_compiling() and AT not in module.__dict__
        self.memory = remembered(module) if lasting else None
        found = None if self.memory is None else self.memory.recall()
        if self.memory is not None and found is not None:
            self._take_up(self.memory, *found)
            return
        self.memory = None  # it is of a tree that is no more
        self.nodes, self.entries, self.tensors, self.buffers, self.containers = [], [], [], [], []
        self._node_of: dict[int, int] = {}
        self._entry_of: dict[Any, int] = {}
        # Dynamo knows tensors as keys of a dict, but no id of them; elsewhere Tensor.__hash__ is a slow way to say id.
        self._identity: Callable[[Tensor], Any] = _itself if _compat.is_compiling() else id
        self._walk(module, 0, "")
        if given or self._interesting:
            self._collect_further(given)
        if given:
            self._slots = [self._argument(at, leaf) for at, leaf in enumerate(self.leaves)]
        if lasting and len(self.roots) == 1:
            self.memory = remember(module, self.nodes, self.entries, self.buffers, self.containers)

    def _take_up(self, memory: Memory, nodes: list[Node], tensors: list[Tensor]) -> None:
        self.memory, self.nodes, self.tensors = memory, nodes, tensors
        self.entries, self.buffers, self.containers = memory.about

    def _collect_like(self, module: nn.Module, other: Collected) -> None:
        """As :meth:`_collect` of a module that is known to be built like the one of ``other``.

        NOTE [Traced layers]. For Dynamo each step of Python is slow, and a walk has thousands: 0.2 s for a layer. What
        is found by way of another one takes a tenth of that.
        """
        self.roots = [module]
        modules: list[Any] = [module, *[None] * (len(other.nodes) - 1)]
        self.nodes, self.tensors = [], list(other.tensors)
        for at, like in enumerate(other.nodes):
            fields = modules[at].__dict__
            for key, child in like.children:
                modules[child] = fields["_modules"][key]
            for store, key, index in like.tensors:
                self.tensors[index] = fields[store][key]
            node = Node(modules[at], 0, like.path)
            node.tensors, node.children = like.tensors, like.children
            self.nodes.append(node)

    @property
    def simple(self) -> bool:
        """Whether all that was found lies in the modules and submodules of one root."""
        return len(self.roots) == 1 and not any(node.attributes for node in self.nodes)

    @property
    def plain_containers(self) -> list[Any]:
        """The lists, dicts and sets in plain attributes that a body shares with the modules."""
        slots = {(at, key) for at, _ in self.containers for key, _ in self.nodes[at].attributes}
        return [self.nodes[at].module.__dict__[key] for at, key in self.containers if (at, key) not in slots]

    _interesting = False  # whether any plain attribute may hold a reference

    def _walk(self, module: nn.Module, root: int, path: str) -> int:
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"{self.label}: {path or 'the module'} {SCRIPTED}")
        fields = module.__dict__
        node = Node(module, root, path)
        self._node_of[id(module)] = at = len(self.nodes)
        self.nodes.append(node)
        for key, tensor in fields["_parameters"].items():
            if tensor is not None:
                node.tensors.append(("_parameters", key, self._entry(tensor, PARAMS, node, "_parameters", key)))
        for key, tensor in fields["_buffers"].items():
            if tensor is not None:
                collection = collection_of(module, "_buffers", key)
                node.tensors.append(("_buffers", key, self._entry(tensor, collection, node, "_buffers", key)))
        for key, value in fields.items() if COMPILED not in fields else ():
            if key not in INTERNALS and type(value) not in SCALARS:
                node.attributes.append((key, value))
                self._interesting = True
        for key, child in fields["_modules"].items():
            if child is not None:
                known = self._node_of.get(id(child))
                node.children.append((key, self._walk(child, root, node.dotted(key)) if known is None else known))
        return at

    def _entry(self, tensor: Tensor, collection: str, node: Node, store: str, key: str) -> int:
        identity = self._identity(tensor)
        index = self._entry_of.get(identity)
        if index is None:
            if type(tensor) in UninitializedTensor:
                raise UnsupportedError(
                    f"{self.label}: {node.dotted(key)!r} is not initialised yet; call the lazy module once before "
                    "lifting it, or, if it waits for the size of a stack, give that where it is made: "
                    "vmap(..., axis_size=), scan(..., length=)"
                )
            self._entry_of[identity] = index = len(self.entries)
            self.entries.append(Entry(node.root, store, self._place(node, key, collection)))
            self.tensors.append(tensor)
            if store == "_buffers":
                self.buffers.append(index)
        elif store != ATTRIBUTE:
            self.entries[index].places.append(self._place(node, key, collection))
        return index

    def _place(self, node: Node, key: str, collection: str) -> Place:
        return Place(self._node_of[id(node.module)], node.path, key, collection)

    def _collect_further(self, found: list[nn.Module]) -> None:
        """Modules in arguments and plain attributes, then the tensors in plain attributes, which may be theirs."""
        scanned = 0
        while True:
            for node in self.nodes[scanned:]:
                for _, value in node.attributes:
                    modules_in(value, found)
            scanned = len(self.nodes)
            new = [candidate for candidate in found if id(candidate) not in self._node_of]
            if not new:
                break
            root = _outermost(new)
            self.roots.append(root)
            self._walk(root, len(self.roots) - 1, "")
        for at, node in enumerate(self.nodes):
            derived = derived_attributes(node.module)
            raw, node.attributes = node.attributes, []
            for key, value in raw:
                if key not in derived:
                    if _can_grow(value):
                        self.containers.append((at, key))
                    template, has_slots = self._template(value, node, key)
                    if has_slots:
                        node.attributes.append((key, template))

    def _template(self, value: Any, node: Node, key: str) -> tuple[Any, bool]:
        """``value`` with slots for the tensors, modules and Variables in it, and whether there are any."""
        if isinstance(value, Tensor):
            # NOTE [Closures]. A tensor in a plain attribute is an entry like any other, so that it keeps its gradient.
            return Slot("tensor", self._entry(value, ATTRIBUTE, node, ATTRIBUTE, key)), True
        if isinstance(value, nn.Module):
            return Slot("module", self._node_of[id(value)]), True
        if isinstance(value, Variable):
            return Slot("variable", self._node_of[id(value.module)], value.collection, value.name), True
        children = elements(value)
        if not children:
            return value, False
        pairs = [self._template(child, node, key) for child in children]
        return Container(value, [template for template, _ in pairs]), any(has_slots for _, has_slots in pairs)

    def _argument(self, at: int, leaf: Any) -> Slot:
        if isinstance(leaf, nn.Module):
            return Slot("module", self._node_of[id(leaf)])
        if isinstance(leaf, Variable):
            return Slot("variable", self._node_of[id(leaf.module)], leaf.collection, leaf.name)
        return Slot("leaf", at)

    # What it found ---------------------------------------------------------------------------------------------------

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the call, with these tensors in the place of its own."""
        leaves = list(self.leaves)
        for at, tensor in zip(self.tensor_leaves, tensors, strict=True):
            leaves[at] = tensor
        return leaves

    def module_at(self, root: int, path: str) -> nn.Module:
        """The module at a dotted path from a root."""
        for node in self.nodes:
            if node.root == root and node.path == path:
                return node.module
        return self.roots[root]

    def has_hooks(self, skip_root: bool) -> bool:
        """Whether any module has hooks, or all have, which a captured graph would run once and never again."""
        if not _compat.is_compiling() and _compat.has_global_hooks():
            return True
        # What is remembered has none.
        if self.memory is not None:
            return False
        found = [node.module.__dict__[hooks] for node in self.nodes[int(skip_root) :] for hooks in HOOKS]
        return any(_acts(hook) for hooks in found if hooks for hook in hooks.values())

    @property
    def device(self) -> torch.device:
        """Where the call computes, as far as its tensors tell."""
        for tensor in (*self.tensors, *(leaf for leaf in self.leaves if isinstance(leaf, Tensor))):
            return tensor.device
        return torch.get_default_device()

    # Shadows ---------------------------------------------------------------------------------------------------------

    def places(self, outermost: bool) -> list[RootPlace]:
        """Where each root lies in the outermost body; ``outermost`` takes this one for it."""
        return [
            outer_place(root) if AT in root.__dict__ and not outermost else (number, "", root)
            for number, root in enumerate(self.roots)
        ]

    def shadows(
        self, bound: Sequence[Tensor], hidden: frozenset[int], inside: type | None, places: Sequence[RootPlace]
    ) -> list[nn.Module]:
        """A copy of each module that holds ``bound`` in the place of its tensors, but for those that are ``hidden``.

        NOTE [Bind]. Tensors are never put into the slots of the real module: a second thread would compute with them,
        and an interrupt would leave them there. A shadow has the same class, a shallow ``__dict__``, and its own
        ``_parameters``, ``_buffers`` and ``_modules``. Making it is cheaper than telling whether a cached one is still
        true, and Dynamo traces it, so there is one code path.
        """
        shadows = []
        compiling = _compat.is_compiling()
        for node in self.nodes:
            shadow = object.__new__(type(node.module))
            if compiling:
                fields = shadow.__dict__
                fields.update(node.module.__dict__)
            else:  # in half the time
                fields = node.module.__dict__.copy()
                object.__setattr__(shadow, "__dict__", fields)
            fields["_parameters"] = dict(fields["_parameters"])
            fields["_buffers"] = dict(fields["_buffers"])
            fields[AT] = (node.root, node.path, places[node.root])
            if COMPILED_CALL in fields:
                del fields[COMPILED_CALL]
            for store, key, index in node.tensors:
                if index in hidden:
                    del fields[store][key]
                else:
                    fields[store][key] = bound[index]
            if compiling and type(shadow).register_buffer is nn.Module.register_buffer:
                fields["register_buffer"] = _Registrar(shadow)
            shadows.append(shadow)
        for node, shadow in zip(self.nodes, shadows):
            if node.children:
                fields = shadow.__dict__
                fields["_modules"] = modules = dict(fields["_modules"])
                for key, child in node.children:
                    modules[key] = shadows[child]
                if COMPILED in fields:  # what it calls is the real module; a transform compiles its body itself
                    fields["forward"] = modules["_orig_mod"]
            elif not compiling:
                fields = shadow.__dict__
                fields["_modules"] = dict(fields["_modules"]) if fields["_modules"] else {}
            for key, template in node.attributes:
                shadow.__dict__[key] = self.fill(template, shadows, bound, ())
        if inside is not None:
            fields = shadows[0].__dict__
            fields[INSIDE] = (*fields.get(INSIDE, ()), inside)
        return shadows

    def fill(self, slot: Any, shadows: Sequence[nn.Module], bound: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
        """What goes into a slot, or a container with slots in it."""
        if isinstance(slot, Container):
            return slot.rebuild([self.fill(child, shadows, bound, leaves) for child in slot.children])
        if not isinstance(slot, Slot):
            return slot
        if slot.kind == "leaf":
            return leaves[slot.index]
        if slot.kind == "tensor":
            return bound[slot.index]
        if slot.kind == "variable":
            return Variable(shadows[slot.index], slot.collection, slot.name)
        return shadows[slot.index]

    def arguments(self, shadows: Sequence[nn.Module], bound: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
        """The ``(args, kwargs)`` of the call with these leaves."""
        if self._slots is not None:
            leaves = [self.fill(slot, shadows, bound, leaves) for slot in self._slots]
        return _tree.unflatten(list(leaves), self.spec)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _can_grow(value: Any) -> bool:
    """Whether there is a container in ``value`` that a body could put something into."""
    if isinstance(value, CONTAINERS):
        return True
    return any(type(child) not in SCALARS and _can_grow(child) for child in elements(value) or ())


def modules_in(value: Any, found: list[nn.Module]) -> None:
    """Appends the modules that a value holds, those that own its Variables among them."""
    if type(value) is Unread:
        return
    if isinstance(value, nn.Module):
        found.append(value)
    elif isinstance(value, Variable):
        found.append(value.module)
    else:
        for child in elements(value) or ():
            modules_in(child, found)


def _outermost(candidates: list[nn.Module]) -> nn.Module:
    """The first module that is a submodule of no other."""
    for candidate in candidates:
        if not any(candidate is not other and candidate in list(other.modules()) for other in candidates):
            return candidate
    return candidates[0]


def idle_in_bodies(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a hook that does nothing in a body."""
    hook.__dict__[_IDLE] = True
    return hook


def _acts(hook: Any) -> bool:
    """Whether a hook does more than compute an attribute, which is part of the graph (weight norm, pruning)."""
    names = (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
    return not any(isinstance(name, str) for name in names) and not hasattr(hook, _IDLE)


def derived_attributes(module: nn.Module) -> tuple[str, ...]:
    """Plain attributes that a forward pre-hook computes from parameters before each call (weight norm, pruning)."""
    hooks = module.__dict__["_forward_pre_hooks"]
    if not hooks:
        return ()
    return tuple(
        name
        for hook in hooks.values()
        for name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        if isinstance(name, str)
    )


def same_role(entry: Entry, axis_of: Callable[[str], Any]) -> bool:
    """Whether all the places of an entry ask for one axis."""
    return len(entry.places) == 1 or len({axis_of(place.collection) for place in entry.places}) == 1
