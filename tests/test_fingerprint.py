"""Content keys: equal for equal bodies, and different for bodies that differ in anything that is not a tensor."""

import collections
import dataclasses
import functools
import gc
import sys
import weakref

import pytest
import torch
import ways
from torch import nn
from ways import AOT

from torchlift import checkpoint_policies, fingerprint, remat, scan, scan_layers, vmap
from torchlift.engine.run import last_report
from torchlift.errors import LayerMismatchError, TorchliftCompileWarning, UnsupportedError


def scaled(factor):
    class Scaled(nn.Module):
        def forward(self, x):
            return x * factor

    return Scaled


def test_digests_tell_apart_classes_of_one_source():
    one, two = scaled(1), scaled(2)
    assert fingerprint.digest(one) != fingerprint.digest(two)
    assert fingerprint.digest(one) == fingerprint.digest(one)
    assert fingerprint.digest(vmap(nn.Linear)) != fingerprint.digest(vmap(nn.Linear, in_axes=1))
    dots = remat(nn.Linear, policy=checkpoint_policies.dots_saveable)
    assert fingerprint.digest(dots) != fingerprint.digest(remat(nn.Linear))
    assert fingerprint.digest(dots) == fingerprint.digest(remat(nn.Linear, policy=checkpoint_policies.dots_saveable))


def nested(number, levels):
    """Lambdas and partials in one another, ``number`` innermost."""
    fn = lambda x: x * number
    for level in range(levels):
        fn = (lambda inner: lambda x: inner(x))(fn) if level % 2 else functools.partial(lambda f, *, x: f(x), fn)
        fn = fn if level % 2 else (lambda inner: lambda x: inner(x=x))(fn)
    return fn


@pytest.mark.parametrize("levels", [0, 1, 7, 12])
def test_closures_in_one_another_are_read_to_the_innermost(levels):
    of = fingerprint.of_value
    assert of(nested(2, levels)) == of(nested(2, levels)) != of(nested(3, levels))
    assert hash(of(nested(2, levels))) == hash(of(nested(2, levels)))


def recursive(number):
    def fn(x, depth=3):
        return x * number if depth == 0 else fn(x, depth - 1)

    return fn


def test_functions_that_call_themselves_have_a_content():
    of = fingerprint.of_value
    assert of(recursive(2)) == of(recursive(2)) != of(recursive(3))

    def empty():
        return later  # noqa: F821

    assert of(empty) == of(empty)
    later = recursive(2)
    assert of(empty) == of(empty) != of(recursive)


def test_defaults_of_keyword_arguments_count():
    def make(number):
        return lambda x, *, by=number: x * by

    assert fingerprint.of_value(make(1)) == fingerprint.of_value(make(1)) != fingerprint.of_value(make(2))


def test_what_occurs_often_is_read_once():
    value = ["a"]
    for _ in range(18):
        value = [value, value]
    with pytest.raises(UnsupportedError, match="of type list holds too much to see it change at each call"):
        fingerprint.of_value([[number] for number in range(20_000)])
    deep = "a"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(UnsupportedError, match="of type list holds too much"):
        fingerprint.of_value(deep)
    reader = fingerprint._Reader()
    reader.read(value)
    assert len(reader.known) == 19


def test_a_compiled_scan_takes_deeply_nested_closures():
    module, x = nn.Linear(3, 3), torch.ones(3)
    found = []
    for number in (2, 3):
        body = nested(number, 9)
        run = scan(lambda m, c: (body(m(c)), None), length=2, compile=AOT)  # noqa: B023
        found.append(run(module, x)[0])
        assert last_report().path == "compiled"
        torch.testing.assert_close(found[-1], module(module(x) * number) * number)


def test_a_value_without_content_sends_the_loop_to_python():
    module = nn.Linear(3, 3)
    module.odd = bytearray(3)
    with pytest.warns(TorchliftCompileWarning, match="a plain value of type bytearray cannot be compared by content"):
        scan(lambda m, c: (m(c), None), length=2, compile=AOT)(module, torch.ones(3))
    assert last_report().path == "plain"


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = slice(1, None)

    def forward(self, x, by):
        return x + x[self.part].sum() * (x[by].sum() if isinstance(by, slice) else len(by))


@pytest.mark.parametrize("loop", ["scan_layers", "scan"])
@pytest.mark.parametrize("values", [(slice(0, 2), slice(0, 3)), ({1}, {1, 2}), (bytearray(1), bytearray(2))], ids=str)
@pytest.mark.filterwarnings("ignore::torchlift.TorchliftCompileWarning")
def test_arguments_and_attributes_without_a_hash(loop, values):
    layers, x = [Sliced(), Sliced()], torch.rand(4)
    run = scan_layers(layers, compile=AOT)
    if loop == "scan":
        over = scan(lambda m, c, by: (m(c, by), None), length=2, compile=AOT)
        run = lambda x, by: over(layers[0], x, by)[0]
    for value in (*values, values[0]):
        torch.testing.assert_close(run(x, value), layers[1](layers[0](x, value), value))
        assert last_report().path == ("compiled" if type(value) is slice else "plain")
    of = fingerprint.of_value
    assert of(slice(0, 2)) == of(slice(0, 2)) != of(slice(0, 3)) != of(slice(0, True))
    assert hash(of([slice(0, 2)])) == hash(of([slice(0, 2)]))


class Items(list):
    pass


class Table(dict):
    pass


class Names(set):
    pass


class Keeps(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        kept = self.kept
        return x * (kept.default_factory() if isinstance(kept, collections.defaultdict) else kept.by)


def with_by(kept, by):
    kept.by = by
    return kept


@pytest.mark.parametrize("kind", [Items, Table, Names, collections.defaultdict], ids=lambda kind: kind.__name__)
def test_what_a_container_has_besides_its_items_counts(kind):
    make = lambda by: kind(lambda: by) if kind is collections.defaultdict else with_by(kind(), by)
    with pytest.raises(LayerMismatchError, match="layer 1: kept"):
        scan_layers([Keeps(make(2.0)), Keeps(make(3.0))])
    layers, x = [Keeps(make(2.0)), Keeps(make(2.0))], torch.rand(3)
    run = scan_layers(layers, compile=AOT)
    torch.testing.assert_close(run(x), x * 4)
    for layer in layers:
        layer.kept = make(3.0)
    torch.testing.assert_close(run(x), x * 9)


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return x * self.parent().scale


def test_what_a_layer_reads_of_a_module_that_it_refers_to_weakly_is_seen_to_change():
    parent, other = nn.Module(), nn.Module()
    parent.scale, parent.unread, other.scale = 2.0, 1.0, 3.0
    with pytest.raises(LayerMismatchError, match="layer 1: parent"):
        scan_layers([Child(parent), Child(other)])
    run, x = scan_layers([Child(parent), Child(parent)], compile=AOT), torch.rand(3)
    for parent.scale, parent.unread in ((2.0, 1), (3.0, 2), (2.0, 3)):
        torch.testing.assert_close(run(x), x * parent.scale**2)
        assert last_report().path == "compiled"
    assert last_report().compilations == 1  # 2.0 again, whatever else the parent has


# How arguments are built -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Added:
    b: torch.Tensor

    def __post_init__(self):
        self.scale = 1.0


class Takes(nn.Module):
    def forward(self, x, given=None, a=None, b=None):
        if isinstance(given, Added):
            return x * given.scale + given.b
        given = {"a": a, "b": b} if given is None else given
        return x * given["a"] if given.get("a") is not None else x + given["b"]


@pytest.mark.parametrize("around", [lambda run: run, lambda run: torch.compile(run, backend="aot_eager")])
@pytest.mark.parametrize("loop", ["scan_layers", "scan"])
def test_programs_are_told_apart_by_how_arguments_are_built(loop, around):
    layers, x = [Takes(), Takes()], torch.full((2,), 1.5)  # a scan takes the rest a number at a time
    run = scan_layers(layers, compile=AOT)
    if loop == "scan":
        over = scan(lambda m, c, *args, **kwargs: (m(c, *args, **kwargs), None), length=2, compile=AOT)
        run = lambda x, *args, **kwargs: over(layers[0], x, *args, **kwargs)[0]
    run = around(run)
    calls = [((), {"a": x}), ((), {"b": x}), (({"a": x},), {}), (({"b": x},), {}), ((Added(x),), {})]
    for args, kwargs in calls:
        expected = layers[1](layers[0](x, *args, **kwargs), *args, **kwargs)
        torch.testing.assert_close(run(x, *args, **kwargs), expected)


def test_an_attribute_of_a_dataclass_argument_that_is_no_field_is_seen_to_change():
    kind = type("Own", (Takes,), {})  # which no other test has compiled for other sizes
    layers, x, given = [kind(), kind()], torch.rand(3), Added(torch.ones(3))
    run = scan_layers(layers, compile=AOT)
    for given.scale in (1.0, 2.0, 1.0):
        torch.testing.assert_close(run(x, given), layers[1](layers[0](x, given), given))
        assert last_report().path == "compiled"
    assert last_report().compilations == 1  # 1.0 again
    dead = weakref.ref(given.b)
    del given
    gc.collect()
    assert dead() is None


# What a class reads beside its arguments -----------------------------------------------------------------------------

FACTOR, SETTINGS = 1.0, {"factor": 1.0}


def helper(x):
    return x * FACTOR * (lambda: SETTINGS["factor"])()


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args) * ways.FACTOR

    return wrapper


class Reader(nn.Linear):
    factor = 1.0

    @property
    def doubled(self):
        return 2 * self.factor

    @decorated
    def forward(self, x):
        return x + helper(super().forward(x)) * self.doubled


CHANGES = {
    "a class attribute": lambda to, value: to.setattr(Reader, "factor", value),
    "a global": lambda to, value: to.setattr(sys.modules[__name__], "FACTOR", value),
    "an item of a global": lambda to, value: to.setitem(SETTINGS, "factor", value),
    "an attribute of a python module": lambda to, value: to.setattr(ways, "FACTOR", value),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_class_reads_is_seen_to_change(change, monkeypatch):
    monkeypatch.setattr(ways, "FACTOR", 1.0, raising=False)
    layers, x = [Reader(2, 2) for _ in range(2)], torch.randn(3, 2)
    run = scan_layers(layers, compile=AOT)
    for value in (1.0, 3.0, 1.0):
        CHANGES[change](monkeypatch, value)
        torch.testing.assert_close(run(x), layers[1](layers[0](x)))
        assert last_report().path == "compiled"
    assert last_report().compilations == 1  # 1.0 again


# What torch.compile and torch.jit made, in a layer -------------------------------------------------------------------


class Compiled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.act = torch.compile(inner, backend="aot_eager"), torch.tanh

    def forward(self, x):
        return self.act(self.inner(x))


@pytest.mark.parametrize("around", [lambda run: run, lambda run: torch.compile(run, backend="aot_eager")])
@pytest.mark.parametrize("compile", [AOT, False])
@pytest.mark.parametrize("remat", [False, True])
def test_submodules_that_torch_compile_returned_run_in_a_loop(compile, remat, around):
    layers, x = [Compiled(nn.Linear(3, 3)) for _ in range(3)], torch.randn(2, 3)
    run = scan_layers(layers, compile=compile, remat=remat)
    for _ in range(2):
        expected = layers[2](layers[1](layers[0](x)))
        grads = torch.autograd.grad(expected.sum(), run.parameters())
        got = around(run)(x)
        torch.testing.assert_close((got, torch.autograd.grad(got.sum(), run.parameters())), (expected, grads))
        assert last_report() is None or last_report().path == ("plain" if compile is False else "compiled")
        with torch.no_grad():
            for parameter in run.parameters():
                parameter.mul_(1.5)


def test_layers_differ_if_what_torch_compile_was_given_does():
    with pytest.raises(LayerMismatchError, match=r"layer 1: inner\._orig_mod\.p 0\.2 != 0\.1"):
        scan_layers([Compiled(nn.Dropout(0.1)), Compiled(nn.Dropout(0.2))])


def test_a_compiled_function_is_told_by_the_one_that_it_runs():
    make = lambda number: torch.compile(lambda x: x * number, backend="aot_eager")
    of = fingerprint.of_value
    assert of(make(2)) == of(make(2)) != of(make(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_with_a_script_module_is_refused_when_the_loop_is_made():
    layers = [nn.Sequential(torch.jit.script(nn.Linear(2, 2))) for _ in range(2)]
    with pytest.raises(UnsupportedError, match="layer 0: 0 is a ScriptModule.*; lift the Python module that"):
        scan_layers(layers, compile=False)
