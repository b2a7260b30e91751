"""A lifted class without a size: what it is until the first call or ``load_state_dict`` tells it."""

import copy
import io

import pytest
import torch
from torch import nn

import torchlift
from torchlift import StateDictError, TransformTargetError, UnsupportedError

N = 4


class Layer(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.linear, self.norm, self.other = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        if tied:
            self.other.weight = self.linear.weight

    def forward(self, x):
        return self.other(self.norm(self.linear(x)))


def lazy(*args):
    return torchlift.vmap(Layer, variable_axes={"params": 0})(*args)


def sized():
    return torchlift.vmap(Layer, variable_axes={"params": 0}, axis_size=N)()


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "save"])
def test_copies_wait_too(copied):
    stack = lazy()
    other = copied(stack)
    assert other(torch.randn(N, 2, 3)).shape == (N, 2, 3) and other.norm.running_var.shape == (N, 3)
    assert nn.parameter.is_lazy(stack.linear.weight) and nn.parameter.is_lazy(stack.norm.running_var)


def test_ties_survive():
    stack = lazy(True)
    assert stack.linear.weight is stack.other.weight and len(list(stack.parameters())) == 5
    stack(torch.randn(N, 2, 3))
    assert stack.linear.weight is stack.other.weight and stack.linear.weight.shape == (N, 3, 3)
    other = lazy(True)
    other.load_state_dict(stack.state_dict())
    assert other.linear.weight is other.other.weight and torch.equal(other.linear.weight, stack.linear.weight)


def test_its_state_dict_is_uninitialised_as_that_of_a_lazy_module():
    stack = nn.ModuleDict({"stack": lazy()})
    state = stack.state_dict()
    assert all(nn.parameter.is_lazy(entry) for entry in state.values()) and len(state) == 9
    stack.load_state_dict(state)
    assert nn.parameter.is_lazy(stack["stack"].linear.weight)
    assert stack["stack"](torch.randn(N, 2, 3)).shape == (N, 2, 3)


WRONG = {
    "of one layer": (
        lambda: Layer().state_dict(),
        r"vmap\(Layer, .*'linear.weight' of the state dict is \(3, 3\), expected \(3, 3\) with an axis of modules "
        r"at 0; torchlift.stack_state_dict",
    ),
    "of other layers": (
        lambda: {"linear.bias": torch.zeros(N, 5)},
        r"'linear.bias' of the state dict is \(4, 5\), expected \(3,\)",
    ),
    "of several sizes": (
        lambda: {**sized().state_dict(), "linear.bias": torch.zeros(5, 3)},
        r"different numbers of modules, expected one: \{'linear.weight': 4, 'linear.bias': 5",
    ),
    "of no module": (lambda: {"norm.num_batches_tracked": torch.tensor(0)}, r"is \(\), expected \(\) with an axis"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_dict_that_does_not_fit_leaves_it_waiting(name):
    state, match = WRONG[name]
    stack = lazy()
    with pytest.raises(StateDictError, match=match):
        stack.load_state_dict(state(), strict=False)
    assert all(nn.parameter.is_lazy(tensor) for tensor in (*stack.parameters(), *stack.buffers()))
    assert stack(torch.randn(5, 2, 3)).shape == (5, 2, 3)


LAZY = {
    "vmap": lambda: torchlift.vmap(nn.LazyLinear, variable_axes={"params": 0}, axis_size=2)(3),
    "lazy vmap": lambda: torchlift.vmap(nn.LazyLinear, variable_axes={"params": 0})(3),
    "stack_modules": lambda: torchlift.stack_modules([nn.LazyLinear(3), nn.LazyLinear(3)]),
}


@pytest.mark.parametrize("name", LAZY)
def test_torchs_lazy_modules_are_refused(name):
    with pytest.raises(UnsupportedError, match="'weight' is not initialised yet, expected a tensor with a shape"):
        LAZY[name]()


NO_MODULES = {
    "from_modules": lambda given: torchlift.vmap(nn.Linear, variable_axes={"params": 0}).from_modules(given),
    "stack_modules": torchlift.stack_modules,
    "scan_layers": torchlift.scan_layers,
}


@pytest.mark.parametrize("name", NO_MODULES)
def test_what_is_no_list_of_modules_is_refused(name):
    with pytest.raises(TransformTargetError, match="got Linear, expected several modules, in a list"):
        NO_MODULES[name](nn.Linear(2, 2))
    with pytest.raises(TransformTargetError, match="module 1 is the class Linear, expected an nn.Module"):
        NO_MODULES[name]([nn.Linear(2, 2), nn.Linear])


def test_lazy_modules_of_torch_are_no_layers_before_they_are_called():
    layers = [nn.Sequential(nn.LazyLinear(4), nn.Tanh()) for _ in range(2)]
    layers[0](torch.ones(2, 4))
    with pytest.raises(
        UnsupportedError, match=r"scan_layers\(Sequential\): '0.weight' of layer 1 is not initialised yet"
    ):
        torchlift.scan_layers(layers)
    layers[1](torch.ones(2, 4))
    assert torchlift.scan_layers(layers, compile=False)(torch.ones(2, 4)).shape == (2, 4)
