"""What a plain attribute refers to, and one like it that refers to something else."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.errors import UnsupportedError
from torchlift.nodes import INTERNALS, LONG, SCALARS
from torchlift.variables import Variable

# What a cell of a closure is looked at for: through what else they know, functions refer to one another in circles.
_IN_CELLS = (Tensor, nn.Module, Variable, types.MethodType, functools.partial)


def elements(value: Any) -> list[Any] | None:
    """What is in a container that may hold references. Long ones of plain values, vocabularies say, hold none.

    NOTE [Kept functions]. ``self.attend = self._flash``, a partial, and a closure over ``self`` hold references as a
    list does: left as they are, they would compute with the real module, whatever is bound in its place.
    """
    if type(value) is list or isinstance(value, tuple):
        found = list(value) if len(value) <= LONG or type(value[0]) not in SCALARS else None
    elif isinstance(value, dict):
        first = next(iter(value.values()), None)
        found = list(value.values()) if len(value) <= LONG or type(first) not in SCALARS else None
    elif _tree.is_node(value):
        found = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, types.MethodType):
        found = [value.__self__]
    elif isinstance(value, functools.partial):
        found = [value.func, *value.args, *value.keywords.values()]
    elif type(value) is types.FunctionType and (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        contents = [in_cell(cell) for cell in value.__closure__ or ()]
        contents += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        held = [content if isinstance(content, _IN_CELLS) else None for content in contents]
        found = held if any(content is not None for content in held) else None
    else:
        found = None
    return found


def in_cell(cell: types.CellType) -> Any:
    """What a cell of a closure holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet: of a function that refers to one defined after it
        return types.CellType


class Container:
    """What has slots among its :func:`elements`, from which a like one is built for each run."""

    def __init__(self, like: Any, children: list[Any]):
        self.like, self.children = like, children

    def rebuild(self, children: list[Any]) -> Any:
        like = self.like
        if type(like) is dict:
            return dict(zip(like, children))
        if isinstance(like, dict):
            new = copy.copy(like)
            new.update(zip(like, children))
            return new
        if isinstance(like, list):
            return children
        if isinstance(like, tuple):
            return type(like)(*children) if hasattr(like, "_fields") else tuple(children)
        if isinstance(like, types.MethodType):
            # Dynamo knows how to call a partial, not how to make a method.
            kind = functools.partial if _compat.is_compiling() else types.MethodType
            return kind(like.__func__, children[0])
        if isinstance(like, functools.partial):
            fn, *args = children[: 1 + len(like.args)]
            return type(like)(fn, *args, **dict(zip(like.keywords, children[1 + len(like.args) :])))
        if isinstance(like, types.FunctionType):
            return _closed_over(like, children)
        new = copy.copy(like)
        for field, child in zip(dataclasses.fields(like), children, strict=True):
            object.__setattr__(new, field.name, child)
        return new


def _closed_over(fn: types.FunctionType, contents: Sequence[Any]) -> types.FunctionType:
    """``fn`` with ``contents`` in its closure, then among its defaults, but for those that are None."""
    if _compat.is_compiling():
        raise UnsupportedError(
            f"{fn.__name__}: a function in a plain attribute that closes over a module or tensor, or has one as a "
            "default, which compiled code cannot bind anew; make it a method of the module, or a functools.partial"
        )
    rest = iter(contents)
    cells = [cell if (content := next(rest)) is None else types.CellType(content) for cell in fn.__closure__ or ()]
    defaults = [old if (content := next(rest)) is None else content for old in fn.__defaults__ or ()]
    by_name = {k: old if (content := next(rest)) is None else content for k, old in (fn.__kwdefaults__ or {}).items()}
    new = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, tuple(defaults), tuple(cells))
    new.__kwdefaults__ = by_name or None
    new.__dict__.update(fn.__dict__)
    return new


# For good ------------------------------------------------------------------------------------------------------------


def become(module: nn.Module, other: nn.Module) -> None:
    """Makes ``module`` be what ``other`` is; what refers back to ``other`` then refers to it."""
    # The very same __dict__, not a copy: what is out of reach here (a hook that is a bound method) sees the module too.
    object.__setattr__(module, "__dict__", other.__dict__)
    relink(module, {id(other): module})


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, in which functions refer to the copies too."""
    new = copy.deepcopy(module, memo)
    relink(new, memo)
    return new


def relink(module: nn.Module, new: Mapping[int, Any]) -> None:
    """Makes what ``module`` keeps refer to ``new[id(x)]`` in the place of any x."""
    for owner in module.modules():
        for key, value in owner.__dict__.items():
            if key not in INTERNALS and type(value) not in SCALARS:
                owner.__dict__[key] = _replaced(value, new)


def _replaced(value: Any, new: Mapping[int, Any]) -> Any:
    """``value``, referring likewise."""
    if id(value) in new:
        return new[id(value)]
    children = elements(value) or ()
    found = [_replaced(child, new) for child in children]
    return value if all(a is b for a, b in zip(children, found)) else Container(value, found).rebuild(found)
