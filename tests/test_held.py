"""Modules that the body of a rematerialised function reaches by a closure, or as a global. See NOTE [Held]."""

import functools
import threading

import pytest
import torch
from torch import nn

import torchlift
from torchlift import checkpoint_policies, remat, remat_scan, scan

pytestmark = pytest.mark.usefixtures("float64")


class Power(nn.Module):
    """Reads a buffer, and then writes it, as spectral norm does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.full((), 2.0))

    def forward(self, x):
        y = x * self.factor
        self.factor = self.factor + 1
        self.factor.mul_(2)
        return y


AROUND = Power()


def reaches_a_global(module, x):
    return AROUND(module(x))


def closes_over(around):
    return lambda module, x: around(module(x))


def closes_over_a_function(around):
    def inner(x):
        return around(x)

    return functools.partial(lambda module, x, gain: inner(module(x)) * gain, gain=1.0)


BODIES = {
    "a global": lambda around: reaches_a_global,
    "a closure": closes_over,
    "a function": closes_over_a_function,
    "a list": lambda around: lambda module, x, held=[around]: held[0](module(x)),  # noqa: B006
}
LOOPS = {
    "remat": lambda body: remat(body),
    "a policy": lambda body: remat(body, policy=checkpoint_policies.dots_saveable),
    "scan": lambda body: lambda m, x: scan(lambda m, c: (remat(body)(m, c), None), length=3, compile=False)(m, x)[0],
    "remat_scan": lambda body: remat_scan(body, (2, 2), variable_axes={}, variable_broadcast=True, compile=False),
    "while_loop": lambda body: (
        lambda m, x: torchlift.while_loop(
            lambda m, c: c[0] < 3, lambda m, c: (c[0] + 1, body(m, c[1])), m, (0, x), remat=True, max_steps=4
        )[1]
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("body", BODIES)
def test_a_module_that_a_body_reaches_by_itself_is_updated_once(body, loop):
    times = {"remat": 1, "a policy": 1, "remat_scan": 4}.get(loop, 3)
    linear, x, around = (
        nn.Linear(3, 3),
        torch.randn(2, 3, requires_grad=True),
        AROUND if body == "a global" else Power(),
    )
    around.factor = torch.full((), 2.0)
    fn = BODIES[body](around)
    found = torch.autograd.grad(LOOPS[loop](fn)(linear, x).sum(), [x, *linear.parameters()])
    after, around.factor = around.factor, torch.full((), 2.0)
    expected = x
    for _ in range(times):
        expected = fn(linear, expected)
    wanted = torch.autograd.grad(expected.sum(), [x, *linear.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(after, around.factor)


def test_a_module_reached_under_a_transform_is_updated_once():
    """The body runs three times where a closure of it needs a gradient."""
    linear, x, around, scale = nn.Linear(3, 3), torch.randn(2, 3), Power(), torch.ones(3, requires_grad=True)

    def loss(x):
        return remat(lambda module, x: around(module(x)).detach() + module(x) * scale)(linear, x).sum()

    torch.func.grad(loss)(x)
    assert around.factor == 6


def test_threads_that_compute_again_leave_a_module_as_it_was():
    around, linear = Power(), nn.Linear(3, 3)
    body = closes_over(around)
    outs = [remat(body)(linear, torch.randn(2, 3)).sum() for _ in range(8)]
    before = around.factor
    threads = [threading.Thread(target=out.backward) for out in outs]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert around.factor is before and around._buffers["factor"] is before
