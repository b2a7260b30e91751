"""Scanned attributes that the layers do not read cost nothing: one body for all layers."""

from __future__ import annotations

import copy
import enum
from typing import Any

import pytest
import torch
from enrolled import AOT, Graphs
from torch import Tensor, nn

import torchlift
from torchlift import _compat
from torchlift.unread import ReadError, Unread


class Kind(enum.IntEnum):
    EVEN, ODD = 0, 1


class Numbered(nn.Module):
    """A layer that needs its number only for a cache, as those of language models do."""

    def __init__(self, at: int):
        super().__init__()
        self.linear, self.at, self.seen = nn.Linear(4, 4), at, None

    def forward(self, x: Tensor, caches: Any = None, way: str = "not") -> Tensor:
        y = torch.dropout(torch.tanh(self.linear(x)), 0.5, self.training)
        if self.at is None:
            raise ValueError("it has no number")
        if caches is not None:
            y = y + caches[self.at]
        if way == "compare" and self.at == 1:
            y = y * 2
        if way == "text":
            y = y * len(f"{self.at}")
        if way == "type" and isinstance(self.at, int):
            y = y * 3
        if way == "identity" and (self.at is True or self.at is Kind.ODD):
            y = y * 5
        if way == "other error":
            try:
                y = y + int(self.at)
            except Exception as error:
                raise ValueError("no number") from error
        if way == "assigned":
            self.last = 3
        if way == "caught":
            try:
                y = y * (self.at + 1)
            except Exception:
                y = y * 100
        return x + y


def results(call: Any, layers: nn.Module, *args: Any) -> list[Tensor]:
    torch.manual_seed(2)
    out = call(*args)
    return [out, *torch.autograd.grad(out.square().sum(), list(layers.parameters())), torch.get_rng_state()]


def loop(layers: nn.ModuleList, x: Tensor, *args: Any) -> Tensor:
    for layer in layers:
        x = layer(x, *args)
    return x


def check(call: Any, scanned: nn.ModuleList, *args: Any) -> None:
    expected = results(lambda *given: loop(scanned, *given), scanned, *args)
    for a, b in zip(results(call, scanned, *args), expected, strict=True):
        torch.testing.assert_close(a, b)


def numbered(n: int = 4) -> Any:
    class Fresh(Numbered):  # what a class is known to read is known for good
        pass

    return torchlift.scan_layers([Fresh(at) for at in range(n)], compile=AOT, scanned_attributes=["at"])


def test_an_attribute_that_is_not_read_makes_no_graph_of_its_own() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    check(scanned, scanned, x)
    assert [(r.path, r.compilations) for r in torchlift.explain(scanned, x)] == [("compiled", 1)]


def test_the_loops_of_a_compiled_model_are_explained_too() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), scanned)
    for compiled in (torch.compile(model, backend="aot_eager"), torch.compile(scanned, backend="aot_eager")):
        assert [report.path for report in torchlift.explain(compiled, x)] == ["compiled"]
    model.compile(backend="aot_eager")
    assert [report.path for report in torchlift.explain(model, x)] == ["compiled"]


@pytest.mark.parametrize("way", ["compare", "text", "type", "caught", "other error"])
def test_an_attribute_that_is_read_is_given(way: str) -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    check(scanned, scanned, x)
    check(scanned, scanned, x, None, way)
    check(scanned, scanned, x, None, way)
    assert torchlift.explain(scanned, x, None, way)[-1].path == "compiled"


def test_an_attribute_that_is_read_later_is_given_from_then_on() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    caches = [torch.randn(4) for _ in range(4)]
    check(scanned, scanned, x)
    check(scanned, scanned, x, caches)
    check(scanned, scanned, x)
    scanned[2].at = 0
    check(scanned, scanned, x, caches)


def test_what_may_be_compared_by_identity_is_always_given() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    scanned[1].at = None
    with pytest.raises(ValueError, match="it has no number"):
        scanned(x)


@pytest.mark.parametrize("values", [[True, False, True], [Kind.ODD, Kind.EVEN, Kind.ODD]])
def test_what_is_compared_by_identity_is_given(values: list[Any]) -> None:
    scanned, x = numbered(3), torch.randn(3, 4)
    for layer, value in zip(scanned, values):
        layer.at = value
    check(scanned, scanned, x, None, "identity")


def test_an_assignment_reads_no_attribute() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    with pytest.warns(torchlift.TorchliftWarning, match="assigned 'last'"):
        scanned(x, None, "assigned")
    assert [(r.path, r.compilations) for r in torchlift.explain(scanned, x, None, "assigned")] == [("compiled", 1)]


@pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED)
def test_a_graph_sees_that_an_attribute_is_of_another_kind() -> None:
    torch._dynamo.reset()
    scanned, x = numbered(), torch.randn(3, 4)
    call = torch.compile(scanned, backend="aot_eager")
    check(call, scanned, x)
    scanned[1].at = None
    with pytest.raises(Exception, match="it has no number"):  # noqa: B017  (Dynamo's, around the body's own)
        call(x)


@pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED)
def test_inside_torch_compile_the_loop_is_one_operator() -> None:
    torch._dynamo.reset()
    scanned, x, graphs = numbered(), torch.randn(3, 4), Graphs()
    call = torch.compile(scanned, fullgraph=True, backend=graphs)
    check(call, scanned, x)
    assert graphs.inputs == [4]  # x, a ticket, and two stand-ins
    caches = [torch.randn(4) for _ in range(4)]
    with pytest.warns(torchlift.TorchliftCompileWarning, match="differ in structure"):
        check(call, scanned, x, caches)


@pytest.mark.parametrize(
    "use", [bool, int, float, str, repr, hash, len, list, iter, abs, lambda v: v + 1, lambda v: 1 + v, lambda v: v == 1,
            lambda v: v < 1, lambda v: [0][v], lambda v: v.real, lambda v: isinstance(v, int), lambda v: f"{v}",
            lambda v: -v, lambda v: {v: 1}, lambda v: range(v), lambda v: v[0], lambda v: torch.ones(2) * v,
            lambda v: torch.full((v,), 1.0)],
)  # fmt: skip
def test_any_use_is_noticed(use: Any) -> None:
    used: set[tuple[int, str]] = set()
    value = Unread((0, "at"), used)
    with pytest.raises((ReadError, TypeError), match="'at' is read|Unread"):
        use(value)
    assert used == {(0, "at")}


def test_copies_are_of_the_layers_as_they_are() -> None:
    scanned, x = numbered(), torch.randn(3, 4)
    check(scanned, scanned, x)
    assert [layer.at for layer in copy.deepcopy(scanned)] == [0, 1, 2, 3]
