"""Gradients clipped on their way back through time: no step of a recurrent network sends on more than a given norm.

    python examples/custom_vjp/clipped_gradients.py

Clipping after `backward()` scales a gradient that has exploded already; here each step of the `scan` is bounded.
"""

import torch
from torch import Tensor, nn

from torchlift import custom_vjp, scan, vjp

LIMIT = 1.0


class Cell(nn.Module):
    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain)

    def forward(self, carry: Tensor, x: Tensor) -> Tensor:
        return self.linear(carry) + x


def call(cell: nn.Module, carry: Tensor, x: Tensor) -> Tensor:
    return cell(carry, x)


def backward(pull, cotangent: Tensor):
    variables, carry, x = pull(cotangent)
    return variables, carry * (LIMIT / carry.norm()).clamp(max=1), x


clipped = custom_vjp(call, lambda cell, carry, x: vjp(call, cell, carry, x), backward)


def last_state(cell: nn.Module, xs: Tensor, step=clipped) -> Tensor:
    """The state after all of `xs`, whose axis 0 is time."""
    loop = scan(lambda cell, carry, x: (step(cell, carry, x), None), variable_broadcast="params")
    return loop(cell, torch.zeros_like(xs[0]), xs)[0]


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    cell, xs = Cell(8, gain=1.5), torch.randn(30, 8, requires_grad=True)
    norms = []
    for step in (call, clipped):
        (gradient,) = torch.autograd.grad(last_state(cell, xs, step).sum(), xs)
        norms.append(gradient[0].norm().item())
    print(f"norm of the gradient of the first input: {norms[0]:.0f}, clipped {norms[1]:.2f}")
    return norms[0], norms[1]


if __name__ == "__main__":
    main()
