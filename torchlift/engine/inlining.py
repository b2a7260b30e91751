"""What captures say of the loops in a body: whether they are to be parts of its graph, and which became operators."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _State(threading.local):
    def __init__(self) -> None:
        self.loops = False  # set inside inlining
        self.nested: list[str] = []  # the loops that became operators, in the block of noting_nested


_state = _State()


@contextmanager
def inlining(loops: bool) -> Iterator[None]:
    """A block of captures in which the loops of a body are to be a part of its graph, with ``loops``."""
    before = _state.loops
    _state.loops = loops
    try:
        yield
    finally:
        _state.loops = before


@contextmanager
def noting_nested() -> Iterator[list[str]]:
    """A block of captures, and the names of the loops that become operators in it."""
    before, _state.nested = _state.nested, []
    try:
        yield _state.nested
    finally:
        _state.nested = before


def note_nested(name: str) -> None:
    """Says that a loop has become an operator."""
    _state.nested.append(name)


def loops_inline() -> bool:
    """Whether the loops of a body are to be a part of its graph here."""
    return _state.loops
