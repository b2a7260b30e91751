"""Lifted custom_vjp: a function of a module with a backward function of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.engine.closures import Closures
from torchlift.errors import ClosureError, DifferentiationError, UnsupportedError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Transform, as_tuple, lift_function
from torchlift.pack import Packed, Update
from torchlift.transforms.calls import Call, describe, is_differentiable, unbound, wanted_operands
from torchlift.variables import ATTRIBUTE


@dataclass(frozen=True, kw_only=True)
class _Custom_vjp(Transform):
    forward_fn: Callable[..., Any]
    backward_fn: Callable[..., Any]
    grad_vars: Filter = "params"
    nondiff: tuple[int, ...] = ()

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        last = max(self.nondiff, default=0)
        if kwargs or last > len(args):
            args = _by_position(fn, module, args, kwargs, label)
        if last > len(args):
            raise DifferentiationError(f"{label}: nondiff_argnums has {last}, but got {len(args)} arguments and the module as 0")
        if _compat.forward_ad_active():
            raise UnsupportedError(
                f"{label}: jvp over custom_vjp: a backward function says nothing about forward mode; take the "
                "derivative in reverse mode (vjp, grad, torch.func.jacrev), or of the function itself"
            )
        packed = _collected(fn, module, args, label)
        operands = [*packed.tensors, *(packed.leaves[at] for at in packed.tensor_leaves)]
        if not torch.is_grad_enabled() or not any(map(_compat.is_tracked, operands)):
            out, update = packed.pure(packed.snapshot(), packed.leaves)
            packed.publish(update)
            return out
        packed = _collected(self.forward_fn, module, args, label)
        rule = _Rule(packed, self, args)
        out, update = rule.apply()
        packed.publish(update)
        return out


def _collected(fn: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], label: str) -> Packed:
    packed = Packed(fn, module, args, {}, label)
    packed.allow(lambda collection: True, lambda collection: "")
    return packed


def _by_position(
    fn: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], label: str
) -> tuple[Any, ...]:
    """All arguments by position, since that is how cotangents are given; defaults filled in."""
    bound = inspect.signature(fn).bind(module, *args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise DifferentiationError(
            f"{label}: {sorted(bound.kwargs)} cannot be given by position, expected arguments that can: cotangents come "
            "in the order of the arguments"
        )
    return bound.args[1:]


class _Rule:
    """One call: what the autograd function runs forward and backward, and the structure of what passes through it.

    The operands are all tensors of the call. What comes out are the outputs, then new state, then those residuals that
    are no operands and no outputs themselves.
    """

    def __init__(self, packed: Packed, config: _Custom_vjp, args: tuple[Any, ...]):
        self.packed, self.config, self.args_spec = packed, config, _tree.flatten(args)[1]
        self.label = packed.label
        self.call = Call(packed, True, wanted_operands(packed, config.grad_vars, "grad_vars"), "residuals")
        self.shapes = [describe(operand) for operand in self.call.operands]
        self.watched = not _compat.is_compiling()

    def apply(self) -> tuple[Any, Update]:
        marker = _compat.batched_marker() if self.watched else None
        tensors = [*self.call.operands] if marker is None else [*self.call.operands, marker]
        found = _Custom.apply(self, *tensors)
        outs = found[: len(self.call.out_at)]
        # State has no cotangent.
        rest = [tensor.detach() for tensor in found[len(outs) : self.state_end]]
        rest += [found[0]] * (len(self.call.rest_at) - len(rest))
        out, _, update = self.call.joined(outs, rest)
        return out, update

    def forward(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs, new state, residuals."""
        if self.watched:
            with _Watch(self.label, operands):
                outs, rest = self.call.run(operands)
        else:
            outs, rest = self.call.run(operands)
        return (*outs, *rest)
