"""Low-rank adapters on a frozen stack of layers: the blocks are scanned, and know nothing of adapters."""

import torch
from torch import Tensor, nn

from torchlift import map_variables, scan

RANK = 2


class Block(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + super().forward(x).tanh(), None


def adapted(tree):
    params = dict(tree["params"])
    a, b = params.pop("a"), params.pop("b")
    return {"params": {**params, "weight": params["weight"] + b @ a}}


def with_adapters(tree):
    weight = tree["params"]["weight"]
    a = torch.randn(*weight.shape[:-2], RANK, weight.shape[-1]) / weight.shape[-1] ** 0.5
    return {"params": {**tree["params"], "a": a, "b": torch.zeros(*weight.shape[:-1], RANK)}}


def main(depth: int = 6, width: int = 16, steps: int = 40) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    Stack = scan(Block, variable_axes={"params": 0}, length=depth, compile=False)
    stack = map_variables(Stack, "params", adapted, with_adapters, init=True)(width, width)
    for name, p in stack.named_parameters():
        p.requires_grad_(name in ("a", "b"))
    x = torch.randn(64, width)
    target = stack(x)[0].detach() + 0.5 * x.roll(1, 1)
    trained = [p for p in stack.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    losses = []
    for _ in range(steps):
        loss = (stack(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in stack.parameters())
    print(f"{share:.0%} of the parameters trained, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return stack, losses


if __name__ == "__main__":
    main()
