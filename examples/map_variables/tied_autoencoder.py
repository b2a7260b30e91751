"""An autoencoder whose decoder is its encoder, transposed: one weight, no code in the layer."""

import torch
from torch import Tensor, nn

from torchlift import map_variables


def transposed(tree):
    return {"params": {"weight": tree["params"]["weight"].mT}}


class Autoencoder(nn.Module):
    def __init__(self, inputs: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(inputs, code, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x))

    def decode(self, code: Tensor) -> Tensor:
        return map_variables(nn.Linear.forward, "params", transposed)(self.encoder, code)


def main(steps: int = 100) -> tuple[Autoencoder, list[float]]:
    torch.manual_seed(0)
    model = Autoencoder(8, 3)
    data = torch.randn(256, 3) @ torch.randn(3, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(steps):
        loss = (model(data) - data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return model, losses


if __name__ == "__main__":
    main()
