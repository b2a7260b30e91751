"""Writes that torch does not count, or that it allows into parameters: where there may be some, told by names in code.

NOTE [Unseen writes]. What a body writes into a tensor is told by the tensor's version. A write through ``.data`` or
``.numpy()`` is not counted, and to hold every buffer against its value before takes longer than a small layer. So that
is done where code that a call can reach names one of these; code that no name leads to is not found.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

_UNCOUNTED = {"data", "numpy"}
_INTO_PARAMETERS = {"no_grad", "inference_mode", "set_grad_enabled", *_UNCOUNTED}
_OTHERS = ("torch.", "torchlift.")


class Unseen(NamedTuple):
    """Whether code names what writes uncounted, and the classes whose code may write into their own parameters."""

    uncounted: bool
    writers: frozenset[type]


def code_of(fn: Callable[..., Any]) -> tuple[types.CodeType, str] | None:
    """What tells functions apart by the names in them: one that is made in each call is the same each time."""
    found = next(_functions(fn), None)
    return None if found is None else (found.__code__, found.__module__)


@functools.lru_cache(maxsize=512)
def unseen_writes(body: tuple[types.CodeType, str] | None, classes: frozenset[type]) -> Unseen:
    """What a body, given by :func:`code_of`, may write unseen with modules of these classes."""
    by_class: dict[type | None, set[str]] = {cls: set() for cls in (None, *classes)}
    names = {"forward"}
    seen: set[tuple[type | None, types.CodeType]] = set()
    work: list[_Code] = [] if body is None else [(None, body[0], getattr(sys.modules.get(body[1]), "__dict__", {}))]
    while work or (work := _members(classes, names, seen)):
        owner, code, space = work.pop()
        if (owner, code) in seen:
            continue
        seen.add((owner, code))
        found = set(_names(code))
        by_class[owner] |= found
        names |= found
        called = [space[name] for name in found if isinstance(space.get(name), types.FunctionType)]
        work += [(owner, f.__code__, f.__globals__) for f in called if not _is_others(f)]
    writers = [cls for cls, found in by_class.items() if cls is not None and found & _INTO_PARAMETERS]
    return Unseen(bool(names & _UNCOUNTED), frozenset(writers))


_Code = tuple[type | None, types.CodeType, dict[str, Any]]  # of a class, or of the body; with its globals


def _members(classes: frozenset[type], names: set[str], seen: set[Any]) -> list[_Code]:
    """The code of members of classes that have one of these names, and were not seen."""
    found: list[_Code] = []
    for cls in classes:
        for base in cls.__mro__:
            if not _is_others(base):
                members = [each for name, value in vars(base).items() if name in names for each in _functions(value)]
                found += [(cls, f.__code__, f.__globals__) for f in members if (cls, f.__code__) not in seen]
    return found


def renormalises(module: nn.Module) -> bool:
    """Whether it is one of torch's embeddings that write into their weight."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None


def _is_others(value: Any) -> bool:
    return (value.__module__ or "").startswith(_OTHERS)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions in a member of a class."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    if isinstance(value, functools.partial):
        value = value.func
    while isinstance(value, types.FunctionType):
        yield value
        inner = getattr(value, "__wrapped__", None)
        value = None if inner is value else inner


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    if code.co_name == "decorate_context":  # torch.no_grad and its like, as a decorator
        yield "no_grad"
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)
