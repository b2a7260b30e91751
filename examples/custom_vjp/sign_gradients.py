"""Sign descent as a property of the model: its parameters get the sign of their gradient, whatever the optimizer.

python examples/custom_vjp/sign_gradients.py
"""

import torch
from torch import Tensor, nn

from torchlift import custom_vjp, vjp


def call(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def backward(pull, cotangent: Tensor):
    variables, x = pull(cotangent)
    return {c: {name: g.sign() for name, g in named.items()} for c, named in variables.items()}, x


signed = custom_vjp(call, lambda net, x: vjp(call, net, x), backward)


def main(steps: int = 100) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    x = 2 * torch.rand(256, 2) - 1
    target = x.prod(1, keepdim=True)
    optimizer = torch.optim.SGD(net.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        loss = (signed(net, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps of one size")
    return net, losses


if __name__ == "__main__":
    main()
