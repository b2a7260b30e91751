"""What changes between two calls is seen by the second one, compiled or not, inside ``torch.compile`` or not."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import torchlift
from torchlift import _compat
from torchlift.engine.run import last_report

EAGER_GRAPHS = {"backend": "aot_eager"}
WAYS = [False, EAGER_GRAPHS]
NEEDS_TRACING = pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED)


class Settings:
    def __init__(self):
        self.scale = 1.0
        self.inner = SimpleNamespace(shift=2.0)


SETTINGS = Settings()
MODULE = nn.Identity()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.flag, self.word, self.settings = True, "add", Settings()

    def forward(self, x):
        x = self.drop(self.norm(self.linear(x))) * (2 if self.flag else 3)
        x = x * self.settings.scale
        return (x + self.settings.inner.shift if self.word == "add" else x), None


def graph(fn):
    torch._dynamo.reset()
    return torch.compile(fn, backend="aot_eager", fullgraph=True)


@NEEDS_TRACING
@pytest.mark.parametrize("compile", [False, EAGER_GRAPHS])
def test_a_scan_in_a_graph_follows_its_module(compile):
    torch.manual_seed(0)
    scan = torchlift.scan(Layer, {"params": 0}, length=3, compile=compile)()
    x, inside = torch.randn(4, 3), graph(scan)
    inside(x)
    assert scan.norm.num_batches_tracked.tolist() == [1, 1, 1]

    def agrees():
        return torch.equal(inside(x)[0], scan(x)[0])

    scan.eval()
    assert agrees() and scan.norm.num_batches_tracked.tolist() == [1, 1, 1]
    scan.flag = False
    assert agrees()
    scan.word = "nothing"
    assert agrees()
    scan.settings.scale = 5.0
    assert agrees()
    scan.word, scan.settings.inner.shift = "add", 7.0
    assert agrees()
    scan.train()
    inside(x)
    assert scan.norm.num_batches_tracked.tolist() == [2, 2, 2]
    scan.norm.eval()
    inside(x)
    assert scan.norm.num_batches_tracked.tolist() == [2, 2, 2]


ODD = {
    "a logger": lambda: logging.getLogger("torchlift.test"),
    "a weak reference": lambda: weakref.ref(MODULE),
    "an event": threading.Event,
    "a pattern": lambda: re.compile("a"),
    "a module of Python": lambda: F,
    "a lambda": lambda: lambda x: x,
}


@NEEDS_TRACING
@pytest.mark.parametrize("what", ODD)
def test_a_scan_in_a_graph_keeps_off_what_dynamo_cannot_ask(what):
    scan = torchlift.scan(Cell, variable_broadcast="params", compile=EAGER_GRAPHS)(3, 3)
    scan.odd = ODD[what]()
    scan.settings = Settings()
    scan.settings.odd = ODD[what]()
    xs, start = torch.randn(4, 2, 3), torch.ones(2, 3)
    torch.testing.assert_close(graph(scan)(start, xs), scan(start, xs))


class Cell(nn.Linear):
    def forward(self, carry, x):
        return super().forward(carry) + x, carry


@NEEDS_TRACING
@pytest.mark.parametrize("compile", [False, EAGER_GRAPHS])
def test_a_scan_in_a_graph_takes_any_number_of_steps(compile):
    scan = torchlift.scan(Cell, variable_broadcast="params", compile=compile)(3, 3)
    inside, start = graph(scan), torch.ones(2, 3)
    for steps in (4, 6, 7, 1, 0, 2):
        xs = torch.randn(steps, 2, 3)
        for got, expected in zip(inside(start, xs), scan(start, xs)):
            torch.testing.assert_close(got, expected)


class Slots:
    __slots__ = ("scale",)


def reads_a_global_object(module, carry, x):
    return carry + SETTINGS.scale * x, None


def reads_deep(module, carry, x):
    return carry + SETTINGS.inner.shift * x, None


def reads_slots(module, carry, x):
    return carry + module.slots.scale * x, None


def reads_a_global_module(module, carry, x):
    return carry + MODULE.scale * x, None


def closes_over_an_attribute():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Identity()

        def body(self):
            return lambda module, carry, x: (carry + self.child.scale * x, None)

    outer = Outer()
    return outer.child, "scale", outer.body()


def test_a_compiled_loop_sees_objects_that_its_code_names_change():
    module = nn.Identity()
    module.slots = Slots()
    cases = [
        (SETTINGS, "scale", reads_a_global_object),
        (SETTINGS.inner, "shift", reads_deep),
        (module.slots, "scale", reads_slots),
        (MODULE, "scale", reads_a_global_module),
        closes_over_an_attribute(),
    ]
    for owner, name, body in cases:
        scan = torchlift.scan(body, compile=EAGER_GRAPHS)
        for value in (1.0, 2.0):
            setattr(owner, name, value)
            assert scan(module, torch.zeros(()), torch.ones(3))[0] == 3 * value
            assert last_report().path == "compiled"


def stack():
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]


@pytest.mark.parametrize("compile", WAYS)
def test_hooks_of_all_modules(compile):
    x, layers = torch.randn(2, 4), stack()
    scanned = torchlift.scan_layers(layers, compile=compile)
    plain = nn.Sequential(*layers)

    def double(module, inputs, out):
        return out * 2 if type(module) is nn.Linear else None

    for _ in range(2):
        assert torch.equal(scanned(x), plain(x))
        handle = register_module_forward_hook(double)
        try:
            assert torch.equal(scanned(x), plain(x))
        finally:
            handle.remove()


def test_a_capture_hooks_modules_and_leaves_loops_compiled():
    class Sows(nn.Linear):
        def forward(self, x):
            torchlift.sow(self, "intermediates", "x", x)
            return super().forward(x), None

    scan = torchlift.scan(Sows, {"params": 0}, length=3, compile=EAGER_GRAPHS)(4, 4)
    with torchlift.capture("intermediates") as store:
        scan(torch.randn(2, 4))
    assert last_report().path == "compiled" and store["intermediates"]["x"][0].shape == (3, 2, 4)


@pytest.mark.parametrize("compile", WAYS)
def test_cached_parametrizations(compile):
    class Tanh(nn.Module):
        def forward(self, weight):
            return weight.tanh()

    layers = stack()
    for layer in layers:
        parametrize.register_parametrization(layer[0], "weight", Tanh())
    x = torch.randn(2, 4)
    expected = nn.Sequential(*layers)(x)
    with parametrize.cached():
        assert torch.equal(torchlift.scan_layers(layers, compile=compile)(x), expected)
        assert parametrize._cache_enabled == 1


@pytest.mark.parametrize("compile", WAYS)
@pytest.mark.parametrize("kind", ["positional", "keyword"])
def test_a_forward_with_the_module_as_a_default(compile, kind):
    layers = stack()
    for layer in layers:
        if kind == "positional":
            layer[0].forward = lambda x, m=layer[0], scale=2: F.linear(x, m.weight, m.bias) * scale
        else:
            layer[0].forward = lambda x, *, scale=2, m=layer[0]: F.linear(x, m.weight, m.bias) * scale
    x = torch.randn(2, 4)
    assert torch.equal(torchlift.scan_layers(layers, compile=compile)(x), nn.Sequential(*layers)(x))


def test_a_method_of_torch_that_is_replaced(monkeypatch):
    layers, x = stack(), torch.randn(2, 4)
    scanned = torchlift.scan_layers(layers, compile=EAGER_GRAPHS)
    scanned(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 3)
    assert torch.equal(scanned(x), nn.Sequential(*layers)(x))
    assert last_report().path == "compiled"


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class OfPairs(nn.Linear):
    def forward(self, pair):
        return type(pair)(super().forward(pair.a), pair.b + 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


@pytest.mark.parametrize("compile", WAYS)
def test_what_is_built_as_it_was_given_is_carried_on_whole(compile):
    layers = [OfPairs(4, 4) for _ in range(3)]
    pair = Pair(torch.randn(2, 4), torch.zeros(2))
    got, expected = torchlift.scan_layers(layers, compile=compile)(pair), nn.Sequential(*layers)(pair)
    assert type(got) is Pair and torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b)
    layers = [Recurrent(), Recurrent()]
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 4), [5, 3, 2], batch_first=True)
    got, expected = torchlift.scan_layers(layers, compile=compile)(packed), nn.Sequential(*layers)(packed)
    torch.testing.assert_close(got.data, expected.data)


@NEEDS_TRACING
@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_are_not_to_be_compiled_are_not_in_a_graph_either(monkeypatch, remat):
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *args, **kwargs: pytest.fail("Inductor was asked"))
    scanned = torchlift.scan_layers(stack(), compile=False, remat=remat)
    x = torch.randn(2, 4, requires_grad=True)
    out = graph(scanned)(x)
    out.sum().backward()
    assert torch.equal(out, scanned(x))
