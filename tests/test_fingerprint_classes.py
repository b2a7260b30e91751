"""A compiled loop sees that a class of its modules was changed, or what the code of its body reads of globals."""

import contextvars
import enum
import functools
import gc
import weakref

import numpy as np
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


# What methods read of closures, defaults and registries --------------------------------------------------------------


class Flag:
    on = 1.0

    @staticmethod
    def scale(x):
        return x * Flag.on


class Mode(enum.Enum):
    LOW, HIGH = 1.0, 3.0


def layer_of(method):
    return type("Layer", (nn.Module,), {"forward": method})


def a_closure():
    held, on = [1.0], 1.0
    inner = lambda x: x * held[0]

    def change():
        nonlocal on
        held[0], on = 2.0, 3.0

    return layer_of(lambda self, x: inner(x) * on), change


def the_same_code_again():
    make = lambda number: lambda self, x: x * number
    layer = layer_of(make(2.0))
    return layer, lambda: setattr(layer, "forward", make(3.0))


def defaults():
    held = [1.0]

    def forward(self, x, by=held, *, also=held):
        return x * by[0] * also[0]

    return layer_of(forward), lambda: held.append(held.pop() + 1)


def a_decorator():
    state = {"on": False}

    def switched(fn):
        @functools.wraps(fn)
        def inner(self, x):
            return fn(self, x) * (3.0 if state["on"] else 1.0)

        return inner

    return layer_of(switched(lambda self, x: x + 1)), lambda: state.update(on=True)


REGISTRY, STEPS, BUILTINS = {"act": lambda x: 2 * x}, [lambda x: 2 * x], {"act": torch.sin}
PARTIAL, MODE, ARRAY, CONTEXT, ACT = functools.partial(torch.mul, other=2.0), Mode.LOW, None, None, torch.sin


def run_steps(self, x):
    for step in STEPS:
        x = step(x)
    return x


def a_global(method, change):
    return lambda: (layer_of(method), change)


def put(**values):
    return lambda: globals().update(values)


READ = {
    "a closure": a_closure,
    "the same code with another closure": the_same_code_again,
    "defaults": defaults,
    "the state of a decorator": a_decorator,
    "a function in a dict": a_global(
        lambda self, x: REGISTRY["act"](x), lambda: REGISTRY.update(act=lambda x, by=3.0: by * x)
    ),
    "functions in a list": a_global(run_steps, lambda: STEPS.append(lambda x: x + 1)),
    "a builtin in a dict": a_global(lambda self, x: BUILTINS["act"](x), lambda: BUILTINS.update(act=torch.cos)),
    "a builtin": a_global(lambda self, x: ACT(x), put(ACT=torch.cos)),
    "a partial": a_global(lambda self, x: PARTIAL(x), put(PARTIAL=functools.partial(torch.mul, other=3.0))),
    "an attribute of a class": a_global(lambda self, x: x * Flag.on, lambda: setattr(Flag, "on", 3.0)),
    "what a function of a class reads": a_global(lambda self, x: Flag.scale(x), lambda: setattr(Flag, "on", 5.0)),
    "another class": a_global(lambda self, x: x * Flag.on, put(Flag=type("Flag", (), {"on": 7.0}))),
    "a member of an enum": a_global(lambda self, x: x * MODE.value, put(MODE=Mode.HIGH)),
    "an array": a_global(lambda self, x: x * float(ARRAY[0]), lambda: ARRAY.__setitem__(0, 3.0)),
    "a context variable": a_global(lambda self, x: x * CONTEXT.get(), lambda: CONTEXT.set(3.0)),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("compile", [AOT, False])
def test_what_a_method_reads_is_seen_to_change(monkeypatch, what, compile):
    fresh = {
        "REGISTRY": dict(REGISTRY), "STEPS": list(STEPS), "BUILTINS": dict(BUILTINS), "PARTIAL": PARTIAL, "ACT": ACT,
        "MODE": MODE, "Flag": type("Flag", (), dict(vars(Flag))), "ARRAY": np.array([1.0]),
        "CONTEXT": contextvars.ContextVar("test", default=1.0),
    }  # fmt: skip
    for name, value in fresh.items():
        monkeypatch.setitem(globals(), name, value)
    layer, change = READ[what]()
    layers, x = [layer() for _ in range(2)], torch.rand(2) + 0.5
    run = torchlift.scan_layers(layers, compile=compile)
    before = run(x)
    change()
    torch.testing.assert_close(run(x), layers[1](layers[0](x)))
    assert not torch.allclose(run(x), before)


def test_methods_of_local_classes_that_call_super_do_not_keep_them_alive():
    class Base(nn.Module):
        def forward(self, x, by=2.0):
            return x * by

    class Layer(Base):
        def forward(self, x):
            return super().forward(x)

    assert fingerprint.of_class(Layer) == fingerprint.of_class(Layer) != fingerprint.of_class(Base)
    dead = weakref.ref(Layer)
    del Layer
    gc.collect()
    assert dead() is None


def test_many_functions_that_know_each_other_are_outlined_once():
    fns = []
    fns += [(lambda n: lambda x: fns[n - 1](x))(number) for number in range(40)]
    fingerprint.of_class(layer_of(lambda self, x: fns[0](x)))  # in factorial time it would not end
