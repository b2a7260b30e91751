"""Trees as constants: a structure that Dynamo can trace, put in a graph, and rebuild a tree from.

``torch.utils._pytree`` specs are objects that Dynamo neither takes nor gives across a call that it does not trace.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any

import torch

# NOTE [classes]: Dynamo takes no class from a function that it does not trace, but it looks up the attributes of a
# module when it meets them.
_classes = types.ModuleType("torchlift.engine.structure.classes")


@torch.compiler.assume_constant_result
def _name_of(cls: type) -> str:
    name = re.sub(r"\W", "_", f"{cls.__module__}_{cls.__qualname__}")
    while getattr(_classes, name, cls) is not cls:  # another class of that name
        name += "_"
    setattr(_classes, name, cls)
    return name


def encode(tree: Any, leaves: list[Any], static: bool = False) -> Any:
    """The structure of ``tree`` in nested tuples; its leaves are appended to ``leaves``.

    With ``static`` only tensors go to ``leaves``; other values become part of the structure.
    """
    if isinstance(tree, dict):
        return ("dict", tuple(tree.keys()), tuple([encode(v, leaves, static) for v in tree.values()]))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return ("named", _name_of(type(tree)), tuple([encode(v, leaves, static) for v in tree]))
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return (kind, None, tuple([encode(v, leaves, static) for v in tree]))
    if static and not isinstance(tree, torch.Tensor):
        return ("value", tree, ())
    leaves.append(tree)
    return ("leaf", None, ())


def decode(structure: Any, leaves: Iterator[Any]) -> Any:
    """The tree of :func:`encode`'s structure, with ``leaves`` in order."""
    kind, what, parts = structure
    if kind == "leaf":
        return next(leaves)
    if kind == "value":
        # Dynamo cannot flatten a None that is part of what it takes for a constant.
        return None if what is None else what
    children = [decode(part, leaves) for part in parts]
    if kind == "dict":
        return dict(zip(what, children))
    if kind == "named":
        return getattr(_classes, what)(*children)
    return children if kind == "list" else tuple(children)


def mutable(tree: Any) -> Any:
    """``tree`` with plain dicts and lists where a graph held it as immutable ones."""
    if isinstance(tree, dict):
        return {key: mutable(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(mutable, tree))
    if isinstance(tree, list | tuple):
        return (list if isinstance(tree, list) else tuple)(map(mutable, tree))
    return tree
