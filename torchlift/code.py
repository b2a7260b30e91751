"""Functions, and where the names in their code lead."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

from torchlift.references import in_cell

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def function_in(value: Any) -> types.FunctionType | None:
    """The Python function in a function, a method of any kind, a property or a partial."""
    if isinstance(value, types.FunctionType):
        return value
    inner = [getattr(value, key, None) for key in ("__func__", "fget", "func")]
    return next((fn for fn in inner if isinstance(fn, types.FunctionType)), None)


def names_in(code: types.CodeType) -> list[str]:
    """The names in a piece of code, and in those inside of it."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in names_in(part)]
    return [name for name in (*code.co_names, *inner) if not name.startswith("__")]


def is_library(module: str | None) -> bool:
    """Whether code of a module of that name is nobody's own."""
    return module is None or module.partition(".")[0] in ("torch", "torchlift", "builtins", "numpy")


def of_library(made: type | types.FunctionType) -> bool:
    """Whether a class or a function is nobody's own.

    What ``exec(code, {})`` makes belongs to no module, and its classes are called builtins; Python's own are static.
    """
    if isinstance(made, types.FunctionType):
        return "__name__" in made.__globals__ and is_library(made.__globals__["__name__"])
    return is_library(made.__module__) and not (made.__module__ == "builtins" and made.__flags__ & _HEAP_TYPE)


def in_closure(fn: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions in the closure of a function."""
    for cell in fn.__closure__ or ():
        inner = function_in(in_cell(cell))
        if inner is not None:
            yield inner


def spaces_of(fn: types.FunctionType, names: list[str]) -> list[Mapping[str, Any]]:
    """The namespaces in which ``names``, those in the code of ``fn``, may lie: its globals, and modules among these."""
    modules = [vars(m) for m in map(fn.__globals__.get, names) if isinstance(m, types.ModuleType)]
    return [fn.__globals__, *(space for space in modules if not is_library(space.get("__name__")))]
