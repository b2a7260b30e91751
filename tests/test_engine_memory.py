"""What compiled loops hold at their peak, in units of a carry."""

import gc
import warnings

import pytest
import torch
from measure import peak_bytes
from torch import nn

from torchlift import TorchliftCompileWarning, scan_layers
from torchlift.engine import compiled

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


@pytest.mark.parametrize("threshold", [0, 700, 60_000])
def test_python_seldom_looks_for_garbage_while_inductor_compiles(threshold, monkeypatch):
    """And not at all where the user has turned it off; afterwards as before, an error or not."""
    seen = []

    def compile_graphs(*args, **kwargs):
        seen.append(gc.get_threshold())
        raise RuntimeError("no program")

    before = gc.get_threshold()
    monkeypatch.setattr(compiled, "compile_graphs", compile_graphs)
    gc.set_threshold(threshold, *before[1:])
    try:
        with warnings.catch_warnings():  # that it runs as a plain loop, which is said once
            warnings.simplefilter("ignore", TorchliftCompileWarning)
            scan_layers([nn.Tanh() for _ in range(2)])(torch.ones(7))
        assert seen[0] == (threshold and max(threshold, 50_000), *before[1:])
        assert gc.get_threshold() == (threshold, *before[1:])
    finally:
        gc.set_threshold(*before)
        compiled.clear_cache()
