"""The gradient of each sample's loss, for one shared set of parameters, without a loop.

    python examples/autodiff/per_sample_gradients.py

`vmap` maps the samples and shares the parameters; inside, `vjp` gives the gradient of one sample's loss. Clipping each
one before they are averaged is the heart of differentially private training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlift


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def per_sample_gradients(net: nn.Module, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
    """``{name: gradients}``, with the samples on axis 0."""

    def one(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out, vjp_fn = torchlift.vjp(loss, net, x, y)
        variables, *_ = vjp_fn(torch.ones_like(out))
        return variables["params"]

    return torchlift.vmap(one)(net, xs, ys)


def clipped(gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
    """The mean over the samples, none of which has more weight than ``limit``."""
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    weight = (limit / norm).clamp(max=1)
    return {name: torch.einsum("b,b...->...", weight, g) / len(weight) for name, g in gradients.items()}


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    xs, ys = torch.randn(8, 4), torch.randint(3, (8,))
    gradients = per_sample_gradients(net, xs, ys)
    for name, g in gradients.items():
        print(f"{name:10} {tuple(g.shape)}")
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    print("norms     ", [round(norm, 2) for norm in norms.tolist()])
    mean = clipped(gradients, limit=1.0)
    print("clipped   ", round(torch.stack([g.norm() for g in mean.values()]).norm().item(), 2))


if __name__ == "__main__":
    main()
