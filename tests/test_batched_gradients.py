"""Gradients of many outputs at a time through compiled loops: what no graph was compiled for."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

import torchlift

pytestmark = pytest.mark.usefixtures("float64")

EAGER_GRAPHS = {"backend": "aot_eager"}


class Cell(nn.Linear):
    def forward(self, carry):
        return super().forward(carry).tanh(), None


def test_jacobian_and_hessian_of_a_scan():
    loops = [
        torchlift.scan(Cell, variable_axes={"params": 0}, length=3, compile=compile)(4, 4)
        for compile in (EAGER_GRAPHS, False)
    ]
    loops[0].load_state_dict(loops[1].state_dict())
    x = torch.randn(2, 4)
    found, expected = [jacobian(lambda x, loop=loop: loop(x)[0], x, vectorize=True) for loop in loops]
    torch.testing.assert_close(found, expected)
    found, expected = [hessian(lambda x, loop=loop: loop(x)[0].square().sum(), x, vectorize=True) for loop in loops]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", [{}, {"remat": True}, {"unroll": 3}], ids=["kept", "remat", "unrolled"])
def test_layers(how):
    stack = torchlift.scan_layers(
        [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)], compile=EAGER_GRAPHS, **how
    )
    x = torch.randn(2, 4, requires_grad=True)
    wanted = [x, *stack.parameters()]
    expected = [
        torch.stack(rows)
        for rows in zip(*[torch.autograd.grad(y, wanted, retain_graph=True) for y in stack(x).flatten()], strict=True)
    ]
    out, rows = stack(x), torch.eye(8)
    old = torch.autograd.grad(out.flatten(), wanted, rows, is_grads_batched=True, retain_graph=True)
    new = torch.func.vmap(lambda row: torch.autograd.grad(out, wanted, row.view(2, 4), retain_graph=True))(rows)
    torch.testing.assert_close(list(old), expected)
    torch.testing.assert_close(list(new), expected)
    one = torch.autograd.grad(out, wanted, torch.ones(2, 4))  # what was kept for the graph is there still
    torch.testing.assert_close(list(one), [rows.sum(0) for rows in expected])
