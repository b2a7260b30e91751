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
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift.errors import UnsupportedError
from torchlift.nodes import INTERNALS, SCALARS, Node
from torchlift.pack import Packed
from torchlift.variables import AT, class_of

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
_DEPTH = 6


def of_packed(packed: Packed, skip: Sequence[str] = ()) -> Hashable:
    """The key of a packed call: its function, its modules, and where its tensors go.

    ``skip`` names plain attributes that are not part of it.
    """
    nodes = tuple(_of_node(node, skip) for node in packed.nodes)
    captures = tuple(repr(frame.filter) for frame in packed.context["captures"])
    return (_of_callable(packed.fn, _DEPTH), nodes, packed.inside, captures, tuple(packed.writable), packed.hidden)


def of_module(module: nn.Module) -> dict[str, Hashable]:
    """The plain attributes of one module by name, without those that hold tensors or modules."""
    return {
        key: (type(value), value) if type(value) in SCALARS else of_value(value, _DEPTH)
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


def of_value(value: Any, depth: int = _DEPTH) -> Hashable:
    """A hashable stand-in for a value, equal for equal content."""
    kind = type(value)
    if kind in _ATOMS:
        return (kind, value)
    if isinstance(value, (Tensor, nn.Module)):
        return f"{kind.__module__}.{kind.__qualname__}"  # tensors are inputs, modules have nodes of their own
    if depth == 0:
        raise UnsupportedError(f"a plain attribute of type {kind.__name__} is nested too deeply to see it change")
    if isinstance(value, (list, tuple)):
        return (kind, tuple(of_value(v, depth - 1) for v in value))
    if isinstance(value, Mapping):
        return (kind, tuple((of_value(k, depth - 1), of_value(v, depth - 1)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(of_value(v, depth - 1) for v in value))
    if isinstance(value, type):
        return value
    if callable(value) and isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _of_callable(value, depth - 1)
    fields = getattr(value, "__dict__", None)
    if fields and kind.__module__ != "builtins":
        return (kind, tuple((k, of_value(v, depth - 1)) for k, v in fields.items()))
    try:
        hash(value)
    except TypeError:
        raise UnsupportedError(f"a plain attribute of type {kind.__name__} cannot be compared by content") from None
    return (kind, value)


def _of_callable(fn: Any, depth: int) -> Hashable:
    if depth <= 0:
        return fn
    if isinstance(fn, functools.partial):
        return ("partial", _of_callable(fn.func, depth - 1), of_value((fn.args, fn.keywords), depth - 1))
    if isinstance(fn, types.MethodType):
        return ("method", _of_callable(fn.__func__, depth - 1), of_value(fn.__self__, depth - 1))
    if not isinstance(fn, types.FunctionType):
        return fn
    cells = tuple(_of_cell(cell, depth - 1) for cell in fn.__closure__ or ())
    return ("function", fn.__code__, cells, of_value(fn.__defaults__, depth - 1), _globals_of(fn))


def _of_cell(cell: Any, depth: int) -> Hashable:
    try:
        return of_value(cell.cell_contents, depth)
    except ValueError:  # not filled yet: a function that refers to itself
        return "empty"


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
