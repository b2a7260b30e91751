"""What the code of a body leads to that outlives it: a copy, for it to be as it was.

NOTE [Reached]. A run of a body on fakes is no call. If it leaves a tensor without data in a list, a dict or an object
of the user's, all of what it may have changed there is put back: the tensor that was in its place, and the number
beside it that says how large a table is. What that is must be known before the run. So it is looked for in the globals
that the body's functions, and the methods of its modules, name, in closures, in class attributes, and in what is in
those, as far as ``_MOST`` values go. Modules are not copied: a body works on stand-ins of them.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

_MOST = 5000  # values looked at
_ITEMS = 1000  # of one container
_CONTAINERS = (list, dict, set, collections.deque, tuple, frozenset)
LRU = type(functools.lru_cache(lambda: None))
_WRAPPERS = {staticmethod, classmethod, property, functools.cached_property, LRU}
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__qualname__"}
_TOLD = (int, float, complex, str, bytes, bool, type(None), torch.Tensor, torch.dtype, torch.device)
_INTERNAL = frozenset(vars(nn.Module()))
_OURS = __name__.partition(".")[0]
_LIBRARIES = (_OURS, "torch", "numpy", "builtins", "typing", "collections", "functools", "abc", "enum", "types")


def is_ours(module: str) -> bool:
    """Whether objects of a module of that name are this package's or torch's."""
    return module.partition(".")[0] in (_OURS, "torch")


def _of_library(module: Any) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


class Reached:
    """Copies of what is reached from ``root``, all of one moment."""

    def __init__(self, root: Any):
        known: dict[int, Any] = {}
        # For each thing that can be changed: what it holds now, and how to make it as it was.
        self._noted: list[tuple[Callable[[], Iterable[Any]], Callable[[], None]]] = []
        todo = [(root, True)]
        while todo and len(known) < _MOST:
            value, ours = todo.pop()
            if not issubclass(type(value), _TOLD) and id(value) not in known:
                known[id(value)] = value
                inside, ours = self._inside(value, ours)
                todo += [(inner, ours) for inner in inside]

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether any of ``tensors`` is now in something that was reached, or in what was put there."""
        wanted = {id(tensor) for tensor in tensors}
        todo = [value for values, _ in self._noted for value in list(values())]
        known: dict[int, Any] = {}
        while todo and len(known) < 2 * _MOST:
            value = todo.pop()
            if id(value) in wanted:
                return True
            if id(value) not in known:
                known[id(value)] = value
                todo += _items_of(value)
        return False

    def put_back(self) -> None:
        """Makes everything as it was."""
        for _, back in self._noted:
            back()

    # By classes alone: to ask an object what it is may run code of the user's, and a stand-in for an attribute that a
    # body leaves alone would take it for the body's.

    def _inside(self, value: Any, ours: bool) -> tuple[Sequence[Any], bool]:
        """What a value leads to, and whether that is this package's or a module's own, which is left as it is.

        Where the value can be changed, how to put it back is noted.
        """
        kind = type(value)
        if kind is types.FunctionType:
            return self._in_function(value), _of_library(value.__globals__.get("__name__", ""))
        if kind is types.MethodType:
            return [value.__self__, value.__func__], ours
        if kind is functools.partial:
            return [value.func, *value.args, *value.keywords.values()], ours
        if issubclass(kind, type):
            return self._in_class(value), False
        if issubclass(kind, _CONTAINERS):
            return self._in_container(value, ours), ours
        if kind in _WRAPPERS:
            inner = [getattr(value, key, None) for key in ("__func__", "fget", "func", "__wrapped__")]
            return [fn for fn in inner if type(fn) is types.FunctionType], ours
        fields = _fields_of(value)
        if issubclass(kind, nn.Module):
            own = [field for name, field in fields.items() if name not in _INTERNAL]
            return [kind, *fields["_modules"].values(), *own], True
        if kind.__module__.partition(".")[0] == _OURS:
            # What says where things are in a module leads to nothing that the module does not.
            return [] if kind.__module__ == f"{_OURS}.nodes" else [*fields.values()], True
        if _of_library(kind.__module__):
            return [], ours
        if fields:
            self._noted.append((fields.values, functools.partial(_refill, fields, dict(fields))))
        return [kind, *fields.values()], False

    def _in_function(self, fn: types.FunctionType) -> list[Any]:
        cells = [cell for cell in fn.__closure__ or () if _is_full(cell)]
        inside = [cell.cell_contents for cell in cells]
        if _of_library(fn.__globals__.get("__name__", "")):
            return inside
        for cell, content in zip(cells, inside):
            self._noted.append((functools.partial(_content_of, cell), functools.partial(_fill, cell, content)))
        names = _names(fn.__code__)
        modules = [m for m in map(fn.__globals__.get, names) if type(m) is types.ModuleType]
        for space in (fn.__globals__, *(vars(m) for m in modules if not _of_library(m.__name__))):
            held = {name: space[name] for name in names if name in space}
            values = functools.partial(map, space.get, held)
            self._noted.append((values, functools.partial(_rebind, space, held)))
            inside += held.values()
        return [*inside, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]

    def _in_class(self, cls: type) -> list[Any]:
        if _of_library(cls.__module__):
            return []
        own = {name: value for name, value in vars(cls).items() if name not in _OF_CLASSES}
        fields = {name: value for name, value in own.items() if not hasattr(type(value), "__get__")}
        self._noted.append((lambda: vars(cls).values(), functools.partial(_reset, cls, fields)))
        return [*cls.__bases__, *own.values()]

    def _in_container(self, value: Any, ours: bool) -> list[Any]:
        if len(value) > _ITEMS:
            return []
        copied = dict(value) if isinstance(value, dict) else list(value)
        if not ours and not isinstance(value, (tuple, frozenset)):
            values = value.values if isinstance(value, dict) else value.__iter__
            self._noted.append((values, functools.partial(_refill, value, copied)))
        return list(copied.values()) if isinstance(copied, dict) else copied


def _items_of(value: Any) -> list[Any]:
    """What is in a container, or in an object of a user's class."""
    kind = type(value)
    if issubclass(kind, _TOLD) or kind.__module__.partition(".")[0] in (_OURS, "torch"):
        return []
    inside: Any = value if issubclass(kind, _CONTAINERS) else {} if _of_library(kind.__module__) else _fields_of(value)
    return [] if len(inside) > _ITEMS else [*inside.values()] if isinstance(inside, dict) else [*inside]


def _fields_of(value: Any) -> dict[str, Any]:
    return object.__getattribute__(value, "__dict__") if type(value).__dictoffset__ else {}


# Others may read these, so they are touched only if they have changed.


def _refill(holder: Any, items: Any) -> None:
    now, before = (x.items() if isinstance(x, dict) else enumerate(x) for x in (holder, items))
    if len(holder) != len(items) or not all(a == c and b is d for (a, b), (c, d) in zip(now, before)):
        holder.clear()
        (holder.update if isinstance(holder, (dict, set)) else holder.extend)(items)


def _rebind(space: dict[str, Any], held: dict[str, Any]) -> None:
    space.update({name: value for name, value in held.items() if space.get(name) is not value})


def _reset(cls: type, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)


def _fill(cell: Any, content: Any) -> None:
    if not _is_full(cell) or cell.cell_contents is not content:
        cell.cell_contents = content


def _content_of(cell: Any) -> list[Any]:
    return [cell.cell_contents] if _is_full(cell) else []


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return {*code.co_names, *(name for part in inner for name in _names(part))}
