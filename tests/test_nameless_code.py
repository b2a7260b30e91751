"""Code in a namespace without a name, as ``exec(code, {})`` runs it: it may change between calls as any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchlift
from torchlift.code import of_library

SOURCE = """
SCALE = 1.0

def helper(x):
    return x * SCALE

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + helper(self.linear(x))

class Cell(Layer):
    def forward(self, carry, x):
        return carry + helper(self.linear(x)), None

def trebled(x):
    return x * 3
"""


@pytest.fixture(params=[None, "some_code"])
def space(request):
    found = {"nn": nn} | ({} if request.param is None else {"__name__": request.param})
    exec(SOURCE, found)
    return found


def changes(space):
    yield
    space["SCALE"] = 2.0
    yield
    space["helper"] = space["trebled"]
    yield
    space["Layer"].forward = lambda self, x: x * 5 + self.linear(x)
    yield


def test_layers_follow_it(space):
    layers, x = (
        torchlift.scan_layers([space["Layer"]() for _ in range(3)], compile={"backend": "aot_eager"}),
        torch.ones(2, 4),
    )
    for _ in changes(space):
        torch.testing.assert_close(layers(x), nn.Sequential(*layers)(x))


def test_a_loop_over_time_follows_it(space):
    scan = torchlift.scan(space["Cell"], variable_broadcast="params", compile={"backend": "aot_eager"})()
    xs = torch.ones(3, 4)
    for _ in changes(space):
        expected = sum(space["helper"](scan.linear(x)) for x in xs)
        torch.testing.assert_close(scan(torch.zeros(4), xs)[0], expected)


def test_what_is_nobodys_own(space):
    assert all(map(of_library, (int, nn.Linear, nn.Linear.forward, torchlift.scan_layers)))
    assert not any(map(of_library, (space["Layer"], space["helper"], test_what_is_nobodys_own)))
