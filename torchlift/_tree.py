"""Pytrees: torch's own, with dataclasses that nobody registered taken as nodes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchlift._compat import is_compiling, pytree
from torchlift.errors import AxisError


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to put leaves back: torch's TreeSpec, and for each of its leaves that is a dataclass a Spec of its own.

    NOTE [Dataclasses in trees]. ``pytree.register_dataclass`` would do as well, but it changes what every other
    library sees in that class, for the whole process.
    """

    outer: Any
    inner: tuple[Any, ...]  # for each outer leaf: None, or (_Like, field names, Spec of the fields, their leaves)


class _Like:
    """An instance to copy. Equal to any other of its class: what differs between the two are leaves."""

    def __init__(self, instance: Any):
        self.instance = instance

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Like) and type(self.instance) is type(other.instance)

    def __hash__(self) -> int:
        return hash(type(self.instance))


_POSITIONAL = Spec("positional", ())
_LEAF = Spec(pytree.tree_structure(0), (None,))
_ROWS = {(row, n): Spec(pytree.tree_structure(row([0] * n)), (None,) * n) for row in (tuple, list) for n in range(9)}


def is_positional(spec: Spec) -> bool:
    """Whether a spec is that of ``(args, kwargs)`` with tensors for args, and no kwargs."""
    return spec is _POSITIONAL


def is_node(x: Any) -> bool:
    """Whether ``x`` is a dataclass instance that torch's pytrees take for a leaf."""
    if x is None or isinstance(x, type):  # torch 2.11: Dynamo cannot ask the class of None for what a dataclass has
        return False
    return dataclasses.is_dataclass(x) and type(x) not in pytree.SUPPORTED_NODES


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Spec]:
    """The leaves of ``tree``, None and modules among them, and how to put them back."""
    if type(tree) is tuple and len(tree) == 2 and type(tree[0]) is tuple and type(tree[1]) is dict and is_leaf is None:
        if not tree[1] and all(isinstance(x, Tensor) for x in tree[0]):
            return list(tree[0]), _POSITIONAL  # (args, kwargs) of the commonest calls, at a tenth of the time
    if is_leaf is None and not is_compiling():  # and the commonest results
        if isinstance(tree, Tensor):
            return [tree], _LEAF
        row = _ROWS.get((type(tree), len(tree))) if isinstance(tree, (tuple, list)) else None
        if row is not None and all(isinstance(x, Tensor) for x in tree):
            return list(tree), row
    outer_leaves, outer = pytree.tree_flatten(tree, is_leaf)
    leaves: list[Any] = []
    inner: list[Any] = []
    for leaf in outer_leaves:
        if is_node(leaf):
            names = tuple(field.name for field in dataclasses.fields(leaf))
            sub_leaves, sub_spec = flatten([getattr(leaf, name) for name in names], is_leaf)
            leaves.extend(sub_leaves)
            inner.append((_Like(leaf), names, sub_spec, len(sub_leaves)))
        else:
            leaves.append(leaf)
            inner.append(None)
    return leaves, Spec(outer, tuple(inner))


def flatten_like(tree: Any, like: Spec) -> tuple[list[Any], Spec]:
    """:func:`flatten`, with the keys of dicts in the order of those in ``like``: which is first is no structure."""
    leaves, spec = flatten(tree)
    if spec == like or len(leaves) != _leaf_count(like):
        return leaves, spec
    try:
        shape = unflatten([None] * len(leaves), like)
    except Exception:  # of a class that is not made of anything: what is no plain dict has no other order
        return leaves, spec
    return flatten(_in_order(tree, shape))


def _leaf_count(spec: Spec) -> int:
    """How many leaves a tree has; that of ``(args, kwargs)``, of whatever number, has no count."""
    return sum(1 if part is None else _leaf_count(part[2]) for part in spec.inner)


def _in_order(tree: Any, like: Any) -> Any:
    if type(tree) is not type(like):
        return tree
    if type(tree) is dict:
        return {key: _in_order(tree[key], like[key]) for key in like} if tree.keys() == like.keys() else tree
    if isinstance(tree, (list, tuple)) and len(tree) == len(like):
        new = [_in_order(*pair) for pair in zip(tree, like)]
        return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)
    if is_node(tree):
        names = tuple(field.name for field in dataclasses.fields(tree))
        return _replace(tree, names, [_in_order(getattr(tree, name), getattr(like, name)) for name in names])
    return tree


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    """The tree that :func:`flatten` took apart, with these leaves."""
    if spec is _POSITIONAL:
        return tuple(leaves), {}
    if spec is _LEAF:
        return leaves[0]
    outer_leaves: list[Any] = []
    at = 0
    for inner in spec.inner:
        if inner is None:
            outer_leaves.append(leaves[at])
            at += 1
        else:
            template, names, sub_spec, count = inner
            outer_leaves.append(_replace(template.instance, names, unflatten(leaves[at : at + count], sub_spec)))
            at += count
    return pytree.tree_unflatten(outer_leaves, spec.outer)


def form(spec: Spec) -> Any:
    """A hashable stand-in for a Spec, which does not keep its dataclasses, and their tensors, alive."""
    if not any(spec.inner):
        return spec.outer
    inner = [part and (type(part[0].instance), part[1], form(part[2])) for part in spec.inner]
    return (spec.outer, *inner)


def beside_fields(spec: Spec) -> list[dict[str, Any]]:
    """What each dataclass in a tree has of attributes that are no fields: they stay with the instance to copy."""
    found: list[dict[str, Any]] = []
    for inner in spec.inner:
        if inner is not None:
            template, names, sub_spec, _ = inner
            own = getattr(template.instance, "__dict__", {})
            found += [{key: value for key, value in own.items() if key not in names}, *beside_fields(sub_spec)]
    return found


def _replace(template: Any, names: tuple[str, ...], values: list[Any]) -> Any:
    # Not dataclasses.replace: it runs __post_init__ again, which may look at values that are tracers now.
    new = copy.copy(template)
    # One that is a dict besides, such as a model output, has each field as an item too, and keeps them in step itself.
    put = setattr if isinstance(new, dict) else object.__setattr__
    for name, value in zip(names, values, strict=True):
        put(new, name, value)
    return new


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` applied to each leaf."""
    leaves, spec = flatten(tree)
    return unflatten([fn(leaf) for leaf in leaves], spec)


def kind(tree: Any) -> str:
    """What errors call the top of a tree; a tensor by one name, also where a capture has a fake in its place."""
    return "Tensor" if isinstance(tree, Tensor) else type(tree).__name__


def paths(tree: Any) -> list[str]:
    """A readable path for each leaf of ``tree``, in the order of :func:`flatten`."""
    found: list[str] = []
    try:
        named = pytree.tree_flatten_with_path(tree)[0]
    except ValueError:  # of a class that was registered without names for what is in it
        return [f"[{number}]" for number in range(len(flatten(tree)[0]))]
    for path, leaf in named:
        here = pytree.keystr(path)
        if is_node(leaf):
            for field in dataclasses.fields(leaf):
                found.extend(f"{here}.{field.name}{sub}" for sub in paths(getattr(leaf, field.name)))
        else:
            found.append(here)
    return found


def argument_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What errors call each leaf of ``(args, kwargs)``: ``args[0]['mask']``, ``keyword argument 'mask'``."""
    by_name = [path[1:].replace("]", "", 1) for path in paths(kwargs)]
    return [f"args{path}" for path in paths(args)] + [f"keyword argument {name}" for name in by_name]


def broadcast_prefix(prefix: Any, tree: Any, where: str, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """``prefix``, a tree of axes that is a prefix of ``tree``, with one axis for each leaf of ``tree``.

    Axes are whatever is no list, tuple or dict: ints, None, ``broadcast``. A None in ``prefix`` covers a whole subtree.
    """
    if not isinstance(prefix, (list, tuple, dict)):
        # Dynamo cannot flatten a None that is part of what it takes for a constant.
        one = tree is None or (is_leaf is not None and is_leaf(tree))
        return [prefix] if one else [prefix] * len(flatten(tree, is_leaf)[0])
    if isinstance(prefix, dict):
        if not isinstance(tree, dict) or set(prefix) != set(tree):
            raise AxisError(f"{where}: axes {prefix!r} do not fit a value with {_describe(tree)}")
        children = [(prefix[key], tree[key]) for key in tree]
    else:
        if not isinstance(tree, (list, tuple)) or len(prefix) != len(tree) or (is_leaf is not None and is_leaf(tree)):
            raise AxisError(f"{where}: axes {prefix!r} do not fit a value with {_describe(tree)}")
        children = list(zip(prefix, tree, strict=True))
    return [axis for sub, subtree in children for axis in broadcast_prefix(sub, subtree, where, is_leaf)]


def _describe(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"keys {sorted(map(str, tree))}"
    if isinstance(tree, (list, tuple)):
        return f"{len(tree)} elements"
    return f"type {type(tree).__name__}"
