"""vmap of bodies that torch cannot map though they serve one module: index by index, with the same answers."""

import pytest
import torch
from torch import nn

from torchlift import stack_modules, vmap
from torchlift.errors import TorchliftWarning

pytestmark = pytest.mark.usefixtures("float64")

N = 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def write_into_zeros(m, x):
    out = torch.zeros(5, 4)
    out += m(x)
    return out


def assign_into_zeros(m, x):
    out = torch.zeros(5, 4)
    out[:, 0] = m(x)[:, 0]
    return out


def put_at_a_mapped_index(m, x):
    out = x.clone()
    out[m(x).argmax(0)] = 0
    return m(out)


def inner_gradient(m, x):
    (grad,) = torch.autograd.grad(m(x).square().sum(), m.weight, create_graph=True)
    return x @ (m.weight - 0.1 * grad)


# Each can be called on one module, and is no mistake.
UNMAPPABLE = [
    write_into_zeros,
    assign_into_zeros,
    put_at_a_mapped_index,
    inner_gradient,
    lambda m, x: m(x) * float(m(x).detach().numpy().sum()),
    lambda m, x: m(x) * sum(m(x).detach().flatten().tolist()),
    lambda m, x: m(x).masked_select(m(x) > 0).sum(),
]


@pytest.mark.parametrize("body", UNMAPPABLE, ids=range(len(UNMAPPABLE)))
def test_what_torch_cannot_map_of_a_body_that_serves_one_module_runs_index_by_index(body):
    modules, x = [nn.Linear(4, 4) for _ in range(N)], torch.randn(5, 4)
    stack = stack_modules(modules)
    with pytest.warns(TorchliftWarning, match="runs index by index, since torch says: "):
        out = vmap(body, variable_axes={"params": 0}, in_axes=None)(stack, x)
    expected = torch.stack([body(m, x) for m in modules])
    close(out, expected)
    wanted = torch.autograd.grad(expected.sum(), [m.weight for m in modules])
    close(torch.autograd.grad(out.sum(), stack.weight)[0], torch.stack(wanted))


def test_shapes_that_do_not_fit_at_any_index_say_so_as_without_a_map():
    stack = stack_modules([nn.Linear(4, 4) for _ in range(N)])
    with pytest.warns(TorchliftWarning), pytest.raises(RuntimeError, match=r"output with shape \[3, 4\] doesn't match"):
        vmap(lambda m, x: torch.zeros(3, 4).add_(m(x)), variable_axes={"params": 0}, in_axes=None)(
            stack, torch.randn(5, 3, 4)
        )
