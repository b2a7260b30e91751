"""Transforms inside transforms, and every kind of carry, input and surroundings, against plain loops."""

import threading
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from matrix.build import Lifted, Twin, arguments, compare, gradients, loss, outputs, tensors
from matrix.modules import MODULES, B, D
from matrix.twins import STATE, TRANSFORMS
from nests import build, join, lifted_class, lifted_function, plain, stacked, state_and_grads
from torch import nn

import torchlift
from torchlift.engine.run import last_report

ENGINE = {"backend": "aot_eager"}
COMPILE = pytest.mark.parametrize("compile", [False, ENGINE], ids=["eager", "engine"])
MODULE = {module.name: module for module in MODULES}
TRANSFORM = {transform.name: transform for transform in TRANSFORMS}
# Those whose loop a plain one can follow draw by draw.
BOTH = pytest.mark.parametrize("name", [name for name in TRANSFORM if name != "vmap (own state)"])


@pytest.fixture(autouse=True)
def _small(float64):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Nested transforms ---------------------------------------------------------------------------------------------------

KINDS = ("vmap", "scan", "remat", "remat_scan")
PAIRS = pytest.mark.parametrize("kinds", [(outer, inner) for outer in KINDS for inner in KINDS], ids="-".join)


class Layer(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(drop)

    def forward(self, x):
        return x + self.drop(self.norm(torch.tanh(self.lin(x))))


def nested(kinds, form):
    """``(module, call, layers)`` of equal weights; nothing is dropped where a vmap draws otherwise than a loop."""
    drop = 0.0 if "vmap" in kinds else 0.5
    torch.manual_seed(1)
    layers = build(kinds, lambda: Layer(drop), lambda kind, found: found)
    torch.manual_seed(1)
    if form == "class":
        cls = Layer
        for kind in reversed(kinds):
            cls = lifted_class(kind, cls)
        module = cls(drop)
        return module, module, layers
    call = lambda m, x: m(x)
    for kind in reversed(kinds):
        call = lifted_function(kind, call)
    module = build(kinds, lambda: Layer(drop), join)
    return module, lambda x: call(module, x), layers


@PAIRS
@pytest.mark.parametrize("form", ["class", "function"])
def test_two_levels_equal_two_plain_loops(kinds, form):
    module, call, layers = nested(kinds, form)
    x = torch.randn(*[2] * kinds.count("vmap"), B, D)
    for _ in range(2):
        runs = []
        for run in (call, lambda x: plain(kinds, layers, x)):
            torch.manual_seed(2)
            x = x.detach().clone().requires_grad_()
            out = run(x)
            drawn = torch.rand(2)
            loss(out).backward()
            runs.append({"out": out, "grad of x": x.grad, "drawn": drawn})
        got, want = runs[0] | state_and_grads(module), runs[1] | stacked(kinds, layers, state_and_grads)
        compare(got, want, "vmap" not in kinds)


@PAIRS
def test_two_levels_under_func_grad(kinds):
    module, _, layers = nested(kinds, "class")
    x = torch.randn(*[2] * kinds.count("vmap"), B, D)
    trained = {name: p.detach() for name, p in module.named_parameters()}

    def of_params(params):
        out, updated = torchlift.apply(module, {"params": params}, x, mutable="batch_stats")
        return loss(out), (out, updated["batch_stats"])

    torch.manual_seed(2)
    grads, (out, state) = torch.func.grad(of_params, has_aux=True)(trained)
    torch.manual_seed(2)
    want_out = plain(kinds, layers, x)
    loss(want_out).backward()
    got = {"out": out} | state | {f"grad of {name}": grad for name, grad in grads.items()}
    compare(got, {"out": want_out} | stacked(kinds, layers, state_and_grads), False)


# Carries -------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "h c")


@dataclass
class State:
    h: torch.Tensor
    c: torch.Tensor
    note: str = "kept"


CARRIES = {
    "dict": (lambda h, c: {"h": h, "c": c}, lambda s: (s["h"], s["c"])),
    "namedtuple": (Pair, lambda s: (s.h, s.c)),
    "dataclass": (State, lambda s: (s.h, s.c)),
    "nested, with None": (lambda h, c: [None, (h, {"c": c}, None)], lambda s: (s[1][0], s[1][1]["c"])),
}


@COMPILE
@pytest.mark.parametrize("kind", CARRIES)
def test_carries_of_any_kind(kind, compile):
    make, take = CARRIES[kind]

    def body(cell, carry, x):
        h, c = cell(x, take(carry))
        return make(h, c), {"y": 2 * h, "none": None}

    cell = nn.LSTMCell(D, D)
    h, c, xs = (torch.randn(*shape, requires_grad=True) for shape in ((B, D), (B, D), (3, B, D)))
    scanned = torchlift.scan(body, variable_broadcast="params", compile=compile)
    carry, ys = scanned(cell, make(h, c), xs)
    assert not compile or last_report().path == "compiled", last_report().reason
    assert type(carry) is type(make(h, c)) and set(ys) == {"y", "none"} and ys["none"] is None
    assert getattr(carry, "note", "kept") == "kept"
    want, want_ys = make(h, c), []
    for x in xs:
        want, y = body(cell, want, x)
        want_ys.append(y["y"])
    inputs = [h, c, xs, *cell.parameters()]
    results = [(*take(carry), ys["y"]), (*take(want), torch.stack(want_ys))]
    got, expected = ([*out, *torch.autograd.grad(loss(out), inputs)] for out in results)
    compare(dict(enumerate(got)), dict(enumerate(expected)), not compile)


@COMPILE
def test_an_empty_carry(compile):
    layer, xs = nn.Linear(D, D), torch.randn(3, B, D)
    carry, ys = torchlift.scan(
        lambda m, carry, x: (carry, m(x)), variable_broadcast="params", compile=compile
    )(layer, (), xs)  # fmt: skip
    assert carry == () and torch.allclose(ys, layer(xs), rtol=1e-12, atol=1e-12)


def test_none_leaves_pass_every_transform():
    layer, x = nn.Linear(D, D), torch.randn(2, D)
    body = lambda m, x, nothing: {"y": m(x), "none": nothing}
    for run in (torchlift.vmap(body, in_axes=(0, None)), torchlift.vmap(body), torchlift.remat(body)):
        out = run(layer, x, None)
        assert out["none"] is None and torch.allclose(out["y"], layer(x), rtol=1e-12)
    carry, ys = torchlift.scan(
        lambda m, carry, x: (carry, (m(x[0]), x[1])), variable_broadcast="params", compile=False
    )(layer, None, (x, None))
    assert carry is None and ys[1] is None and torch.allclose(ys[0], layer(x), rtol=1e-12)


# Inputs --------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.detach().mT.contiguous().mT,
    "expanded": lambda x: x.detach()[..., :1, :].expand(x.shape),
    "strided": lambda x: x.detach().repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape),
}


def both(transform, module, args, compile=False, calls=1):
    """The outcome of lifted module and twin on the same arguments."""
    compile = compile if transform.engine else False
    found = []
    for built in (Lifted(transform, module, "class", compile), Twin(transform, module)):
        given = [arg() for arg in args]
        torch.manual_seed(2)
        for _ in range(calls):
            out = built(*given)
        drawn = torch.rand(2)
        named = outputs(out, built.state)
        if any(t.requires_grad for t in tensors(out)):
            loss(out).backward()
            named |= gradients(built, given)
        found.append(named | {"drawn": drawn})
    return found


@BOTH
@COMPILE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(name, layout, compile):
    args = [
        lambda x=x: LAYOUTS[layout](x).requires_grad_()
        for x in (torch.randn(shape) for shape in TRANSFORM[name].shapes)
    ]
    compare(*both(TRANSFORM[name], MODULE["linear"], args, compile), False)


@BOTH
@COMPILE
def test_a_second_call_with_another_batch_size(name, compile):
    transform, module = TRANSFORM[name], MODULE["linear"]
    lifted, twin = Lifted(transform, module, "class", compile if transform.engine else False), Twin(transform, module)
    for batch in (B, B + 2, 1, B):
        shapes = [(*shape[:-2], batch, D) for shape in transform.shapes]
        got, want = (outputs(built(*arguments(shapes))) for built in (lifted, twin))
        compare(got, want, False)


@COMPILE
@pytest.mark.parametrize("length", [0, 1])
def test_loops_of_length_zero_and_one(length, compile):
    rnn, h, xs = nn.RNNCell(D, D), torch.randn(B, D, requires_grad=True), torch.randn(length, B, D, requires_grad=True)
    body = lambda m, h, x: (m(x, h), (2 * x, h[0]))
    carry, ys = torchlift.scan(body, variable_broadcast="params", compile=compile)(rnn, h, xs)
    want = rnn(xs[0], h) if length else h
    compare(dict(enumerate((carry, *ys))), dict(enumerate((want, 2 * xs, h[None, 0][:length]))), not compile)
    got, expected = (torch.autograd.grad(loss(out), [h, *rnn.parameters()], allow_unused=True) for out in (carry, want))
    for one, other in zip(got, expected):
        assert one is other is None or torch.allclose(
            torch.zeros(()) if one is None else one, torch.zeros(()) if other is None else other, rtol=1e-12, atol=1e-12
        )
    step = torchlift.scan(lambda m, x: (m(x), None), variable_axes={"params": 0}, compile=compile, length=length)
    made = torchlift.vmap(nn.Linear, variable_axes={"params": 0}, axis_size=length)(D, D)
    flat = nn.Linear(D, D)
    for key in ("weight", "bias"):
        setattr(flat, key, nn.Parameter(getattr(made, key).detach()))
    out, nothing = step(flat, h)
    assert nothing is None and torch.equal(out, nn.functional.linear(h, flat.weight[0], flat.bias[0]) if length else h)


# Surroundings --------------------------------------------------------------------------------------------------------


@contextmanager
def autocast():
    torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        yield


@BOTH
@COMPILE
def test_autocast(name, compile):
    """Products are in bfloat16, and the loop sees it as the plain one does."""
    with autocast():
        args = [lambda x=x: x.detach().clone().requires_grad_() for x in arguments(TRANSFORM[name].shapes)]
        got, want = both(TRANSFORM[name], MODULE["nested"], args, compile)
        plain_dtype = nn.Linear(D, D)(torch.randn(B, D)).dtype
    assert plain_dtype == torch.bfloat16
    exact = TRANSFORM[name].bitwise and not compile
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value) if exact else torch.allclose(got[key], value, rtol=2e-2, atol=2e-2), key


@BOTH
@COMPILE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("module", ["linear", "batch-norm", "custom collections"])
def test_without_gradients(name, mode, compile, module):
    transform = TRANSFORM[name]
    if transform.name == "vmap (shared params)" and MODULE[module].stateful:
        transform = TRANSFORM["vmap (own state)"]
    if transform.applied:
        return check_apply_without_gradients(mode, MODULE[module])
    args = [lambda x=x: x for x in arguments(transform.shapes)]
    lifted, twin = (
        Lifted(transform, MODULE[module], "class", compile if transform.engine else False),
        Twin(transform, MODULE[module]),
    )
    for built in (lifted, twin):
        with mode():
            built.out = built(*(arg() for arg in args))
        assert not any(t.requires_grad for t in tensors(built.out))
    compare(outputs(lifted.out, lifted.state), outputs(twin.out, twin.state), transform.bitwise and not compile)
    # What was done without gradients must not stand in the way of training.
    for built in (lifted, twin):
        built.given = arguments(transform.shapes)
        loss(built(*built.given)).backward()
    compare(gradients(lifted, lifted.given), gradients(twin, twin.given), False)


def check_apply_without_gradients(mode, module):
    lifted, twin = Lifted(TRANSFORM["apply"], module, "class"), Twin(TRANSFORM["apply"], module)
    args = arguments(((B, D),))
    with mode():
        out, state, _ = lifted.apply(args, {})
        want = twin(*args)
    compare(outputs(out, state), outputs(want, twin.state), True)


@COMPILE
def test_two_threads_in_nested_transforms(compile):
    """Two threads call one module, each with inputs of its own: a stack of layers, each a loop over time."""

    class Cell(nn.RNNCell):
        def forward(self, h, x):
            h = super().forward(x, h)
            return h, h

    class Layer(torchlift.scan(Cell, variable_broadcast="params", compile=compile)):
        def forward(self, xs):
            h, ys = super().forward(torch.zeros(B, D), xs)
            return ys, h

    Deep = torchlift.scan(torchlift.remat(Layer), variable_axes={"params": 0}, length=2, compile=compile)
    module = Deep(D, D)

    def run(seed):
        (xs,) = arguments(((3, B, D),), seed)
        out = module(xs)
        return outputs(out) | dict(enumerate(torch.autograd.grad(loss(out), [xs, *module.parameters()])))

    want = [run(seed) for seed in range(2)]
    found, barrier = {}, threading.Barrier(2)

    def work(seed):
        barrier.wait()
        found[seed] = [run(seed) for _ in range(3)]

    both = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for seed in range(2):
        for got in found[seed]:
            compare(got, want[seed], False)
    assert not torchlift.variables(module, STATE)
