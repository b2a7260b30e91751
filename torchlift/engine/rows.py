"""Rows of mapped axes: a function run on some of them, and not on the others.

NOTE [Rows]. Under ``vmap`` a tensor stands for one row of a batch, and no operator sees which rows there are. Where a
choice differs from row to row it is taken apart here: *gather* makes all rows of a tensor visible at once, the same in
every row; the function runs, under a ``vmap`` of its own, on the rows that chose it; *scatter* gives each row its
result. Gather and scatter are autograd functions whose vmap rules see the batch, each the other's transpose. That is
right because what lies between works row by row; so whatever belongs to a transform inside of the mapped axis, such as
the parameters of per-sample gradients, is gathered too, whether it differs between rows or not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchlift import _compat
from torchlift._compat import pytree
from torchlift.errors import ClosureError


class _Gather(torch.autograd.Function):
    """``x`` at all rows of the axis that maps ``marker``, on a new axis 0."""

    @staticmethod
    def forward(marker: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("rows outlived the vmap that maps them")  # pragma: no cover

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, _Scatter.apply(*ctx.saved_tensors, cotangent)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Gather.apply(*ctx.saved_tensors, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], marker: Tensor, x: Tensor) -> tuple[Tensor, int | None]:
        here, dim = in_dims
        if here is None:  # another axis: x is mapped there
            return _Gather.apply(marker, x.movedim(dim, 0)), 1
        # Copied: the result of a function may not be a view of its operand.
        rows = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return rows.clone(), None


class _Scatter(torch.autograd.Function):
    """What lies on axis 0 of ``x`` at the row where this code runs, on the axis that maps ``marker``."""

    @staticmethod
    def forward(marker: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("rows outlived the vmap that maps them")  # pragma: no cover

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, _Gather.apply(*ctx.saved_tensors, cotangent)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return _Scatter.apply(*ctx.saved_tensors, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], marker: Tensor, x: Tensor) -> tuple[Tensor, int | None]:
        here, dim = in_dims
        if here is None:
            return _Scatter.apply(marker, x.movedim(dim, 1)), 0
        return x.clone(), 0


class Rows:
    """The rows of the axes that map a tensor, as ``torch.func.vmap`` numbers them, those of outer axes major."""

    def __init__(self, axes: Sequence[_compat.MappedAxis]):
        self.axes = axes
        self.sizes = [axis.size for axis in axes]

    @staticmethod
    def of(tensor: Tensor) -> Rows | None:
        """Those of the axes that map ``tensor``; None where no ``vmap`` does."""
        if _compat.is_compiling() or not _compat.is_wrapped(tensor):
            return None
        axes = _compat.mapped_axes(tensor)
        return Rows(axes) if axes else None

    @property
    def runnable(self) -> bool:
        """Whether a function can be run on some rows.

        Not where torch's operators are only recorded; nor where the axes disagree about randomness, which the one vmap
        over the rows cannot.
        """
        return len({axis.randomness for axis in self.axes}) == 1 and not _compat.is_tracing()

    @property
    def shares_draws(self) -> bool:
        return self.axes[0].randomness == "same"

    def gather(self, x: Tensor) -> Tensor:
        """``x`` at every row, on axis 0."""
        for axis in reversed(self.axes):
            x = _Gather.apply(axis.marker, x)
        return x.flatten(0, len(self.axes) - 1)

    def scatter(self, x: Tensor) -> Tensor:
        """To each row its part of ``x``, which has the rows on axis 0."""
        x = x.unflatten(0, self.sizes)
        for axis in self.axes:
            x = _Scatter.apply(axis.marker, x)
        return x

    def values(self, x: Tensor) -> Tensor:
        """``x`` at every row, a plain tensor that Python may look into."""
        return _compat.plain(self.gather(x.detach()))

    def concern(self, x: Tensor) -> bool:
        """Whether ``x`` belongs to one of the axes, or to a transform inside of them."""
        return _compat.functorch_level(x) >= self.axes[0].level

    def take(self, x: Tensor, at: Tensor) -> Tensor:
        """The rows ``at`` of ``x``."""
        rows = self.gather(x)
        return rows if len(at) == len(rows) else rows.index_select(0, at.to(rows.device))

    def run(self, fn: Callable[[list[Tensor]], list[Tensor]], operands: Sequence[Tensor], at: Tensor) -> list[Tensor]:
        """``fn`` on the rows ``at`` of ``operands``: its results, with these rows on axis 0."""
        concerned = [self.concern(x) for x in operands]

        def one(own: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
            mode = _OwnRow(self, own)
            with mode:
                out = fn(list(operands))
            return tuple(mode.own(x) for x in out)

        mapped = torch.func.vmap(
            one,
            in_dims=(0, *(0 if c else None for c in concerned)),
            randomness=self.axes[0].randomness,
        )
        return list(mapped(at, *(self.take(x, at) if c else x for x, c in zip(operands, concerned, strict=True))))

    def merge(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """From pairs of rows and what they have on axis 0, to each row its own."""
        if len(parts) == 1:
            return self.scatter(parts[0][1])
        order = torch.argsort(torch.cat([at for at, _ in parts]))
        whole = torch.cat([x for _, x in parts])
        return self.scatter(whole.index_select(0, order.to(whole.device)))


class _OwnRow(TorchFunctionMode):
    """Inside of the vmap over some rows: tensors of the axes that are met there are narrowed to those rows.

    They come by a closure, or are drawn: an operator under ``vmap`` draws for every row of every axis.
    """

    def __init__(self, rows: Rows, own: Tensor):
        super().__init__()
        self.rows, self.row = rows, own.reshape(1)
        self.level = _compat.functorch_level(own)
        self.levels = {axis.level for axis in rows.axes}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # an attribute; what is no tensor is the same for all rows
            return pytree.tree_map_only(Tensor, self.own, func(*args))
        own_args, kwargs = pytree.tree_map_only(Tensor, self.own, (args, kwargs or {}))
        if func is torch.autograd.grad and any(map(operator.is_not, *map(pytree.tree_leaves, (args, own_args)))):
            raise ClosureError(
                "a graph that was made outside is differentiated in code that runs on some rows of a vmap only, such "
                "as the pull-back of a vjp that reaches a branch by a closure; pass the pull-back as an operand"
            )
        return pytree.tree_map_only(Tensor, self.own, func(*own_args, **kwargs))

    def own(self, x: Tensor) -> Tensor:
        """``x`` at this row, if it belongs to the axes or to a transform between them and the vmap over rows."""
        if not _compat.is_wrapped(x):
            return x
        levels = _compat.levels_of(x)
        inside = any(level >= self.level for level in levels)
        if self.levels.isdisjoint(_compat.mapped_levels(x)) and (inside or max(levels) < min(self.levels)):
            return x
        return self.rows.gather(x).index_select(0, self.row.to(x.device)).squeeze(0)
