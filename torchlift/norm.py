"""Batch normalisation over a named axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat
from torchlift.axes import pmean
from torchlift.errors import TransformTargetError
from torchlift.named_axes import Names, find


class _SyncBatchNorm(_compat.BatchNorm):
    """Batch norm whose batch is that of all indices of named axes. Its tensors are those of the layer it replaces."""

    axis_name: Names

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))  # as torch's: half precision would not add up
        if not self.training and self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
        else:
            dims = [0, *range(2, x.ndim)]
            mean = pmean(x.mean(dims), self.axis_name)
            var = pmean((x - _channels(mean, x)).square().mean(dims), self.axis_name)
            if self.training and self.track_running_stats:
                count = x.numel() // x.shape[1]
                for axis in find(self.axis_name, "sync_batch_norm"):
                    count *= axis.size
                with torch.no_grad():
                    _update(self, mean, var * (count / max(count - 1, 1)))
        out = (x - _channels(mean, x)) * _channels((var + self.eps).rsqrt(), x)
        if self.affine:
            out = out * _channels(self.weight, x) + _channels(self.bias, x)
        return out.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis_name={self.axis_name!r}"


def _update(layer: Any, mean: Tensor, var: Tensor) -> None:
    # A function, not a method: Dynamo takes no method of a bound module that it made itself.
    layer.num_batches_tracked.add_(1)
    # No momentum: a cumulative average.
    rate = 1.0 / layer.num_batches_tracked.to(mean.dtype) if layer.momentum is None else layer.momentum
    layer.running_mean.add_(rate * (mean - layer.running_mean))
    layer.running_var.add_(rate * (var - layer.running_var))


def _channels(statistic: Tensor, like: Tensor) -> Tensor:
    return statistic.view(-1, *[1] * (like.ndim - 2))


def sync_batch_norm(module: nn.Module, axis_name: Names) -> nn.Module:
    """Makes the batch-norm layers of a module take their statistics over a named axis too.

    Under ``vmap(..., axis_name=)`` they then compute what batch norm computes on the joined batch, running statistics
    included: equal at every index, so that ``batch_stats`` may be shared (``None`` in ``variable_axes``). The
    counterpart of ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, and of the ``axis_name`` of flax's batch norm.

    Args:
        module: a module; its batch-norm layers are replaced in place, by ones with the same parameters and buffers.
        axis_name: the ``axis_name`` of a ``vmap`` around the calls, or the name of a dimension of the device mesh that
            they are made in (``with mesh:``); or several.

    Returns:
        ``module``, or what replaces it if it is a batch-norm layer itself.

    Raises:
        TransformTargetError: ``module`` is no module, or has lazy batch-norm layers that were not called yet.

    Example:
        >>> net = torchlift.sync_batch_norm(torch.nn.BatchNorm1d(2), "device")
        >>> run = torchlift.vmap(lambda m, x: m(x), {"params": None, "batch_stats": None}, axis_name="device")
        >>> x = torch.randn(4, 8, 2)
        >>> bool(torch.allclose(run(net, x).flatten(0, 1), torch.nn.BatchNorm1d(2)(x.flatten(0, 1)), atol=1e-5))
        True
    """
    if not isinstance(module, nn.Module):
        raise TransformTargetError(f"sync_batch_norm: got {module!r}, expected a module that was constructed")
    new: dict[nn.Module, nn.Module] = {}
    for path, layer in list(module.named_modules()):
        if isinstance(layer, _compat.BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
                raise TransformTargetError(
                    f"sync_batch_norm: {path or 'the module'} is a {type(layer).__name__} that does not know its size, "
                    "expected one that was called; call the module once before"
                )
            # The very same __dict__: its tensors, hooks and collections stay those that others hold.
            new[layer] = _SyncBatchNorm.__new__(_SyncBatchNorm)
            object.__setattr__(new[layer], "__dict__", layer.__dict__)
            layer.__dict__["axis_name"] = axis_name
    for owner in module.modules():
        for key, child in owner.__dict__["_modules"].items():
            owner.__dict__["_modules"][key] = new.get(child, child)
    return new.get(module, module)
