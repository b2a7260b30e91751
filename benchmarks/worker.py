"""One measurement in a process of its own: ``python benchmarks/worker.py WHAT '{"argument": ...}'`` prints JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import STACKS, Figures, blocks, clock, ensembles, interleaved, lifted_calls, lstms, peak_memory, shared
from common import training as train


def measure(
    make: dict[str, Callable[[], Callable[[], Any]]], like: torch.Tensor, seconds: float, memory: bool = False
) -> Figures:
    """First call, best time and peak memory of each way; a way that fails has its error."""
    found: Figures = {}
    calls: dict[str, Callable[[], Any]] = {}
    for way, build in make.items():
        try:
            call = build()
            found[way] = {"first": clock(call, like.is_cuda)}
            clock(call, like.is_cuda)
            if memory:
                found[way]["memory"] = peak_memory(call, like.is_cuda)
            calls[way] = call
        except Exception as error:  # whatever a compiler raises is the figure of this way
            found[way] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
        if like.is_cuda:
            torch.cuda.empty_cache()
    if seconds:
        for way, best in interleaved(calls, seconds * len(calls), like.is_cuda).items():
            found[way]["step"] = best
    return found


def stacks(
    like: torch.Tensor, ways: Sequence[str], layers: int, width: int, batch: int = 4, time: int = 64,
    seconds: float = 0.0, memory: bool = False, frozen: bool = False,
) -> Figures:  # fmt: skip
    """Training steps of transformer blocks; of the gradient of the input alone if ``frozen``."""
    modules = blocks(layers, width, like)
    x = torch.randn(batch, time, width).to(like).requires_grad_(frozen)
    for module in modules:
        module.requires_grad_(not frozen)

    def build(way: str) -> Callable[[], None]:
        own = shared(modules)
        model = STACKS[way](own)
        step = train(lambda: model(x), own)
        clean = step.clean  # type: ignore[attr-defined]

        def clean_all() -> None:
            clean()
            x.grad = None

        step.clean = clean_all  # type: ignore[attr-defined]
        return step

    return measure({way: partial(build, way) for way in ways}, like, seconds, memory)


def steps(
    like: torch.Tensor, made: tuple[dict[str, Callable[[], torch.Tensor]], list[torch.nn.Module]], seconds: float
) -> Figures:
    """Training steps of a workload that has its modules."""
    calls, modules = made
    return measure({way: partial(train, call, modules) for way, call in calls.items()}, like, seconds)


def lstm(like: torch.Tensor, length: int, width: int, batch: int, seconds: float) -> Figures:
    return steps(like, lstms(length, width, batch, like), seconds)


def ensemble(like: torch.Tensor, size: int, batch: int, seconds: float) -> Figures:
    return steps(like, ensembles(size, batch, like), seconds)


def call(like: torch.Tensor, seconds: float, state: bool = False) -> Figures:
    with torch.no_grad():
        return measure({way: lambda made=made: made for way, made in lifted_calls(like, state).items()}, like, seconds)


WHAT: dict[str, Callable[..., Figures]] = {"stacks": stacks, "lstm": lstm, "ensemble": ensemble, "call": call}


def main(what: str, arguments: str) -> None:
    given = json.loads(arguments)
    torch.set_num_threads(given.pop("threads", 2))
    like = torch.empty(0, device=given.pop("device", "cpu"), dtype=getattr(torch, given.pop("dtype", "float32")))
    warnings.simplefilter("ignore")
    print(json.dumps(WHAT[what](like, **given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
