"""How many iterations a loop has."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchlift.errors import AxisError
from torchlift.groups import Role


class _Broadcast(enum.Enum):
    """The type of :data:`torchlift.broadcast`; of all things without a value, what Dynamo takes for a constant."""

    BROADCAST = "broadcast"

    def __repr__(self) -> str:
        return "broadcast"


broadcast = _Broadcast.BROADCAST


def length_of(
    label: str, sizes: tuple[int, ...] | None, entries: Sequence[Any], tensors: Sequence[Tensor],
    roles: Sequence[Role], leaves: Sequence[Any], names: Callable[[], list[str]], axes: Sequence[Any], levels: int,
) -> tuple[int, ...]:  # fmt: skip
    """The lengths of the loop's levels, on which all that is scanned must agree."""
    found: dict[Any, tuple[int, ...]] = {} if sizes is None else {"length": sizes}
    for entry, tensor, role in zip(entries, tensors, roles, strict=True):
        if role.axis is not None:
            where = f"{label}: {entry.name!r} in {entry.collection!r}"
            free = tensor.ndim - levels + 1
            if not -free <= role.axis < free:
                shape = tuple(tensor.shape)
                raise AxisError(f"{where} has shape {shape}, which has no axis {role.axis} to scan over")
            axis = role.axis % free
            found[f"{entry.name!r} in {entry.collection!r}"] = tuple(tensor.shape[axis : axis + levels])
            if sizes is not None and found[f"{entry.name!r} in {entry.collection!r}"] != sizes:
                got = found[f"{entry.name!r} in {entry.collection!r}"]
                raise AxisError(f"{where} has {_plain(got)} on axis {axis}, expected {_plain(sizes)}")
    for number, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        if isinstance(leaf, Tensor) and axis is not broadcast and axis is not None:
            if not -leaf.ndim <= axis < leaf.ndim:
                shape = tuple(leaf.shape)
                raise AxisError(f"{label}: {names()[number]} has shape {shape}, which has no axis {axis}")
            found[number] = (leaf.shape[axis],)
    if not found:
        raise AxisError(f"{label}: nothing is scanned over, so the length is not known; pass length=")
    first = next(iter(found.values()))
    if any(size != first for size in found.values()):  # not a set: a size that is symbolic has no hash
        named = {number: f"{name} (axis {axis})" for number, (name, axis) in enumerate(zip(names(), axes, strict=True))}
        listed = ", ".join(f"{named.get(what, what)}: {_plain(size)}" for what, size in found.items())
        raise AxisError(f"{label}: the lengths disagree, expected one: {listed}")
    return first


def _plain(sizes: tuple[int, ...]) -> Any:
    return sizes[0] if len(sizes) == 1 else sizes
