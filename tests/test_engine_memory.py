"""What compiled loops hold at their peak, in units of a carry."""

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
