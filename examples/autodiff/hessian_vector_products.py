"""Curvature without the Hessian: its product with a vector, in parameters, and its largest eigenvalue.

    python examples/autodiff/hessian_vector_products.py

Forward mode over reverse mode: `jvp` of the gradient that `vjp` gives. It costs about two gradients, whatever the
number of parameters.
"""

import torch
from torch import Tensor, nn

import torchlift

Params = dict[str, Tensor]


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).pow(2).mean()


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> Params:
    out, vjp_fn = torchlift.vjp(loss, net, x, y)
    return vjp_fn(torch.ones_like(out))[0]["params"]


def hessian_vector_product(net: nn.Module, x: Tensor, y: Tensor, vector: Params) -> Params:
    """The Hessian of the loss in the parameters, times ``vector``."""
    return torchlift.jvp(gradient, net, (x, y), (None, None), {"params": vector})[1]


def largest_eigenvalue(net: nn.Module, x: Tensor, y: Tensor, steps: int = 30) -> float:
    """By power iteration."""
    vector = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    value = 0.0
    for _ in range(steps):
        norm = torch.stack([v.norm() for v in vector.values()]).norm()
        vector = {name: v / norm for name, v in vector.items()}
        product = hessian_vector_product(net, x, y, vector)
        value = sum((product[name] * v).sum().item() for name, v in vector.items())
        vector = {name: p.detach() for name, p in product.items()}
    return value


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x.sin().sum(1, keepdim=True)
    print("largest eigenvalue of the Hessian:", round(largest_eigenvalue(net, x, y), 3))


if __name__ == "__main__":
    main()
