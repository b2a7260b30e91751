"""Plain attributes in which layers may differ."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from torchlift.pack import Packed
from torchlift.unread import ReadError, Unread
from torchlift.variables import class_of

# No bool, None or enum: who compares those does so by identity, which no object can notice.
_TELLING = {int, float, str}
# Of each class of layers, which attributes some body of theirs has read.
_read: weakref.WeakKeyDictionary[type[nn.Module], set[tuple[int, str]]] = weakref.WeakKeyDictionary()


class Scanned:
    """Which scanned attributes the layers of one call are given, and which they are thought not to read."""

    def __init__(self, packed: Sequence[Packed], names: Sequence[str], all_given: bool):
        self.used: set[tuple[int, str]] = set()
        self._read = _read.setdefault(class_of(packed[0].nodes[0].module), set())
        places = scanned_places(packed[0], names)
        self.given = [p for p in places if all_given or p in self._read or not _could_go_unread(packed, *p)]
        self.unread = {place: Unread(place, self.used) for place in places if place not in self.given}

    def require_unread(self) -> None:
        """Raises :class:`ReadError` if something was used, even where the body caught it."""
        if self.used:
            raise ReadError

    def learn(self) -> bool:
        """Whether something was used; it is given from now on."""
        self._read |= self.used
        return bool(self.used)


def _could_go_unread(packed: Sequence[Packed], at: int, key: str) -> bool:
    kinds = {type(each.nodes[at].module.__dict__.get(key)) for each in packed}
    return len(kinds) == 1 and kinds <= _TELLING


def scanned_places(packed: Packed, names: Sequence[str]) -> list[tuple[int, str]]:
    """Where in a layer the scanned attributes lie: a bare name stands for that attribute of any submodule."""
    if not names:
        return []
    return [
        (at, key)
        for at, node in enumerate(packed.nodes)
        for key in node.module.__dict__
        if key in names or node.dotted(key) in names
    ]
