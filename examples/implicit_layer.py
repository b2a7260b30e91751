"""A layer whose output is a fixed point z = tanh(W z + U x + b): any number of iterations, the memory of one.

    python examples/implicit_layer.py

`while_loop` finds the point; `custom_vjp` gives the gradient of the point itself rather than of the way there: by the
implicit function theorem a cotangent g of z comes back as u = g + (df/dz)^T u, a fixed point once more.
"""

import torch
from torch import Tensor, nn

import torchlift
from torchlift import custom_vjp, vjp, while_loop

TOLERANCE = 1e-10


class Cell(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(width, width), nn.Linear(inputs, width, bias=False)
        with torch.no_grad():
            self.w.weight.mul_(0.5)  # a contraction: the point exists, and is found from anywhere

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) + self.u(x))


def iterate(step, module: nn.Module, start: Tensor, *given) -> Tensor:
    """Where `step(module, z, *given)` leaves `z` as it is. What is given is carried along, so that it may be mapped."""

    def body(module, carry):
        _, z, given = carry
        return z, step(module, z, *given), given

    going = lambda module, carry: (carry[0] - carry[1]).abs().max() > TOLERANCE
    return while_loop(going, body, module, (start, step(module, start, *given), given), max_steps=500)[1]


def fixed_point(cell: Cell, x: Tensor) -> Tensor:
    return iterate(cell_step, cell, torch.zeros_like(cell.u(x)), x)


def cell_step(cell: Cell, z: Tensor, x: Tensor) -> Tensor:
    return cell(z, x)


def forward(cell: Cell, x: Tensor):
    with torch.no_grad():
        z = fixed_point(cell, x)
    return vjp(cell_step, cell, z, x)


def backward(pull, cotangent: Tensor):
    adjoint = iterate(lambda _, u, cotangent, pull: cotangent + pull(u)[1], nn.Identity(), cotangent, cotangent, pull)
    variables, _, x = pull(adjoint)
    return variables, x


implicit = custom_vjp(fixed_point, forward, backward)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    cell, readout = Cell(2, 16), nn.Linear(16, 1)
    x = torch.randn(64, 2)
    target = (x[:, :1] * x[:, 1:]).tanh()
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], 1e-2)
    losses = []
    for _ in range(steps):
        loss = (readout(implicit(cell, x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"torchlift {torchlift.__version__}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
