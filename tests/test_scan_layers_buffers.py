"""The buffers of scan_layers: which are copied, and layers that share one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from measure import Operations
from test_scan_layers import AOT, assert_equal, loop, results
from torch import Tensor, nn

import torchlift
from torchlift import TorchliftCompileWarning
from torchlift.pack import Packed

pytestmark = pytest.mark.usefixtures("float64")


class Rotating(nn.Module):
    """With a table that all layers share, and one of its own that is large and never written."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.norm, self.linear = table, nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)) * self.table(x)


class Table(nn.Module):
    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("angles", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.angles += 1
        return self.angles.cos()


def test_layers_that_share_a_buffer_are_compiled_unless_they_write_it() -> None:
    for counts in (False, True):
        table = Table(counts)
        scanned = torchlift.scan_layers([Rotating(table) for _ in range(3)], compile=AOT)
        plain = copy.deepcopy(nn.ModuleList(scanned))
        for _ in range(3):
            x = torch.randn(5, 4)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                assert_equal(results(scanned, scanned, x), results(lambda x: loop(plain, x), plain, x))  # noqa: B023
            assert any("layers share a buffer that they write" in str(w.message) for w in found) == counts
        assert torchlift.explain(scanned, x)[-1].path == ("plain" if counts else "compiled")


class Overlapping(nn.Module):
    """Counts in one buffer and reads the other."""

    def __init__(self, counts: Tensor, reads: Tensor):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("counts", counts)
        self.register_buffer("reads", reads)

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        return self.linear(x) + self.reads.sum()


def _within(base: Tensor) -> list[nn.Module]:
    # Each of its own memory: torch.compile of such a layer alone loses writes where the views do not begin at 0.
    return [Overlapping(part[:3], part[1:]) for part in map(Tensor.clone, base.view(3, 4))]


def _across(base: Tensor) -> list[nn.Module]:
    base = base.clone()
    return [Overlapping(base[4 * at : 4 * at + 3], base[4 * at - 4 : 4 * at - 1]) for at in (1, 2, 1)]


def _detached(base: Tensor) -> list[nn.Module]:
    base = base.clone()
    return [Overlapping(base[:3].detach(), base[1:4].detach()) for _ in range(3)]


def _apart(base: Tensor) -> list[nn.Module]:
    return [Overlapping(part[:2], part[2:]) for part in base.clone().view(3, 4)]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", [_within, _across, _detached, _apart])
def test_buffers_that_are_views_of_one_another_see_each_others_writes(make: Any, inside: bool) -> None:
    if inside and make is _detached:
        pytest.skip("torch.compile refuses to write into these, in the layers alone too")
    base = torch.arange(12.0)
    scanned = torchlift.scan_layers(make(base), compile=AOT)
    plain = nn.ModuleList(make(base))
    plain.load_state_dict(scanned.state_dict())
    call = torch.compile(scanned, backend="aot_eager") if inside and torchlift._compat.TRACES_MODULES else scanned
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            x = torch.randn(2, 4)
            assert_equal(results(call, scanned, x), results(lambda x: loop(plain, x), plain, x))
    said = any("layers share a buffer that they write" in str(w.message) for w in found)
    assert said == (make is not _apart and call is scanned)


def test_a_buffer_that_is_not_written_is_not_copied(monkeypatch: Any) -> None:
    scanned = torchlift.scan_layers([Rotating(Table()) for _ in range(3)], compile=AOT)
    copied: list[list[str]] = []
    snapshot = Packed.snapshot

    def noted(self: Packed, *args: Any) -> list[Tensor]:
        found = snapshot(self, *args)
        copied.append([e.name for e, a, b in zip(self.entries, found, self.tensors, strict=True) if a is not b])
        return found

    results(scanned, scanned, torch.randn(5, 4))
    monkeypatch.setattr(Packed, "snapshot", noted)
    results(scanned, scanned, torch.randn(5, 4))
    assert copied == [["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]] * 3


def test_a_shared_buffer_where_nothing_is_compiled_and_an_export() -> None:
    table = Table(counts=True)
    scanned = torchlift.scan_layers([Rotating(table) for _ in range(3)], compile=AOT).eval()
    x, before = torch.randn(5, 4), table.angles.clone()
    with Operations(), pytest.warns(TorchliftCompileWarning, match="layer by layer: layers share a buffer that they"):
        scanned(x)
    torch.testing.assert_close(table.angles, before + 3)
    table.counts = False
    batch = torch.export.Dim("batch")
    exported = torch.export.export(nn.Sequential(scanned), (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.ones(7, 4)), scanned(torch.ones(7, 4)), rtol=1e-12, atol=1e-12)
