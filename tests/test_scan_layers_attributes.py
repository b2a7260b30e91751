"""What attributes scan_layers has: those of its layers that are plain and alike, as models read them of a layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchlift


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.attention_type, self.index, self.act = "full", index, torch.tanh
        self.table = torch.ones(4)
        self.__dict__["_mark"] = True

    @property
    def costly(self):
        raise AssertionError("asked")

    def forward(self, x):
        return self.act(self.a(x))


@pytest.fixture
def stack():
    layers = [Layer(index) for index in range(3)]
    layers[1].table = layers[2].table = layers[0].table
    return torchlift.scan_layers(layers, scanned_attributes=["index"], compile=False)


def test_plain_attributes_of_all_layers(stack):
    for one in (stack, stack[1:], copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert one.attention_type == "full" and one.act is torch.tanh


def test_what_is_its_own_comes_first(stack):
    stack.a, stack.index = nn.Parameter(torch.zeros(1)), 7
    stack.register_buffer("table", torch.zeros(2))
    assert stack.a.shape == (1,) and stack.index == 7 and stack.table.shape == (2,)
    assert getattr(stack, "1") is stack[1]
    assert getattr(torchlift.scan_layers([nn.Sequential(nn.Tanh())]), "0")[0].__class__ is nn.Tanh


@pytest.mark.parametrize("name", ["a", "index", "costly", "table"])
def test_what_layers_do_not_have_alike_is_refused(stack, name):
    with pytest.raises(AttributeError, match=rf"scan_layers\(Layer\): asked for '{name}'.*layers\[0\]\.{name}"):
        getattr(stack, name)
    assert not hasattr(stack, name)


def test_others_are_nobodys(stack):
    with pytest.raises(AttributeError, match="neither it nor its layers have an attribute 'nope'"):
        _ = stack.nope
    with pytest.raises(AttributeError, match="has no attribute '_mark'"):
        _ = stack._mark
    assert not hasattr(torchlift.scan_layers([]), "attention_type")


def test_read_in_a_graph():
    stack = torchlift.scan_layers([Layer(0) for _ in range(3)], compile=False)

    def forward(x):
        if stack.attention_type == "full" and hasattr(stack, "act") and not hasattr(stack, "a"):
            x = x + 1
        return stack(x)

    x = torch.randn(2, 4)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), forward(x))


class Mapping(nn.Module):
    """A layer that made its transforms itself."""

    def __init__(self, transform, out):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mapped = transform(
            lambda module, *args: out(module(args[0])), **({"length": 2} if out is repeated else {})
        )

    def forward(self, x):
        out = self.mapped(self.linear, x)
        return out[0] if isinstance(out, tuple) else out


def repeated(x):
    return x, None


@pytest.mark.parametrize(("transform", "out"), [(torchlift.vmap, torch.tanh), (torchlift.scan, repeated)])
def test_layers_that_hold_a_lifted_function_are_alike_at_each_call(transform, out, float64):
    layers = [Mapping(transform, out) for _ in range(3)]
    layers[0](torch.ones(2, 4))  # used before, which says nothing about it
    stack, x = torchlift.scan_layers(layers, compile={"backend": "aot_eager"}), torch.randn(2, 4)
    wanted = torchlift.scan_layers(layers, compile=False)(x)
    seen = []
    for _ in range(4):
        torch.testing.assert_close(stack(x), wanted, rtol=1e-12, atol=1e-12)
        seen.append(torchlift.explain(stack, x)[-1].compilations)
    assert len(set(seen[1:])) == 1
    torch.testing.assert_close(torch.compile(stack, backend="aot_eager")(x), wanted, rtol=1e-12, atol=1e-12)
