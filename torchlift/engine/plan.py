"""What a compiled loop consists of: programs, and the plan of one run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchlift.engine.capture import stride_order
from torchlift.engine.graphs import Boxed
from torchlift.engine.trees import Template

TOGETHER = 128  # iterations that chained programs run in one call: what they save is freed at once
SMALL = 2**20  # numbers in the weights of a layer, or in what else an iteration takes


@dataclass
class Program:
    """Compiled graphs of ``steps`` iterations. Inputs: consts, carry, the x of each step, closures; see ``Graphs``.

    ``packed``: the xs of all steps are one, of stacks, and so are the ys.
    """

    fw: Boxed
    bw: Boxed | None
    feeds: list[tuple[str, int]]
    # Per differentiable output: the order of its gradient's dimensions in memory, None where that is their own.
    tangent_orders: dict[int, list[int] | None]
    shared_grads: list[bool]
    steps: int
    consts: int
    carries: int
    ys: tuple[Template, ...]
    requires_grad: list[bool]  # per output
    random: bool
    saved_bytes: int
    operators: int
    recomputed: int
    packed: bool = False
    chained: bool = False  # takes the xs of any number of times as many steps; then ``packed``
    rowwise: bool = False  # each row of the stacks that it takes is laid out as it is given
    closures: int = 0
    shapes: torch.fx.GraphModule | None = None  # the forward, to infer shapes with
    grads: list[bool] = field(default_factory=list)  # per input: whether backward gives it a gradient
    saved_orders: dict[int, list[int]] = field(default_factory=dict)  # per saved tensor: its dimensions in memory
    marks: list[tuple[str, int] | None] = field(default_factory=list)  # of its spans

    def __post_init__(self) -> None:
        self.outputs = self.carries + sum(y.tensors for y in self.ys)
        inside = range(self.consts, self.consts + self.carries)
        # Carries are the inputs that differ from call to call and that nobody else holds.
        self.kept_carries = [i - self.consts for kind, i in self.feeds if kind == "input" and i in inside]
        self.saved_numbers = sorted({i for kind, i in self.feeds if kind == "saved"} - self.saved_orders.keys())


@dataclass
class Plan:
    """One run of a loop. Position counts iterations in the order they run; ``order`` gives their index.

    ``pieces`` are the sizes, in chunks, of the pieces recomputed in backward, outermost first; empty: nothing is.
    """

    chunks: list[tuple[Program, range]]  # a program and the positions it runs
    order: Sequence[int]
    consts: int
    closures: int
    carries: int
    x_tensors: int
    stacked: bool
    shared_draws: bool
    pieces: tuple[int, ...]
    devices: tuple[torch.device, ...]
    plain: Callable[..., tuple[Any, ...]]  # the plain loop over the same tensors, for double backward
    joined: bool = False  # ys, and gradients of xs, come as stacks; always so if xs does
    random: bool = field(init=False)
    packed: bool = field(init=False)  # some programs are
    single: bool = field(init=False)  # one graph is all there is
    places: list[int] = field(init=False)  # then: where the inputs of the graph stand among those of the node
    not_differentiable: list[int] = field(init=False)  # outputs

    def __post_init__(self) -> None:
        first = self.chunks[0][0]
        self.random = any(program.random for program, _ in self.chunks)
        self.joined = self.joined or self.stacked
        self.packed = any(program.packed for program, _ in self.chunks)
        self.single = len(self.chunks) == 1 and not self.joined and not self.pieces
        a, b = self.consts, self.consts + self.closures
        self.places = [*range(a), *range(b, b + self.carries + self.x_tensors * self.length), *range(a, b)]
        flags = first.requires_grad[: self.carries]
        each = first.requires_grad[self.carries : self.carries + first.ys[0].tensors]
        flags = flags + each * (1 if self.joined else self.length)
        self.not_differentiable = [i for i, flag in enumerate(flags) if not flag]

    @functools.cached_property
    def feeds(self) -> list[int]:
        """If it is ``single``: where backward's inputs stand among the node's tensors, tangents and saved values."""
        program = self.chunks[0][0]
        first = self.consts + self.closures + self.carries + self.x_tensors * self.length
        tangents = {i: first + at for at, i in enumerate(program.tangent_orders)}
        start = first + len(tangents)
        at = {"saved": lambda i: start + i, "input": self.places.__getitem__, "tangent": tangents.__getitem__}
        return [at[kind](i) for kind, i in program.feeds]

    @property
    def length(self) -> int:
        return len(self.order)

    def rows(self, positions: range) -> tuple[int, int]:
        """Where the rows of consecutive positions start in a stack of all iterations, and how many they are."""
        return min(self.order[positions[0]], self.order[positions[-1]]), len(positions)


def unroll_of(
    unroll: int | str, length: int, consts: Sequence[torch.Tensor], x: Sequence[torch.Tensor], even: bool = False
) -> int:
    """How many iterations make one graph; with ``even`` a divisor of ``length``.

    NOTE [unroll="auto"]. Iterations that share weights have products to join, and are small as a rule: sixteen of a
    cell of four tensors, fewer of larger ones, since the time to compile grows with the graph. Layers have their
    weights in ``x``. Of small ones four, or the largest divisor of ``length`` below: what is done around a graph is a
    seventh of a step at width 64 and a fortieth at width 256, and of six layers hardly more is saved than of four.
    """
    if unroll == "auto":
        if any(t.ndim >= 2 for t in consts):
            unroll = max(1, min(16, 64 // len(consts)))
        else:
            unroll, even = 4 if sum(t.numel() for t in x) <= SMALL else 1, True
        while even and length % unroll:
            unroll -= 1
    assert isinstance(unroll, int)
    return min(unroll, length)


def pieces_of(remat: bool, lengths: Sequence[int] | None, every: int) -> tuple[int, ...]:
    """Sizes of the pieces that backward recomputes, outermost first."""
    if lengths is not None:
        return tuple(math.prod(lengths[i + 1 :]) for i in range(len(lengths)))
    return (every,) if remat else ()


def orders_of(bw_inputs: list[Any], feeds: list[tuple[str, int]], wanted: str) -> dict[int, list[int]]:
    """Per saved value, or per output that gets a gradient: the order of its dimensions in memory."""
    pairs = [(value, i) for value, (kind, i) in zip(bw_inputs, feeds) if kind == wanted]
    return {i: stride_order(value) for value, i in pairs if isinstance(value, torch.Tensor)}
