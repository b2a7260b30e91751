"""What a loop of modules needs to be one operator of a graph of torch.compile around it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.changes import Meta
from torchlift.engine.handles import Row
from torchlift.engine.loop import Body
from torchlift.engine.opaque import register_body
from torchlift.nodes import INTERNALS, SCALARS
from torchlift.variables import Variable

# NOTE [Tokens]. In a captured graph, and as a constant that Dynamo takes, a string stands for what is static about the
# results of an iteration.
results: dict[str, Any] = {}

_TENSOR = "<tensor>"


def token(static: Any) -> Any:
    """``static``, or in a capture the string that stands for it."""
    if _compat.is_compiling() or not _compat.is_tracing():
        return static
    name = repr(static)
    results[name] = static
    return name


def static_of(found: Any) -> Any:
    """What a :func:`token` stands for."""
    return results[found] if isinstance(found, str) else found


@dataclass(frozen=True)
class Static:
    """What is static about what a layer returns."""

    out: _tree.Spec
    sown: _tree.Spec
    meta: Meta


def constant(leaf: Any) -> Any:
    """A leaf that every iteration gets. Modules and Variables are bound in the body, not given to the engine."""
    return None if isinstance(leaf, (nn.Module, Variable)) else leaf


def skeleton(tree: Any) -> Any:
    """``tree`` with a mark for each tensor: something that Dynamo can hand to a function that it does not trace."""
    return _tree.map_leaves(lambda leaf: _TENSOR if isinstance(leaf, Tensor) else leaf, tree)


def fleshed(tree: Any) -> Any:
    """The tree of a skeleton, with a tensor of no consequence for each mark."""
    return _tree.map_leaves(lambda leaf: torch.empty(()) if isinstance(leaf, str) and leaf == _TENSOR else leaf, tree)


_READ_ALONG = (Tensor, nn.Module, type, list, tuple, dict, set, frozenset)  # by the walk through what modules hold


def settings(modules: Sequence[nn.Module]) -> tuple[bool | str, ...]:
    """The flags and words among the attributes of modules, and of objects that these hold.

    Dynamo traces anew for what it has read while it traced: of flags and words that were only collected no more than
    their type, of objects nothing.
    """
    found: list[bool | str] = []
    todo: list[Any] = [vars(module) for module in modules]
    seen: list[Any] = []
    while todo:
        for key, value in todo.pop().items():
            if key in INTERNALS:
                continue
            if type(value) in (bool, str):
                found.append(value)
            elif type(value) in SCALARS or isinstance(value, _READ_ALONG) or callable(value):
                continue
            elif hasattr(value, "__dict__") and not any(value is other for other in seen):
                seen.append(value)
                todo.append(vars(value))
    return tuple(found)


def register(
    key: str, owners: Sequence[nn.Module], make: Callable[..., Body], policy: Any, row: Row | None = None
) -> str:
    """Makes the body that ``make(*owners)`` builds known to the engine under ``key``; returns ``key``."""
    found = [weakref.ref(owner) for owner in owners]  # the engine keeps what it knows; it shall not keep the model
    return register_body(key, lambda *others: make(*(others or [owner() for owner in found])), policy, row)


@torch.compiler.disable(
    reason="torchlift: no graph can hold this loop: what it does depends on the values of a tensor, or FSDP gathers "
    "parameters of layers that are run again; outside of fullgraph=True it runs between two graphs, in the first case "
    "with a warning that names the line"
)
def out_of_graph(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fn(*args, **kwargs)`` in Python, where Dynamo would break the graph in the midst of this package."""
    return fn(*args, **kwargs)
