"""Lifted classes whose constructors are given modules."""

import copy
import re

import pytest
import torch
from torch import nn

from torchlift import ArgumentError, vmap


@pytest.mark.parametrize("size", [3, None])
@pytest.mark.parametrize("way", ["args[0]", "args[1][0]", "keyword argument 'inner'"])
def test_a_module_among_the_arguments_of_the_constructor_is_nobodys_own(size, way):
    class Holder(nn.Module):
        def __init__(self, inner, more=()):
            super().__init__()
            self.inner, self.more = inner, nn.ModuleList(more)

        def forward(self, x):
            return self.inner(x)

    given = nn.Linear(4, 4)
    weight = given.weight
    stack = vmap(Holder, variable_axes={"params": 0}, in_axes=None, axis_size=size)
    path = "more.0" if "args[1]" in way else "inner"
    with pytest.raises(ArgumentError, match=re.escape(f"module that {way} brings would be {path!r} of each module")):
        if way == "args[0]":
            stack(given)
        elif path == "inner":
            stack(inner=given)
        else:
            stack(nn.Tanh(), [given])
    assert given.weight is weight and weight.shape == (4, 4)


def test_a_module_among_the_arguments_that_has_nothing_to_stack_may_be_shared():
    given = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    class Copies(nn.Module):
        def __init__(self, layer, act):
            super().__init__()
            self.layer, self.act = copy.deepcopy(layer), act

        def forward(self, x):
            return self.act(self.layer(x))

    stack = vmap(Copies, variable_axes={"params": 0}, in_axes=None, axis_size=3)(given, given[1])
    assert stack.layer[0].weight.shape == (3, 4, 4) and given[0].weight.shape == (4, 4)
    x = torch.randn(2, 4)
    torch.testing.assert_close(stack(x), given[1](given(x)).expand(3, 2, 4))
