"""The loop as a definition: what every compiled path must equal.

The engine knows pytrees of tensors and nothing of modules. A :class:`Body` is one iteration,
``(consts, carry, x) -> (carry, y)``; :func:`plain_run` calls it in an ordinary Python loop.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from torchlift import _compat
from torchlift._compat import pytree
from torchlift.engine.draws import devices_of, read_states, write_states
from torchlift.engine.spans import at_iteration
from torchlift.errors import CarryError, IterationError, OptionError

Tree = Any


@dataclass(frozen=True)
class Body:
    """One iteration of a loop.

    ``fn(consts, carry, x) -> (carry, y)`` takes and returns pytrees and is pure, but for draws from torch's default
    generators. ``key`` is a content key: two bodies with equal keys, given inputs of equal signature, compute the
    same thing. ``name`` is for messages. ``names(index)`` tells what the modules that an iteration works on are called
    in profiler traces.
    """

    fn: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    key: Hashable
    name: str
    names: Callable[[int], Sequence[str]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Stacked:
    """A pytree whose every tensor leaf has the iterations on axis 0; other leaves are the same in all of them."""

    tree: Tree


Xs = Stacked | list[Tree]


def check_arguments(body: Body, xs: Xs, length: int, unroll: int | str, lengths: Sequence[int] | None) -> None:
    """Refuses sizes that do not fit each other."""
    if isinstance(xs, Stacked):
        for path, leaf in pytree.tree_flatten_with_path(xs.tree)[0]:
            if isinstance(leaf, torch.Tensor) and (leaf.ndim == 0 or leaf.shape[0] != length):
                got = "no axis 0" if leaf.ndim == 0 else f"{leaf.shape[0]} on axis 0"
                raise IterationError(f"{body.name}: xs{pytree.keystr(path)} has {got}, expected {length}")
    elif len(xs) != length:
        raise IterationError(f"{body.name}: xs has {len(xs)} entries, expected {length}")
    if unroll != "auto" and not (isinstance(unroll, int) and unroll >= 1):
        raise OptionError(f"{body.name}: unroll is {unroll!r}, expected 1 or more, or 'auto'")
    if lengths is not None and math.prod(lengths) != length:
        raise OptionError(f"{body.name}: the product of lengths {tuple(lengths)} is not the length {length}")


def plain_run(
    body: Body,
    consts: Tree,
    carry: Tree,
    xs: Xs,
    length: int,
    *,
    reverse: bool = False,
    shared_draws: bool = False,
    remat: Any = None,
    lengths: Sequence[int] | None = None,
    every: int = 1,
) -> tuple[Tree, Xs]:
    """Runs ``body`` in a Python loop under ordinary autograd; returns the last carry and the ys.

    ``remat`` recomputes in backward: ``True`` keeps only the carries, a policy decides otherwise. With ``lengths``
    the loop is a nest whose levels are all recomputed; with ``every`` it is cut in pieces of that many iterations.
    """
    slices = slices_of(xs, length)
    if length == 0:
        return carry, empty_ys(body, consts, carry, xs)
    if lengths is not None and remat is None:
        remat = True
    ys: list[Tree] = [None] * length
    tensors = [leaf for leaf in pytree.tree_leaves((consts, carry, slices[0])) if isinstance(leaf, torch.Tensor)]
    start = read_states(devices_of(tensors)) if shared_draws else None
    fn = _checked(body, carry)
    order = list(range(length))[:: -1 if reverse else 1]

    def piece(consts: Tree, carry: Tree, part: tuple[Tree, ...], first: int) -> tuple[Tree, tuple[Tree, ...]]:
        outs = []
        for offset, x in enumerate(part):
            if start is not None and first + offset > 0:
                write_states(start)
            at_iteration(order[first + offset])
            carry, y = fn(consts, carry, x)
            outs.append(y)
        return carry, tuple(outs)

    pieces: _Pieces = piece
    for size in (every,) if lengths is None else itertools.accumulate((1, *reversed(lengths[1:])), operator.mul):
        pieces = _in_pieces(pieces, size, remat)
    carry, outs = pieces(consts, carry, tuple(slices[i] for i in order), 0)
    for i, y in zip(order, outs):
        ys[i] = y
    return carry, stack(body.name, ys) if isinstance(xs, Stacked) else ys


_Pieces = Callable[[Tree, Tree, tuple[Tree, ...], int], tuple[Tree, tuple[Tree, ...]]]


def _in_pieces(inner: _Pieces, size: int, remat: Any) -> _Pieces:
    """Iterations cut into pieces of ``size``, each run by ``inner`` and, with ``remat``, recomputed in backward."""
    if remat is not None:
        from torchlift.engine.remat import checkpointed

        inner = checkpointed(inner, None if remat is True else remat)

    def run(consts: Tree, carry: Tree, part: tuple[Tree, ...], first: int) -> tuple[Tree, tuple[Tree, ...]]:
        outs: list[Tree] = []
        for at in range(0, len(part), size):
            carry, some = inner(consts, carry, part[at : at + size], first + at)
            outs.extend(some)
        return carry, tuple(outs)

    return run


def slices_of(xs: Xs, length: int) -> list[Tree]:
    """The x of every iteration.

    NOTE [unbind]: ``leaf[i]`` would cost O(length**2) in backward, ``unbind`` costs O(length).
    """
    if not isinstance(xs, Stacked):
        return xs
    leaves, spec = pytree.tree_flatten(xs.tree)
    cut = [leaf.unbind(0) if isinstance(leaf, torch.Tensor) else (leaf,) * length for leaf in leaves]
    return [pytree.tree_unflatten([leaf[i] for leaf in cut], spec) for i in range(length)]


def stack(name: str, ys: list[Tree]) -> Stacked:
    """The ys of all iterations as one tree with the iterations on axis 0; leaves that are no tensors must agree."""
    first, spec = pytree.tree_flatten(ys[0])
    columns: list[list[Any]] = [[leaf] for leaf in first]
    for y in ys[1:]:
        leaves, other = pytree.tree_flatten(y)
        if other != spec:
            raise IterationError(
                f"{name}: an iteration returned ys of structure {other}, another one {spec}; expected the same in each"
            )
        for column, leaf in zip(columns, leaves):
            column.append(leaf)
    return Stacked(pytree.tree_unflatten([_stack_leaves(name, column) for column in columns], spec))


def _stack_leaves(name: str, column: list[Any]) -> Any:
    if isinstance(column[0], torch.Tensor):
        for leaf in column:
            if leaf.shape != column[0].shape or leaf.dtype != column[0].dtype:
                raise IterationError(
                    f"{name}: an iteration returned a y of {leaf.dtype} {list(leaf.shape)}, another one of "
                    f"{column[0].dtype} {list(column[0].shape)}; expected the same in each"
                )
        return torch.stack(column)
    if any(leaf != column[0] for leaf in column[1:]):
        raise IterationError(
            f"{name}: what an iteration returned beside tensors differs: {column[0]!r} and others; return a tensor "
            "instead"
        )
    return column[0]


def empty_ys(body: Body, consts: Tree, carry: Tree, xs: Xs) -> Xs:
    """The ys of a loop of length 0: shapes one iteration would give, with 0 on the axis; nothing is computed."""
    if not isinstance(xs, Stacked):
        return []
    x = pytree.tree_map_only(torch.Tensor, lambda t: t.new_zeros(t.shape[1:]), xs.tree)
    # Dynamo's tensors are fakes already, and its graph drops what nobody uses.
    _, y = (body.fn if _compat.is_compiling() else functools.partial(_compat.run_on_fakes, body.fn))(consts, carry, x)
    return Stacked(pytree.tree_map_only(torch.Tensor, lambda t: _new_empty(t), y))


def _new_empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty((0, *like.shape), dtype=like.dtype, device=like.device)


def _checked(body: Body, carry: Tree) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """``body.fn``, refusing a carry that does not come out as it went in."""
    expected, spec = pytree.tree_flatten(carry)

    def fn(consts: Tree, carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        new, y = body.fn(consts, carry, x)
        check_carry(body.name, carry, expected, spec, new)
        return new, y

    return fn


def check_carry(name: str, old: Tree, expected: list[Any], spec: pytree.TreeSpec, new: Tree) -> None:
    """Raises :class:`CarryError` unless ``new`` has the structure, shapes, dtypes and other values of ``old``."""
    got, new_spec = pytree.tree_flatten(new)
    if new_spec != spec:
        raise _carry_error(name, "", f"structure {new_spec}", f"{spec}")
    for i, (a, b) in enumerate(zip(expected, got)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape:
                _refuse(name, old, i, f"shape {tuple(b.shape)}", f"{tuple(a.shape)}")
            if a.dtype != b.dtype:
                _refuse(name, old, i, f"dtype {b.dtype}", f"{a.dtype}")
        elif isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a != b:
            _refuse(name, old, i, _kind(b), _kind(a))


def _refuse(name: str, old: Tree, i: int, got: str, expected: str) -> NoReturn:
    raise _carry_error(name, pytree.keystr(pytree.tree_flatten_with_path(old)[0][i][0]), got, expected)


def _carry_error(name: str, path: str, got: str, expected: str) -> CarryError:
    return CarryError(
        f"{name}: carry{path} came out of an iteration as {got}, expected {expected}; "
        "return the carry with the structure, shapes and dtypes that it came in with, or start from one like that"
    )


def _kind(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"{leaf!r}"
