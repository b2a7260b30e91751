"""Content keys: what a compiled body depends on besides its tensors, as one hashable value.

NOTE [Content]. A graph that was captured without guards is right only while everything that Python read in capture is
still as it was. So the key holds the classes of the modules and their plain attributes, the body's code, closure and
defaults, and plain numbers among the globals that the code names: by value, never by a small integer id, which goes
stale when an object dies.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift.errors import UnsupportedError
from torchlift.nodes import INTERNALS, SCALARS, Node
from torchlift.pack import Packed
from torchlift.variables import AT, class_of

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
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
    return (of_value(packed.fn), nodes, packed.inside, captures, tuple(packed.writable), packed.hidden)


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


def of_value(value: Any) -> Hashable:
    """A hashable stand-in for a value, equal for equal content."""
    return _Reader().read(value)


class _Reader:
    """Reads a value once, however often it occurs in what is read, and whatever refers back to itself."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Hashable]] = {}  # with the values, whose ids are taken while they live
        self.path: dict[int, int] = {}  # what is being read, outermost first

    def read(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in _ATOMS:
            return (kind, value)
        if isinstance(value, (Tensor, nn.Module)):
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
            parts = (value.__defaults__, value.__kwdefaults__, *map(_in_cell, value.__closure__ or ()))
            return ("function", value.__code__, self.all(parts), _globals_of(value))
        fields = getattr(value, "__dict__", None)
        if fields and kind.__module__ != "builtins":
            return (kind, tuple(fields), self.all(fields.values()))
        try:
            hash(value)
        except TypeError:
            raise UnsupportedError(f"a plain value of type {kind.__name__} cannot be compared by content") from None
        return (kind, value)


def _in_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet: of a function that refers to one defined after it
        return types.CellType


def _globals_of(fn: types.FunctionType) -> Hashable:
    known = fn.__globals__
    plain = (bool, int, float, str)
    return tuple((name, known[name]) for name in fn.__code__.co_names if type(known.get(name)) in plain)


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
