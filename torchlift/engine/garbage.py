"""Python's search for garbage while a program is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARE = 50_000  # objects made before Python looks through the youngest, of which it looks after 700 otherwise


@contextmanager
def rarely_collected() -> Iterator[None]:
    """A block, of one thread at a time, in which Python seldom looks for garbage.

    Inductor is imported, and works, with millions of objects that hardly ever become garbage in cycles: to look through
    them takes a twelfth of a first step. Off altogether it would save as much, and keep tensors that others let go.
    """
    youngest, *older = gc.get_threshold()
    gc.set_threshold(max(youngest, RARE) if youngest else 0, *older)  # 0: the user has turned it off
    try:
        yield
    finally:
        gc.set_threshold(youngest, *older)
