"""Named axes that a body is in: those of the maps around it, and the dimensions of a device mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchlift import _compat
from torchlift._context import context
from torchlift.errors import AxisNameError

Names = str | Sequence[str]


@dataclass(frozen=True)
class NamedAxis:
    """An axis that a body is in, its size, and which index this is: of a map a tensor, that is mapped itself.

    Of a mesh the index is the number of this process, and ``group`` names the processes along the axis.
    """

    name: str
    size: int
    index: Tensor | int
    group: str | None = None


def around() -> tuple[NamedAxis, ...]:
    """The axes that a body is in: those of the mesh that this thread entered (``with mesh:``), then the mapped ones.

    A body that runs again in backward finds the mesh among the axes it was called with (NOTE [Context]).
    """
    mesh = _compat.mesh_dimensions()
    if not mesh:
        return context.axes
    known = {(axis.name, axis.group) for axis in context.axes}
    entered = [NamedAxis(*dimension) for dimension in mesh]
    return (*(axis for axis in entered if (axis.name, axis.group) not in known), *context.axes)


def and_named(name: str | None, size: int, index: Tensor | None) -> tuple[NamedAxis, ...]:
    """The axes that a body is in, and one more if it has a name."""
    if name is None:
        return around()
    assert index is not None
    return (*around(), NamedAxis(name, size, index))


def find(names: Names, where: str) -> list[NamedAxis]:
    """The axes of these names, innermost first where a name is there twice."""
    axes = around()
    found = []
    for name in (names,) if isinstance(names, str) else names:
        axis = next((axis for axis in reversed(axes) if axis.name == name), None)
        if axis is None:
            known = sorted({axis.name for axis in axes})
            raise AxisNameError(
                f"{where}: got the axis name {name!r}, expected one of {known}, the mapped axes around this call and "
                f"the dimensions of the device mesh; name one: torchlift.vmap(..., axis_name={name!r}), or enter the "
                "mesh: with mesh:"
            )
        found.append(axis)
    return found
