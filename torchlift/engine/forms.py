"""What tensors were like at the last call of a kind."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from torchlift import _compat

KINDS = 128  # of calls


_is_nested = operator.attrgetter("is_nested")


class Likeness:
    """What a row of tensors is like, for others to be held against: 1 us for a dozen, where Python takes 40."""

    def __init__(self, tensors: list[torch.Tensor]):
        self._count, (once, self._places) = len(tensors), _once(tensors)
        self._check = _compat.tensor_guards(once)

    def fits(self, tensors: list[torch.Tensor]) -> bool:
        """Whether others are like these, one by one. It may be False where they are."""
        if len(tensors) != self._count or any(map(_is_nested, tensors)):
            return False
        once, places = _once(tensors)
        return places == self._places and self._check(*once)


def _once(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int] | None]:
    """``tensors`` without those that occur again; and if any does, where each was first."""
    if len({*map(id, tensors)}) == len(tensors):
        return tensors, None
    first: dict[int, int] = {}
    places = [first.setdefault(id(t), at) for at, t in enumerate(tensors)]
    return [tensors[at] for at in first.values()], places


class Forms:
    """Per kind of call what its tensors were like at last, and what was found out about them then.

    A training loop asks the same at each step. To hold a dozen tensors against those of the step before takes a
    microsecond, and to describe them so that a dict can tell them from all others takes twenty.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[Likeness, Any]] = OrderedDict()

    def find(self, kind: Hashable, tensors: list[torch.Tensor]) -> tuple[Likeness, Any] | None:
        """Their form and what was noted of it, if those of the last call were like these."""
        known = self._known.get(kind)
        return known if known is not None and known[0].fits(tensors) else None

    def note(self, kind: Hashable, tensors: list[torch.Tensor], found: Any = None) -> Likeness:
        """Notes what was ``found``, in the place of what was known of this kind. All of ``tensors`` must be plain."""
        form = Likeness(tensors)
        self._known.pop(kind, None)  # to the end, whatever other threads do
        self._known[kind] = form, found
        while len(self._known) > KINDS:
            self._known.popitem(last=False)
        return form

    def clear(self) -> None:
        self._known.clear()
