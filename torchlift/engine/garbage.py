"""Python's search for garbage while a program is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARE = 50_000  # objects made before Python looks through the youngest; without a word from anyone it is 700 or 2,000


@contextmanager
def rarely_collected() -> Iterator[None]:
    """A block in which Python seldom looks for garbage; blocks may nest, but threads must take turns.

    For Inductor alone: what looks for a body's tensors has the youngest objects collected, after each capture.

    Inductor is imported, and works, with millions of objects that hardly ever become garbage in cycles: to look through
    them takes a twelfth of a first step. Off altogether it would save as much, and keep tensors that others let go.
    """
    before = youngest, *older = gc.get_threshold()
    raised = (max(youngest, RARE) if youngest else 0, *older)  # 0: the user has turned it off
    gc.set_threshold(*raised)
    try:
        yield
    finally:
        if gc.get_threshold() == raised:  # nobody has set it meanwhile
            gc.set_threshold(*before)
