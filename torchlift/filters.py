"""Collection filters: which variable collections, or which random streams, something applies to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torchlift.errors import FilterError

T = TypeVar("T")


@dataclass(frozen=True)
class DenyList:
    """Every name that ``deny`` does not match.

    Args:
        deny: a filter, the complement of which this is.

    Example:
        >>> most = torchlift.DenyList("buffers")
        >>> torchlift.vmap(torch.nn.Linear, variable_axes={most: 0}, axis_size=2)(3, 4).weight.shape
        torch.Size([2, 4, 3])
    """

    deny: Filter

    def __post_init__(self) -> None:
        if isinstance(self.deny, (list, set)):  # a filter is a key of a dict
            object.__setattr__(self, "deny", tuple(sorted(self.deny, key=str)))


@dataclass(frozen=True)
class In:
    """An axis for what goes in only: the collection is mapped over ``axis`` and read-only in the body.

    Args:
        axis: the axis, or None for a collection that is shared.

    Example:
        >>> torchlift.In(0)
        In(axis=0)
    """

    axis: int | None


@dataclass(frozen=True)
class Out:
    """An axis for what comes out only: the collection is hidden from the body, which creates it.

    Args:
        axis: where the new axis goes, or None for variables that are the same at every index.

    Example:
        >>> torchlift.Out(0)
        Out(axis=0)
    """

    axis: int | None


Filter = bool | str | Iterable[str] | DenyList


def check(filter: Any, where: str) -> None:
    """Raises FilterError, naming ``where``, unless ``filter`` is a filter."""
    if isinstance(filter, (bool, str)):
        return
    if isinstance(filter, DenyList):
        check(filter.deny, where)
        return
    if isinstance(filter, (list, tuple, set, frozenset)):
        for name in filter:
            if not isinstance(name, str):
                raise FilterError(f"{where}: a filter lists names, got {name!r} of type {type(name).__name__} in it")
        return
    raise FilterError(
        f"{where}: got {filter!r} of type {type(filter).__name__} as a filter, "
        "expected True, False, a name, a list, tuple or set of names, or DenyList(filter)"
    )


def matches(filter: Filter, name: str) -> bool:
    """Whether ``filter`` selects ``name``."""
    if isinstance(filter, bool):
        return filter
    if isinstance(filter, str):
        return filter == name
    if isinstance(filter, DenyList):
        return not matches(filter.deny, name)
    return name in filter


def first_match(mapping: Mapping[Any, T], name: str, default: T) -> T:
    """The value of the first filter of ``mapping`` that selects ``name``."""
    for filter, value in mapping.items():
        if matches(filter, name):
            return value
    return default


def listed(mapping: Mapping[Any, Any], name: str) -> bool:
    """Whether any filter of ``mapping`` selects ``name``."""
    return any(matches(filter, name) for filter in mapping)
