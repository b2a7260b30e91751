"""Jacobians of a module with batch-norm, by rows, by columns and for each sample.

    python examples/autodiff/jacobians.py

`torch.func.jacrev` wants a pure function; a module that updates state is not one. `vjp` and `jvp` run it once, update
its state once, and the maps over cotangents and tangents are torch's own.
"""

import torch
from torch import Tensor, nn

import torchlift


def call(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def by_rows(net: nn.Module, x: Tensor) -> Tensor:
    """Reverse mode, one row for each output: for few outputs."""
    out, vjp_fn = torchlift.vjp(call, net, x)
    basis = torch.eye(out.numel()).unflatten(1, out.shape)
    return torch.func.vmap(lambda row: vjp_fn(row)[1])(basis).unflatten(0, out.shape)


def by_columns(net: nn.Module, x: Tensor) -> Tensor:
    """Forward mode, one column for each input: for few inputs. The state does not change: it is not asked for."""

    def pushed(direction: Tensor) -> Tensor:
        fn = lambda x: torchlift.apply(net, {}, x, mutable=True)[0]
        return torch.func.jvp(fn, (x,), (direction,))[1]

    basis = torch.eye(x.numel()).unflatten(1, x.shape)
    return torch.func.vmap(pushed)(basis).movedim(0, -1).unflatten(-1, x.shape)


def per_sample(net: nn.Module, xs: Tensor) -> Tensor:
    """The Jacobian at each sample, for a module that takes them one by one."""
    return torch.func.vmap(torch.func.jacrev(net))(xs)


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    rows, columns = by_rows(net, x), by_columns(net, x)
    print("by rows   ", tuple(rows.shape), "batches seen:", int(net[1].num_batches_tracked))
    print("by columns", tuple(columns.shape), "equal:", torch.allclose(rows, columns, atol=1e-5))
    net.eval()
    print("per sample", tuple(per_sample(nn.Sequential(net[0], net[2], net[3]), x).shape))


if __name__ == "__main__":
    main()
