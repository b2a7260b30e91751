"""Every figure of the README, each with its peers in the same run: a Markdown table, the numbers and the plots.

python benchmarks/figures.py --out benchmarks/results                                 # all, under an hour
python benchmarks/figures.py --quick --only call lstm --out /some/folder              # small sizes: does it run?
python benchmarks/figures.py --flax path/to/python/with/flax --out benchmarks/results # Flax among the peers
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import HEAD, Figures, Line, ask, best, compare, mebibytes, merged, seconds, slope

PEERS = ["eager loop", "every block compiled", "whole model compiled"]
SCAN, SEVERAL, REMAT, NESTED, INSIDE = (
    "scan_layers", "scan_layers, unroll='auto'", "scan_layers, remat", "scan_layers, nested remat",
    "scan_layers inside torch.compile",
)  # fmt: skip

AUTO = "with unroll='auto'"


@dataclass
class Run:
    """How to measure, and the points of the plots measured so far."""

    quick: bool
    flax: str | None
    threads: int
    cache: str  # compiled code of everything but first steps, which start with none
    repeats: int = 3  # of what is measured in processes of its own
    seconds: float = 6.0  # of every way in an interleaved measurement
    timeout: float = 900.0  # of one process
    series: dict[str, dict[str, list[tuple[int, float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def ask(self, what: str, **arguments: Any) -> Figures:
        return ask("worker.py", what, self.timeout, threads=self.threads, cache=self.cache, **arguments)

    def steps(self, what: str, **arguments: Any) -> Figures:
        return self.ask(what, seconds=self.seconds, **arguments)

    def cold(self, way: str, layers: int, width: int = 64, headers: str | None = None) -> Figures:
        """First training step of one way, in a process and a compile cache of its own, which may have ``headers``."""
        arguments: dict[str, Any] = {"ways": [way], "layers": layers, "width": width}
        try:
            return ask("worker.py", "stacks", self.timeout, threads=self.threads, headers=headers, **arguments)
        except RuntimeError as error:  # the other ways do not depend on this one
            return {way: {"error": str(error)}}

    def peer(self, what: str, **arguments: Any) -> Figures:
        """The same in Flax."""
        if self.flax is None:
            raise RuntimeError("not measured: needs --flax PYTHON")
        return ask("flax_peer.py", what, self.timeout, python=self.flax, threads=self.threads, **arguments)

    def points(self, plot: str, x: int, found: Figures, key: str) -> None:
        for way, of in found.items():
            if key in of:
                self.series[plot][way].append((x, of[key]))


def first_step(run: Run) -> Iterator[Line]:
    depths = run.pick([4, 12, 24, 48, 96], [2, 4])
    unrolled = run.pick(48, 4)
    ways = {way: depths for way in (SCAN, INSIDE, "every block compiled")}
    ways["whole model compiled"] = [depth for depth in depths if depth <= unrolled]
    ways[SEVERAL] = [unrolled]
    found: dict[int, Figures] = {depth: {} for depth in depths}
    for turn in range(run.repeats):
        for way, at in ways.items():
            for depth in at:
                if turn and (way == "whole model compiled" or depth not in (depths[0], depths[-1], unrolled)):
                    continue  # minutes each, or on the plot only
                found[depth] = merged(found[depth], run.cold(way, depth))
    for depth in depths:
        run.points("first step", depth, found[depth], "first")
        if run.flax:
            run.points("first step", depth, run.peer("stacks", layers=depth, width=64), "first")
    few, many = depths[0], depths[-1]
    for way in (SCAN, INSIDE):
        pair = {f"{depth} layers": found[depth][way] for depth in (few, many)}
        text = f"time to first training step, {many} layers over {few}, {way}"
        yield compare(pair, "first", f"{many} layers", [f"{few} layers"], text, "<= 1.2")
    text = f"time to first training step, {unrolled} layers, scan_layers over the whole model compiled"
    yield compare(found[unrolled], "first", SCAN, ["whole model compiled"], text, "<= 0.07")
    yield compare(found[unrolled], "first", SEVERAL, ["whole model compiled"], f"{text}, {AUTO}", "<= 0.07")
    warm: Figures = {}
    # The first one makes the headers; of scan_layers after its first step, so it must not be over at once.
    for way, depth in ((SCAN, unrolled), ("whole model compiled", few)):
        run.cold(way, depth, headers=run.cache)
        warm[way] = run.cold(way, unrolled, headers=run.cache)[way]
    text += ", with the headers of Inductor's C++ made before"
    yield compare(warm, "first", SCAN, ["whole model compiled"], text, "<= 0.07")


def step(run: Run) -> Iterator[Line]:
    for layers, width, target in run.pick([(24, 64, 0.85), (48, 64, 0.75), (12, 256, 1.0)], [(3, 64, 0.85)]):
        found = run.steps("stacks", ways=[*PEERS, SCAN, SEVERAL], layers=layers, width=width)
        text = f"training step, {layers} layers of width {width}, over the best of eager and compiled"
        yield compare(found, "step", SCAN, PEERS, text, f"<= {target}")
        yield compare(found, "step", SEVERAL, PEERS, f"{text}, {AUTO}", f"<= {target}")


def flax_step(run: Run) -> Iterator[Line]:
    arguments = {"layers": run.pick(24, 3), "width": 64}
    turns = [
        side
        for _ in range(run.repeats)
        for side in (
            run.peer("stacks", seconds=run.seconds, **arguments),
            run.steps("stacks", ways=[SCAN, SEVERAL], **arguments),
        )
    ]
    text = f"training step, {arguments['layers']} layers of width 64, over flax.linen.scan jitted"
    yield compare(merged(*turns), "step", SCAN, ["flax.linen.scan"], text, "<= 0.55")
    yield compare(merged(*turns), "step", SEVERAL, ["flax.linen.scan"], f"{text}, {AUTO}", "<= 0.55")


def memory(run: Run) -> Iterator[Line]:
    layers = run.pick(24, 3)
    found = run.ask("stacks", ways=[PEERS[0], PEERS[1], SCAN, SEVERAL], layers=layers, width=64, memory=True)
    text = f"peak memory of a training step, {layers} layers, over every block compiled"
    yield compare(found, "memory", SCAN, [PEERS[1]], text, "<= 1.0")
    yield compare(found, "memory", SEVERAL, [PEERS[1]], f"{text}, {AUTO}", "<= 1.0")


def remat(run: Run) -> Iterator[Line]:
    layers, peers = run.pick(24, 3), ["checkpoint", "checkpoint of compiled blocks"]
    found = run.steps("stacks", ways=[*peers, SCAN, REMAT], layers=layers, width=64, memory=True)
    text = f"remat, {layers} layers: peak memory over torch.utils.checkpoint per block"
    yield compare(found, "memory", REMAT, peers, text, "<= 1.0")
    yield compare(found, "step", REMAT, [SCAN], f"remat, {layers} layers: step over no remat", "<= 1.35")
    yield compare(found, "step", REMAT, peers, f"remat, {layers} layers: step over torch.utils.checkpoint", "faster")


def nested(run: Run) -> Iterator[Line]:
    layers, width = run.pick(64, 4), 64
    arguments: dict[str, Any] = {"width": width, "memory": True, "frozen": True}  # no parameter's gradient in memory
    one = best(run.ask("stacks", ways=[REMAT], layers=1, **arguments), "memory", [REMAT])
    deep = run.ask("stacks", ways=[REMAT, NESTED], layers=layers, **arguments)
    carry = 4 * 64 * width * 4
    saved = {way: (best(deep, "memory", [way]) - one) / carry + 1 for way in (REMAT, NESTED)}
    root = int(layers**0.5)
    text = f"nested remat, {layers} layers: saved carries, by peak memory beyond that of one layer"
    yield Line(text, f"<= {2 * root + 1}", saved[NESTED], {way: f"{n:.1f}" for way, n in saved.items()})
    found = run.steps("stacks", ways=[REMAT, NESTED], layers=layers, width=width, memory=True)
    yield compare(found, "step", NESTED, [REMAT], f"nested remat, {layers} layers: step over plain remat", "<= 1.3")


def lstm(run: Run) -> Iterator[Line]:
    length, limits = run.pick(256, 8), {64: ("<= 1.2", "<= 1.0"), 256: ("<= 1.0", "<= 0.8")}
    for width, (fused, flax) in list(limits.items())[: run.pick(2, 1)]:
        arguments = {"length": length, "width": width, "batch": 16}
        found = run.steps("lstm", **arguments)
        text = f"LSTM written as a cell, {length} steps, width {width}"
        yield compare(found, "step", "torchlift.scan", ["torch.nn.LSTM"], f"{text}, over torch.nn.LSTM", fused)
        line = Line(f"{text}, over flax's scanned LSTM", flax)
        try:
            turns = [run.peer("lstm", seconds=run.seconds, **arguments), run.steps("lstm", **arguments)]
            turns += [run.peer("lstm", seconds=run.seconds, **arguments)]
            line = compare(merged(found, *turns), "step", "torchlift.scan", ["flax scanned LSTM"], line.text, flax)
        except RuntimeError as error:
            line.error = str(error)
        yield line
    for length in run.pick([16, 64, 256, 1024], [4, 8]):
        arguments = {"length": length, "width": 64, "batch": 16}
        run.points("LSTM", length, run.steps("lstm", **arguments), "step")
        if run.flax:
            run.points("LSTM", length, run.peer("lstm", seconds=run.seconds, **arguments), "step")


def ensemble(run: Run) -> Iterator[Line]:
    hand, ours, loop = "hand-written torch.func", "torchlift.vmap", "Python loop"
    sizes = run.pick([4, 16, 64, 256], [2, 4])
    found = {size: run.steps("ensemble", size=size, batch=32) for size in sizes}
    for size in sizes:
        run.points("ensemble", size, found[size], "step")
    size = run.pick(64, 4)
    text = f"ensemble of {size} small networks"
    yield compare(found[size], "step", ours, [hand], f"{text} by vmap over hand-written torch.func", "<= 1.03")
    yield compare(found[size], "step", loop, [ours], f"{text}: Python loop over vmap", ">= 5")


def call(run: Run) -> Iterator[Line]:
    for state, what in {
        False: "12 parameters, width 8, no grad",
        True: "the same with 3 batch norms in training",
    }.items():
        text = f"one lifted call ({what}) over torch.func.functional_call"
        found = run.steps("call", state=state)
        yield compare(found, "step", "torchlift.apply", ["torch.func.functional_call"], text, "<= 1.0")


def growth(run: Run) -> Iterator[Line]:
    depths = run.pick([12, 24, 48, 96, 192], [2, 4, 6])
    ways = [PEERS[1], SCAN, SEVERAL, REMAT]
    for depth in depths:
        found = run.steps("stacks", ways=ways, layers=depth, width=64, memory=True)
        run.points("step", depth, found, "step")
        run.points("memory", depth, found, "memory")
    for plot, show in {"step": seconds, "memory": mebibytes}.items():
        for way in (SCAN, SEVERAL, REMAT):
            points = run.series[plot][way]
            each, distance = slope(points)
            line = Line(f"{plot} as the depth grows, {way}: slope per layer {show(each)}", "linear")
            line.raw = {f"{depth} layers": show(value) for depth, value in points}
            line.raw["largest distance from the line"] = f"{distance:.0%}"
            yield line


MEASURES: dict[str, Callable[[Run], Iterator[Line]]] = {
    "first-step": first_step, "step": step, "flax": flax_step, "memory": memory, "remat": remat, "nested": nested,
    "lstm": lstm, "ensemble": ensemble, "call": call, "growth": growth,
}  # fmt: skip

PLOTS = {
    "first step": ("layers", "time to first training step (s)", 1.0),
    "step": ("layers", "training step (ms)", 1e-3),
    "memory": ("layers", "peak memory of a training step (MiB)", 2.0**20),
    "LSTM": ("steps of time", "training step (ms)", 1e-3),
    "ensemble": ("networks", "training step (ms)", 1e-3),
}


def draw(series: dict[str, dict[str, list[tuple[int, float]]]], out: Path) -> None:
    """One PNG for each series."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import LogLocator, StrMethodFormatter
    except ImportError:
        print("no plots: pip install matplotlib")
        return
    for name, (x_label, y_label, unit) in PLOTS.items():
        if not series.get(name):
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for way, points in series[name].items():
            ours = "scan_layers" in way or "torchlift" in way
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, [y / unit for y in ys], "o-" if ours else "s--", label=way)
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        figure.legend(fontsize="small", loc="outside lower center", ncols=2)  # on the lines it would hide some
        figure.savefig(out / f"{name.replace(' ', '_').lower()}.png", dpi=130)
        plt.close(figure)


def machine(threads: int) -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(), "architecture": platform.machine(), "threads": threads,
        "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat(),
    }  # fmt: skip


def write(out: Path, lines: dict[str, list[Line]], run: Run) -> None:
    """All there is so far: a run that is cut short keeps what it measured."""
    about = machine(run.threads) | {"quick": run.quick}
    every = [line for of in lines.values() for line in of]
    words = ", ".join(f"{key} {value}" for key, value in about.items())
    (out / "table.md").write_text("\n".join([HEAD, *(line.row() for line in every), "", f"Measured on: {words}.", ""]))
    measured = {name: [asdict(line) | {"met": line.met} for line in of] for name, of in lines.items()}
    (out / "figures.json").write_text(json.dumps({"machine": about, "lines": measured, "series": run.series}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and one repeat: whether it runs, no figures")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--flax", metavar="PYTHON", help="a Python that has flax and jax")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        make = partial(Run, repeats=1, seconds=0.3, timeout=300.0) if args.quick else Run
        run = make(args.quick, args.flax, args.threads, cache)
        lines: dict[str, list[Line]] = defaultdict(list)
        print(HEAD)
        for name in args.only:
            start = time.perf_counter()
            try:
                for line in MEASURES[name](run):
                    lines[name].append(line)
                    print(line.row(), flush=True)
            except Exception as error:  # the other lines do not depend on this one
                lines[name].append(Line(name, "", error=f"{type(error).__name__}: {error}"))
                print(lines[name][-1].row(), flush=True)
            print(f"<!-- {name}: {time.perf_counter() - start:.0f} s -->", flush=True)
            write(args.out, lines, run)
    draw(run.series, args.out)


if __name__ == "__main__":
    main()
