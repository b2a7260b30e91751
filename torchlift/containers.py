"""Plain lists, dicts and sets that a module keeps: what a body put into them.

NOTE [Plain containers]. The shadow of a module holds the very lists and dicts of the module itself, but for those with
tensors or modules in them, since code around the model may hold them too. So what a body puts into one outlives the
body, and a tensor there would be a dead tracer. A number is left there, as plain torch leaves it, where the body runs
in the module's own name; not by apply, which changes nothing, nor by one layer in the name of all.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

from torch import Tensor, nn

from torchlift import _tree
from torchlift.collecting import CONTAINERS, derived_attributes
from torchlift.nodes import INTERNALS, LONG
from torchlift.references import elements
from torchlift.unread import Unread


class Held:
    """A container, and what it held when this was made."""

    def __init__(self, container: Any):
        self.container, self.size = container, len(container)
        self.keys = list(container) if isinstance(container, dict) and self.size <= LONG else []
        # To copy a vocabulary at each call would take too long: of one that large, only what comes on top is seen.
        self.values = _values(container) if self.size <= LONG else None

    def added(self) -> list[Any]:
        """What is in the container that was not."""
        if self.values is None:
            at_end = self.container.values() if isinstance(self.container, dict) else self.container
            return list(itertools.islice(at_end, self.size, None)) if len(at_end) > self.size else []
        now = _values(self.container)
        if len(now) == len(self.values) and all(map(operator.is_, now, self.values)):
            return []
        return [value for value in now if all(value is not old for old in self.values)]

    def changed(self) -> bool:
        """Whether the container holds anything else than it did."""
        if self.values is None or len(self.container) != self.size:
            return len(self.container) != self.size
        if isinstance(self.container, dict) and list(self.container) != self.keys:
            return True
        return not all(map(operator.is_, _values(self.container), self.values))

    def restore(self) -> None:
        """Makes the container hold what it held."""
        container, values = self.container, self.values
        if values is None:
            values = list(itertools.islice(_values(container), self.size))
            self.keys = list(itertools.islice(container, self.size)) if isinstance(container, dict) else []
        container.clear()
        if isinstance(container, dict):
            container.update(zip(self.keys, values, strict=True))
        elif isinstance(container, set):
            container.update(values)
        else:
            container.extend(values)


def changed_attributes(module: nn.Module, fields: dict[str, Any], old: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """The plain attributes that a body changed: their values, and whether one holds a tensor that was in none."""
    if len(fields) == len(old) and all(map(operator.is_, fields.values(), old.values())):
        return []
    derived = derived_attributes(module)
    known = [value for value in old.values() if type(value) is not Unread]
    bound = [leaf for value in known for leaf in _tree.flatten(value)[0] if isinstance(leaf, Tensor)]
    found = []
    for key, value in fields.items():
        if key not in derived and key not in INTERNALS and value is not old.get(key, fields):
            tensors = [leaf for leaf in _tree.flatten(value)[0] if isinstance(leaf, Tensor)]
            found.append((key, value, any(all(tensor is not known for known in bound) for tensor in tensors)))
    return found


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def held_in(value: Any) -> list[Held]:
    """The containers in a plain attribute, however deep."""
    own = [Held(value)] if isinstance(value, CONTAINERS) else []
    return [*own, *(held for child in elements(value) or () for held in held_in(child))]


def tensors_in(values: list[Any]) -> list[Tensor]:
    """The tensors in what was added."""
    return [leaf for value in values for leaf in _tree.flatten(value)[0] if isinstance(leaf, Tensor)]
