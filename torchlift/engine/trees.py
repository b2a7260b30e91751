"""Pytrees as the engine sees them: a list of tensors, and a hashable template of everything else."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torchlift._compat import pytree

Tree = Any


@dataclass(frozen=True)
class Template:
    """A pytree less its tensors: its structure and its other leaves, of which ``1`` and ``True`` are not equal."""

    spec: pytree.TreeSpec
    others: tuple[tuple[int, type, Any], ...]  # (position, type, value) of every leaf that is no tensor
    tensors: int

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # A slice has no hash before Python 3.12.
        others = [(at, (v.start, v.stop, v.step) if kind is slice else v) for at, kind, v in self.others]
        return hash((self.spec, *others))  # that of a spec takes longer than all else in a search for a program

    def fill(self, tensors: Iterable[Any]) -> Tree:
        """The pytree with ``tensors``, or what stands for them, in its slots."""
        if not self.others:
            return pytree.tree_unflatten(list(tensors), self.spec)
        leaves = list(tensors)
        for position, _, value in self.others:
            leaves.insert(position, value)
        return pytree.tree_unflatten(leaves, self.spec)


class Parts:
    """A pytree that is split already."""

    __slots__ = ("template", "tensors")

    def __init__(self, tensors: list[torch.Tensor], template: Template):
        self.tensors, self.template = tensors, template


def whole(tree: Tree) -> Tree:
    """``tree``, put together if it comes in parts."""
    return tree.template.fill(tree.tensors) if type(tree) is Parts else tree


def split(tree: Tree) -> tuple[list[torch.Tensor], Template]:
    """``tree`` as its tensors and its template; the template hashes only if its other leaves do."""
    if type(tree) is Parts:
        return tree.tensors, tree.template
    if type(tree) in (list, tuple) and all(isinstance(item, torch.Tensor) for item in tree):
        return list(tree), _row(isinstance(tree, list), len(tree))
    leaves, spec = pytree.tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(tensors) == len(leaves):
        return tensors, Template(spec, (), len(tensors))
    others = tuple((i, type(leaf), leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor))
    return tensors, Template(spec, others, len(tensors))


@functools.cache
def _row(as_list: bool, count: int) -> Template:
    """The template of a list or tuple of so many tensors, as most trees are."""
    row = [0] * count
    return Template(pytree.tree_structure(row if as_list else tuple(row)), (), count)
