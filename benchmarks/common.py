"""What the benchmarks share: the models, every way to run them, clocks, peak memory, and the table."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import operator
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # a clone serves without being installed

import torchlift  # noqa: E402

Model = Callable[[Tensor], Tensor]
Figures = dict[str, dict[str, Any]]  # of each way: its figures, or {"error": ...}
UNROLL = 16  # steps of time in one compiled graph


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # batch time width
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # batch head time width/heads
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Cell(nn.Module):
    """An LSTM cell as a user writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.input, self.hidden = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, c = carry
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h


class Net(nn.Sequential):
    """A small network: one of an ensemble."""

    def __init__(self, width: int = 64):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


# A stack of blocks, in every way. Each takes the list of blocks.


def _chain(calls: Sequence[Model]) -> Model:
    def run(x: Tensor) -> Tensor:
        for call in calls:
            x = call(x)
        return x

    return run


def _checkpointed(call: Model) -> Model:
    return lambda x: checkpoint(call, x, use_reentrant=False)


def _whole(blocks: list[nn.Module]) -> Model:
    return torch.compile(nn.Sequential(*blocks))


def _inside(blocks: list[nn.Module]) -> Model:
    return torch.compile(torchlift.scan_layers(blocks), fullgraph=True)


def _nested(blocks: list[nn.Module]) -> Model:
    inner = next(n for n in range(math.isqrt(len(blocks)), 0, -1) if len(blocks) % n == 0)
    return torchlift.scan_layers(blocks, lengths=(len(blocks) // inner, inner))


STACKS: dict[str, Callable[[list[nn.Module]], Model]] = {
    "eager loop": _chain,
    "every block compiled": lambda blocks: _chain([torch.compile(block) for block in blocks]),
    "whole model compiled": _whole,
    "checkpoint": lambda blocks: _chain([_checkpointed(block) for block in blocks]),
    "checkpoint of compiled blocks": lambda blocks: _chain([_checkpointed(torch.compile(block)) for block in blocks]),
    "scan_layers": lambda blocks: torchlift.scan_layers(blocks),
    "scan_layers, unroll='auto'": lambda blocks: torchlift.scan_layers(blocks, unroll="auto"),
    "scan_layers inside torch.compile": _inside,
    "scan_layers, remat": lambda blocks: torchlift.scan_layers(blocks, remat=True),
    "scan_layers, nested remat": _nested,
}


def blocks(layers: int, width: int, like: Tensor) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(width, heads=max(4, width // 128)).to(like) for _ in range(layers)]


def shared(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules of their own with the same parameters, so that every way has as much in memory."""
    return copy.deepcopy(modules, {id(p): p for module in modules for p in module.parameters()})


# The other workloads: a dict of calls by way, which compute the same.


def lstms(steps: int, width: int, batch: int, like: Tensor) -> tuple[dict[str, Callable[[], Tensor]], list[nn.Module]]:
    """Forward calls of an LSTM, by way, and the modules whose parameters they train."""
    x = torch.randn(batch, steps, width).to(like)
    start = (like.new_zeros(batch, width), like.new_zeros(batch, width))
    over_time = {"variable_broadcast": "params", "in_axes": 1, "out_axes": 1}
    fused = nn.LSTM(width, width, batch_first=True).to(like)
    lifted = torchlift.scan(Cell, **over_time, unroll=min(UNROLL, steps))(width).to(like)
    return {"torch.nn.LSTM": lambda: fused(x)[0], "torchlift.scan": lambda: lifted(start, x)[1]}, [fused, lifted]


def ensembles(size: int, batch: int, like: Tensor) -> tuple[dict[str, Callable[[], Tensor]], list[nn.Module]]:
    """Forward calls of an ensemble, by way, and the modules whose parameters they train."""
    x = torch.randn(batch, 64).to(like)
    nets = nn.ModuleList(Net().to(like) for _ in range(size))
    params, buffers = torch.func.stack_module_state(list(nets))
    held = nn.ParameterList(params.values())  # the same tensors, so that they are trained
    params = dict(zip(params, held, strict=True))
    base = Net().to("meta")
    mapped = torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))
    lifted = torchlift.vmap(Net, variable_axes={"params": 0}, in_axes=None, axis_size=size)().to(like)
    return {
        "hand-written torch.func": lambda: mapped(params, buffers, x),
        "torchlift.vmap": lambda: lifted(x),
        "Python loop": lambda: torch.stack([net(x) for net in nets]),
    }, [nets, held, lifted]


def lifted_calls(like: Tensor, state: bool = False) -> dict[str, Callable[[], Any]]:
    """One call of a model of 12 parameters on given parameters; or with batch statistics, which it changes.

    functional_call writes into the buffers that it is given, so there the caller copies them.
    """
    pair = [lambda: nn.Linear(8, 8), lambda: nn.BatchNorm1d(8) if state else nn.Linear(8, 8)]
    model = nn.Sequential(*[make() for _ in range(3) for make in pair]).to(like)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x = torch.randn(4, 8).to(like)

    def functional() -> Any:
        changed = {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(model, {**params, **changed}, (x,)), changed

    def apply() -> Any:
        return torchlift.apply(model, {"params": params, "batch_stats": buffers}, x, mutable="batch_stats")

    plain = {
        "torch.func.functional_call": lambda: torch.func.functional_call(model, params, (x,)),
        "torchlift.apply": lambda: torchlift.apply(model, {"params": params}, x),
    }
    return {"torch.func.functional_call": functional, "torchlift.apply": apply} if state else plain


def training(forward: Callable[[], Tensor], modules: Sequence[nn.Module]) -> Callable[[], None]:
    """A training step without the optimizer: forward, a loss, backward."""
    params = [p for module in modules for p in module.parameters()]

    def step() -> None:
        forward().float().square().mean().backward()

    def clean() -> None:
        for p in params:
            p.grad = None

    step.clean = clean  # type: ignore[attr-defined]  # outside the clock
    return step


# Clocks and memory.


def _clean(call: Callable[[], Any]) -> None:
    getattr(call, "clean", lambda: None)()


def clock(call: Callable[[], Any], cuda: bool = False) -> float:
    """Seconds of one call."""
    _clean(call)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float, cuda: bool = False) -> dict[str, float]:
    """The best time of each call: rounds of all of them in turn, in another order every round, for so many seconds.

    Calls of less than two milliseconds are repeated within a round.
    """
    loops = {name: max(1, min(1000, int(2e-3 / clock(call, cuda)))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, end, rounds = list(calls), time.perf_counter() + seconds, 0
    gc.collect()
    while rounds < 3 or (time.perf_counter() < end and rounds < 1000):
        for name in names:
            call = calls[name]

            def repeated(call: Callable[[], Any] = call, loop: int = loops[name]) -> None:
                for _ in range(loop):
                    if loop > 1:
                        _clean(call)
                    call()

            _clean(call)
            found[name].append(clock(repeated, cuda) / loops[name])
        names = names[1:] + names[:1]
        rounds += 1
    return {name: min(times) for name, times in found.items()}


def peak_memory(call: Callable[[], Any], cuda: bool = False) -> int:
    """Bytes that one call has allocated at its peak, beyond those held before it.

    On a CPU: the peak of the running sum over every allocation and release that torch's allocator reports to the
    profiler. It is exact and the same in every run, which a process's resident size is not.
    """
    _clean(call)
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=operator.itemgetter(0)):
        total += change
        peak = max(peak, total)
    return peak


# A measurement in a process of its own.


def ask(
    script: str, what: str, timeout: float, *, python: str = sys.executable, threads: int = 2, cache: str | None = None,
    headers: str | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """Runs ``script what {arguments}`` and returns the JSON that it prints last; a fresh compile cache unless given.

    Inductor keeps the compiled headers of its C++ elsewhere, beside other temporary files: in ``headers``, if given.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache or fresh}
        env["TMPDIR"] = headers or cache or fresh
        command = [python, str(HERE / script), what, json.dumps({"threads": threads, **arguments})]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=told, text=True, start_new_session=True)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise RuntimeError(f"{what} took more than {timeout:.0f} s") from None
            _wait_for_session(process.pid)
            out.seek(0), told.seek(0)
            answers, errors = out.read().strip().splitlines(), told.read().strip().splitlines()
    if process.returncode:
        raise RuntimeError(f"{what}: {(errors or ['no output'])[-1][:200]}")
    return json.loads(answers[-1])


def _wait_for_session(leader: int, seconds: float = 60.0) -> None:
    """Waits for what a process has left running, a compiler of headers, say: it would slow what is measured next."""
    end = time.perf_counter() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.perf_counter() < end:
            os.killpg(leader, 0)
            time.sleep(0.05)


# The table.


@dataclass
class Line:
    """One line of the table: a ratio, what it should be, and the times it came from."""

    text: str
    target: str  # "<= 1.2", or words
    ratio: float | None = None
    raw: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def met(self) -> bool | None:
        sense, _, limit = self.target.partition(" ")
        compare = {"<=": operator.le, ">=": operator.ge}.get(sense)
        return None if compare is None or self.ratio is None else compare(self.ratio, float(limit))

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "no", None: "-"}[self.met] if self.error is None else "error"

    def row(self) -> str:
        measured = "" if self.ratio is None else f"{self.ratio:.3g}"
        raw = self.error or "; ".join(f"{name} {value}" for name, value in self.raw.items())
        return "| " + " | ".join(cell.replace("|", "/") for cell in (
            self.text, self.target, measured, self.verdict, raw)) + " |"  # fmt: skip


HEAD = "| | target | measured | met | raw |\n|---|---|---|---|---|"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def raw(found: Figures, key: str) -> dict[str, str]:
    """One figure of every way, printable; its error where it has one."""
    show = mebibytes if key == "memory" else seconds
    return {way: show(of[key]) if key in of else f"({of.get('error', 'not measured')})" for way, of in found.items()}


def best(found: Figures, key: str, ways: Sequence[str]) -> float:
    """The smallest figure of the ways that have one."""
    values = [found[way][key] for way in ways if key in found.get(way, {})]
    if not values:
        raise RuntimeError("; ".join(f"{way}: {found.get(way, {}).get('error', 'not measured')}" for way in ways))
    return min(values)


def compare(found: Figures, key: str, way: str, peers: Sequence[str], text: str, target: str) -> Line:
    """A line: a figure of one way over the best of its peers."""
    line = Line(text, target, raw=raw({name: found[name] for name in (way, *peers) if name in found}, key))
    try:
        line.ratio = best(found, key, [way]) / best(found, key, peers)
    except RuntimeError as error:
        line.error = str(error)
    return line


def merged(*runs: Figures) -> Figures:
    """The best of several runs, figure by figure."""
    ways = {way: None for run in runs for way in run}
    out: Figures = {}
    for way in ways:
        every = [run[way] for run in runs if way in run]
        fine = [of for of in every if "error" not in of]
        out[way] = {key: min(of[key] for of in fine) for key in fine[0]} if fine else every[0]
    return out


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of the fitted straight line, and the largest relative distance of a point from it."""
    fit = statistics.linear_regression(*zip(*points, strict=True))
    return fit.slope, max(abs(fit.slope * x + fit.intercept - y) / abs(y) for x, y in points)
