"""Group: what a transform does with each collection of variables and each random stream."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchlift import _compat, rng
from torchlift.errors import AxisError, FilterError
from torchlift.filters import Filter, In, Out, check, first_match, listed, matches
from torchlift.variables import ATTRIBUTE, PARAMS

_UNTOLD: Any = object()


@dataclass(frozen=True)
class Role:
    """What happens to one collection.

    ``axis``: the axis of the variables that is mapped or scanned over; None where all indices share them.
    ``out_axis``: where the axis of new values goes. ``carried``: each iteration of a loop gets the values of the one
    before. ``writable``: the body may change them. ``hidden``: the body creates them and sees none before.
    """

    axis: int | None
    out_axis: int | None
    carried: bool = False
    writable: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Groups:
    """The collection and stream arguments of one ``vmap`` or ``scan``.

    NOTE [State follows params]. Where ``params`` has an axis, a collection or stream that is not listed takes the
    same axis (streams: split): a layer with batch-norm and dropout is stacked by naming its parameters alone. Where
    ``params`` is shared, an unlisted collection is shared and read-only, and an unlisted stream may not be drawn from.
    """

    label: str
    variable_axes: Mapping[Any, Any] = field(default_factory=dict)
    broadcast: Filter = False
    carry: Filter = False
    split_rngs: Mapping[Any, Any] = field(default_factory=dict)
    _roles: dict[str, Role] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, mapping, example in (
            ("variable_axes", self.variable_axes, {"params": 0}), ("split_rngs", self.split_rngs, {"dropout": True})
        ):  # fmt: skip
            if not isinstance(mapping, Mapping):
                raise FilterError(f"{self.label}: {name} is {mapping!r}, expected a dict such as {example}")
            for filter in mapping:
                check(filter, f"{self.label}: {name}")
        check(self.broadcast, f"{self.label}: variable_broadcast")
        check(self.carry, f"{self.label}: variable_carry")
        for filter, axis in self.variable_axes.items():
            inner = axis.axis if isinstance(axis, (In, Out)) else axis
            if inner is not None and (not isinstance(inner, int) or isinstance(inner, bool)):
                raise AxisError(
                    f"{self.label}: variable_axes[{filter!r}] is {axis!r}, expected an int, None, In(axis) or Out(axis)"
                )
        for filter, split in self.split_rngs.items():
            if not isinstance(split, bool):
                raise FilterError(f"{self.label}: split_rngs[{filter!r}] is {split!r}, expected True or False")

    def role(self, collection: str) -> Role:
        """What happens to ``collection``."""
        if _compat.is_compiling():  # Dynamo lets nothing be kept from the body of a higher-order operator
            return self._role(collection)
        if collection not in self._roles:
            self._roles[collection] = self._role(collection)
        return self._roles[collection]

    def _role(self, collection: str) -> Role:
        if collection == ATTRIBUTE:
            return Role(None, None)
        axis = first_match(self.variable_axes, collection, _UNTOLD)
        told = [
            name
            for name, says in (
                ("variable_axes", axis is not _UNTOLD),
                ("variable_broadcast", matches(self.broadcast, collection)),
                ("variable_carry", matches(self.carry, collection)),
            )
            if says
        ]
        if len(told) > 1:
            raise FilterError(f"{self.label}: collection {collection!r} is in {' and in '.join(told)}; keep it in one")
        if told == ["variable_carry"]:
            return Role(None, None, carried=True, writable=True)
        if told == ["variable_broadcast"]:
            return Role(None, None)
        if axis is _UNTOLD:
            if collection == PARAMS:
                return Role(None, None)
            follows = self.role(PARAMS).axis
            return Role(follows, follows, writable=follows is not None)
        if isinstance(axis, In):
            return Role(axis.axis, axis.axis)
        if isinstance(axis, Out):
            return Role(None, axis.axis, writable=True, hidden=True)
        return Role(axis, axis, writable=True)

    def sown_axis(self, collection: str) -> int:
        """Where the axis of values sown in ``collection`` goes: 0 unless told otherwise."""
        axis = first_match(self.variable_axes, collection, 0)
        axis = axis.axis if isinstance(axis, (In, Out)) else axis
        return 0 if axis is None else axis

    def splits(self, stream: str) -> bool | None:
        """Whether ``stream`` differs from index to index; None if this transform was not told."""
        if listed(self.split_rngs, stream):
            return first_match(self.split_rngs, stream, True)
        return True if self.role(PARAMS).axis is not None else None

    def untold_streams(self, streams: Iterable[str]) -> list[str]:
        """The streams, ``dropout`` among them, that may not be drawn from."""
        return [stream for stream in sorted({rng.DROPOUT, *streams}) if self.splits(stream) is None]

    @property
    def has_axis(self) -> bool:
        """Whether any collection may have an axis."""
        return any(
            (a.axis if isinstance(a, In) else a) is not None
            for a in self.variable_axes.values()
            if not isinstance(a, Out)
        )


_KNOWN = 512
_known: OrderedDict[str, tuple[Any, Groups]] = OrderedDict()


def groups_of(
    label: str, variable_axes: Mapping[Any, Any], broadcast: Filter, carry: Filter, split_rngs: Mapping[Any, Any]
) -> Groups:
    """The :class:`Groups` of these arguments; the same ones as at the last call, if nobody has changed those since.

    To make them takes 10 us of each call. They are not kept by the transform: what that holds is part of what tells
    one body from another.
    """
    given = (variable_axes, broadcast, carry, split_rngs)
    if _compat.is_compiling():  # see `Groups.role`
        return Groups(label, *given)
    known = _known.get(label)
    if known is None or known[0] != given:
        made = Groups(label, *given)
        known = _known[label] = copy.deepcopy(given), made
        while len(_known) > _KNOWN:
            _known.popitem(last=False)
    return known[1]
