"""Modules and variables as a call sees them, and the memory of how a module tree was last found."""

from __future__ import annotations

import operator
import types
import weakref
from collections.abc import Hashable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat
from torchlift.variables import AT, ATTRIBUTE

SCALARS = frozenset((bool, int, float, str, bytes, type(None), complex))
ATOMS: tuple[Any, ...] = (*SCALARS, torch.dtype, torch.device, torch.Size, slice, range)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STORES = ("_parameters", "_buffers")
COMPILED_CALL = "_compiled_call_impl"  # what Module.compile() makes; it calls the real module
COMPILED = "_torchdynamo_orig_callable"  # what marks that which torch.compile(module) makes; so does that of a function
_OF_DYNAMO = {COMPILED, "_torchdynamo_wrapper_id", "dynamo_ctx", "get_compiler_config", "_super_module_initialized"}
INTERNALS = frozenset(nn.Module().__dict__) - {"training"} | {AT, COMPILED_CALL} | _OF_DYNAMO
SCRIPTED = "is a ScriptModule, which has no Python to run; lift the Python module that torch.jit.script was given"
LONG = 64  # a longer container is a table of plain values


class Place(NamedTuple):
    """Where a tensor lies: the index and the path of its node, its key there, and the collection that it has there."""

    node: int
    path: str
    key: str
    collection: str

    @property
    def name(self) -> str:
        return dotted(self.path, self.key)


class Entry:
    """One variable: its collection, and the places where it was found, the first of which names it."""

    __slots__ = ("_name", "collection", "places", "root", "store")

    def __init__(self, root: int, store: str, place: Place):
        self.collection, self.root, self.store = place.collection, root, store
        self.places = [place]
        self._name: str | None = None

    @property
    def name(self) -> str:
        """The dotted name, in its root. Made when asked for: most calls that succeed need no names."""
        name = self._name or self.places[0].name
        if not _compat.is_compiling():  # Dynamo lets nothing be set around the body of a higher-order operator
            self._name = name
        return name

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Every place, as (dotted name, the collection it has there)."""
        return [(place.name, place.collection) for place in self.places]


class Node:
    """One module of the tree, and where in it tensors, children and other references lie."""

    __slots__ = ("attributes", "children", "module", "path", "root", "tensors")

    def __init__(self, module: nn.Module, root: int, path: str):
        self.module, self.root, self.path = module, root, path
        self.tensors: list[tuple[str, str, int]] = []  # (store, key, entry)
        self.children: list[tuple[str, int]] = []  # (key, node)
        self.attributes: list[tuple[str, Any]] = []  # (key, template with slots)

    @property
    def has_buffers(self) -> bool:
        return bool(self.tensors) and self.tensors[-1][0] == "_buffers"  # they come after the parameters

    def dotted(self, key: str) -> str:
        return dotted(self.path, key)


def dotted(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class _Plain:
    """An object as Python makes them."""


class _Unwatchable(Exception):
    """Something in a module tree that can change unseen."""


class Memory:
    """How a module tree was found, for as long as it stays as it is.

    NOTE [Memory]. To walk the modules of a layer takes as long as to run a small one, and the next call finds the same.
    So a tree is remembered if all its plain attributes are numbers, names, torch's own functions, or containers
    of such, and it is known again if every dict and list in it holds the very same objects; a tree that changed in any
    way is walked anew. Where Python counts the changes of each dict, their counts tell that. Tensors are not remembered
    but read from their places. Nothing here refers to the root, whose death ends the memory.
    """

    def __init__(self, root: nn.Module, nodes: list[Node], *about: Any):
        self.about = about  # the rest of what was found, which no call changes
        self.keys: dict[Hashable, Any] = {}  # what else was found out about this tree, by those who did
        self._fields = [node.module.__dict__ for node in nodes]
        self._hooks = [fields[hooks] for fields in self._fields for hooks in HOOKS]
        plain = ("_modules", *STORES)  # which may be in another order than they look
        if any(self._hooks) or any(type(fields[key]) is not dict for fields in self._fields for key in plain):
            raise _Unwatchable
        modules = [fields["_modules"] for fields in self._fields]
        self._stores = [fields[store] for fields in self._fields for store in STORES]
        self._dicts = [*self._fields, *modules]
        self._tables: list[Any] = []  # lists and dicts in attributes
        self._objects: list[tuple[Any, type, Any]] = []  # other objects there, with their class and fields
        for fields in self._fields:
            for key, value in fields.items():
                if key not in INTERNALS:
                    self._watch(value)
        self._held = [*map(dict.copy, self._dicts)]
        self._counted = [*self._dicts, *self._stores]
        self._versions: list[int] | None = None
        self._items = [*chain(*self._tables)]
        self._lengths = [*map(len, self._tables)]
        self._named = [*modules, *self._stores]
        self._layout, self._absent = self._look(), self._look_for_none()
        self._some_absent = any(self._absent)
        self._first, self._others = (nodes[0].tensors, nodes[0].children), nodes[1:]
        self._classes = [type(node.module) for node in nodes]
        at = id(root)
        self.root = weakref.ref(root, lambda _: _memories.pop(at, None))

    def _look(self) -> list[Any]:
        """How much there is, and under which names: numbers and strings, which may be told apart by value."""
        # Of attributes the last name: one that takes the place of another goes to the end.
        return [*map(len, self._stores), *map(next, map(reversed, self._fields)), *chain(*self._named)]

    def _look_for_none(self) -> list[bool]:
        return [tensor is None for tensor in chain.from_iterable(map(dict.values, self._stores))]

    def _watch(self, value: Any, depth: int = 4) -> None:
        kind = type(value)
        if kind in ATOMS or isinstance(value, (type, types.BuiltinFunctionType)):
            return
        if depth == 0 or isinstance(value, (Tensor, nn.Module)):
            raise _Unwatchable
        if kind is types.FunctionType:
            # What others read of globals may change, and their code, and that of the functions that they call.
            if value.__closure__ or (value.__module__ or "").partition(".")[0] != "torch":
                raise _Unwatchable
            value = (value.__defaults__, value.__kwdefaults__)
        elif kind not in (tuple, list, dict):
            if kind.__basicsize__ != _Plain.__basicsize__ or not hasattr(value, "__dict__"):
                raise _Unwatchable
            self._objects.append((value, kind, value.__dict__))
            value = value.__dict__  # its whole state: a configuration, say
        held = (*value, *value.values()) if isinstance(value, dict) else value
        if isinstance(value, dict):
            self._dicts.append(value)
        if isinstance(value, (list, dict)):
            self._tables.append(value)
        if len(held) > LONG and kind in (tuple, list, dict):
            raise _Unwatchable
        for item in held:
            self._watch(item, depth - 1)

    def recall(self) -> tuple[list[Node], list[Tensor]] | None:
        """The nodes and the tensors, if the tree is as it was."""
        root = self.root()
        if root is None or not _stand(self, [root, *[node.module for node in self._others]]):
            return None
        versions = _compat.dict_versions(self._counted)
        changed = versions is None or versions != self._versions
        if changed and not (same(self._dicts, self._held) and self._look() == self._layout):
            return None
        found = [*chain.from_iterable(map(dict.values, self._stores))]
        tensors = [tensor for tensor in found if tensor is not None] if changed or self._some_absent else found
        if changed:
            if [tensor is None for tensor in found] != self._absent or len(set(map(id, tensors))) != len(tensors):
                return None
            self._versions = versions
        first = Node(root, 0, "")
        first.tensors, first.children = self._first
        return [first, *self._others], tensors


class Forest:
    """The memories of several trees, recalled in one go: at half the time that each by itself takes.

    It knows them only if no dict has changed at all.
    """

    def __init__(self, memories: Sequence[Memory], nodes: Sequence[list[Node]]):
        self.memories, self.nodes = memories, nodes
        self.in_step = False  # whether all are known to have as many nodes, in the same mode
        self.agreed: dict[tuple[str, ...], Any] = {}  # the key that all have, by the attributes left out of it
        self._modules = [node.module for tree in nodes for node in tree]
        self._classes = [*map(type, self._modules)]
        self._fields, self._hooks, self._counted, self._stores, self._tables, self._items, self._objects = (
            [*chain.from_iterable(map(operator.attrgetter(part), memories))]
            for part in ("_fields", "_hooks", "_counted", "_stores", "_tables", "_items", "_objects")
        )
        self._lengths = [*map(len, self._tables)]
        self._some_absent = any(memory._some_absent for memory in memories)
        ends = [*accumulate(len(memory.about[0]) for memory in memories)]
        self._parts = [*map(slice, [0, *ends], ends)]
        self._versions = _compat.dict_versions(self._counted)

    def recall(self, roots: Sequence[nn.Module]) -> list[list[Tensor]] | None:
        """The tensors of each tree, if all are those of ``roots`` and as they were."""
        if len(roots) != len(self.nodes) or any(a[0].module is not b for a, b in zip(self.nodes, roots)):
            return None
        if not _stand(self, self._modules) or _compat.dict_versions(self._counted) != self._versions:
            return None
        found = chain.from_iterable(map(dict.values, self._stores))
        tensors = [tensor for tensor in found if tensor is not None] if self._some_absent else [*found]
        return [tensors[part] for part in self._parts]


class Ground:
    """Where a forest stands, if one does: planted when its trees were found twice, and ever more rarely in vain."""

    def __init__(self) -> None:
        self.forest: Forest | None = None
        self._calls, self._pause = 0, 1

    def recall(self, roots: Sequence[nn.Module]) -> tuple[Forest, list[list[Tensor]]] | None:
        """The forest and the tensors of each tree, if all are as they were."""
        known = self.forest  # which another thread may clear meanwhile
        if known is None:
            return None
        trees = known.recall(roots)
        if trees is None:
            self.forest, self._calls, self._pause = None, 0, min(2 * self._pause, 64)
            return None
        self._pause = 1
        return known, trees

    def plant(self, memories: Sequence[Memory | None], nodes: Sequence[list[Node]]) -> None:
        """Remembers these trees together, if each is remembered and it is time."""
        self._calls += 1
        if self._calls > self._pause and _compat.dict_versions([]) is not None:
            known = [memory for memory in memories if memory is not None]
            self.forest = Forest(known, nodes) if len(known) == len(memories) else None


def _stand(known: Memory | Forest, modules: Sequence[nn.Module]) -> bool:
    """Whether ``modules`` are as they were ``known``, in all that no count of a dict tells."""
    return (
        not any(known._hooks)
        and all(map(operator.is_, map(type, modules), known._classes))
        and all(map(operator.is_, map(_fields_of, modules), known._fields))
        and [*map(len, known._tables)] == known._lengths
        and all(map(operator.is_, chain(*known._tables), known._items))
        and all(type(value) is kind and value.__dict__ is fields for value, kind, fields in known._objects)
    )


_fields_of = operator.attrgetter("__dict__")
_memories: dict[int, Memory] = {}
_grounds: weakref.WeakKeyDictionary[nn.Module, Ground] = weakref.WeakKeyDictionary()


def remembered(module: nn.Module) -> Memory | None:
    """The memory of the tree of ``module``."""
    memory = _memories.get(id(module))
    return None if memory is None or memory.root() is not module else memory


def remember(module: nn.Module, nodes: list[Node], entries: list[Entry], *about: Any) -> Memory | None:
    """Remembers the tree of ``module``, if no change of it could go unseen."""
    _memories.pop(id(module), None)
    alias = any(len(entry.places) > 1 or entry.store == ATTRIBUTE for entry in entries)
    if alias or len({id(node.module) for node in nodes}) != len(nodes):
        return None
    try:
        _memories[id(module)] = memory = Memory(module, nodes, entries, *about)
    except _Unwatchable:
        return None
    return memory


def ground(owner: nn.Module) -> Ground:
    """That of the trees that ``owner`` holds."""
    return _grounds.setdefault(owner, Ground())


def same(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    """Whether dicts hold the very same objects as others do, in the same order."""
    if [*map(len, some)] != [*map(len, others)]:
        return False
    # All in one go: a tree has dozens of them, most of them small.
    held, expected = (chain.from_iterable(map(dict.values, dicts)) for dicts in (some, others))
    return all(map(operator.is_, held, expected))
