"""Weights of one bit and a scale each row: the sign computes, a straight-through gradient trains."""

import torch
from torch import Tensor, nn

from torchlift import map_variables


def one_bit(p: Tensor) -> Tensor:
    if p.ndim != 2:
        return p
    quantised = p.sign() * p.abs().mean(1, keepdim=True)
    return p + (quantised - p).detach()  # the value of the one, the gradient of the other


def quantise(tree):
    return {"params": {name: one_bit(p) for name, p in tree["params"].items()}}


BitMLP = map_variables(nn.Sequential, "params", quantise)


def main(steps: int = 150) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = BitMLP(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    x = 2 * torch.rand(256, 2) - 1
    target = (x.prod(1, keepdim=True) > 0).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    accuracy = ((model(x) > 0) == target.bool()).float().mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {accuracy:.0%} right")
    return model, losses


if __name__ == "__main__":
    main()
