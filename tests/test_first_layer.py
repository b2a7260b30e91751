"""Stacks whose first layer carries on something else than it is given, as under autocast."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlift
from torchlift.engine.run import last_report
from torchlift.errors import TorchliftCompileWarning

AOT = {"backend": "aot_eager"}


def blocks(p: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p)) for _ in range(4)]


def results(run: Any, layers: Any, x: Tensor, dtype: torch.dtype | None = torch.bfloat16) -> list[Tensor]:
    """Output, gradients and state after a step."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = run(x)
    gradients = torch.autograd.grad(out.float().square().sum(), list(layers.parameters()))
    return [out, *gradients, *layers.buffers()]


def assert_like(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def plain(layers: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def test_the_first_layer_draws_first() -> None:
    layers = torchlift.scan_layers(blocks(p=0.5), compile=AOT)
    reference = nn.ModuleList(copy.deepcopy(list(layers)))
    x = torch.randn(6, 8)
    for _ in range(2):
        out, expected = results(layers, layers, x)[0], results(plain(reference), reference, x)[0]
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"lengths": (2, 2)}, {"compile": False}])
def test_under_autocast_all_layers_but_the_first_are_compiled(options: dict[str, Any]) -> None:
    layers = torchlift.scan_layers(blocks(), **{"compile": AOT, **options})
    reference = nn.ModuleList(copy.deepcopy(list(layers)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)
        for batch in (6, 6, 5):
            x = torch.randn(batch, 8)
            assert_like(results(layers, layers, x), results(plain(reference), reference, x))
    report = last_report()
    assert report is not None and report.path == ("plain" if options.get("compile") is False else "compiled")


def test_what_the_layers_carry_is_tried_once(monkeypatch: Any) -> None:
    layers = torchlift.scan_layers(blocks(), compile=AOT)
    x = torch.randn(6, 8)
    results(layers, layers, x)
    monkeypatch.setattr("torchlift.engine.compiled.settle", lambda request: pytest.fail("captured again"))
    results(layers, layers, x)
    monkeypatch.undo()
    results(layers, layers, x, None)  # and without autocast all of them are
    report = last_report()
    assert report is not None and report.nodes == 4


@pytest.mark.skipif(not torchlift._compat.TRACES_MODULES, reason="this torch traces no lifted modules")
def test_under_autocast_inside_torch_compile() -> None:
    layers = torchlift.scan_layers(blocks(), compile=AOT)
    reference = nn.ModuleList(copy.deepcopy(list(layers)))
    call = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(6, 8)
        assert_like(results(call, layers, x), results(plain(reference), reference, x))


class Spread(nn.Module):
    """Returns as many rows as it has weights, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x.sum()


def test_a_first_layer_that_changes_the_shape() -> None:
    layers = torchlift.scan_layers([Spread() for _ in range(3)], compile=AOT)
    x, expected = torch.randn(1, 8), torch.ones(3, 8)
    for layer in layers:
        expected = expected * layer.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)
        for _ in range(2):
            out, total = layers(x)
            torch.testing.assert_close(out, x * expected)
            torch.testing.assert_close(total, (x * layers[0].weight * layers[1].weight).sum())


class Growing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x])


def test_a_carry_that_changes_in_every_layer_runs_in_python() -> None:
    layers = torchlift.scan_layers([Growing() for _ in range(3)], compile=AOT)
    with pytest.warns(TorchliftCompileWarning, match=r"layer by layer.*carry.* came out of an iteration as shape \(4"):
        out = layers(torch.ones(1, 2))
    assert out.shape == (8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)  # of one layer nothing is lost
        assert torchlift.scan_layers([Growing()], compile=AOT)(torch.ones(1, 2)).shape == (2, 2)


class Fails(nn.Module):
    def __init__(self, fails: bool):
        super().__init__()
        self.linear, self.norm, self.fails = nn.Linear(8, 8), nn.BatchNorm1d(8), fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ValueError("of the user")
        return self.norm(self.linear(x))


def test_an_error_after_the_first_layer_leaves_it_as_it_was() -> None:
    layers = torchlift.scan_layers([Fails(False), Fails(False), Fails(True)], compile=AOT, scanned_attributes=["fails"])
    for _ in range(2):
        with pytest.raises(ValueError, match="of the user"), torch.autocast("cpu", dtype=torch.bfloat16):
            layers(torch.randn(6, 8))
        assert [int(layer.norm.num_batches_tracked) for layer in layers] == [0, 0, 0]
        assert all(torch.equal(layer.norm.running_mean, torch.zeros(8)) for layer in layers)
