"""Attributes that differ from layer to layer and that a compiled body is not to look at."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchlift.alike import attributes
from torchlift.pack import Packed
from torchlift.variables import class_of

_TELLING = (int, float, str)  # no bool or None: who compares those does so by identity, which no object can notice
_KEPT = {"__new__", "__init__", "__getattribute__", "__setattr__", "__doc__", "__init_subclass__", "__class__"}
# Of each class of layers, which attributes some body of theirs has read.
_read: weakref.WeakKeyDictionary[type[nn.Module], set[tuple[int, str]]] = weakref.WeakKeyDictionary()


class ReadError(Exception):
    """A body used an attribute that it was thought to leave alone."""


class Unread:
    """Stands in a body for the attribute of a layer, and says so when something is done with it.

    NOTE [Unread]. A layer that knows its number, for a cache of keys and values that training does not have, would be a
    body of its own, and compile time would grow with depth. So such attributes are first given as this; a body that
    runs with it does not depend on them. Where one is used, it is given for what it is from then on.
    """

    def __init__(self, place: tuple[int, str], used: set[tuple[int, str]]):
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "_used", used)

    def __getattribute__(self, name: str) -> Any:
        return _refuse(self)

    __class__: Any = property(lambda self: _refuse(self))  # what isinstance asks for


def _refuse(self: Unread, *args: Any, **kwargs: Any) -> Any:
    place = object.__getattribute__(self, "_place")
    object.__getattribute__(self, "_used").add(place)
    raise ReadError(f"{place[1]!r} is read")


# Python finds these in the class, by no __getattribute__.
for _name in {name for kind in (int, float, str, list) for name in dir(kind) if name.startswith("__")} - _KEPT:
    setattr(Unread, _name, _refuse)


class Scanned:
    """Which scanned attributes the layers of one call are given, and which they are thought not to read."""

    def __init__(self, packed: Sequence[Packed], names: Sequence[str], all_given: bool):
        self.used: set[tuple[int, str]] = set()
        self._read = _read.setdefault(class_of(packed[0].nodes[0].module), set())
        places = attributes(packed[0], names)
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
    return len({type(each.nodes[at].module.__dict__.get(key)) for each in packed}) == 1 and isinstance(
        packed[0].nodes[at].module.__dict__[key], _TELLING
    )
