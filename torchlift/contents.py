"""What objects that are no values hold, so that a body that runs again finds them as it did at first.

NOTE [Contents]. A cache of keys and values is given to a body as an object, which the body fills. A recomputation in
backward would find it full: shapes differ then, or gradients are silently wrong.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchlift import _compat
from torchlift.errors import UnsupportedError

_WHOLE = (nn.Module, type, types.FunctionType, types.ModuleType, types.MethodType)  # not looked into
_MOST = 10_000  # things: more would take milliseconds at each call


class Contents:
    """What ``objects`` hold now, in containers and in one another: by identity, and of tensors how often written."""

    def __init__(self, objects: Iterable[Any], label: str):
        self.objects, self.label = list(objects), label
        self.held: list[tuple[Any, Any]] = []  # containers, each with a copy of what is in it
        self.tensors: list[tuple[Tensor, int]] = []
        seen: set[int] = set()
        todo = list(self.objects)
        while todo:
            value = todo.pop()
            if isinstance(value, _WHOLE) or id(value) in seen:
                continue
            if len(seen) == _MOST:  # a loader, a table: nothing that a layer is given to write into
                self.held, self.tensors = [], []
                break
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append((value, _compat.version(value)))
            elif isinstance(value, (list, tuple, set)):
                self.held.append((value, list(value)))
                todo += value
            elif isinstance(value, dict):
                self.held.append((value, dict(value)))
                todo += value.values()
            if hasattr(value, "__dict__") and not isinstance(value, Tensor):
                self.held.append((value.__dict__, dict(value.__dict__)))
                todo += value.__dict__.values()

    def put_back(self) -> None:
        """Makes the objects hold that again."""
        for container, content in self.held:
            if isinstance(container, list):
                container[:] = content
            elif not isinstance(container, tuple):
                container.clear()
                container.update(content)

    @contextmanager
    def again(self) -> Any:
        """A block in which the objects hold that, and after which what they held before it.

        Raises:
            UnsupportedError: a tensor in them was written in place, which cannot be taken back.
        """
        if any(_compat.version(tensor) != version for tensor, version in self.tensors):
            kinds = " and ".join(dict.fromkeys(type(value).__name__ for value in self.objects))
            raise UnsupportedError(
                f"{self.label}: a tensor in an argument, a {kinds}, was written in place since the call, and its "
                "recomputation would read the new values; write into new tensors, or pass no such object in training"
            )
        now = Contents(self.objects, self.label)
        self.put_back()
        try:
            yield
        finally:
            now.put_back()
