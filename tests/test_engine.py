"""The compiled loop against the plain one: values, gradients, draws, memory."""

from __future__ import annotations

import pytest
import torch
from engine_zoo import (
    EAGER_GRAPHS,
    WAYS,
    ZOO,
    assert_equal,
    compare,
    double,
    draws,
    loop,
    rand,
    tanh_linear,
)

from torchlift.engine import compiled
from torchlift.engine.run import Body, Stacked, last_report, run

__all__ = ["double"]  # an autouse fixture


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("as_a_list", [False, True], ids=["stacked", "list"])
@pytest.mark.parametrize("name", ZOO)
def test_equals_plain_loop(name, as_a_list, way):
    compare(name, as_a_list, way, EAGER_GRAPHS)


@pytest.mark.slow
@pytest.mark.parametrize("as_a_list", [False, True], ids=["stacked", "list"])
@pytest.mark.parametrize("name", ["tanh_linear", "draws", "views", "kinds"])
@pytest.mark.parametrize("way", ["plain", "remat"])
def test_equals_plain_loop_under_inductor(name, as_a_list, way):
    compare(name, as_a_list, way, {"backend": "inductor"})


@pytest.mark.parametrize("way", ["plain", "remat", "nested"])
def test_retain_graph_twice_and_then_never_again(way):
    kw = {"plain": {}, "remat": {"remat": True}, "nested": {"lengths": (5, 1)}}[way]
    out, ys, leaves = loop(**kw)
    total = out.sum() + ys.tree["h"].sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves, retain_graph=True)
    third = torch.autograd.grad(total, leaves)
    assert_equal(list(first), list(second), exact=True)
    assert_equal(list(first), list(third), exact=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_gradients_accumulate():
    out, _, (w, *_) = loop()
    out.sum().backward(retain_graph=True)
    once = w.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(w.grad, 2 * once)


@pytest.mark.parametrize("fn", [tanh_linear, draws])
def test_double_backward(fn):
    def second(compile):
        out, _, leaves = loop(compile, fn)
        leaves = [t for t in leaves] if fn is tanh_linear else leaves[2:]
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    assert_equal(second(EAGER_GRAPHS), second(False), exact=False)


def test_gradcheck_twice():
    w = rand(3, 3)
    body = Body(lambda c, h, x: (torch.tanh(h @ c + x), h.sin()), "gradcheck", "scan")

    def fn(w, h, xs):
        out, ys = run(body, w, h, Stacked(xs), 3, compile=EAGER_GRAPHS)
        return out, ys.tree

    assert torch.autograd.gradcheck(fn, (w, rand(2, 3), rand(3, 2, 3)))
    assert torch.autograd.gradgradcheck(fn, (w, rand(2, 3), rand(3, 2, 3)))


def test_an_output_written_in_place_is_noticed():
    body = Body(lambda c, h, x: (torch.tanh(h + x), None), "noticed", "scan")
    out, _ = run(body, None, torch.zeros(3), [rand(3)], 1, compile=EAGER_GRAPHS)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_never_written():
    def fn(c, h, x):
        h.add_(x)
        return h, None

    body = Body(fn, "writes", "scan")
    carry, xs = torch.zeros(3), torch.ones(4, 3)
    out, _ = run(body, None, carry, Stacked(xs), 4, compile=EAGER_GRAPHS)
    assert torch.equal(out, torch.full((3,), 4.0))
    assert torch.equal(carry, torch.zeros(3))


@pytest.mark.parametrize("compile", [False, EAGER_GRAPHS])
def test_length_zero(compile):
    carry = rand(2, 4)
    out, ys = run(
        Body(lambda c, h, x: (h + x, {"a": h.sum(-1), "b": 3}), "zero", "scan"), None, carry, Stacked(rand(0, 4)), 0,
        compile=compile,
    )  # fmt: skip
    torch.testing.assert_close(out, carry)
    assert ys.tree["a"].shape == (0, 2) and ys.tree["b"] == 3


def test_batch_size_changes_cost_one_more_compilation_and_then_none():
    key = ("loop", "tanh_linear")
    for batch in (2, 3, 5, 8, 13):
        a = loop(batch=batch)
        b = loop(False, batch=batch)
        assert_equal([a[0], a[1].tree["h"]], [b[0], b[1].tree["h"]], exact=True)
        assert_equal(
            list(torch.autograd.grad(a[0].sum(), a[2])), list(torch.autograd.grad(b[0].sum(), b[2])), exact=False
        )
    assert compiled.compilations[key] == 2
    loop(batch=1)  # a size of 1 broadcasts, so it is a graph of its own
    assert compiled.compilations[key] == 3


@pytest.mark.slow
def test_batch_size_changes_under_inductor():
    for batch in (2, 3, 5, 8):
        a, b = loop({}, batch=batch), loop(False, batch=batch)
        assert_equal(
            list(torch.autograd.grad(a[0].sum(), a[2])), list(torch.autograd.grad(b[0].sum(), b[2])), exact=False
        )
    assert compiled.compilations[("loop", "tanh_linear")] == 2


def test_dynamic_false_compiles_each_size():
    for batch in (2, 3, 5):
        loop({**EAGER_GRAPHS, "dynamic": False}, batch=batch)
    assert compiled.compilations[("loop", "tanh_linear")] == 3


def test_length_is_no_part_of_the_signature():
    for length in (2, 3, 9):
        loop(length=length)
    assert compiled.compilations[("loop", "tanh_linear")] == 1


def test_autocast_is_captured():
    body = Body(lambda c, h, x: ((h @ c).float() + x, h @ c), "autocast", "scan")
    results = []
    for compile in (EAGER_GRAPHS, False):
        torch.manual_seed(0)
        w, xs = rand(8, 8, dtype=torch.float32), rand(3, 2, 8, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out, ys = run(body, w, torch.zeros(2, 8, dtype=torch.float32), Stacked(xs), 3, compile=compile)
        assert ys.tree.dtype == torch.bfloat16
        results.append([out, ys.tree, *torch.autograd.grad(out.sum(), (w, xs))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", enabled=False):
        w = rand(8, 8, dtype=torch.float32)
        _, ys = run(body, w, torch.zeros(2, 8, dtype=torch.float32), Stacked(xs), 3, compile=EAGER_GRAPHS)
    assert ys.tree.dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_there_is_no_node(context):
    with context():
        out, ys, _ = loop()
    assert not out.requires_grad and last_report().nodes == 0 and last_report().path == "compiled"
    torch.testing.assert_close(out, loop(False)[0].detach())


def test_one_node_for_each_iteration_of_a_list():
    body = Body(lambda c, h, x: (torch.tanh(h * x), None), "nodes", "scan")
    xs = [rand(4) for _ in range(6)]
    order: list[int] = []
    for i, x in enumerate(xs):
        x.register_hook(lambda g, i=i: order.append(i))
    out, _ = run(body, None, torch.ones(4), xs, 6, compile=EAGER_GRAPHS)
    assert last_report().nodes == 6 and last_report().compilations == 1
    out.sum().backward()
    assert order == [5, 4, 3, 2, 1, 0]


def test_list_with_frozen_layers():
    body = Body(lambda c, h, x: (torch.tanh(h * x["a"] + x["b"]), None), "frozen", "scan")
    grads = []
    for compile in (EAGER_GRAPHS, False):
        torch.manual_seed(0)
        xs = [{"a": torch.randn(4).requires_grad_(i % 2 == 0), "b": torch.randn(4)} for i in range(5)]
        out, _ = run(body, None, torch.ones(4), xs, 5, compile=compile)
        grads.append(list(torch.autograd.grad(out.sum(), [x["a"] for x in xs[::2]])))
    assert_equal(*grads, exact=False)


def counting_saved(fn) -> int:
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return total


def test_remat_saves_carries_only_and_nested_fewer():
    body = Body(lambda c, h, x: (torch.tanh(torch.sin(torch.exp(h * x))).cos(), None), "saves", "scan")
    xs, carry = torch.rand(64, 1, requires_grad=True), rand(1000)
    one = carry.numel() * carry.element_size()

    def saved(**kw):
        return counting_saved(lambda: run(body, None, carry, Stacked(xs), 64, compile=EAGER_GRAPHS, **kw)) / one

    everything, remat, nested = saved(), saved(remat=True), saved(lengths=(8, 8))
    assert everything > 2 * 64
    assert 63 <= remat <= 66
    assert nested <= 11


def test_saved_tensor_hooks_are_honoured():
    with torch.autograd.graph.save_on_cpu():
        out, _, leaves = loop()
    got = torch.autograd.grad(out.sum(), leaves)
    out, _, leaves = loop(False)
    assert_equal(list(got), list(torch.autograd.grad(out.sum(), leaves)), exact=False)


def test_policy():
    from torch.utils.checkpoint import CheckpointPolicy

    def dots(ctx, op, *args, **kwargs):
        matmul = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE

    def fn(c, h, x):
        return torch.tanh(torch.sin(torch.exp(h @ c) + x)), None

    body = Body(fn, "policy", "scan")
    results, reports = [], []
    for compile, remat in ((EAGER_GRAPHS, dots), (EAGER_GRAPHS, None), (False, None)):
        torch.manual_seed(0)
        c, h, xs = rand(4, 4), rand(2, 4), rand(3, 2, 4)
        out, _ = run(body, c, h, Stacked(xs), 3, compile=compile, remat=remat)
        reports.append(last_report())
        results.append(list(torch.autograd.grad(out.sum(), (c, h, xs))))
    assert_equal(results[0], results[2], exact=False)
    assert_equal(results[1], results[2], exact=False)
    assert reports[0].saved_bytes == 2 * 4 * 8 and reports[0].recomputed > 0
