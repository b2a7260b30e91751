"""A code of zeros and ones that trains: a step has no gradient, so backward takes that of the identity.

python examples/custom_vjp/straight_through.py
"""

import torch
from torch import Tensor, nn

from torchlift import custom_vjp


def step(module: nn.Module, x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


straight_through = custom_vjp(step, lambda m, x: (step(m, x), None), lambda _, cotangent: ({}, cotangent))


class BinaryAutoencoder(nn.Module):
    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, bits), nn.Linear(bits, width)

    def code(self, x: Tensor) -> Tensor:
        return straight_through(self, self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.code(x))


def main(steps: int = 200) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = BinaryAutoencoder(8, 6)
    x = torch.randn(256, 3) @ torch.randn(3, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"6 bits for 8 numbers: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return model, losses


if __name__ == "__main__":
    main()
