"""Products in the fastest way: the same to rounding, in the graphs of a compiled loop and nowhere else."""

import math

import pytest
import torch
from torch import nn

from torchlift import scan_layers
from torchlift.engine import gemm

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    monkeypatch.setattr(gemm, "_ways", lambda: gemm.Ways(2**20, transposed=True, parts=False))


def products(x, w, row, full, small):
    return [
        aten.mm(x, w), aten.mm(x.t(), x), aten.addmm(row, x, w), aten.addmm(full, x, w), aten.addmm(full, x, w, beta=2),
        aten.addmm(row[:1], x, w), aten.mm(small, small), aten.mm(x.double(), w.double()), aten.mm(x[:0], w),
    ]  # fmt: skip


def traced(dtype=torch.float32):
    sizes = ((256, 128), (128, 64), (64,), (256, 64), (8, 8))
    inputs = [torch.randn(*size, dtype=dtype) for size in sizes]
    return torch.fx.experimental.proxy_tensor.make_fx(products, tracing_mode="fake")(*inputs), inputs


def test_large_float32_products_are_replaced():
    graph, inputs = traced()
    expected = graph(*inputs)
    gemm.tune_products(graph)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.torchlift.product.default) == 5
    assert targets.count(aten.mm.default) == 3 and targets.count(aten.addmm.default) == 1
    for got, wanted in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_where_a_transposed_first_factor_is_slow_it_stays(monkeypatch):
    monkeypatch.setattr(gemm, "_ways", lambda: gemm.Ways(2**20, transposed=False, parts=False))
    graph, _ = traced()
    gemm.tune_products(graph)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.torchlift.product.default) == 4


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx512f\n", 2**20),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx512f\n", 2**24),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2\n", None),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx512f\n", math.inf),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx2\n", None),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 6\nflags\t\t: fpu avx512f\n", None),
        ("", None),
    ],
)
def test_the_processor_decides(text, least, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(gemm.Path, "read_text", lambda path: text)
    monkeypatch.setattr(gemm.Path, "exists", lambda path: True)
    found = gemm._ways.__wrapped__()
    assert (found and found.least) == least


@pytest.mark.parametrize(
    ("processors", "parts", "halves"),
    [(1, False, False), (2, True, True), (3, True, False), (4, True, False), (5, False, False), (None, False, False)],
)
@pytest.mark.parametrize("kind", ["AuthenticAMD\ncpu family\t: 25", "GenuineIntel\ncpu family\t: 6"])
def test_the_number_of_processors_decides_about_parts(kind, processors, parts, halves, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(gemm.Path, "exists", lambda path: True)
    monkeypatch.setattr(gemm.Path, "read_text", lambda path: f"vendor_id\t: {kind}\nflags\t\t: avx512f\n")
    monkeypatch.setattr(gemm.os, "cpu_count", lambda: processors)
    ways = gemm._ways.__wrapped__()
    assert (ways.parts, ways.halves) == (parts, halves and "Intel" in kind)


@pytest.mark.parametrize("off", ["other processors", "switched off", "float64"])
def test_what_stays_as_it_is(off, monkeypatch):
    graph, _ = traced(torch.float64 if off == "float64" else torch.float32)
    before = str(graph.graph)
    if off == "other processors":
        monkeypatch.setattr(gemm, "_ways", lambda: None)
    if off == "switched off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    gemm.tune_products(graph)
    assert str(graph.graph) == before


def assert_batches(fn, inputs, count):
    """So many products of ``fn`` become batches, and all are the same to rounding."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(fn, tracing_mode="fake")(*inputs)
    expected = graph(*inputs)
    gemm.tune_products(graph)
    assert [node.target for node in graph.graph.nodes].count(aten.bmm.default) == count
    for got, wanted in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def few_rows(x, w, row, weights):
    return [
        aten.mm(x, w.t()), aten.mm(x, weights[:, 8:]), aten.addmm(row, x, w.t()), aten.addmm(row[:1], x, w.t()),
        aten.mm(x.t(), x), aten.mm(x[:1], w.t()), aten.mm(x, w[:-1].t()), aten.mm(x[:, :8], w[:, :8].t()),
    ]  # fmt: skip


def test_products_of_few_rows_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr(gemm, "_ways", lambda: gemm.Ways(2**24, transposed=False, parts=True))
    inputs = [torch.randn(*size) for size in ((8, 256), (256, 256), (256,), (256, 264))]
    assert_batches(few_rows, inputs, 4)


def gradients(x, w, square, flat, bias):
    return [
        aten.mm(x, w), aten.mm(x.t(), x), aten.mm(flat, flat.t()), aten.mm(x, w.t().contiguous().t()),
        aten.addmm(bias, x, w), aten.mm(x[:-1], w), aten.mm(square, square), aten.mm(x[:, :64], w[:64, :64]),
        aten.mm(x[:8], w),
    ]  # fmt: skip


def test_products_by_a_factor_that_lies_row_by_row_are_computed_in_halves(monkeypatch):
    monkeypatch.setattr(gemm, "_ways", lambda: gemm.Ways(math.inf, transposed=False, parts=False, halves=True))
    inputs = [torch.randn(*size) for size in ((256, 128), (128, 128), (32, 32), (512, 64), (128,))]
    assert_batches(gradients, inputs, 2)


@pytest.mark.slow
def test_a_compiled_loop_equals_the_plain_one():
    def results(compile):
        torch.manual_seed(1)
        layers = [nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.Tanh()) for _ in range(3)]
        module = scan_layers(layers, compile=compile)
        x = torch.randn(128, 128, requires_grad=True)
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    for got, wanted in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
