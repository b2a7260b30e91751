"""Content keys: what a compiled body depends on besides its tensors, as one hashable value.

NOTE [Content]. A graph that was captured without guards is right only while everything that Python read in capture is
still as it was. So the key holds the classes of the modules and their plain attributes, the body's code, closure and
defaults, and plain numbers among the globals that the code names: by value, never by a small integer id, which goes
stale when an object dies.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchlift import _tree
from torchlift.errors import UnsupportedError
from torchlift.nodes import INTERNALS, LONG, SCALARS, Node
from torchlift.pack import Packed
from torchlift.references import in_cell
from torchlift.variables import AT, Variable, class_of

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
# Arguments that are told by what they are, or are inputs.
_FUNCTIONS = (type, types.FunctionType, types.MethodType, functools.partial)
_TOLD = (*_ATOMS, *_FUNCTIONS, enum.Enum, Tensor, nn.Module, Variable)
_DEPTH = 64  # values in one another
_MOST = 10_000  # of one value: what is read at each call must be small


def of_packed(packed: Packed, skip: Sequence[str] = ()) -> Hashable:
    """The key of a packed call: its function, its modules, and where its tensors go.

    ``skip`` names plain attributes that are not part of it.
    """
    known = {} if packed.memory is None else packed.memory.keys
    nodes = known.get(tuple(skip))
    if nodes is None:
        nodes = known[tuple(skip)] = tuple(_of_node(node, skip) for node in packed.nodes)
    captures = tuple(repr(frame.filter) for frame in packed.context["captures"])
    classes = dict.fromkeys(type(node.module) for node in packed.nodes)
    around = tuple(_around(cls) for cls in classes)
    return (of_value(packed.fn), nodes, around, packed.inside, captures, tuple(packed.writable), packed.hidden)


def of_module(module: nn.Module) -> dict[str, Hashable]:
    """The plain attributes of one module by name, without those that hold tensors or modules."""
    return {
        key: (type(value), value) if type(value) in SCALARS else of_value(value)
        for key, value in module.__dict__.items()
        if key not in INTERNALS and key != AT and not isinstance(value, (Tensor, nn.Module))
    }


def _of_node(node: Node, skip: Sequence[str]) -> Hashable:
    return (
        class_of(node.module),
        node.path,
        tuple(node.tensors),
        tuple(node.children),
        tuple((k, v) for k, v in of_module(node.module).items() if k not in skip and node.dotted(k) not in skip),
    )


def hidden(packed: Packed) -> list[Any]:
    """The tensors and modules in objects that plain attributes hold: no others are bound in their place."""
    reader = _Reader()
    if packed.memory is None:  # what is remembered has none
        for node in packed.nodes:
            reader.all(value for key, value in node.module.__dict__.items() if key not in INTERNALS and key != AT)
    return reader.hidden


def opaque(leaves: Iterable[Any]) -> str | None:
    """Why compiled code cannot have these as arguments, if it cannot: one of them is an object with content of its own.

    Its identity does not tell that content, and what a body puts there (into a cache of keys and values) is a tracer.
    """
    for leaf in leaves:
        if not isinstance(leaf, _TOLD) and hasattr(leaf, "__dict__"):
            return (
                f"an argument is a {type(leaf).__name__}, whose content compiled code would not see change; pass "
                "tensors and numbers, or a dict, tuple or dataclass of them"
            )
    return None


def of_value(value: Any) -> Hashable:
    """A hashable stand-in for a value, equal for equal content."""
    return _Reader().read(value)


class _Reader:
    """Reads a value once, however often it occurs in what is read, and whatever refers back to itself."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Hashable]] = {}  # with the values, whose ids are taken while they live
        self.path: dict[int, int] = {}  # what is being read, outermost first
        self.objects = 0  # how many of those are objects with fields
        self.hidden: list[Any] = []  # the tensors and modules met there

    def read(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in _ATOMS:
            return (kind, value)
        if isinstance(value, (Tensor, nn.Module)):
            if self.objects:
                self.hidden.append(value)
            return f"{kind.__module__}.{kind.__qualname__}"  # tensors are inputs, modules have nodes of their own
        if isinstance(value, type):
            return value
        at = id(value)
        if at in self.known:
            return self.known[at][1]
        if at in self.path:
            return ("itself", self.path[at])
        if len(self.path) == _DEPTH or len(self.known) == _MOST:
            raise UnsupportedError(
                f"a plain value of type {kind.__name__} holds too much to see it change at each call"
            )
        self.path[at] = len(self.path)
        try:
            self.known[at] = value, self._content(value, kind)
        finally:
            del self.path[at]
        return self.known[at][1]

    def all(self, values: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple([self.read(value) for value in values])

    def _content(self, value: Any, kind: type) -> Hashable:
        if isinstance(value, (list, tuple)):
            return (kind, self.all(value))
        if isinstance(value, Mapping):
            return (kind, self.all(value), self.all(value.values()))
        if isinstance(value, (set, frozenset)):
            return (kind, frozenset(self.all(value)))
        if isinstance(value, functools.partial):
            return ("partial", self.all((value.func, value.args, value.keywords)))
        if isinstance(value, types.MethodType):
            return ("method", self.all((value.__func__, value.__self__)))
        if isinstance(value, types.FunctionType):
            parts = (value.__defaults__, value.__kwdefaults__, *map(in_cell, value.__closure__ or ()))
            return ("function", value.__code__, self.all(parts), _globals_of(value))
        fields = getattr(value, "__dict__", None)
        if fields and kind.__module__ != "builtins":
            self.objects += not _tree.is_node(value)
            content = self.all(fields.values())
            self.objects -= not _tree.is_node(value)
            return (kind, tuple(fields), content)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.size <= _MOST:
            return (kind, value.dtype.str, value.shape, value.tobytes())
        try:
            hash(value)
        except TypeError:
            raise UnsupportedError(f"a plain value of type {kind.__name__} cannot be compared by content") from None
        return (kind, value)


def _globals_of(fn: types.FunctionType) -> Hashable:
    known = fn.__globals__
    plain = (bool, int, float, str)
    return tuple((name, known[name]) for name in fn.__code__.co_names if type(known.get(name)) in plain)


def _around(cls: type) -> Hashable:
    """What the methods of a class read beside their arguments, where that is plain: class attributes and globals."""
    found = [(name, space.get(name)) for space, names in _read_by(cls) for name in names]
    return tuple([(name, of_value(value)) for name, value in found if _is_plain(value)])


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return len(value) <= LONG and all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return type(value) in _ATOMS


@functools.cache
def _read_by(cls: type) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Namespaces, and names in them, that the methods of a class read, and the functions that those call."""
    spaces: dict[int, Mapping[str, Any]] = {
        id(base): vars(base) for base in cls.__mro__ if not _is_torch(base.__module__)
    }
    todo: list[Any] = [value for space in spaces.values() for value in space.values()]
    seen: dict[types.FunctionType, None] = {}
    while todo:
        value = todo.pop()
        if isinstance(value, types.FunctionType):
            if value in seen:
                continue
            seen[value] = None
            known = value.__globals__
            todo += map(in_cell, value.__closure__ or ())  # what a decorator wraps
            if not _is_torch(known.get("__name__")):
                spaces[id(known)] = known
                todo += [known[name] for name in _names(value.__code__) if name in known]
        elif isinstance(value, types.ModuleType) and not _is_torch(value.__name__):
            spaces[id(value)] = vars(value)
        else:  # methods of all kinds
            todo += [fn for key in _INNER if isinstance(fn := getattr(value, key, None), types.FunctionType)]
    codes = [fn.__code__ for fn in seen if id(fn.__globals__) in spaces]
    names = dict.fromkeys(name for code in codes for name in _names(code) if not name.startswith("__"))
    found = [(space, [name for name in names if _is_plain(space.get(name, cls))]) for space in spaces.values()]
    return [(space, read) for space, read in found if read]


_INNER = ("__func__", "fget", "func")  # of class and static methods, of properties


def _names(code: types.CodeType) -> list[str]:
    """The names in a piece of code, and in those inside of it."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return [*code.co_names, *inner]


def _is_torch(name: str | None) -> bool:
    return name is None or name.partition(".")[0] in ("torch", "torchlift", "builtins")


def digest(key: Hashable) -> str:
    """A hash of a key's content, the same in every process that runs the same code."""
    return hashlib.sha256(_text(key).encode()).hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_text(item) for item in value) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(_text(item) for item in value)) + "}"
    if isinstance(value, types.CodeType):
        return _text((value.co_code.hex(), value.co_consts, value.co_names, value.co_varnames, value.co_freevars))
    if isinstance(value, type):
        return _source(value)
    if isinstance(value, _ATOMS):
        return f"{type(value).__name__}:{value!r}"
    # By address, true in this process only: another one compiles anew, which is slow and never wrong.
    return f"{type(value).__qualname__}@{id(value)}"


_sources: Counter[str] = Counter()  # how many classes have this source


@functools.cache
def _source(cls: type) -> str:
    """The source of a class, and a number: a function that makes classes, or a transform, makes many of one source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # typed in, or generated
        source = repr(sorted(map(str, vars(cls))))
    source = f"{cls.__module__}.{cls.__qualname__}:{source}"
    _sources[source] += 1
    return f"{_sources[source]}:{source}"


# Settings ------------------------------------------------------------------------------------------------------------


def other_setting(first: nn.Module, module: nn.Module) -> str | None:
    """The class, or the plain attribute, in which ``module`` differs from ``first``, both of equal structure."""
    others = dict(module.named_modules(remove_duplicate=False))
    for path, expected in first.named_modules(remove_duplicate=False):
        other = others.get(path)
        if other is None or class_of(other) is not class_of(expected):
            return f"{path!r} is a {type(other).__name__}, expected a {type(expected).__name__}"
        for key, value in expected.__dict__.items():
            got = other.__dict__.get(key)
            if key not in INTERNALS and _is_setting(value) and _is_setting(got) and _content(got) != _content(value):
                return f"{f'{path}.{key}' if path else key!r} is {got!r}, expected {value!r}"
    return None


def _is_setting(value: Any) -> bool:
    """Whether the content of a plain attribute can be compared: of a number, a name, a function."""
    if isinstance(value, (tuple, list)):
        return all(_is_setting(item) for item in value)
    return type(value) in _ATOMS or isinstance(value, (types.FunctionType, types.BuiltinFunctionType))


def _content(value: Any) -> Any:
    return [_content(item) for item in value] if isinstance(value, (tuple, list)) else getattr(value, "__code__", value)
