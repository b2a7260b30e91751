"""Loops that are made in the code that torch.compile traces, and loops whose body gives no ys."""

import copy

import pytest
import torch
from torch import nn
from ways import AOT

import torchlift
from torchlift import broadcast, checkpoint_policies, lifting, remat_scan, scan, scan_layers
from torchlift.engine.run import last_report

pytestmark = pytest.mark.usefixtures("float64")
SIZE = 4


class Layer(nn.Linear):
    def forward(self, x):
        return x + super().forward(x).tanh()


def layers():
    return nn.ModuleList(Layer(SIZE, SIZE) for _ in range(3))


def in_order(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def thrice(m, x):
    return m(m(m(x)))


def stacked_in_order(stack, x):
    return in_order(torchlift.unstack_modules(stack), x)


def stack():
    return torchlift.stack_modules(layers())


def scanned(**kw):
    return lambda m, x: scan(lambda m, c, *xs: (m(c), None), compile=AOT, **kw)(m, x)[0]


def one_layer():
    return Layer(SIZE, SIZE)


# A way to write a loop inside compiled code, the module it takes, and what it computes.
MADE = {
    "scan": (scanned(length=3), one_layer, thrice),
    "scan of a method": (
        lambda m, x: scan(lambda m, c: (Layer.forward(m, c), None), length=3, compile=AOT)(m, x)[0], one_layer, thrice
    ),
    "scan of stacked layers": (scanned(variable_axes={True: 0}), stack, stacked_in_order),
    "scan with xs": (
        lambda m, x: scan(lambda m, c, t, s: (m(c) * t * s, c), in_axes=(0, broadcast), compile=AOT)(
            m, x, torch.ones(3), torch.ones(())
        )[0],
        one_layer,
        thrice,
    ),
    "remat_scan": (
        lambda m, x: remat_scan(
            lambda m, c: m(c), lengths=(3, 1), variable_axes={}, policy=checkpoint_policies.dots_saveable, compile=AOT
        )(m, x),
        one_layer,
        thrice,
    ),
    "scan_layers": (lambda m, x: scan_layers(m, compile=AOT)(x), layers, in_order),
    "scan_layers with remat": (lambda m, x: scan_layers(list(m), remat=True, compile=AOT)(x), layers, in_order),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_a_loop_may_be_made_in_the_code_that_is_compiled(name):
    loop, make, definition = MADE[name]
    module = make()
    twin, x = copy.deepcopy(module), torch.randn(2, SIZE, requires_grad=True)
    compiled = torch.compile(loop, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got, expected = compiled(module, x), definition(twin, x)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (got_x,) = torch.autograd.grad(got.square().sum(), x, retain_graph=True)
    (expected_x,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(got_x, expected_x, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_body_without_ys_is_compiled_alone_and_in_a_graph(backend):
    module, x = Layer(SIZE, SIZE), torch.randn(2, SIZE, requires_grad=True)
    run = scan(lambda m, c: (m(c), None), length=3, compile={"backend": backend})
    (expected,) = torch.autograd.grad(thrice(module, x).sum(), x)
    for call in (run, torch.compile(run, backend=backend, fullgraph=True)):
        carry, ys = call(module, x)
        assert ys is None
        torch.testing.assert_close(carry, thrice(module, x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(carry.sum(), x)[0], expected, rtol=1e-12, atol=1e-12)
    assert last_report().path == "compiled"


def test_no_ys_are_returned_from_what_is_compiled():
    stack = scan(lambda m, c: (m(c), None), length=3, compile=AOT)
    module, x = Layer(SIZE, SIZE), torch.randn(2, SIZE)
    carry, ys = torchlift.jit(lambda m, x: stack(m, x), backend="aot_eager")(module, x)
    assert ys is None
    torch.testing.assert_close(carry, thrice(module, x), rtol=1e-12, atol=1e-12)


def test_a_draw_that_is_refused_is_refused_when_the_graph_is_traced():
    module, x = nn.Dropout(), torch.ones(4)
    run = scan(lambda m, c: (m(c), None), length=3, compile=AOT)
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        with pytest.raises(Exception, match=r"drew from the random stream 'dropout'; .*split_rngs=\{'dropout': True\}"):
            call(module, x)
    module.eval()
    torch.compile(run, backend="aot_eager", fullgraph=True)(module, x)
    split = scan(lambda m, c: (m(c), None), length=3, split_rngs={"dropout": True}, compile=AOT)
    torch.compile(split, backend="aot_eager", fullgraph=True)(module.train(), x)


INSIDE = {
    "vmap": lambda m, x: torchlift.vmap(lambda m, x: m(x))(m, x),
    "remat": lambda m, x: torchlift.remat(lambda m, x: m(x))(m, x),
    "apply": lambda m, x: torchlift.apply(m, {}, x),
    "scan": lambda m, x: scan(lambda m, c: (m(c), None), length=2, compile=AOT)(m, x)[0],
}


@pytest.mark.parametrize("outer", INSIDE)
@pytest.mark.parametrize("inner", [torchlift.remat, torchlift.vmap, torchlift.jit], ids=lambda t: t.__name__)
def test_an_instance_of_a_lifted_class_runs_inside_another_transform_in_compiled_code(inner, outer):
    module, x = nn.Sequential(inner(Layer)(SIZE, SIZE)), torch.randn(SIZE, SIZE, SIZE, requires_grad=True)
    compiled = torch.compile(INSIDE[outer], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(module, x), INSIDE[outer](module, x), rtol=1e-12, atol=1e-12)


class Methods(nn.Module):
    """A module whose decorated methods are lifted each by itself."""

    def __init__(self, name):
        super().__init__()
        self.linear, self.name = nn.Linear(SIZE, SIZE), name

    @torchlift.remat
    def remat(self, x):
        return self.linear(x).sin()

    @torchlift.jit(backend="aot_eager")
    def jit(self, x):
        return self.linear(x).sin()

    @torchlift.map_variables
    def map_variables(self, x):
        return self.linear(x).sin()

    @torchlift.vmap
    def vmap(self, x):
        return self.linear(x).sin()

    @torchlift.remat_scan(lengths=(2,), variable_broadcast=True, variable_axes={}, compile=AOT)
    def remat_scan(self, x):
        return self.linear(x).sin()

    @scan(length=2, compile=AOT)
    def loop(self, x):
        return self.linear(x).sin(), None

    def scan(self, x):
        return self.loop(x)[0]

    def forward(self, x):
        return getattr(self, self.name)(x)


METHODS = ["remat", "jit", "map_variables", "vmap", "remat_scan", "scan"]
AROUND = {
    **INSIDE,
    "grad": lambda m, x: torchlift.grad(lambda m, x: m(x).sum(), m, x)[0],
    "cond": lambda m, x: torchlift.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, m, x),
    "map_variables": lambda m, x: torchlift.map_variables(lambda m, x: m(x))(m, x),
    "plain scan": lambda m, x: scan(lambda m, c: (m(c), None), length=2, compile=False)(m, x)[0],
}


PAIRS = [*(("remat", outer) for outer in AROUND), *((inner, "apply") for inner in METHODS if inner != "remat")]


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_a_decorated_method_runs_inside_another_transform_in_compiled_code(inner, outer):
    module, x = nn.Sequential(Methods(inner)), torch.rand(SIZE, SIZE, SIZE)
    expected = AROUND[outer](module, x)
    compiled = torch.compile(AROUND[outer], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(module, x), expected, rtol=1e-12, atol=1e-12)
    lifted = torchlift.jit(AROUND[outer], backend="aot_eager")
    torch.testing.assert_close(lifted(module, x), expected, rtol=1e-12, atol=1e-12)


def test_a_lifted_function_is_compiled_in_a_process_that_it_was_sent_to(monkeypatch):
    run, module, x = torchlift.remat(lambda m, x: m(x).sin()), nn.Linear(SIZE, SIZE), torch.randn(SIZE)
    monkeypatch.setattr(lifting, "_transforms", {})
    compiled = torch.compile(lambda x: run(module, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x).sin(), rtol=1e-12, atol=1e-12)
