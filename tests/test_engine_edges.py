"""The engine at its edges: closures, what cannot be captured, errors, threads, reports."""

from __future__ import annotations

import functools
import gc
import queue
import threading
import warnings
from typing import Any

import pytest
import torch
from engine_zoo import (
    EAGER_GRAPHS,
    assert_equal,
    double,
    identity,
    loop,
    rand,
    tanh_linear,
)
from torch import nn

import torchlift
from torchlift import _compat
from torchlift.engine import compiled
from torchlift.engine.run import Body, Stacked, explain_run, last_report, run

__all__ = ["double"]  # an autouse fixture


@pytest.mark.parametrize("train", [True, False])
def test_operators_with_effects_keep_their_order_in_the_plain_loop(train):
    def body(c, h, x):
        return torch.linalg.inv(h * 2), None

    start = torch.eye(2).requires_grad_(train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, _ = run(Body(body, f"inverted, {train}", "scan"), None, start, Stacked({}), 3, compile=EAGER_GRAPHS)
    assert torch.equal(out, torch.eye(2) / 2)
    # From torch 2.13 on the check of what came out is an operator with effects.
    if last_report().path == "plain":
        assert "_linalg_check_errors.default has an effect, which must come in order" in str(caught[-1].message)


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
    assert torch.equal(out, again) and out.requires_grad
    line = fn.__code__.co_firstlineno + 1
    assert last_report().reason.startswith(f"test_engine_edges.py:{line} depends on the values of a tensor")


def test_a_number_that_is_another_in_each_call_is_not_compiled_forever():
    body, xs = Body(lambda c, h, x: (h * c + x, None), "a schedule", "scan(schedule)"), rand(3, 2)
    outs = [run(body, 1.0 / n, torch.ones(2), Stacked(xs), 3, compile=EAGER_GRAPHS)[0] for n in range(1, 9)]
    with pytest.warns(torchlift.errors.TorchliftCompileWarning, match="arguments, 0.1 now, were others in 8 calls"):
        outs.append(run(body, 0.1, torch.ones(2), Stacked(xs), 3, compile=EAGER_GRAPHS)[0])
    assert last_report().path == "plain" and compiled.compilations["a schedule"] == 8
    outs.append(run(body, 1.0, torch.ones(2), Stacked(xs), 3, compile=EAGER_GRAPHS)[0])
    assert last_report().path == "compiled" and torch.equal(outs[0], outs[-1])
    torch.testing.assert_close(outs[8], run(body, 0.1, torch.ones(2), Stacked(xs), 3, compile=False)[0])


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


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]),
        lambda: torch.eye(3)[:2].to_sparse(),
        lambda: torch._neg_view(torch.ones(2, 3)),
        lambda: torch.ones(2, 3, device="meta"),
    ],
    ids=["nested", "sparse", "neg", "meta"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_one_iteration_on_what_is_no_plain_tensor(odd):
    body = Body(lambda c, h, x: (h + 1, None), odd, "scan")
    with pytest.warns(
        torchlift.TorchliftCompileWarning, match="scan runs as a plain Python loop: an input is a Tensor"
    ):
        out, _ = run(body, None, torch.zeros(()), [torch.ones(2, 3), odd()], 2, compile=EAGER_GRAPHS)
    assert out == 2 and last_report().path == "plain"


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


def test_explain_takes_a_module():
    with pytest.raises(
        torchlift.errors.TransformTargetError, match=r"explain: got <class .*Linear'>, expected an nn.M"
    ):
        torchlift.explain(nn.Linear, torch.ones(2))


@pytest.mark.parametrize("options", [{"remat": True}, {"every": 2}, {"lengths": (2, 2)}])
def test_what_runs_again_as_a_whole_is_counted(options):
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)]
    stack = torchlift.scan_layers(layers, compile={"backend": "aot_eager"}, **options)
    report = torchlift.explain(stack, torch.ones(2, 3))[0]
    assert report.path == "compiled" and report.saved_bytes == 0 and report.recomputed >= 2
    with torch.no_grad():
        assert torchlift.explain(stack, torch.ones(2, 3))[0].recomputed == 0


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


@pytest.mark.parametrize(("native", "cache"), [(True, "CppWrapperCodeCache"), (False, "CppPythonBindingsCodeCache")])
def test_getting_ready_without_a_compiler_says_nothing(native, cache, monkeypatch):
    """The loop says it, in its warning; a thread that ends in an error prints a traceback beside that."""
    from torch._inductor import codecache

    asked, ended = queue.Queue(), []

    def fail(*args, **options):
        asked.put(threading.current_thread())
        raise RuntimeError("no compiler")

    monkeypatch.setattr(getattr(codecache, cache), "load_pybinding_async", fail)
    monkeypatch.setattr(threading, "excepthook", ended.append)
    _compat.prepare_compiler.__wrapped__(native)
    thread = asked.get(timeout=60)
    thread.join()
    assert thread is not threading.main_thread() and not ended


def test_the_processor_is_asked_once_a_kernel_could_not_be_built(monkeypatch):
    """NOTE [Instruction sets]: the compiler is taken to know them all; where it does not, the loop compiles all the same."""
    from torch._inductor import config, cpu_vec_isa, exc

    taken = []

    def compile_graphs(*args, **kwargs):
        taken.append(config.cpp.vec_isa_ok)
        if len(taken) == 1:
            raise exc.CppCompileError(["g++"], "unrecognized command-line option")
        return compile(*args, **kwargs)

    compile = compiled.compile_graphs
    monkeypatch.setattr(compiled, "compile_graphs", compile_graphs)
    monkeypatch.setattr(_compat, "_doubted", False)
    known = cpu_vec_isa.valid_vec_isa_list()
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", functools.cache(lambda: known))  # or it would be asked here
    with config.patch({"cpp.vec_isa_ok": None}):
        out, _, leaves = loop({"backend": "inductor"})
    assert taken == [True, None]
    assert last_report().path == "compiled"
    out.sum().backward()


def test_what_a_user_says_of_the_processor_is_left(monkeypatch):
    from torch._inductor import config, exc

    monkeypatch.setattr(_compat, "_doubted", False)
    with config.patch({"cpp.vec_isa_ok": False}):
        assert not _compat.doubt_processor(exc.CppCompileError(["g++"], ""))
        assert _compat._optimism() == {}
    assert not _compat.doubt_processor(RuntimeError("something else"))


def test_what_is_left_of_a_transform_that_has_ended_is_an_ordinary_tensor():
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(rand(3, 4))
    linear = torch.nn.Linear(4, 4)
    layers = torchlift.scan_layers([linear, torch.nn.Linear(4, 4)], compile=EAGER_GRAPHS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = layers(kept[0])
    assert last_report().path == "compiled"
    expected = layers[1](linear(_compat.alive(kept[0])))
    assert torch.equal(*[torch.autograd.grad(result.sum(), linear.weight)[0] for result in (out, expected)])


def test_options_of_inductor_reach_it(monkeypatch):
    """``cpp_wrapper`` is an argument of Inductor, not only an option."""
    from torch._inductor import compile_fx

    given = []

    def spy(graph, inputs, **kind):
        given.append(kind.get("cpp_wrapper", False))
        raise RuntimeError("seen")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    for wrapped in (False, True):
        body = Body(lambda consts, carry, x: (carry + x, ()), f"cpp_wrapper {wrapped}", "adds")
        with pytest.warns(torchlift.TorchliftCompileWarning, match="seen"):
            run(body, (), torch.zeros(3), [torch.ones(3)] * 2, 2, compile={"options": {"cpp_wrapper": wrapped}})
    assert given == [False, True]


class ScaledBySize(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, e):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        return self.weight * attend(q, q.sin(), q.cos(), scale=1 / e.shape[0]).transpose(1, 2).flatten(2)


def test_a_size_that_became_a_number_is_checked_beside_conditions_that_are_alternatives():
    """Torch joins conditions by a bare "and", so that ``size == 3 and a or b`` held for any size where ``b`` did."""
    x, layer, symbolic = torch.randn(2, 8, 32), ScaledBySize(), EAGER_GRAPHS | {"dynamic": True}
    for size in (3, 4, 7):
        e = torch.zeros(size)
        got, wanted = (torchlift.scan_layers([layer], compile=way)(x, e) for way in (symbolic, False))
        assert torch.equal(got, wanted)
