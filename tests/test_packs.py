"""Graphs of several iterations take, give and save few tensors, and nothing but rounding changes."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_zoo import EAGER_GRAPHS, WAYS, ZOO, assert_equal, double, evaluate, packed, rand
from torch import nn

from torchlift import scan
from torchlift.engine import capture, compiled, packs
from torchlift.engine.graphs import Backend
from torchlift.engine.run import Body, Stacked, last_report, run
from torchlift.errors import IterationError

__all__ = ["double", "packed"]  # fixtures
INDUCTOR = {"backend": "inductor"}


def cell(c, h, x):
    h = torch.tanh(x @ c["w"] + h @ c["u"])
    return h, {"h": h, "again": h, "x": x, "sum": h.sum(), "count": torch.arange(2)}


def inputs(steps: int = 7, time: int = 0):
    torch.manual_seed(0)
    x = torch.randn(*((steps, 2, 3) if time == 0 else (2, steps, 3))).movedim(time, 0).requires_grad_()
    return {"w": rand(3, 4), "u": rand(4, 4)}, rand(2, 4), x


def found(consts, h, x, fn=cell, **settings):
    out, ys = run(Body(fn, ("packs", fn.__name__), "scan(cell)"), consts, h, Stacked(x), len(x), **settings)
    outs = [out, *ys.tree.values()]
    total = sum((t.square() * torch.arange(t.numel()).view(t.shape)).sum() for t in outs if t.requires_grad)
    return outs, list(torch.autograd.grad(total, [*consts.values(), h, x], retain_graph=True)), total


@pytest.mark.parametrize(
    ("way", "as_a_list"), [("unroll", False), ("unroll", True), ("reverse_unroll", False), ("shared", False)]
)
@pytest.mark.parametrize("name", ZOO)
def test_every_body_equals_the_plain_loop(packed, name, as_a_list, way):
    fn, make = ZOO[name]
    ways = ({k: v for k, v in WAYS[way].items() if k != "unroll"}, False), (WAYS[way], EAGER_GRAPHS)
    (_, *expected), (_, *got) = [evaluate(fn, make, as_a_list, way, compile) for way, compile in ways]
    assert last_report().path == "compiled", last_report()
    for a, b in zip(got[:2], expected[:2]):
        assert_equal(a, b, exact=False)
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("steps", [2, 3, 6, 7, 8])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [0, 1])
def test_any_number_of_steps_in_any_layout(packed, steps, reverse, time):
    ways = [{"compile": False}, {"compile": EAGER_GRAPHS, "unroll": 3}]
    expected, got = [found(*inputs(steps, time), reverse=reverse, **way) for way in ways]
    assert last_report().path == "compiled", last_report()
    for a, b in zip(got[:2], expected[:2]):
        assert_equal(a, b, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_inductor_equals_the_plain_loop(reverse):
    ways = [{"compile": False}, {"compile": INDUCTOR, "unroll": 3}]
    expected, got = [found(*inputs(7), reverse=reverse, **way) for way in ways]
    assert last_report().path == "compiled", last_report()
    for a, b in zip(got[:2], expected[:2]):
        assert_equal(a, b, exact=False)


def graphs_of(monkeypatch, **settings):
    """The graphs of three iterations as Inductor would be given them; they run as they are."""
    seen = []
    compile_graphs = compiled.compile_graphs

    def run_as_is(graphs, mode, backend, inductor, **kw):
        seen.append(graphs)
        return compile_graphs(graphs, mode, Backend("aot_eager"), None, **kw)

    monkeypatch.setattr(compiled, "compile_graphs", run_as_is)
    found(*inputs(6), unroll=3, compile=INDUCTOR, **settings)
    assert last_report().path == "compiled", last_report()
    return seen[-1]


def test_few_tensors_pass_from_forward_to_backward(packed, monkeypatch):
    graphs = graphs_of(monkeypatch)
    assert len(graphs.fw_inputs) == 2 + 1 + 1  # weights, carry, xs
    assert graphs.outputs == 1 + 5  # carry, ys
    saved = [i for kind, i in graphs.feeds if kind == "saved"]
    assert len(saved) == 1  # the carries, which are a y
    output = next(iter(reversed(graphs.fw.graph.nodes))).args[0]
    assert output[graphs.outputs] in output[1].all_input_nodes  # and are not copied
    assert not any(
        x in node.all_input_nodes for x in graphs.fw.graph.nodes if x.op == "placeholder" for node in cats(graphs.fw)
    )
    (joined,) = [node for node in cats(graphs.bw) if len(node.args[0]) == 2]  # the carry at the start, and the others


def cats(graph):
    return [node for node in graph.graph.nodes if node.target is torch.ops.aten.cat.default]


def test_large_values_stay_apart(packed, monkeypatch):
    monkeypatch.setattr(packs, "PACK", 64)
    graphs = graphs_of(monkeypatch)
    assert len([i for kind, i in graphs.feeds if kind == "saved"]) > 1


def test_packs_are_of_limited_size(packed, monkeypatch):
    def many(c, h, x):
        z = x @ c["w"] + h @ c["u"]
        for _ in range(3):
            h = torch.tanh(h.sin() + z)
        return h, {}

    monkeypatch.setattr(packs, "PACK", 3 * 2 * 4 * 8)
    graphs = graphs_of(monkeypatch, fn=many)
    sizes = [graphs.bw_inputs[at].numel() * 8 for at, (kind, _) in enumerate(graphs.feeds) if kind == "saved"]
    assert len(sizes) > 1 and max(sizes) == packs.PACK, sizes


def test_gradients_do_not_change_what_is_saved(packed):
    """A gradient may be nothing but saved rows; it must be memory of its own."""

    def body(c, h, x):
        y = h.sin()
        return y, {"y": (c["w"] * y).sum()}

    consts, h, x = {"w": rand(2, 4), "u": rand(1)}, rand(2, 4), rand(6, 1)
    _, ys = run(Body(body, ("packs", "rows"), "scan(rows)"), consts, h, Stacked(x), 6, unroll=3, compile=EAGER_GRAPHS)
    total = ys.tree["y"].sum()
    first, second = [torch.autograd.grad(total, consts["w"], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)
    first.zero_()
    assert torch.equal(torch.autograd.grad(total, consts["w"])[0], second)


def test_a_carry_may_be_written_into_after_the_loop(packed):
    """What is saved is no output that a caller may change."""

    def body(c, h, x):
        parts = [torch.sin(h[:1]), torch.sin(h[1:] + x)]
        return torch.cat(parts), {"p": parts[0].exp() + parts[1].exp()}

    def gradient(compile, write):
        h, x = torch.linspace(0, 1, 2, requires_grad=True), torch.linspace(0, 1, 6)
        body_ = Body(body, ("packs", "cat"), "scan(cat)")
        out, ys = run(body_, None, h, Stacked(x), 6, unroll=3, compile=compile)
        total = ys.tree["p"].sum() + out.clone().sum()
        if write:
            out.mul_(0)
        return torch.autograd.grad(total, h)[0]

    torch.testing.assert_close(gradient(EAGER_GRAPHS, True), gradient(False, False), rtol=1e-12, atol=0)


def test_what_comes_out_is_no_view_of_what_went_in(packed):
    """Rows that are put together as they were are a view, but not where they come out."""

    def body(c, h, x):
        whole = torch.cat([x[:1], x[1:]])
        return h + whole.sum(), {"whole": whole, "detached": whole.detach()}

    x = torch.randn(6, 3)
    for unroll in (1, 3, 6):
        body_ = Body(body, ("packs", "wholes"), "scan(wholes)")
        _, ys = run(body_, None, rand(1), Stacked(x), 6, unroll=unroll, compile=EAGER_GRAPHS)
        storages = {t.untyped_storage().data_ptr() for t in (x, *ys.tree.values())}
        assert len(storages) == 3
        assert_equal(list(ys.tree.values()), [x, x], exact=True)


def test_some_gradients_of_ys_are_missing(packed):
    def grads(compile):
        consts, h, x = inputs(7)
        out, ys = run(Body(cell, ("packs", "cell"), "scan"), consts, h, Stacked(x), 7, unroll=3, compile=compile)
        wanted = [*consts.values(), h, x]
        return [
            *torch.autograd.grad(out.sum(), wanted, retain_graph=True),
            *torch.autograd.grad(ys.tree["sum"][-1].exp(), wanted, retain_graph=True),
            *torch.autograd.grad(ys.tree["x"].sum(), [x]),
        ]

    assert_equal(grads(EAGER_GRAPHS), grads(False), exact=False)


def test_twice_differentiated(packed):
    def second(compile):
        consts, h, x = inputs(7)
        *_, total = found(consts, h, x, unroll=3, compile=compile)
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [*consts.values(), h, x]))

    assert_equal(second(EAGER_GRAPHS), second(False), exact=False)


def test_hooks_on_saved_tensors_see_packs(packed):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        got = found(*inputs(6), unroll=3, compile=EAGER_GRAPHS)
    expected = found(*inputs(6), compile=False)
    assert_equal(got[1], expected[1], exact=False)
    assert any(t.shape == (6, 4) for t in seen)  # of three iterations


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_any_size(packed, dynamic):
    compile = {**EAGER_GRAPHS, "dynamic": dynamic}
    for batch in (2, 5, 9, 3):
        consts, _, _ = inputs(6)
        h, x = rand(batch, 4), rand(6, batch, 3)
        expected, got = [found(consts, h, x, compile=c, unroll=3) for c in (False, compile)]
        assert last_report().path == "compiled", last_report()
        assert_equal(got[1], expected[1], exact=False)
    assert compiled.compilations["packs", "cell"] <= 4


ODD = {
    "no columns": lambda h, x: h + x[:, :0] @ h.new_zeros(0, 4),
    "a weight of no columns": lambda h, x: h + x @ h.new_ones(3, 0) @ h.new_ones(0, 4),
    "a symbolic row": lambda h, x: h + torch.cat([x.select(0, len(x) - 1), x.select(0, len(x) // 2)]).sum(),
    "empty rows first": lambda h, x: h + torch.cat([x[2:1], x[1:]]).cos().sum(),
    "rows of two tensors": lambda h, x: h + torch.cat([x[:1], x[1:], h[:1, :3], h[1:, :3]]).sum(),
    "a weight as wide as the batch": lambda h, x: h + (x.T @ h).sin().sum() + ((x.T + 1) @ h).cos().sum(),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_rows(packed, name):
    def body(c, h, x):
        h = ODD[name](h, x).tanh()
        return h, {"h": h}

    for batch in (5, 3):
        h, x = rand(batch, 4), rand(6, batch, 3)
        ways = (False, {**EAGER_GRAPHS, "dynamic": True})
        expected, got = [found({}, h, x, fn=body, unroll=3, compile=way) for way in ways]
        assert last_report().path == "compiled", last_report()
        assert_equal(got[0], expected[0], exact=False)
        assert_equal(got[1], expected[1], exact=False)


def test_a_weight_of_no_columns_leaves_the_loop_compiled(packed):
    def body(c, h, x):
        return h + x @ c["a"] @ c["b"], {}

    expected, got = [
        found(
            {"a": torch.ones(3, 0, requires_grad=True), "b": torch.ones(0, 4, requires_grad=True)},
            *inputs(6)[1:],
            fn=body,
            unroll=3,
            compile=way,
        )
        for way in (False, EAGER_GRAPHS)
    ]
    assert last_report().path == "compiled", last_report()
    assert_equal(got[1], expected[1], exact=False)


def test_images_keep_their_layout(packed):
    """A convolution of images with the channels last is another one, and a faster one on many devices."""
    layouts = []

    def body(c, h, x):
        layouts.append(x.stride())
        return nn.functional.conv2d(x, c["w"], padding=1) + h, {}

    x = torch.randn(6 * 2, 4, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (6, 2)).requires_grad_()
    consts, h = {"w": rand(4, 4, 3, 3)}, rand(2, 4, 5, 5)
    expected, got = [found(consts, h, x, fn=body, unroll=3, compile=way) for way in (False, EAGER_GRAPHS)]
    assert len(set(layouts)) == 1
    assert_equal(got[1], expected[1], exact=False)
    stack = x.detach()[:, :, ::2]
    assert capture.rows_of(stack)(1, 2)[0].is_contiguous(memory_format=torch.channels_last)


def test_ys_that_differ_between_iterations_are_refused_as_the_loop_does(packed):
    calls = []

    def body(c, h, x):
        calls.append(0)
        return h, {"y": h[: 1 + len(calls) % 2]}

    for compile in (False, EAGER_GRAPHS):
        with pytest.raises(IterationError, match="another one of torch.float64"):
            run(
                Body(body, ("packs", "odd"), "scan(odd)"), None, rand(4), Stacked(rand(6)), 6, unroll=2, compile=compile
            )


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, h, x):
        h = self.cell(x, h)
        return h, h


@pytest.mark.parametrize("reverse", [False, True])
def test_inside_an_outer_graph(packed, reverse):
    module = Gru().double()
    x, start = rand(6, 2, 3), rand(2, 4)

    def loop(compile):
        lifted = scan(Gru.forward, variable_broadcast="params", reverse=reverse, unroll=3, compile=compile)
        return functools.partial(lifted, module)

    results = []
    for call in (loop(False), torch.compile(loop(EAGER_GRAPHS), fullgraph=True, backend="aot_eager")):
        h, ys = call(start, x)
        results.append([h, ys, *torch.autograd.grad((ys.square().sum() + h.sum()), [start, x, *module.parameters()])])
    assert_equal(results[1], results[0], exact=False)
