"""Collectives over named axes: of the maps around a body, or of a device mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchlift import _compat, _tree
from torchlift.errors import AxisError, UnsupportedError
from torchlift.named_axes import NamedAxis, Names, find

# Primitives ----------------------------------------------------------------------------------------------------------
#
# NOTE [Collectives]. Each is an autograd function whose vmap rule sees the batch. Its operand ``index`` is mapped by
# one vmap only, the one whose axis is meant: a vmap that does not map the index lets the function pass to the next one
# outside. Where it does, the rule is an ordinary reduction, which torch differentiates by itself; the formulas below
# serve transforms inside of that vmap, such as ``grad`` in its body. They transpose as in JAX: the cotangent of a sum
# is the sum of all cotangents. An axis of a mesh has no vmap: every map passes the function on, until its forward asks
# the processes of the ``group``.


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, index: Tensor, size: int, group: str | None) -> Tensor:
        x = x.long() if x.dtype is torch.bool else x
        return _compat.all_reduce(x, "sum", _group(group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, *ctx.axis = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        return _sum(cotangent, index, *ctx.axis), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        return _sum(tangent, index, *ctx.axis)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, index: Tensor, size: int, group: str | None
    ) -> tuple[Tensor, int | None]:
        dim, here, *_ = in_dims
        if here is None:
            return _sum(x, index, size, group), dim
        _check_whole(info, size)
        if dim is None:
            return x * size, None
        return x.sum(dim, dtype=None if x.dtype is torch.bool else x.dtype), None


class _Extreme(torch.autograd.Function):
    """The largest or smallest; indices that share it share its gradient, as in ``torch.amax``."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, size: int, group: str | None, kind: str) -> Tensor:
        return _compat.all_reduce(x, kind, _group(group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, *ctx.axis, _ = inputs
        ctx.save_for_backward(x, index, output)
        ctx.save_for_forward(x, index, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, index, out = ctx.saved_tensors
        mask = (x == out).to(cotangent.dtype)
        return _sum(cotangent, index, *ctx.axis) * mask / _sum(mask, index, *ctx.axis), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, index, out = ctx.saved_tensors
        mask = (x == out).to(tangent.dtype)
        return _sum(mask * tangent, index, *ctx.axis) / _sum(mask, index, *ctx.axis)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, index: Tensor, size: int, group: str | None, kind: str
    ) -> tuple[Tensor, int | None]:
        dim, here, *_ = in_dims
        if here is None:
            return _extreme(x, index, size, group, kind), dim
        _check_whole(info, size)
        if dim is None:
            return x.clone(), None
        return (x.amax(dim) if kind == "max" else x.amin(dim)), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, index: Tensor, size: int, group: str | None, dim: int) -> Tensor:
        return _compat.all_gather(x, size, _group(group)).movedim(0, dim).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, *ctx.axis, ctx.dim = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        total = _sum(cotangent, index, *ctx.axis)
        here = index.reshape(1).to(total.device)
        return total.index_select(ctx.dim, here).squeeze(ctx.dim), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        size, group = ctx.axis
        return _gather(tangent, index, size, group, ctx.dim)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, index: Tensor, size: int, group: str | None, dim: int
    ) -> tuple[Tensor, int | None]:
        mapped, here, *_ = in_dims
        if here is None:
            if mapped is None:
                return _gather(x, index, size, group, dim), None
            return _gather(x.movedim(mapped, 0), index, size, group, dim + 1), 0
        _check_whole(info, size)
        if mapped is None:
            return x.unsqueeze(dim).repeat_interleave(size, dim), None
        return x.movedim(mapped, dim).clone(), None  # a function may not return its operand, or a view of it


def _group(group: str | None) -> str:
    if group is None:
        raise UnsupportedError(
            "a collective ran outside of the vmap that names its axis: in code that outlived it, or in a vmap that "
            "runs index by index; call it in the body itself, and split all random streams alike"
        )
    return group


class PartialAxisError(AxisError):
    """A collective was called for some of the indices of its axis."""


def _check_whole(info: Any, size: int) -> None:
    if info.batch_size != size:
        raise PartialAxisError(
            f"a collective got {info.batch_size} of the {size} indices of its axis, expected all of them: leave out "
            "vmap's chunk_size"
        )


# Functions, since Dynamo can be told to keep a function in the graph as it is, which an autograd function's vmap rule
# needs: Dynamo traces its forward, and ignores the rule.


def _sum(x: Tensor, index: Tensor, size: int, group: str | None) -> Tensor:
    return _Sum.apply(x, index, size, group)


def _extreme(x: Tensor, index: Tensor, size: int, group: str | None, kind: str) -> Tensor:
    return _Extreme.apply(x, index, size, group, kind)


def _gather(x: Tensor, index: Tensor, size: int, group: str | None, dim: int) -> Tensor:
    return _Gather.apply(x, index, size, group, dim)


_allow = _compat.kept_in_graphs(_sum, _extreme, _gather)


def _number(axis: NamedAxis) -> Tensor:
    if isinstance(axis.index, int):
        return torch.tensor(axis.index)
    # An operator first: where a body is run again (remat), it is operators that get the index of the new run.
    return axis.index.view_as(axis.index)


def _operands(axis: NamedAxis) -> tuple[Tensor, int, str | None]:
    return _number(axis), axis.size, axis.group


def _mapped(where: str, names: Names, x: Any, one: Callable[[Tensor, NamedAxis], Tensor]) -> Any:
    """``x``, a tree, with ``one`` applied to each leaf for each axis, the last one first."""
    found = find(names, where)
    if _compat.is_compiling():
        _allow()

    def of_leaf(leaf: Any) -> Any:
        leaf = leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
        for axis in reversed(found):
            leaf = one(leaf, axis)
        return leaf

    return _tree.map_leaves(lambda leaf: leaf if leaf is None else of_leaf(leaf), x)


# Collectives ---------------------------------------------------------------------------------------------------------


def psum(x: Any, axis_name: Names) -> Any:
    """The sum of ``x`` over a named axis, the same at every index.

    The counterpart of ``jax.lax.psum``. Works in the body of ``torchlift.vmap(..., axis_name=)``, in maps, loops and
    ``torch.func`` transforms inside of it, and under ``torch.compile``. Its gradient is again a sum over the axis.

    An axis that no map around names may be a dimension of a device mesh that was entered, ``with mesh:``. Then every
    process along that dimension makes the call, with its own ``x``: the same code runs mapped on one machine and
    distributed on many.

    Args:
        x: a tensor or number, or a tree of them.
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.

    Example:
        >>> softmax = torchlift.vmap(lambda m, x: x.exp() / torchlift.psum(x.exp(), "row"), axis_name="row")
        >>> softmax(torch.nn.Identity(), torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _mapped("psum", axis_name, x, lambda leaf, axis: _sum(leaf, *_operands(axis)))


def pmean(x: Any, axis_name: Names) -> Any:
    """The mean of ``x`` over a named axis, the same at every index.

    The counterpart of ``jax.lax.pmean``; see :func:`psum`.

    Args:
        x: a tensor or number, or a tree of them.
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.

    Example:
        >>> centred = torchlift.vmap(lambda m, x: x - torchlift.pmean(x, "row"), axis_name="row")
        >>> centred(torch.nn.Identity(), torch.arange(3.0))
        tensor([-1.,  0.,  1.])
    """
    return _mapped("pmean", axis_name, x, lambda leaf, axis: _sum(leaf, *_operands(axis)) / axis.size)


def pmax(x: Any, axis_name: Names) -> Any:
    """The elementwise maximum of ``x`` over a named axis, the same at every index.

    The counterpart of ``jax.lax.pmax``; see :func:`psum`. Unlike that it has a gradient, which indices that share the
    maximum share, as in ``torch.amax``.

    Args:
        x: a tensor or number, or a tree of them.
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.

    Example:
        >>> torchlift.vmap(lambda m, x: torchlift.pmax(x, "row"), axis_name="row")(torch.nn.Identity(), torch.arange(3))
        tensor([2, 2, 2])
    """
    return _mapped("pmax", axis_name, x, lambda leaf, axis: _extreme(leaf, *_operands(axis), "max"))


def pmin(x: Any, axis_name: Names) -> Any:
    """The elementwise minimum of ``x`` over a named axis, the same at every index.

    The counterpart of ``jax.lax.pmin``; see :func:`pmax`.

    Args:
        x: a tensor or number, or a tree of them.
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.

    Example:
        >>> torchlift.vmap(lambda m, x: torchlift.pmin(x, "row"), axis_name="row")(torch.nn.Identity(), torch.arange(3))
        tensor([0, 0, 0])
    """
    return _mapped("pmin", axis_name, x, lambda leaf, axis: _extreme(leaf, *_operands(axis), "min"))


def all_gather(x: Any, axis_name: Names, *, axis: int = 0, tiled: bool = False) -> Any:
    """The values of ``x`` at all indices of a named axis, in one tensor, the same at every index.

    The counterpart of ``jax.lax.all_gather``; see :func:`psum`. Its gradient is the sum over the axis, at this index.

    Args:
        x: a tensor or number, or a tree of them.
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several, the
            first one major.
        axis: where the gathered axis goes.
        tiled: concatenate on the existing ``axis`` rather than stack on a new one.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.
        AxisError: ``x`` has no such axis.

    Example:
        >>> sort = torchlift.vmap(lambda m, x: torchlift.all_gather(x, "row").sort().values, axis_name="row")
        >>> sort(torch.nn.Identity(), torch.tensor([3, 1, 2]))[0]
        tensor([1, 2, 3])
    """
    levels = len(find(axis_name, "all_gather"))

    def place(leaf: Tensor) -> int:
        ndim = leaf.ndim if tiled else leaf.ndim + 1
        if not -ndim <= axis < ndim:
            raise AxisError(
                f"all_gather: axis is {axis}, expected {-ndim} to {ndim - 1} for a value of shape "
                f"{tuple(leaf.shape)}" + (" with tiled=True" if tiled else "")
            )
        return axis % ndim

    def of_leaf(leaf: Any) -> Tensor:
        leaf = torch.as_tensor(leaf)
        at = place(leaf)
        gathered = _mapped("all_gather", axis_name, leaf, lambda x, a: _gather(x, *_operands(a), at))
        last = at + levels - 1 + tiled
        return gathered.flatten(at, last) if last > at else gathered

    return _tree.map_leaves(lambda leaf: leaf if leaf is None else of_leaf(leaf), x)


def axis_index(axis_name: Names) -> Tensor:
    """The number of this index on a named axis.

    The counterpart of ``jax.lax.axis_index``.

    Args:
        axis_name: the ``axis_name`` of a ``vmap`` around the call, or the name of a mesh dimension; or several, the
            first one major.

    Returns:
        An integer tensor without dimensions.

    Raises:
        AxisNameError: no map around the call and no mesh has an axis of that name.

    Example:
        >>> number = torchlift.vmap(lambda m, x: x + torchlift.axis_index("row"), axis_name="row")
        >>> number(torch.nn.Identity(), torch.zeros(3))
        tensor([0., 1., 2.])
    """
    first, *rest = find(axis_name, "axis_index")
    index = _number(first)
    for axis in rest:
        index = index * axis.size + _number(axis)
    return index
