"""Names in filters that nothing has, where something has a name much like it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from torchlift import rng
from torchlift.errors import TorchliftWarning, likely, warn
from torchlift.filters import DenyList
from torchlift.variables import ATTRIBUTE, BATCH_STATS, BUFFERS, PARAMS

# What code for any module names, whether this one has it or not.
_USUAL = {PARAMS, BATCH_STATS, BUFFERS, "intermediates", rng.DROPOUT}
_seen: weakref.WeakKeyDictionary[type[nn.Module], set[Any]] = weakref.WeakKeyDictionary()

Named = tuple[tuple[str, tuple[str, ...]], ...]


def named(arguments: Mapping[str, Any]) -> Named:
    """The names in filters, or in mappings from filters, by argument; nothing where all of them are usual."""
    found = tuple((argument, tuple(_names(filter))) for argument, filter in arguments.items())
    return found if any(name not in _USUAL for _, names in found for name in names) else ()


def _names(filter: Any) -> Iterable[str]:
    if isinstance(filter, str):
        return [filter]
    if isinstance(filter, DenyList):
        return _names(filter.deny)
    several = isinstance(filter, (list, tuple, set, frozenset, Mapping))
    return [name for part in filter for name in _names(part)] if several else []


def warn_misspelt(module: nn.Module, label: str, given: Named, known: Callable[[], Iterable[str]]) -> None:
    """Warns of names that are not ``known`` after a call, where one that is, and was not given, is much like it.

    A name that nobody has is no error: a variable may be created in another call. Looked at once for each class of
    modules.
    """
    key = (label.partition("(")[0], given)
    seen = _seen.setdefault(type(module), set())
    if key in seen:
        return
    seen.add(key)
    there = set(known()) - {ATTRIBUTE}
    free = sorted(there.difference(*(names for _, names in given)))
    for argument, names in given:
        for name in names:
            meant = None if name in there or name in _USUAL else likely(name, free)
            if meant is not None:
                warn(
                    f"{label}: {argument} names {name!r}, but for {type(module).__name__} there are only "
                    f"{sorted(there)}; did you mean {meant!r}?",
                    TorchliftWarning,
                )
