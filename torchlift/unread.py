"""Attributes that differ from layer to layer and that a compiled body is not to look at."""

from __future__ import annotations

from typing import Any

_KEPT = {"__new__", "__init__", "__getattribute__", "__setattr__", "__doc__", "__init_subclass__", "__class__"}


class ReadError(Exception):
    """A body used an attribute that it was thought to leave alone."""


class Unread:
    """Stands in a body for the attribute of a layer, and says so when something is done with it.

    NOTE [Unread]. A layer that knows its number, for a cache of keys and values that training does not have, would be a
    body of its own, and compile time would grow with depth. So such attributes are first given as this; a body that
    runs with it does not depend on them. Where one is used, it is given for what it is from then on. Only ``is`` and
    ``type`` cannot be noticed.
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
