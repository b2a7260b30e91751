"""What ``cuda.py`` measures.

bf16 and fp32; a stack of the shape of a model of 1.3 billion parameters (width 2048, 24 layers) among the cases. Peaks
are from ``torch.cuda.max_memory_allocated``, beyond what was held before the step. What would not fit in the time is
left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import HEAD, Figures, Line, ask, compare

EAGER, COMPILED, CHECKPOINT = "eager loop", "every block compiled", "checkpoint"
SCAN, REMAT = "scan_layers", "scan_layers, remat"
SMALL = {"layers": 24, "width": 256, "batch": 8, "time": 256}
LARGE = {"layers": 24, "width": 2048, "batch": 4, "time": 1024}


@dataclass
class Run:
    """What is left of the time, and where compiled code is kept."""

    end: float
    cache: str
    device: str = "cuda"
    seconds: float = 2.0

    def ask(self, what: str, cold: bool = False, **arguments: Any) -> Figures:
        left = self.end - time.perf_counter()
        if left < 15:
            raise RuntimeError("left out: no time")
        arguments |= {"device": self.device}
        return ask("worker.py", what, min(left, 180), cache=None if cold else self.cache, **arguments)


def stack(run: Run, name: str, shape: dict[str, int], dtype: str, threshold: str) -> Iterator[Line]:
    ways = [EAGER, COMPILED, CHECKPOINT, SCAN, REMAT]
    found = run.ask("stacks", ways=ways, memory=True, seconds=run.seconds, dtype=dtype, **shape)
    text = f"{name}, {dtype}: "
    yield compare(found, "step", SCAN, [EAGER, COMPILED], f"{text}training step over eager and compiled", threshold)
    yield compare(found, "memory", SCAN, [COMPILED], f"{text}peak memory over every block compiled", "<= 1.0")
    yield compare(found, "memory", REMAT, [CHECKPOINT], f"{text}remat, peak memory over checkpoint", "<= 1.0")
    yield compare(found, "step", REMAT, [SCAN], f"{text}remat, step over no remat", "<= 1.35")
    yield compare(found, "step", REMAT, [CHECKPOINT], f"{text}remat, step over checkpoint", "faster")


def stacks(run: Run, quick: bool) -> Iterator[Line]:
    for dtype in ("bfloat16", "float32"):
        for name, shape in {"1.3B shape": LARGE, "24 layers of width 256": SMALL}.items():
            if quick:
                shape = {"layers": 2, "width": min(shape["width"], 256), "batch": 1, "time": 32}
            elif dtype == "float32" and shape is LARGE:
                shape = shape | {"batch": 1}
            try:
                yield from stack(run, name, shape, dtype, "<= 1.0" if name == "1.3B shape" else "<= 0.85")
            except RuntimeError as error:
                yield Line(f"{name}, {dtype}", "", error=str(error))


def call(run: Run, quick: bool) -> Iterator[Line]:
    found = run.ask("call", seconds=run.seconds)
    text = "one lifted call (12 parameters, width 8, no grad) over torch.func.functional_call"
    yield compare(found, "step", "torchlift.apply", ["torch.func.functional_call"], text, "<= 1.0")


def ensemble(run: Run, quick: bool) -> Iterator[Line]:
    size, ours = 4 if quick else 64, "torchlift.vmap"
    found, text = run.ask("ensemble", size=size, batch=32, seconds=run.seconds), f"ensemble of {size} small networks"
    hand = ["hand-written torch.func"]
    yield compare(found, "step", ours, hand, f"{text} by vmap over hand-written torch.func", "<= 1.03")
    yield compare(found, "step", "Python loop", [ours], f"{text}: Python loop over vmap", ">= 5")


def lstm(run: Run, quick: bool) -> Iterator[Line]:
    for width, target in {64: "<= 1.2", 256: "<= 1.0"}.items():
        length = 8 if quick else 256
        found = run.ask("lstm", length=length, width=width, batch=16, seconds=run.seconds)
        text = f"LSTM written as a cell, {length} steps, width {width}, over torch.nn.LSTM"
        yield compare(found, "step", "torchlift.scan", ["torch.nn.LSTM"], text, target)


def first_step(run: Run, quick: bool) -> Iterator[Line]:
    few, many = (2, 4) if quick else (4, 96)
    found = {
        f"{depth} layers": run.ask("stacks", cold=True, ways=[SCAN], layers=depth, width=64)[SCAN]
        for depth in (few, many)
    }
    text = f"time to first training step, {many} layers over {few}"
    yield compare(found, "first", f"{many} layers", [f"{few} layers"], text, "<= 1.2")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, no figures")
    parser.add_argument("--minutes", type=float, default=7.5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/cuda.py needs a CUDA device and a torch built for it; benchmarks/figures.py is for a CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        show(Run(time.perf_counter() + 60 * args.minutes, cache), args.quick)


def show(run: Run, quick: bool) -> None:
    for measure in (call, ensemble, first_step, stacks, lstm):
        try:
            for line in measure(run, quick):
                print(line.row(), flush=True)
        except Exception as error:  # the other lines do not depend on this one
            print(Line(measure.__name__, "", error=str(error)).row(), flush=True)


if __name__ == "__main__":
    main()
