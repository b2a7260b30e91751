"""Loops in the bodies of compiled loops are operators of their graphs: equal to the plain loops, and flat to compile."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlift
from torchlift.engine import compiled, handles
from torchlift.engine.run import last_report

AOT = {"backend": "aot_eager"}
STEPS = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "remat": {"remat": True},
    "every": {"remat": True, "every": 2},
    "policy": {"policy": torchlift.checkpoint_policies.dots_saveable},
    "lengths": {"lengths": (2, 2)},
    "unroll": {"unroll": 2},
}


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Cell(nn.Module):
    """A recurrent cell that counts its steps."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.linear, self.p = nn.Linear(4, 4), p
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        c = F.dropout(torch.tanh(self.linear(c) + x), self.p, self.training)
        self.mean.mul_(0.9).add_(c.detach().mean(0))
        return c, c * 2


class Recurrent(nn.Module):
    """A layer that runs over time."""

    def __init__(self, compile: Any, p: float = 0.0, **options: Any):
        super().__init__()
        lifted = torchlift.scan(
            Cell, variable_broadcast="params", variable_carry="buffers", split_rngs={"dropout": True}, in_axes=1,
            out_axes=1, compile=compile, **options,
        )  # fmt: skip
        self.time, self.norm = lifted(p), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.time(x.new_zeros(x.shape[0], 4), x)[1])


def stack(compile: Any, p: float = 0.0, outer: dict[str, Any] | None = None, **inner: Any) -> Any:
    torch.manual_seed(0)
    layers = [Recurrent(compile, p, **inner) for _ in range(4)]
    return torchlift.scan_layers(layers, compile=compile, **(outer or {}))


def results(call: Any, layers: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = call(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()]), *layers.buffers()]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def operators(monkeypatch: Any) -> list[Any]:
    """The loops that became operators of a graph around them."""
    made: list[Any] = []
    prepare = handles.prepare

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(prepare(*args, **kwargs))
        return made[-1]

    compiled.clear_cache()
    monkeypatch.setattr(handles, "_prepared", {})
    monkeypatch.setattr("torchlift.engine.nested.prepare", noted)
    return made


@pytest.mark.parametrize("inner", [{}, {"reverse": True}, {"unroll": 3}, {"unroll": "auto"}], ids=str)
@pytest.mark.parametrize("outer", OPTIONS)
def test_layers_that_run_over_time(outer: str, inner: dict[str, Any], operators: list[Any]) -> None:
    layers, plain = stack(AOT, outer=OPTIONS[outer], **inner), stack(False, outer=OPTIONS[outer], **inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftCompileWarning)
        for batch in (2, 2, 3, 5):
            x = torch.randn(batch, STEPS, 4)
            got, report = results(layers, layers, x), last_report()
            assert_equal(got, results(plain, plain, x))
            assert report is not None and report.path == "compiled"
    assert bool(operators) == (outer != "policy")  # which is asked about each operator of the loop


@pytest.mark.parametrize("rematerialised", [False, True])
def test_a_loop_of_loops(rematerialised: bool, operators: list[Any]) -> None:
    class Rows(nn.Module):
        def __init__(self, compile: Any):
            super().__init__()
            self.layer = Recurrent(compile)

        def forward(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            run = torchlift.remat(Recurrent.forward) if rematerialised else Recurrent.forward
            c = run(self.layer, c + x)
            return c, c.sum()

    def run(compile: Any) -> list[Tensor]:
        torch.manual_seed(0)
        over = torchlift.scan(Rows, variable_axes={"params": 0, "buffers": 0}, length=10, compile=compile)(compile)
        x, c = torch.randn(10, 2, STEPS, 4), torch.randn(2, STEPS, 4)
        out, sums = over(c, x)
        return [out, sums, *torch.autograd.grad(out.sum() + sums.sum(), list(over.parameters())), *over.buffers()]

    assert_equal(run(AOT), run(False))
    assert operators


def test_a_loop_that_draws_is_part_of_the_graph(operators: list[Any]) -> None:
    layers, plain = stack(AOT, p=0.3), stack(False, p=0.3)
    x = torch.randn(2, STEPS, 4)
    for _ in range(2):
        assert_equal(results(layers, layers, x), results(plain, plain, x))
    assert not operators


class Closing(nn.Module):
    """A layer whose loop reads what the layer computed by a closure."""

    def __init__(self, compile: Any):
        super().__init__()
        self.linear, self.compile_inner = nn.Linear(4, 4), compile

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        body = lambda m, c, i: (c * 0.5 + h * i, None)
        return torchlift.scan(body, compile=self.compile_inner)(self.linear, x, torch.ones(STEPS))[0]


def test_a_loop_that_closes_over_a_value_is_part_of_the_graph() -> None:
    def make(compile: Any) -> Any:
        torch.manual_seed(0)
        return torchlift.scan_layers([Closing(compile) for _ in range(3)], compile=compile)

    layers, plain, x = make(AOT), make(False), torch.randn(2, 4)
    assert_equal(results(layers, layers, x), results(plain, plain, x))


class Penalty(nn.Module):
    """A layer that differentiates its loop, for a gradient that is differentiated again."""

    def __init__(self, compile: Any):
        super().__init__()
        self.inner = Recurrent(compile).eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.inner(z).square().sum(), z, create_graph=True)
        return x + 0.1 * g


def test_a_loop_whose_gradient_the_layer_differentiates() -> None:
    def make(compile: Any) -> Any:
        torch.manual_seed(0)
        return torchlift.scan_layers([Penalty(compile) for _ in range(2)], compile=compile)

    compiled.clear_cache()
    layers, plain, x = make(AOT), make(False), torch.randn(2, STEPS, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftCompileWarning)
        got = results(layers, layers, x)
    report = last_report()
    assert report is not None and report.path == "compiled"
    assert_equal(got, results(plain, plain, x))


def test_where_a_graph_with_operators_cannot_be_compiled_the_loops_are_parts_of_it(operators: list[Any]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        if "nested_forward" in str(graph.graph):
            raise ValueError("no such operator here")
        return graph

    layers, plain, x = stack({"backend": backend}), stack(False), torch.randn(2, STEPS, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftCompileWarning)
        got = results(layers, layers, x)
    report = last_report()
    assert operators
    assert report is not None and report.path == "compiled"
    assert_equal(got, results(plain, plain, x))


def test_a_policy_is_asked_about_the_steps() -> None:
    layers = stack(AOT, outer={"policy": torchlift.checkpoint_policies.dots_saveable})
    x = torch.randn(2, STEPS, 4)
    results(layers, layers, x)
    report = last_report()
    assert report is not None and report.saved_bytes >= STEPS * 2 * 4 * 8


@pytest.mark.skipif(not torchlift._compat.TRACES_MODULES, reason="this torch traces no lifted modules")
def test_inside_torch_compile_with_another_number_of_steps() -> None:
    layers, plain = stack(AOT), stack(False)
    call = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for steps in (12, 13, 14):
        x = torch.randn(2, steps, 4)
        assert_equal(results(call, layers, x), results(plain, plain, x))


def test_without_gradients_and_twice_differentiated() -> None:
    layers, plain = stack(AOT), stack(False)
    x = torch.randn(2, STEPS, 4)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), plain(x))
    found = []
    for each in (layers, plain):
        each.eval()
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(each(y).square().sum(), y, create_graph=True)
        found.append([g, *torch.autograd.grad(g.square().sum(), list(each.parameters()))])
    assert_equal(*found)


@pytest.mark.skipif(not torchlift._compat.TRACES_MODULES, reason="this torch traces no lifted modules")
def test_inside_torch_compile(operators: list[Any]) -> None:
    layers, plain = stack(AOT), stack(False)
    call = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, STEPS, 4)
        assert_equal(results(call, layers, x), results(plain, plain, x))
    assert operators


def test_the_graph_does_not_grow_with_the_steps() -> None:
    nodes = []
    for steps in (20, 200):
        compiled.clear_cache()
        layers = stack(AOT)
        layers(torch.randn(2, steps, 4)).sum().backward()
        (variant,) = {id(v): v for v in compiled._exact.values() if not isinstance(v, str)}.values()
        nodes.append(variant.program.saved_bytes >= 0 and len(operators_of(variant.program)))
    assert nodes[0] == nodes[1]


def operators_of(program: Any) -> list[Any]:
    graphs = [cell.cell_contents for fn in (program.fw, program.bw) for cell in fn.__closure__]
    return [node for graph in graphs if isinstance(graph, torch.fx.GraphModule) for node in graph.graph.nodes]


def test_with_inductor() -> None:
    torch.set_default_dtype(torch.float32)
    layers, plain = stack(True), stack(False)
    x = torch.randn(2, 40, 4)
    for a, b in zip(results(layers, layers, x), results(plain, plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_copy_and_another_body_are_told_apart() -> None:
    layers = stack(AOT)
    x = torch.randn(2, STEPS, 4)
    layers(x)
    other = copy.deepcopy(layers)
    for layer in other:
        layer.time.p = 0.0
        layer.norm.eps = 0.5
    plain = stack(False)
    for layer in plain:
        layer.norm.eps = 0.5
    torch.testing.assert_close(other.eval()(x), plain.eval()(x))
