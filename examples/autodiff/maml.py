"""Model-agnostic meta-learning: parameters from which one step of descent fits any sine wave.

    python examples/autodiff/maml.py --steps 200

The inner gradient is a `vjp`, `apply` runs the module on the new parameters, and the outer `backward()` differentiates
through both. `vmap` does it for all tasks at once.
"""

import argparse

import torch
from torch import Tensor, nn

import torchlift


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).pow(2).mean()


def adapted_loss(net: nn.Module, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor, rate: float = 0.1) -> Tensor:
    """The loss on new points of a task, after one step of descent on the old ones."""
    before, vjp_fn = torchlift.vjp(loss, net, x, y)
    gradient = vjp_fn(torch.ones_like(before))[0]["params"]
    params = {name: p - rate * gradient[name] for name, p in net.named_parameters()}
    return torchlift.apply(net, {"params": params}, new_x, new_y, method=loss)


def tasks(count: int, points: int = 20) -> tuple[Tensor, Tensor]:
    """Points on sine waves of random amplitude and phase."""
    amplitude, phase = 1 + 2 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    x = 10 * torch.rand(count, points, 1) - 5
    return x, amplitude * torch.sin(x + phase)


def meta_train(net: nn.Module, steps: int) -> list[float]:
    """The mean loss after adaptation, for each step of training."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=3e-3), []
    for _ in range(steps):
        x, y = tasks(16)  # half of the points to adapt to, half to be judged by
        value = torchlift.vmap(adapted_loss)(net, x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def main(args: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    losses = meta_train(net, parser.parse_args(args).steps)
    print(f"loss after one step: {losses[0]:.2f} before meta-training, {losses[-1]:.2f} after")
    return losses


if __name__ == "__main__":
    main()
