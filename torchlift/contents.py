"""What a body did to objects among its arguments, so that it finds them again as it did at first.

NOTE [Contents]. A cache of keys and values is given to a body as an object, which the body fills. A recomputation in
backward would find it full: shapes differ then, or gradients are silently wrong. Only what the body itself changed is
taken back while it runs again: what else such an object leads to, a logger say, is used by other threads as well.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchlift import _compat
from torchlift.errors import UnsupportedError

_WHOLE = (nn.Module, type, types.FunctionType, types.ModuleType, types.MethodType)  # not looked into
_MOST = 1_000  # things: to look at more would take as long as a small body


def _contents(objects: Iterable[Any]) -> tuple[dict[int, tuple[Any, Any]], list[tuple[Tensor, int]]]:
    """The containers that objects lead to, each with a copy of what is in it; and the tensors, with their versions."""
    held: dict[int, tuple[Any, Any]] = {}
    tensors: list[tuple[Tensor, int]] = []
    seen: dict[int, Any] = {}  # with the things, whose ids are taken while they live
    todo = list(objects)
    while todo and len(seen) <= _MOST:
        value = todo.pop()
        if isinstance(value, _WHOLE) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            tensors.append((value, _compat.version(value)))
            continue
        if isinstance(value, (list, set)):
            held[id(value)] = value, list(value)
        elif isinstance(value, dict):
            held[id(value)] = value, dict(value)
        if isinstance(value, (list, set, tuple)):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        if hasattr(value, "__dict__"):
            held[id(value.__dict__)] = value.__dict__, dict(value.__dict__)
            todo += value.__dict__.values()
    return held, tensors


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(value is b[key] for key, value in a.items())
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


class Contents:
    """What ``objects`` hold before a body runs on them."""

    def __init__(self, objects: Iterable[Any], label: str):
        self.objects, self.label = list(objects), label
        self.held, self.tensors = _contents(self.objects)
        self.changed: list[tuple[Any, Any]] = []  # containers, and what was in them before

    def ran(self) -> None:
        """To be called after the body has run for the first time.

        Raises:
            UnsupportedError: it wrote into a tensor in them, which cannot be taken back.
        """
        if any(_compat.version(tensor) != version for tensor, version in self.tensors):
            kinds = " and ".join(dict.fromkeys(type(value).__name__ for value in self.objects))
            raise UnsupportedError(
                f"{self.label}: the body wrote into a tensor in an argument, a {kinds}, and its recomputation would "
                "read the new values; have it make a new tensor instead, or pass no such object in training"
            )
        self.changed = [
            (container, content) for container, content in self.held.values() if not _same(content, container)
        ]
        self.held, self.tensors = {}, []

    @contextmanager
    def again(self) -> Iterator[None]:
        """A block in which the objects are as they were before that, and after which they are as they are now."""
        now = [(container, type(content)(container)) for container, content in self.changed]
        for container, content in self.changed:
            _fill(container, content)
        try:
            yield
        finally:
            for container, content in now:
                _fill(container, content)
