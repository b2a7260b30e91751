"""The loop as one operator of an outer compiled graph."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift.engine import compiled, handles
from torchlift.engine.loop import Body, Stacked, plain_run
from torchlift.engine.opaque import opaque_run, register_body

Pair = namedtuple("Pair", "first second")
GRAPHS = {"backend": "aot_eager"}


class Cell(nn.Module):
    def __init__(self, rate: float = 0.5):
        super().__init__()
        self.linear, self.rate = nn.Linear(4, 4), rate

    def forward(self, x):
        return torch.tanh(F.dropout(self.linear(x), self.rate))


def body_of(cell: nn.Module) -> Body:
    def fn(consts, carry, params):
        h = torch.func.functional_call(cell, params, (carry["h"],))
        return {"h": h}, Pair(h.sum(-1), {"n": 3, "none": None})

    return Body(fn, ("cell", cell.rate), "scan(Cell)")


class Layers(nn.Module):
    """Layers run by one operator."""

    def __init__(self, n: int, stacked: bool, rate: float = 0.5, backend: str = "aot_eager", **options):
        super().__init__()
        self.layers = nn.ModuleList(Cell(rate) for _ in range(n))
        self.n, self.stacked, self.backend, self.options = n, stacked, backend, options
        self.key = register_body(f"cell {rate}", lambda: body_of(self.layers[0]))

    def xs(self):
        params = [dict(layer.named_parameters()) for layer in self.layers]
        return Stacked({k: torch.stack([p[k] for p in params]) for k in params[0]}) if self.stacked else params

    def forward(self, x):
        carry, ys = opaque_run(
            self.key, {}, {"h": x}, self.xs(), self.n, compile={"backend": self.backend}, **self.options
        )  # fmt: skip
        return carry["h"], self.first(ys)

    def first(self, ys):
        return ys.tree.first if self.stacked else torch.stack([y.first for y in ys])

    def plain(self, x):
        options = {k: v for k, v in self.options.items() if k in ("reverse", "shared_draws")}
        carry, ys = plain_run(body_of(self.layers[0]), {}, {"h": x}, self.xs(), self.n, **options)
        return carry["h"], self.first(ys)


def results(fn, model, x):
    torch.manual_seed(1)
    outs = fn(x)
    leaves = [x, *model.parameters()]
    return [*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), leaves), torch.get_rng_state()]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled.clear_cache()
    yield
    torch.set_default_dtype(torch.float32)


WAYS = [{}, {"reverse": True, "unroll": 2}, {"remat": True}, {"lengths": (2, 2)}, {"shared_draws": True}]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_two_calls_in_one_graph_and_changing_batches(stacked, options):
    model = Layers(4, stacked, **options)

    def twice(fn):
        return lambda x: (*fn(x), *fn(x))

    fn = torch.compile(twice(model), fullgraph=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters
    counter.clear()
    for batch in (2, 3, 5, 8):
        x = torch.randn(batch, 4, requires_grad=True)
        got = results(fn, model, x)
        assert_same(got, results(twice(model.plain), model, x))
        if not options.get("shared_draws"):
            assert not torch.equal(got[0], got[2])  # two calls, two masks
    assert counter["stats"]["unique_graphs"] == 2
    assert compiled.compilations[("cell", 0.5)] == 2


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
def test_under_inductor(stacked):
    model = Layers(3, stacked, backend="inductor")
    fn = torch.compile(lambda x: (*model(x), *model(x)), fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, requires_grad=True)
        assert_same(results(fn, model, x), results(lambda x: (*model.plain(x), *model.plain(x)), model, x))


def test_retained_graph_and_no_grad():
    model = Layers(3, True, rate=0.0)
    fn = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, requires_grad=True)
    out, _ = fn(x)
    first = torch.autograd.grad(out.sum(), [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *model.parameters()])
    assert_same(first, second)
    with torch.no_grad():
        torch.testing.assert_close(fn(x)[0], model.plain(x)[0])


def test_the_graph_holds_one_operator_whatever_the_length():
    sizes = []

    def backend(graph, inputs):
        from torch._functorch.aot_autograd import aot_module_simplified

        def count(gm, _):
            sizes.append(sum("torchlift" in str(n.target) for n in gm.graph.nodes))
            return gm

        return aot_module_simplified(graph, inputs, fw_compiler=count)

    for n in (2, 12):
        torch._dynamo.reset()
        model = Layers(n, False)
        out, _ = torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 4))
        out.sum().backward()
    assert sizes == [1, 1, 1, 1]


def test_frozen_parameters():
    model = Layers(3, False, rate=0.0)
    model.layers[1].linear.weight.requires_grad_(False)
    fn = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4)
    grads = []
    for f in (fn, model.plain):
        model.zero_grad()
        f(x)[0].sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert model.layers[1].linear.weight.grad is None
    assert_same(*grads)


class Decoder(nn.Module):
    """Its tokens have no gradients, though its parameters want some."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, token, _):
        token = self.head(self.embed(token)).argmax(-1)
        return token, token


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapter, self.on = nn.Linear(4, 4), False

    def forward(self, x):
        return x + self.adapter(x) if self.on else x * 2


@pytest.mark.filterwarnings("error:torchlift")
def test_parameters_that_want_gradients_where_no_output_has_one():
    torch.manual_seed(0)
    decode = torchlift.scan(Decoder, variable_broadcast="params", length=5, compile=GRAPHS)()
    token = torch.zeros(2, dtype=torch.long)
    whole = torch.compile(lambda token: decode(token, None)[1], backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(token), decode(token, None)[1])
    layers, x = torchlift.scan_layers([Adapter() for _ in range(3)], compile=GRAPHS), torch.ones(2, 4)
    out = torch.compile(layers, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out, x * 8) and not out.requires_grad
    x.requires_grad_()
    torch.compile(layers, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 8))


def test_policy():
    from torch.utils.checkpoint import CheckpointPolicy

    def nothing(ctx, op, *args, **kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE

    model = Layers(3, True, rate=0.0)
    key = register_body("with a policy", lambda: body_of(model.layers[0]), nothing)

    def forward(x):
        carry, ys = opaque_run(
            key, {}, {"h": x}, model.xs(), 3, compile={"backend": "aot_eager"}, remat=nothing
        )  # fmt: skip
        return carry["h"], ys.tree.first

    x = torch.randn(2, 4, requires_grad=True)
    fn = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert_same(results(fn, model, x), results(model.plain, model, x))


def test_what_cannot_be_captured_is_unrolled():
    class Branch(Cell):
        def forward(self, x):
            return x.new_tensor(x.tolist()) * 2 if False else self.linear(x) @ self.linear(x).T @ x

    model = Layers(3, False, rate=0.25)
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    different = [{"n": i, **dict(m.named_parameters())} for i, m in enumerate(model.layers)]

    @torch.compiler.assume_constant_result
    def make():
        def fn(c, h, p):
            return F.linear(h, p["0.weight"]) * (p["n"] + 1), None

        return register_body("different", lambda: Body(fn, "different", "scan(different)"))

    def forward(x):
        return opaque_run(make(), None, x, different, 3, compile={"backend": "aot_eager"})[0]

    x = torch.randn(2, 4)
    with pytest.warns(match="is unrolled into the surrounding graph: iterations differ in structure"):
        got = torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
    expected = x
    for i, layer in enumerate(model.layers):
        expected = F.linear(expected, layer[0].weight) * (i + 1)
    torch.testing.assert_close(got, expected)


def test_a_closed_over_tensor_is_refused():
    mask = torch.ones(4, requires_grad=True)

    @torch.compiler.assume_constant_result
    def make():
        return register_body("closed", lambda: Body(lambda c, h, x: (h * mask, None), "closed", "scan(f)"))

    def forward(x):
        return opaque_run(make(), None, x, Stacked({}), 3)[0]

    with pytest.raises(Exception, match=r"scan\(f\): the body reads a tensor of shape \(4,\)"):
        torch.compile(forward, fullgraph=True, backend="aot_eager")(torch.ones(2, 4))


def test_named_tuples_go_in_and_come_out():
    @torch.compiler.assume_constant_result
    def make():
        def fn(c, h, x):
            assert isinstance(c, Pair) and isinstance(h, Pair)
            return Pair(h.first * c.first + x["x"][0], h.second + c.second[0]), None

        return register_body("pairs", lambda: Body(fn, "pairs", "scan(pairs)"))

    def forward(a, b):
        out, _ = opaque_run(
            make(), Pair(a, [b]), Pair(a, b), Stacked({"x": (torch.stack([a, b]),)}), 2, compile=GRAPHS
        )  # fmt: skip
        return out

    a, b = torch.randn(3), torch.randn(3)
    got = torch.compile(forward, fullgraph=True, backend="aot_eager")(a, b)
    assert isinstance(got, Pair)
    torch.testing.assert_close(got, Pair((a * a + a) * a + b, 3 * b))


def test_outside_of_a_compiled_graph_it_is_run():
    model = Layers(3, True, rate=0.0)
    x = torch.randn(2, 4, requires_grad=True)
    assert_same(results(model, model, x), results(model.plain, model, x))


def test_handles_are_hashes_of_content():
    model = Layers(3, True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(2, 4))
    assert all(len(name) == 64 for name in handles._handles)


SCRIPT = """
    import torch, sys
    sys.path.insert(0, {tests!r})
    from test_engine_opaque import Layers, results
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Layers(3, True, rate=float(sys.argv[1]), backend="inductor")
    fn = torch.compile(lambda x: (*model(x), *model(x)), fullgraph=True)
    x = torch.randn(2, 4, requires_grad=True)
    got, expected = results(fn, model, x), results(lambda x: (*model.plain(x), *model.plain(x)), model, x)
    assert all(torch.allclose(a, b) for a, b in zip(got, expected))
    print("right")
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path):
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__)))
    for rate in ("0.5", "0.25", "0.5"):
        done = subprocess.run([sys.executable, "-c", script, rate], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == "right", done.stderr
