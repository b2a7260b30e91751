"""Draws from generators that are not torch's: a graph would repeat them, so the plain loop runs."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torchlift
from torchlift.engine import compiled
from torchlift.engine.run import last_report

AOT = {"backend": "aot_eager"}


class Drop(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if self.training and self.draw() < 0.5 else x + 1


def by_python():
    return random.random()


def by_numpy():
    return np.random.rand()


def results(stack):
    random.seed(0)
    np.random.seed(0)
    return [stack(torch.zeros(1)).item() for _ in range(4)]


@pytest.mark.parametrize("draw", [by_python, by_numpy, random.random, np.random.rand])
def test_global_generators(draw):
    compiled.clear_cache()
    layers = [Drop(draw) for _ in range(12)]
    expected = results(torchlift.scan_layers(layers, compile=False))
    with pytest.warns(torchlift.TorchliftCompileWarning, match="draws from Python's or NumPy's global generator") as w:
        stack = torchlift.scan_layers(layers, compile=AOT)
        assert results(stack) == expected
    assert len(set(expected)) > 1 and last_report().path == "plain"
    assert len([x for x in w if issubclass(x.category, torchlift.TorchliftWarning)]) == 1
    stack.eval()
    assert stack(torch.zeros(1)).item() == 12 and last_report().path == "compiled"


@pytest.mark.filterwarnings("ignore")
def test_inside_torch_compile():
    torch._dynamo.reset()
    call = torch.compile(torchlift.scan_layers([Drop(by_python) for _ in range(12)], compile=AOT), backend="aot_eager")
    assert len({call(torch.zeros(1)).item() for _ in range(8)}) > 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: random.Random(0).random,
        lambda: np.random.RandomState(0).rand,
        lambda: np.random.default_rng(0).random,
    ],
)
def test_generators_in_attributes(make):
    draw = make()
    stack = torchlift.scan_layers([Drop(draw) for _ in range(3)], compile=AOT)
    with pytest.warns(torchlift.TorchliftCompileWarning, match="whose numbers a graph would repeat; draw with torch"):
        outs = [stack(torch.zeros(1)).item() for _ in range(8)]
    draw = make()
    assert outs == [sum(draw() >= 0.5 for _ in range(3)) for _ in range(8)]


class Held(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x + self.generator.random()


@pytest.mark.parametrize("make", [lambda: random.Random(0), lambda: np.random.default_rng(0)])
def test_generators_as_attributes(make):
    generator = make()
    stack = torchlift.scan_layers([Held(generator) for _ in range(2)], compile=AOT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [stack(torch.zeros(1, dtype=torch.float64)).item() for _ in range(3)]
    generator = make()
    assert outs == [generator.random() + generator.random() for _ in range(3)]
    assert any("whose numbers a graph would repeat" in str(w.message) for w in caught)


def test_python_and_numpy_stand_where_they_stood():
    def body(m, c, x):
        return c + x, None

    states = random.getstate(), np.random.get_state()[2]
    torchlift.scan(body, compile=AOT)(nn.Identity(), torch.zeros(()), torch.ones(3))
    assert last_report().path == "compiled" and states == (random.getstate(), np.random.get_state()[2])


def test_what_was_drawn_once_beside_a_capture_does_not_make_it_plain():
    """As by another thread, which fetches data."""
    once = iter([random.random])
    beside = lambda: next(once, lambda: 1.0)()
    torchlift.scan(lambda m, c, x: (m(c), None), compile=AOT, length=2)(Drop(beside), torch.ones(2), None)
    assert last_report().path == "compiled" and next(once, None) is None


@pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning")
def test_numpy_with_another_bit_generator():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        layers = torchlift.scan_layers([nn.Linear(2, 2) for _ in range(2)], compile=AOT)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            layers(torch.ones(1, 2))
        assert last_report().path == "compiled"
        torchlift.scan_layers([Drop(np.random.rand) for _ in range(2)], compile=AOT)(torch.ones(2))
        assert "NumPy's global generator" in last_report().reason
    finally:
        np.random.set_bit_generator(before)
