"""A compiled loop sees that a class of its modules was changed, or what the code of its body reads of globals."""

import gc
import weakref

import pytest
import torch
from torch import nn

import torchlift
from torchlift import fingerprint
from torchlift.pack import Packed

SCALE = 1.0
AOT = {"backend": "aot_eager"}


def shift(x):
    return x + SHIFT


SHIFT = 0.0


def classes():
    """New ones, for a test to change."""

    class Inner(nn.Module):
        factor, kind = 2.0, "plain"

        @property
        def twice(self):
            return 2.0

        @staticmethod
        def bent(x):
            return x.tanh()

        def forward(self, x):
            return shift(self.bent(x * self.factor * SCALE) * self.twice)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = Inner(), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.inner(x) * self.weight

    return Inner, Layer


def of_global(name):
    return lambda patch, inner: patch.setitem(globals(), name, 3.0)


CHANGES = {
    "an attribute": lambda patch, inner: patch.setattr(inner, "factor", 3.0),
    "a method": lambda patch, inner: patch.setattr(inner, "forward", lambda self, x: 3 * x),
    "a static method": lambda patch, inner: patch.setattr(inner, "bent", staticmethod(lambda x: x.sin())),
    "a property": lambda patch, inner: patch.setattr(inner, "twice", property(lambda self: 3.0)),
    "a global of a method": of_global("SCALE"),
    "a global of a function that it calls": of_global("SHIFT"),
    "a function that it calls": lambda patch, inner: patch.setitem(globals(), "shift", lambda x: x - 3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loop", ["scan_layers", "scan", "remat_scan", "function"])
def test_a_loop_sees_the_change(monkeypatch, loop, change):
    inner, layer = classes()
    layers, x = [layer() for _ in range(3)], torch.randn(2)
    run = {
        "scan_layers": lambda compile: torchlift.scan_layers(layers, compile=compile)(x),
        "scan": lambda compile: torchlift.scan(lambda m, c: (m(c), None), length=3, compile=compile)(layers[0], x)[0],
        "remat_scan": lambda compile: torchlift.remat_scan(layer, lengths=(3,), compile=compile).from_modules(layers)(x),
        "function": lambda compile: torchlift.scan(
            lambda m, c: (shift(c * SCALE), None), length=3, compile=compile
        )(inner(), x)[0],
    }[loop]  # fmt: skip
    for _ in range(2):
        torch.testing.assert_close(run(AOT), run(False))
        CHANGES[change](monkeypatch, inner)


def test_what_is_read_of_a_class_does_not_keep_it_alive():
    _, layer = classes()
    packed = Packed(lambda m: None, layer(), (), {}, "test")
    assert (
        fingerprint.of_packed(packed)[2] == fingerprint.of_packed(packed)[2]
        and len(fingerprint.of_packed(packed)[2]) == 2
    )
    dead = weakref.ref(layer)
    del layer, packed
    gc.collect()
    assert dead() is None


def test_inner_functions_that_call_each_other_are_read_once():
    def made():
        def down(x, n):
            return up(x + n, n - 1) if n else x

        def up(x, n):
            return down(x * 2, n - 1) if n else x

        return lambda self, x: down(self.linear(x), 3)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        forward = made()

    layers, x = [Layer() for _ in range(2)], torch.randn(3, 2)
    torch.testing.assert_close(torchlift.scan_layers(layers, compile=AOT)(x), layers[1](layers[0](x)))
