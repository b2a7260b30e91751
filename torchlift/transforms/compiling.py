"""What a loop of modules needs to be one operator of a graph of torch.compile around it."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.changes import Meta
from torchlift.code import is_library
from torchlift.engine.handles import Row
from torchlift.engine.loop import Body
from torchlift.engine.opaque import register_body
from torchlift.nodes import INTERNALS, LONG, SCALARS
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


def settings(modules: Sequence[nn.Module]) -> tuple[bool | str, ...]:
    """The flags and words among the attributes of modules, and in objects that these hold.

    Dynamo traces anew for what it has read while it traced: of flags and words that were only collected no more than
    their type, of objects nothing.
    """
    found = [v for module in modules for k, v in vars(module).items() if k not in INTERNALS and type(v) in (bool, str)]
    for at, names in _fields_of_objects(*modules):
        value = modules[at]
        for name in names:
            value = getattr(value, name)
        found += [v for v in _inside(value) if type(v) in (bool, str)]  # asking for the type of a number is reading it
    return tuple(found)


def _inside(value: Any) -> list[Any]:
    """What is in a container, or a value by itself."""
    return list(value.values()) if type(value) is dict else list(value) if type(value) in (list, tuple) else [value]


@torch.compiler.assume_constant_result
def _fields_of_objects(*modules: nn.Module) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Where the plain fields are of the objects that modules keep: the module's number, and a name after the other.

    Found by Python: of what else a module may keep, a logger, a lock or an array, Dynamo can ask next to nothing.
    """
    found: list[tuple[int, tuple[str, ...]]] = []
    todo: list[tuple[int, tuple[str, ...], dict[str, Any]]] = [(at, (), vars(m)) for at, m in enumerate(modules)]
    seen: set[int] = set()
    while todo and len(found) < _FIELDS:
        at, names, fields = todo.pop()
        for name, value in fields.items():
            inner = _inside(value)
            if names and len(inner) <= LONG and all(type(v) in SCALARS for v in inner):
                found.append((at, (*names, name)))
            elif name not in INTERNALS and id(value) not in seen and _is_settings(value):
                seen.add(id(value))
                todo.append((at, (*names, name), vars(value)))
    return tuple(found)


_FIELDS = 256  # of objects: each is a guard of the graph


def _is_settings(value: Any) -> bool:
    """Whether a value is an object of some class of the user's, as configurations are."""
    module = type(value).__module__.partition(".")[0]
    if isinstance(value, (Tensor, nn.Module, type)) or is_library(module) or not hasattr(value, "__dict__"):
        return False
    return module not in sys.stdlib_module_names or type(value) is types.SimpleNamespace


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
