"""Named axes: which mapped axes a body is in, and collectives over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from torchlift._context import context, entered


@dataclass(frozen=True)
class NamedAxis:
    """A mapped axis that a body is in: its name, size, and this index's number, a tensor that is mapped itself."""

    name: str
    size: int
    index: Tensor


@contextmanager
def named(name: str | None, size: int, index: Tensor) -> Iterator[None]:
    """Makes a mapped axis known to the body under its name."""
    if name is None:
        yield
    else:
        with entered(axes=(*context.axes, NamedAxis(name, size, index))):
            yield
