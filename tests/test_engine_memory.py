"""What compiled loops hold at their peak, in units of a carry."""

import gc

import pytest
import torch
from measure import peak_bytes
from torch import nn

from torchlift import scan_layers

AOT = {"backend": "aot_eager"}
ROWS, WIDTH = 256, 32
CARRY = ROWS * WIDTH * 4


class Wide(nn.Module):
    """Between what it is given and what it returns it holds eight times as much."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH, bias=False), nn.Linear(8 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh().sin())


def peak(module):
    module.requires_grad_(False)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    step = lambda: torch.autograd.grad(module(x).sum(), x)
    step()
    return peak_bytes(step)


def layers(count, **settings):
    return scan_layers([Wide() for _ in range(count)], **settings)


@pytest.mark.parametrize("settings, most", [({"remat": True}, 16), ({"lengths": (4, 4)}, 2 * 4 + 1)])
def test_carries_are_all_that_grows_with_depth(settings, most):
    extra = peak(layers(16, compile=AOT, **settings)) - peak(layers(1, compile=AOT, remat=True))
    assert extra / CARRY + 1 <= most


@pytest.mark.parametrize("threshold", [0, 700, 20_000])
def test_python_seldom_looks_for_garbage_while_a_program_is_made(threshold):
    """And not at all where the user has turned it off; afterwards as before, an error or not."""
    seen = []

    class Layer(nn.Module):
        def forward(self, x):
            seen.append(gc.get_threshold())
            if len(x) == 3:
                raise ValueError("three")
            return x.tanh()

    before = gc.get_threshold()
    gc.set_threshold(threshold, *before[1:])
    try:
        layers = scan_layers([Layer() for _ in range(2)], compile={"backend": "aot_eager"})
        layers(torch.ones(2))
        with pytest.raises(ValueError, match="three"):
            layers(torch.ones(3))
        assert seen[0] == (threshold and max(threshold, 50_000), *before[1:])
        assert gc.get_threshold() == (threshold, *before[1:])
    finally:
        gc.set_threshold(*before)
