"""Lists, dicts and dataclasses among the arguments of a call: what a body put into them.

NOTE [Given containers]. Arguments are trees: a body gets lists and dicts of its own, with its own tensors in them, so
what it puts there does not reach the caller. A body that counts on that is refused, or what it put there is put into
the caller's containers as well (:meth:`Given.fill`), but never is it lost unsaid. What it returns is not lost, nor
what it does to a carry, or to the part of an input that belongs to one iteration: those are handed on by value.
"""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor, nn

from torchlift import _tree
from torchlift._compat import pytree
from torchlift.errors import UnsupportedError
from torchlift.nodes import SCALARS
from torchlift.variables import Variable

_ROWS = (list, collections.deque)


class FilledError(UnsupportedError):
    """A body put something into a container that is not its own."""


class _Known:
    """Stands in a new content for what the caller has: one of the leaves of the call, or a container."""

    def __init__(self, kind: str, number: int):
        self.kind, self.number = kind, number


def can_fill(value: Any) -> bool:
    """Whether there is anything in an argument that a body could put something into."""
    # The class first: to ask whether something is a tensor, which it mostly is, takes a microsecond.
    if type(value) is Tensor or type(value) in SCALARS or isinstance(value, (Tensor, nn.Module, Variable)):
        return False
    if isinstance(value, tuple):
        return any(can_fill(child) for child in value)
    return isinstance(value, (*_ROWS, dict)) or _tree.is_node(value) or type(value) in pytree.SUPPORTED_NODES


def by_value(given: tuple[Any, Any] | None, scanned: list[int]) -> frozenset[int]:
    """Which of the arguments ``given`` of a loop are handed on by value.

    The carry is, and what an iteration gets a part of: ``scanned`` are the leaves that are scanned over.
    """
    found, start = {0}, 0
    for at, value in enumerate(given[0] if given else ()):
        end = start + len(_tree.flatten(value)[0])
        if any(start <= leaf < end for leaf in scanned):
            found.add(at)
        start = end
    return frozenset(found)


class Given:
    """The containers among arguments, in order, each with what it holds and what errors call it.

    ``by_value`` are arguments, by position, that are handed on by value; ``before`` is how many of those that come
    first are none of the user's.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], by_value: frozenset[int], before: int = 0):
        self.found: list[tuple[Any, Any, str]] = []
        for at, value in enumerate(args):
            if type(value) is not Tensor and at not in by_value:
                self._walk(value, f"args[{at - before}]")
        for key, value in kwargs.items():
            self._walk(value, f"keyword argument {key!r}")

    def _walk(self, value: Any, path: str) -> None:
        if not can_fill(value):
            return
        content = _content(value)
        if not isinstance(value, tuple):
            self.found.append((value, content, path))
        if not _is_whole(value):
            for key, child in _items(content):
                self._walk(child, path + _step(value, key))

    def changed(self, out: Any = None) -> list[int]:
        """The numbers of those that do not hold what they held, but for what is part of ``out``."""
        found = [at for at, (value, held, _) in enumerate(self.found) if not _same(_content(value), held)]
        if not found or out is None:
            return found
        returned = Given((out,), {}, frozenset()).found
        return [at for at in found if all(self.found[at][0] is not value for value, *_ in returned)]

    def name(self, number: int) -> str:
        """What errors call the first thing in a container that is not what it was."""
        value, held, path = self.found[number]
        now, before = dict(_items(_content(value))), dict(_items(held))
        keys = [key for key in {**now, **before} if not (key in now and key in before and _is(now[key], before[key]))]
        return path if _is_whole(value) or not keys else path + _step(value, keys[0])

    def contents(self, numbers: list[int], leaves: list[Any]) -> list[tuple[int, Any]] | None:
        """What some of them hold now, with marks for what the caller has; None if only the body can have it.

        ``leaves`` are those that the body was given.
        """
        marks = {id(leaf): _Known("leaf", at) for at, leaf in enumerate(leaves) if type(leaf) not in SCALARS}
        marks.update((id(value), _Known("container", at)) for at, (value, *_) in enumerate(self.found))

        def marked(value: Any) -> Any:
            return marks.get(id(value), value)

        found: list[tuple[int, Any]] = []
        for number in numbers:
            value = self.found[number][0]
            items = [(key, _tree.map_leaves(marked, marked(child))) for key, child in _items(_content(value))]
            inside = [leaf for _, child in items for leaf in _tree.flatten(child)[0]]
            if _is_whole(value) or any(isinstance(leaf, (nn.Module, Variable)) for leaf in inside):
                return None
            found.append((number, items))
        return found

    def fill(self, contents: list[tuple[int, Any]], leaves: list[Any]) -> None:
        """Puts the :meth:`contents` of a body's containers into these, which are the caller's."""

        def known(value: Any) -> Any:
            if not isinstance(value, _Known):
                return value
            return leaves[value.number] if value.kind == "leaf" else self.found[value.number][0]

        for number, items in contents:
            value = self.found[number][0]
            now = [(key, _tree.map_leaves(known, child)) for key, child in items]
            if isinstance(value, _ROWS):
                value.clear()
                value.extend([child for _, child in now])
                continue
            old = value if isinstance(value, dict) else value.__dict__
            for key in [key for key in old if all(key != other for other, _ in now)]:
                del old[key]
            for key, child in now:
                if key not in old or old[key] is not child:
                    old[key] = child


def _content(value: Any) -> Any:
    """A copy of what a container holds."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (*_ROWS, tuple)):
        return list(value)
    if _tree.is_node(value):
        return dict(vars(value)) if hasattr(value, "__dict__") else _tree.flatten(value)[0]
    return _tree.flatten(value)[0]


def _is_whole(value: Any) -> bool:
    """Whether a container is known by its leaves alone: one of a class that is registered with torch's trees."""
    if isinstance(value, (*_ROWS, tuple, dict)):
        return False
    return not _tree.is_node(value) or not hasattr(value, "__dict__")


def _items(content: Any) -> list[tuple[Any, Any]]:
    return list(content.items() if isinstance(content, dict) else enumerate(content))


def _step(value: Any, key: Any) -> str:
    return f"[{key!r}]" if isinstance(value, (*_ROWS, tuple, dict)) else f".{key}"


def _is(now: Any, before: Any) -> bool:
    # By identity: what is put into a container may be equal to what was there and be another tensor.
    return now is before or (type(now) in SCALARS and type(now) is type(before) and bool(now == before))


def _same(now: Any, held: Any) -> bool:
    if len(now) != len(held):
        return False
    if isinstance(held, dict):
        return all(key in now and _is(now[key], value) for key, value in held.items())
    return all(_is(a, b) for a, b in zip(now, held))
