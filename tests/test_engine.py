"""The compiled loop against the plain one: values, gradients, draws, memory."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import torchlift
from torchlift.engine import compiled
from torchlift.engine.run import Body, Stacked, explain_run, last_report, run

EAGER_GRAPHS = {"backend": "aot_eager"}
closed_over = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    compiled.clear_cache()
    closed_over.grad = None
    yield
    torch.set_default_dtype(torch.float32)


def rand(*size: int, **kw: Any) -> torch.Tensor:
    return torch.randn(*size, requires_grad=True, **kw)


def tanh_linear(c, h, x):
    h = torch.tanh(F.linear(h, c["w"], c["b"]) + x)
    return h, {"h": h, "none": None}


def attention(c, h, x):
    q, k, v = h @ c["q"], h @ c["k"], h @ x
    return h + torch.softmax(q @ k.mT / 2, -1) @ v, None


def rms_norm(c, h, x):
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * x
    return h, h


def draws(c, h, x):
    h = F.dropout(F.dropout(h + x, 0.3), 0.5)
    return h + torch.rand_like(h) + torch.randn(2, 4), torch.randn(())


def lstm(c, state, x):
    h, cell = state
    i, f, g, o = (x @ c["w"] + h @ c["u"]).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(cell)
    return (h, cell), h


def in_place(c, h, x):
    h = h.clone()
    h.mul_(2)
    h[:, 0] = 0
    h += x
    y = torch.zeros_like(h)
    y[:, 1] = h[:, 0]
    return h, y


def identity(c, h, x):
    return h, h


def unused(c, h, x):
    return h * 2 + c["a"], None


def leaves_of_all_kinds(c, h, x):
    a, n, flag = h
    return (a * (x["f"] * n).sum() + c, n + 1, ~flag), (n, flag, x["n"], 3, x["s"])


def closure(c, h, x):
    return torch.tanh(h * closed_over + x), None


def complex_numbers(c, h, x):
    return h * x, h.real


def detached(c, h, x):
    a, b = h
    return (a * x, b.detach() + a.mean(0).detach()), (a, b)


def views(c, h, x):
    h = h * x
    return h, (h.T, h[0], h.T)


def weights_twice(c, h, x):
    return torch.tanh(h @ c @ c.T + x @ c), (c.sum(),)


def cplx(*size):
    return torch.randn(*size, dtype=torch.complex128, requires_grad=True)


ZOO = {
    "tanh_linear": (tanh_linear, lambda: ({"w": rand(4, 4), "b": rand(4)}, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "attention": (attention, lambda: ({"q": rand(4, 4), "k": rand(4, 4)}, rand(2, 3, 4), rand(5, 4, 4), 5)),
    "rms_norm": (rms_norm, lambda: (None, rand(2, 4), rand(5, 4), 5)),
    "draws": (draws, lambda: (None, rand(2, 4), rand(5, 2, 4), 5)),
    "lstm": (
        lstm,
        lambda: ({"w": rand(3, 16), "u": rand(4, 16)}, (torch.zeros(2, 4), torch.zeros(2, 4)), rand(7, 2, 3), 7),
    ),
    "in_place": (in_place, lambda: (None, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "identity": (identity, lambda: (None, rand(2, 4), {}, 3)),
    "unused": (unused, lambda: ({"a": rand(4), "b": rand(3)}, torch.randn(2, 4), {"z": rand(3, 2)}, 3)),
    "kinds": (
        leaves_of_all_kinds,
        lambda: (
            rand(2),
            (rand(2), torch.tensor(0), torch.tensor([True, False])),
            {"f": rand(4, 2, 3), "n": torch.arange(4), "s": "text"},
            4,
        ),
    ),
    "closure": (closure, lambda: (None, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "complex": (complex_numbers, lambda: (None, cplx(3), cplx(4, 3), 4)),
    "detached": (detached, lambda: (None, (rand(2, 4), torch.zeros(4)), rand(5, 2, 4), 5)),
    "views": (views, lambda: (None, rand(2, 4), rand(5, 2, 4), 5)),
    "weights_twice": (weights_twice, lambda: (rand(4, 4), rand(2, 4), rand(5, 2, 4), 5)),
    "empty": (rms_norm, lambda: (None, rand(0, 4), rand(5, 4), 5)),
    "one": (tanh_linear, lambda: ({"w": rand(4, 4), "b": rand(4)}, torch.randn(2, 4), rand(1, 2, 4), 1)),
    "transposed": (rms_norm, lambda: (None, rand(4, 2).T, rand(2, 5, 4).transpose(0, 1), 5)),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "unroll": {"unroll": 3},
    "remat": {"remat": True},
    "every": {"remat": True, "every": 2},
    "nested": {"lengths": "nested"},
    "shared": {"shared_draws": True, "unroll": 2},
    "shared_remat": {"shared_draws": True, "remat": True},
    "reverse_unroll": {"reverse": True, "unroll": 2},
}


def as_list(tree: Any, length: int) -> list[Any]:
    """The slices of a stacked tree as leaves of their own."""

    def cut(leaf: Any, i: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach()[i].clone().requires_grad_(leaf.requires_grad)

    return [pytree.tree_map(lambda leaf, i=i: cut(leaf, i), tree) for i in range(length)]


def tensors(*trees: Any) -> list[torch.Tensor]:
    trees = tuple(t.tree if isinstance(t, Stacked) else t for t in trees)
    return [t for t in pytree.tree_leaves(trees) if isinstance(t, torch.Tensor)]


def evaluate(fn, make, as_a_list: bool, way: dict[str, Any], compile: Any) -> tuple[Any, list, list, torch.Tensor]:
    """Outputs, their tensors, gradients of all inputs, and the generator's state afterwards."""
    torch.manual_seed(3)
    closed_over.grad = None
    consts, carry, xs, length = make()
    xs = as_list(xs, length) if as_a_list else Stacked(xs)
    way = dict(way)
    if "lengths" in way:
        way["lengths"] = (2, length // 2) if length % 2 == 0 else (1, length, 1)
    inputs = [t for t in tensors(consts, carry, xs) if t.requires_grad] + [closed_over]
    out = run(
        Body(fn, ("test", fn.__name__), f"scan({fn.__name__})"), consts, carry, xs, length, compile=compile, **way
    )
    state = torch.get_rng_state()
    outs = tensors(*out)
    loss = sum((t * torch.linspace(0.1, 2, t.numel()).view(t.shape)).sum().abs() for t in outs if t.requires_grad)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return out, outs, list(grads), state


def assert_equal(got: list, expected: list, exact: bool) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if a is None or b is None:
            assert a is b
        else:
            tight = dict(rtol=0, atol=0) if exact else dict(rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(a, b, **tight, check_stride=False)


def compare(name: str, as_a_list: bool, way: str, compile: dict[str, Any]) -> None:
    fn, make = ZOO[name]
    plain_way = {k: v for k, v in WAYS[way].items() if k in ("reverse", "shared_draws")}
    expected, outs_b, grads_b, state_b = evaluate(fn, make, as_a_list, plain_way, False)
    got, outs_a, grads_a, state_a = evaluate(fn, make, as_a_list, WAYS[way], compile)
    assert last_report().path == "compiled", last_report()
    assert pytree.tree_structure(got[0]) == pytree.tree_structure(expected[0])
    assert_equal(outs_a, outs_b, exact=compile is EAGER_GRAPHS)
    assert_equal(grads_a, grads_b, exact=False)
    assert torch.equal(state_a, state_b)
    for a, b in zip(outs_a, outs_b):
        assert a.requires_grad == b.requires_grad


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


def loop(compile: Any = EAGER_GRAPHS, fn=tanh_linear, length: int = 5, batch: int = 2, **kw: Any):
    """A small loop and its leaves."""
    torch.manual_seed(5)
    consts = {"w": rand(4, 4), "b": rand(4)}
    xs = Stacked(rand(length, batch, 4))
    carry = torch.zeros(batch, 4)
    out, ys = run(Body(fn, ("loop", fn.__name__), "scan(loop)"), consts, carry, xs, length, compile=compile, **kw)
    return out, ys, [consts["w"], consts["b"], xs.tree]


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


def test_a_closure_is_looked_up_at_every_call():
    def make(scale):
        return Body(lambda c, h, x: (h * scale, None), "same key", "scan")

    for value in (2.0, 3.0):
        scale = torch.tensor(value, requires_grad=True)
        out, _ = run(make(scale), None, torch.ones(2), Stacked({}), 3, compile=EAGER_GRAPHS)
        (grad,) = torch.autograd.grad(out.sum(), scale)
        torch.testing.assert_close(grad, torch.tensor(6 * value**2))
    assert compiled.compilations["same key"] == 1


def test_what_cannot_be_captured_runs_plain_and_warns_once():
    def fn(c, h, x):
        return (h + x if h.sum() > 0 else h - x), None

    body = Body(fn, "branches", "scan(branches)")
    xs = rand(3, 2)
    with pytest.warns(torchlift.errors.TorchliftCompileWarning, match=r"scan\(branches\) runs as a plain Python loop"):
        out, _ = run(body, None, torch.ones(2), Stacked(xs), 3, compile=EAGER_GRAPHS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = run(body, None, torch.ones(2), Stacked(xs), 3, compile=EAGER_GRAPHS)
    assert torch.equal(out, again) and out.requires_grad and last_report().reason


def test_functorch_and_modes_run_plain():
    body = Body(lambda c, h, x: (torch.sin(h * x), None), "around", "scan")

    def fn(h):
        return run(body, None, h, Stacked(torch.ones(3, 2)), 3, compile=EAGER_GRAPHS)[0].sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = torch.rand(2)
        expected = torch.autograd.functional.jacobian(fn, h)
        torch.testing.assert_close(torch.func.grad(fn)(h), expected)
        assert "torch.func" in last_report().reason
        primal, tangent = torch.func.jvp(fn, (h,), (torch.ones(2),))
        torch.testing.assert_close(tangent, expected.sum())
        with torch.compiler.set_stance("force_eager"):
            fn(h)
        assert "set_stance" in last_report().reason
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            fn(h)
        assert last_report().path == "plain"


def test_errors_of_the_body_are_its_own():
    body = Body(lambda c, h, x: (h @ x, None), "fails", "scan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shape|size"):
            run(body, None, torch.ones(2, 3), Stacked(torch.ones(2, 5, 5)), 2, compile=EAGER_GRAPHS)


@pytest.mark.parametrize("compile", [False, EAGER_GRAPHS])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda c, h, x: ({"a": h["a"][:1]}, None), r"carry\['a'\].*shape \(1, 3\).*\(2, 3\)"),
        (lambda c, h, x: ({"a": h["a"].int()}, None), r"carry\['a'\].*int32.*float64"),
        (lambda c, h, x: ({"b": h["a"]}, None), "structure"),
        (lambda c, h, x: ({"a": 3}, None), r"carry\['a'\].*3"),
    ],
)
def test_carry_must_come_out_as_it_went_in(compile, fn, message):
    body = Body(fn, ("carry", message), "scan(f)")
    with pytest.raises(torchlift.errors.CarryError, match=message):
        run(body, None, {"a": torch.ones(2, 3)}, Stacked({}), 2, compile=compile)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"length": 3}, r"xs\['x'\] has 4 on axis 0, expected 3"),
        ({"unroll": 0}, "unroll is 0"),
        ({"lengths": (2, 3)}, r"the product of lengths \(2, 3\)"),
        ({"compile": {"speed": 1}}, "compile= has"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        run(Body(identity, "bad", "scan"), None, torch.ones(2), Stacked({"x": torch.ones(4)}), **{"length": 4, **kw})


def test_bad_lists():
    with pytest.raises(ValueError, match="xs has 2 entries, expected 3"):
        run(Body(identity, "bad", "scan"), None, torch.ones(2), [None, None], 3)


def test_two_threads():
    results: dict[int, Any] = {}
    torch.manual_seed(0)
    w, xs = rand(4, 4), rand(6, 2, 4)
    body = Body(lambda c, h, x: (torch.tanh(h @ c + x), h), "threads", "scan")

    def work(i):
        results[i] = []
        for _ in range(10):
            out, _ = run(body, w, torch.full((2 + i, 4), float(i))[:2], Stacked(xs), 6, compile=EAGER_GRAPHS)
            results[i].append(torch.autograd.grad(out.sum(), (w, xs)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        out, _ = run(body, w, torch.full((2, 4), float(i)), Stacked(xs), 6, compile=False)
        expected = list(torch.autograd.grad(out.sum(), (w, xs)))
        for got in results[i]:
            assert_equal(list(got), expected, exact=False)


@pytest.mark.parametrize("way", [{}, {"remat": True}, {"unroll": 2}])
@pytest.mark.parametrize("as_a_list", [False, True])
def test_many_calls_leave_nothing_behind(as_a_list, way):
    body = Body(lambda c, h, x: (torch.tanh(h @ c + x), h), ("leaves nothing", as_a_list), "scan")
    w = rand(4, 4)
    xs = [rand(2, 4) for _ in range(4)] if as_a_list else Stacked(rand(4, 2, 4))

    def call(backward):
        out, ys = run(body, w, torch.zeros(2, 4), xs, 4, compile=EAGER_GRAPHS, **way)
        if backward:
            out.sum().backward()

    def alive():
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    call(True)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for i in range(200):
            call(i % 2 == 0)
        assert alive() - before <= 2
    finally:
        gc.enable()


def test_explain_run():
    report = explain_run(
        Body(tanh_linear, "explained", "scan(f)"), {"w": rand(4, 4), "b": rand(4)}, torch.zeros(2, 4),
        Stacked(rand(3, 2, 4)), 3, compile=EAGER_GRAPHS,
    )  # fmt: skip
    assert (report.path, report.nodes, report.compilations, report.reason) == ("compiled", 1, 1, None)
    assert report.saved_bytes > 0


def test_other_backends_are_given_both_graphs():
    seen = []

    def backend(graph, inputs):
        seen.append(len(inputs))
        return graph

    out, _, leaves = loop({"backend": backend})
    assert len(seen) == 2
    out.sum().backward()
