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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_MOST = 5000  # values looked at
_ITEMS = 1000  # of one container
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
        self._back: list[Callable[[], bool]] = []  # whether something was put back
        todo = [(root, True)]
        while todo and len(known) < _MOST:
            value, ours = todo.pop()
            if not isinstance(value, _TOLD) and id(value) not in known:
                known[id(value)] = value
                inside, ours = self._inside(value, ours)
                todo += [(inner, ours) for inner in inside]

    def put_back(self) -> bool:
        """Makes everything as it was, and says whether anything was not."""
        return any([back() for back in self._back])

    def _inside(self, value: Any, ours: bool) -> tuple[Sequence[Any], bool]:
        """What a value leads to, and whether that is this package's or a module's own, which is left as it is.

        Where the value can be changed, how to put it back is noted.
        """
        if isinstance(value, types.FunctionType):
            return self._in_function(value), _of_library(value.__globals__.get("__name__"))
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__], ours
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()], ours
        if isinstance(value, type):
            return self._in_class(value), False
        if isinstance(value, (list, dict, set, collections.deque, tuple, frozenset)):
            return self._in_container(value, ours), ours
        inner = [getattr(value, key, None) for key in ("__func__", "fget", "func", "__wrapped__")]
        fields = getattr(value, "__dict__", None)
        if not isinstance(fields, dict) or isinstance(value, types.ModuleType):
            return [fn for fn in inner if isinstance(fn, types.FunctionType)], ours  # functools.lru_cache has one
        if isinstance(value, nn.Module):
            own = [field for name, field in fields.items() if name not in _INTERNAL]
            return [type(value), *fields["_modules"].values(), *own], True
        if type(value).__module__.partition(".")[0] == _OURS:
            # What says where things are in a module leads to nothing that the module does not.
            return [] if type(value).__module__ == f"{_OURS}.nodes" else [*fields.values()], True
        if _of_library(type(value).__module__):
            return inner, ours
        self._back.append(functools.partial(_refill, fields, dict(fields)))
        return [type(value), *fields.values()], False

    def _in_function(self, fn: types.FunctionType) -> list[Any]:
        cells = [cell for cell in fn.__closure__ or () if _is_full(cell)]
        inside = [cell.cell_contents for cell in cells]
        if _of_library(fn.__globals__.get("__name__")):
            return inside
        for cell, content in zip(cells, inside):
            self._back.append(functools.partial(_fill, cell, content))
        names = _names(fn.__code__)
        modules = [m for m in map(fn.__globals__.get, names) if isinstance(m, types.ModuleType)]
        for space in (fn.__globals__, *(vars(m) for m in modules if not _of_library(m.__name__))):
            held = {name: space[name] for name in names if name in space}
            self._back.append(functools.partial(_rebind, space, held))
            inside += held.values()
        return [*inside, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]

    def _in_class(self, cls: type) -> list[Any]:
        if _of_library(cls.__module__):
            return []
        own = {name: value for name, value in vars(cls).items() if not name.startswith("__") or callable(value)}
        fields = {name: value for name, value in own.items() if not callable(value) and not hasattr(value, "__get__")}
        self._back.append(functools.partial(_reset, cls, fields))
        return [*cls.__bases__, *own.values()]

    def _in_container(self, value: Any, ours: bool) -> list[Any]:
        if len(value) > _ITEMS:
            return []
        copied = dict(value) if isinstance(value, dict) else list(value)
        if not ours and not isinstance(value, (tuple, frozenset)):
            self._back.append(functools.partial(_refill, value, copied))
        return list(copied.values()) if isinstance(copied, dict) else copied


# Others may read these, so they are touched only if they have changed.


def _refill(holder: Any, items: Any) -> bool:
    now, before = (x.items() if isinstance(x, dict) else enumerate(x) for x in (holder, items))
    if len(holder) == len(items) and all(a == c and b is d for (a, b), (c, d) in zip(now, before)):
        return False
    holder.clear()
    (holder.update if isinstance(holder, (dict, set)) else holder.extend)(items)
    return True


def _rebind(space: dict[str, Any], held: dict[str, Any]) -> bool:
    changed = {name: value for name, value in held.items() if space.get(name) is not value}
    space.update(changed)
    return bool(changed)


def _reset(cls: type, fields: dict[str, Any]) -> bool:
    changed = {name: value for name, value in fields.items() if vars(cls).get(name) is not value}
    for name, value in changed.items():
        setattr(cls, name, value)
    return bool(changed)


def _fill(cell: Any, content: Any) -> bool:
    if _is_full(cell) and cell.cell_contents is content:
        return False
    cell.cell_contents = content
    return True


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return {*code.co_names, *(name for part in inner for name in _names(part))}
