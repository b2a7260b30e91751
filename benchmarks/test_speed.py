"""The workloads of figures.py under pytest-benchmark: ``python -m pytest benchmarks/test_speed.py``.

Times to look at and to compare between commits (``--benchmark-autosave``, ``--benchmark-compare``); none is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from common import STACKS, blocks, ensembles, lifted_calls, lstms, training

pytest.importorskip("pytest_benchmark")
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


def timed(benchmark: Any, call: Callable[[], Any]) -> None:
    clean = getattr(call, "clean", None)
    benchmark.pedantic(call, setup=clean, rounds=20, warmup_rounds=2, iterations=1 if clean else 50)


@pytest.mark.parametrize("way", [way for way in STACKS if way != "whole model compiled"])
@pytest.mark.benchmark(group="training step, 12 blocks of width 64")
def test_stack(benchmark: Any, way: str) -> None:
    modules = blocks(12, 64, LIKE)
    model, x = STACKS[way](modules), torch.randn(4, 64, 64)
    timed(benchmark, training(lambda: model(x), modules))


@pytest.mark.parametrize("way", ["torch.nn.LSTM", "torchlift.scan"])
@pytest.mark.benchmark(group="LSTM, 64 steps, width 64")
def test_lstm(benchmark: Any, way: str) -> None:
    calls, modules = lstms(64, 64, 16, LIKE)
    timed(benchmark, training(calls[way], modules))


@pytest.mark.parametrize("way", ["hand-written torch.func", "torchlift.vmap", "Python loop"])
@pytest.mark.benchmark(group="ensemble of 64")
def test_ensemble(benchmark: Any, way: str) -> None:
    calls, modules = ensembles(64, 32, LIKE)
    timed(benchmark, training(calls[way], modules))


@pytest.mark.parametrize("way", ["torch.func.functional_call", "torchlift.apply"])
@pytest.mark.benchmark(group="one lifted call")
def test_call(benchmark: Any, way: str) -> None:
    with torch.no_grad():
        timed(benchmark, lifted_calls(LIKE)[way])
