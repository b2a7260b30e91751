"""What surrounds a body, per thread: captures of sown values, random streams, named axes.

NOTE [Context]. A body may run again later, in the thread that runs backward. Whatever it reads from its surroundings
is therefore kept here, where :func:`snapshot` and :func:`entered` can take it along, and nowhere else.
"""

from __future__ import annotations

import threading
from typing import Any


class _Context(threading.local):
    """One per thread; every field is replaced, never mutated, so that a snapshot stays what it was."""

    def __init__(self) -> None:
        self.captures: tuple[Any, ...] = ()  # variables.Capture, innermost last
        self.streams: dict[str, tuple[int, int]] = {}  # name -> (seed, generators made so far)
        self.refused: tuple[tuple[str, str], ...] = ()  # (stream, why and what to add)
        self.axes: tuple[Any, ...] = ()  # axes.NamedAxis, innermost last


context = _Context()


class entered:
    """Sets fields of this thread's context for the duration of a block. A class: half the cost of a generator."""

    __slots__ = ("before", "fields")

    def __init__(self, **fields: Any):
        self.fields = fields

    def __enter__(self) -> _Context:
        self.before = {name: getattr(context, name) for name in self.fields}
        for name, value in self.fields.items():
            setattr(context, name, value)
        return context

    def __exit__(self, *error: object) -> None:
        for name, value in self.before.items():
            setattr(context, name, value)
