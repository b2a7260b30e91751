"""The compiled loop: graphs called one after the other, forward and backward, as one autograd node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine.capture import inverse, rows_of
from torchlift.engine.draws import States, read_states, write_states
from torchlift.engine.plan import Plan, Program
from torchlift.engine.residuals import Residuals
from torchlift.engine.spans import Names, located

Tensors = list[torch.Tensor]


@dataclass
class _Mark:
    """Where recomputation starts again: the carry and the generators' states there."""

    at: int
    carry: Tensors
    states: States | None


class _Execution:
    """The tensors of one run, and the walk over its chunks."""

    def __init__(self, plan: Plan, tensors: Sequence[torch.Tensor], names: Names | None) -> None:
        self.plan, self.names = plan, names
        a = plan.consts
        b = a + plan.closures
        c = b + plan.carries
        self.consts, self.closures = list(tensors[:a]), list(tensors[a:b])
        self.carry, xs = list(tensors[b:c]), tensors[c:]
        self.xs = xs
        self.start: States | None = None

    @functools.cached_property
    def columns(self) -> list[Sequence[torch.Tensor]]:
        """Of each tensor of xs, that of every iteration."""
        if self.plan.stacked:
            return [leaf.unbind(0) for leaf in self.xs]
        return [self.xs[i :: self.plan.x_tensors] for i in range(self.plan.x_tensors)]

    @functools.cached_property
    def takers(self) -> list[Callable[[int, int], torch.Tensor]]:
        """Of each tensor of xs, what takes rows of it."""
        return [rows_of(leaf) for leaf in self.xs]

    def states(self) -> States | None:
        return read_states(self.plan.devices) if self.plan.random else None

    def inputs(self, chunk: int, carry: Tensors) -> Tensors:
        plan = self.plan
        program, positions = plan.chunks[chunk]
        if program.packed:
            first, count = plan.rows(positions)
            if program.rowwise:
                xs = [leaf.narrow(0, first, count) for leaf in self.xs]
            else:
                xs = [take(first, count) for take in self.takers]
        else:
            xs = [column[plan.order[p]] for p in positions for column in self.columns]
        return [*self.consts, *carry, *xs, *self.closures]

    def forward(self, lo: int, hi: int, carry: Tensors) -> Iterator[tuple[int, Tensors, Tensors]]:
        """Runs chunks ``lo`` to ``hi``; yields each one's number, the carry it was given and all its outputs.

        Those are in a list that is emptied before the next one runs: what is not taken out does not live beside it.
        """
        plan = self.plan
        for chunk in range(lo, hi):
            if self.start is not None and chunk > 0:
                write_states(self.start)
            program, positions = plan.chunks[chunk]
            outs = list(_forward(program, self.inputs(chunk, carry), self.names, plan.order, positions))
            given, carry = carry, outs[: plan.carries]
            yield chunk, given, outs
            outs.clear()

    def advance(self, lo: int, hi: int, carry: Tensors) -> Tensors:
        for _, _, outs in self.forward(lo, hi, carry):
            carry = outs[: self.plan.carries]
        return carry


def _forward(
    program: Program, inputs: Tensors, names: Names | None, order: Sequence[int], positions: Sequence[int]
) -> Sequence[Any]:
    if not program.marks:
        return program.fw(inputs)
    with located(names, [order[p] for p in positions]):
        return program.fw(inputs)


class _Gradients:
    """Gradients of the inputs while backward walks the chunks from the last to the first."""

    def __init__(self, run: _Execution, grads: Sequence[torch.Tensor | None], models: list[_Model]) -> None:
        plan = run.plan
        self.run = run
        self.carry = list(grads[: plan.carries])
        self.ys = grads[plan.carries :]
        self.models = models  # of the outputs of the first chunk, for gradients that are not there
        self.zeros: dict[tuple[int, int | None], torch.Tensor] = {}
        self.sums: list[torch.Tensor | None] = [None] * (plan.consts + plan.closures)
        self.xs: list[list[torch.Tensor | None]] = [[None] * plan.length for _ in range(plan.x_tensors)]
        self.stacks: list[torch.Tensor | None] = [None] * plan.x_tensors
        self.y_slices = self._cut() if plan.joined and not plan.packed else None

    def _cut(self) -> list[Sequence[torch.Tensor] | None]:
        """Gradients of ys by iteration, laid out all at once: a loop over time has hundreds, each of a few numbers."""
        orders = self.run.plan.chunks[0][0].tangent_orders
        cut: list[Sequence[torch.Tensor] | None] = []
        for at, y in enumerate(self.ys, self.run.plan.carries):
            order = orders.get(at)
            stacked = None if order is None else [0, *(dim + 1 for dim in order)]
            cut.append(None if y is None else _laid(y, stacked).unbind(0))
        return cut

    def tangent(self, program: Program, positions: range, i: int) -> torch.Tensor:
        """The gradient of the ``i``-th output of a chunk, laid out as the graph expects it."""
        plan, model = self.run.plan, i
        rows: int | None = None  # how many are wanted of what the first chunk had several of; 0: one by itself
        if i < plan.carries:
            given = self.carry[i]
        elif plan.packed:
            stack, (first, count) = self.ys[i - plan.carries], plan.rows(positions)
            rows = count if program.packed else 0
            given = None if stack is None else stack.narrow(0, first, count) if rows else stack[first]
        else:
            width = program.ys[0].tensors
            step, column = divmod(i - plan.carries, width)
            index = plan.order[positions[step]]
            if self.y_slices is not None:
                cut = self.y_slices[column]
                given = None if cut is None else cut[index]
            else:
                given = self.ys[index * width + column]
            model = plan.carries + column
        return _laid(self._zero(model, rows) if given is None else given, program.tangent_orders[i])

    def _zero(self, i: int, rows: int | None) -> torch.Tensor:
        if (i, rows) not in self.zeros:
            zero = _zeros(self.models[i])
            self.zeros[i, rows] = zero if rows is None else zero[:rows] if rows else zero[0]
        return self.zeros[i, rows]

    def step(self, chunk: int, carry: Tensors, saved: list[Any]) -> None:
        """Runs one chunk's backward graph and takes up what it gives."""
        run, plan = self.run, self.run.plan
        program, positions = plan.chunks[chunk]
        inputs = run.inputs(chunk, carry)
        feeds = []
        for kind, i in program.feeds:
            if kind == "saved":
                feeds.append(saved[i])
            elif kind == "input":
                feeds.append(inputs[i])
            else:
                feeds.append(self.tangent(program, positions, i))
        saved.clear()
        inputs.clear()
        assert program.bw is not None
        grads = list(program.bw(feeds))
        a, b = program.consts, program.consts + program.carries
        self.carry = grads[a:b]
        end = b + plan.x_tensors * (1 if program.packed else len(positions))
        shared = program.shared_grads
        self._add(grads[:a] + grads[end:], shared[:a] + shared[end:])
        if program.packed:
            first, count = plan.rows(positions)
            self._put(first, grads[b:end], count)
            return
        for step, position in enumerate(positions):
            at = b + step * plan.x_tensors
            self._put(plan.order[position], grads[at : at + plan.x_tensors])

    def _add(self, grads: list[torch.Tensor | None], shared: list[bool]) -> None:
        sums, new = [], []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            old = self.sums[i]
            if old is None:
                # What is added to later must be ours alone.
                self.sums[i] = grad.clone() if shared[i] and len(self.run.plan.chunks) > 1 else grad
            else:
                sums.append(old)
                new.append(grad)
        if sums:
            _compat.foreach_add_(sums, new)

    def _put(self, index: int, grads: list[torch.Tensor | None], rows: int | None = None) -> None:
        """Takes up the gradients of the xs of one iteration, or of the stacks of ``rows`` of them."""
        if not self.run.plan.joined:
            for column, grad in zip(self.xs, grads):
                column[index] = grad
            return
        places: list[Any] = []
        values: list[torch.Tensor] = []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            stack = self.stacks[i]
            if stack is None:
                size = grad.shape if rows is None else grad.shape[1:]
                stack = torch.empty((self.run.plan.length, *size), dtype=grad.dtype, device=grad.device)
                self.stacks[i] = stack
                if not self.run.plan.packed:
                    self.xs[i] = list(stack.unbind(0))
            if self.run.plan.packed:
                places.append(stack.narrow(0, index, rows or 1))
                values.append(grad if rows else grad.unsqueeze(0))
            else:
                places.append(self.xs[i][index])
                values.append(grad)
        if places:
            _compat.foreach_copy_(places, values)

    def flat(self) -> list[torch.Tensor | None]:
        length = self.run.plan.length
        xs = self.stacks if self.run.plan.joined else [column[i] for i in range(length) for column in self.xs]
        return [*self.sums, *self.carry, *xs]


def _laid(gradient: torch.Tensor, order: list[int] | None) -> torch.Tensor:
    """``gradient`` with its dimensions in memory in the given order; None is that of a contiguous tensor."""
    if order is None:
        return gradient.contiguous()
    laid = gradient.permute(order)
    if laid.is_contiguous():
        return gradient
    return laid.contiguous().permute(inverse(order))


_Model = tuple[torch.Size, torch.dtype, torch.device]  # of an output, for a gradient of zeros


def _models(outs: Sequence[torch.Tensor]) -> list[_Model]:
    return [(out.shape, out.dtype, out.device) for out in outs]


def _zeros(model: _Model) -> torch.Tensor:
    shape, dtype, device = model
    return torch.zeros(shape, dtype=dtype, device=device)


def run_single(plan: Plan, tensors: Sequence[torch.Tensor], names: Names | None) -> tuple[Tensors, Sequence[Any]]:
    """The outputs of a plan of one graph, and what the graph saves."""
    program = plan.chunks[0][0]
    outs = _forward(program, [tensors[i] for i in plan.places], names, plan.order, plan.chunks[0][1])
    return list(outs[: program.outputs]), outs[program.outputs :]


def single_backward(
    plan: Plan, tensors: Tensors, saved: list[Any], models: list[_Model], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of ``tensors`` for a plan of one graph.

    NOTE [Freed as it is used]. It empties both lists, and the graph empties the one that it is given: a layer's
    activations go while its backward runs, not after it.
    """
    program = plan.chunks[0][0]
    values: list[Any] = [*tensors]
    for i, order in program.tangent_orders.items():
        given = grads[i]
        values.append(_laid(_zeros(models[i]) if given is None else given, order))
    values += saved
    feeds = [values[i] for i in plan.feeds]
    values.clear()
    tensors.clear()
    saved.clear()
    assert program.bw is not None
    found: list[torch.Tensor | None] = [None] * len(plan.places)
    for place, gradient in zip(plan.places, program.bw(feeds), strict=True):
        found[place] = gradient
    return found


def run_forward(
    plan: Plan, tensors: Sequence[torch.Tensor], names: Names | None, honour_hooks: bool = True
) -> tuple[Tensors, Residuals, list[_Model]]:
    """The loop's outputs (carry, then ys), what backward needs, and models of the first chunk's outputs (for zeros)."""
    run = _Execution(plan, tensors, names)
    if plan.shared_draws:
        run.start = run.states()
    train = plan.chunks[0][0].bw is not None
    size = plan.pieces[0] if plan.pieces else 0
    kept = Residuals(honour_hooks)
    ys: list[list[torch.Tensor]] = [[] for _ in range(plan.length)]
    carry = run.carry
    models: list[_Model] = []
    states = run.states() if size and train else None
    for chunk, given, outs in run.forward(0, len(plan.chunks), carry):
        program, positions = plan.chunks[chunk]
        if train and not size:
            kept.push([given[i] for i in program.kept_carries], list(outs[program.outputs :]))
        elif train and chunk % size == 0:
            kept.push(given, [], states)
        if train and size and (chunk + 1) % size == 0 and chunk + 1 < len(plan.chunks):
            states = run.states()
        at = plan.carries
        if plan.packed:
            some = list(outs[at : program.outputs])
            ys[plan.rows(positions)[0]] = some if program.packed else [y.unsqueeze(0) for y in some]
        else:
            for position, y in zip(positions, program.ys):
                ys[plan.order[position]] = list(outs[at : at + y.tensors])
                at += y.tensors
        carry = list(outs[: plan.carries])
        if not models:
            models = _models(outs[: program.outputs])
    if plan.joined:
        join = torch.cat if plan.packed else torch.stack
        flat = [join(column) for column in zip(*filter(None, ys))]
        if train and not size:
            # NOTE [outputs on the node]: the last chunk may have saved its carry; a node that holds its own output is
            # a cycle that only the garbage collector frees.
            carry = [t.clone() for t in carry]
    else:
        flat = [t for y in ys for t in y]
    return carry + flat, kept, models


def run_backward(
    plan: Plan,
    tensors: Sequence[torch.Tensor],
    kept: Residuals,
    models: list[_Model],
    grads: Sequence[torch.Tensor | None],
    keep: bool,
    names: Names | None,
) -> list[torch.Tensor | None]:
    """Gradients of ``tensors``; ``keep`` leaves ``kept`` whole for another time."""
    run = _Execution(plan, tensors, names)
    into = _Gradients(run, grads, models)
    size = plan.pieces[0] if plan.pieces else 0
    before = run.states() if size else None
    if size and plan.shared_draws:
        run.start = kept.pop(0, keep=True)[2]
    for piece in reversed(range(len(kept.pieces))):
        carries, saved, states = kept.pop(piece, keep)
        if size:
            mark = _Mark(piece * size, carries if piece else run.carry, states)
            _recompute(run, into, 1, mark, min(mark.at + size, len(plan.chunks)))
            continue
        carry = list(run.carry)
        if piece:
            for i, value in zip(plan.chunks[piece][0].kept_carries, carries):
                carry[i] = value
        into.step(piece, carry, saved)
    if before is not None:
        write_states(before)
    return into.flat()


def _recompute(run: _Execution, into: _Gradients, level: int, mark: _Mark, hi: int) -> None:
    """Backward of the chunks from ``mark`` to ``hi``, recomputed in pieces of the size of ``level``, then smaller."""
    if mark.states is not None:
        write_states(mark.states)
    pieces = run.plan.pieces
    if level == len(pieces):
        stash = []
        for chunk, given, outs in run.forward(mark.at, hi, mark.carry):
            stash.append((chunk, given, outs[run.plan.chunks[chunk][0].outputs :]))
        while stash:
            into.step(*stash.pop())
        return
    marks = [mark]
    size = pieces[level]
    for at in range(mark.at, hi - size, size):
        carry = run.advance(at, at + size, marks[-1].carry)
        marks.append(_Mark(at + size, carry, run.states()))
    while marks:
        piece = marks.pop()
        _recompute(run, into, level + 1, piece, min(piece.at + size, hi))


class Loop(torch.autograd.Function):
    """A loop, or one iteration of it, as an autograd node."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, names: Names | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.start = read_states(plan.devices) if plan.random else None
        ctx.plan, ctx.names, ctx.kept = plan, names, None
        if plan.single:
            # Torch keeps it, and checks that nobody writes into it.
            outs, saved = run_single(plan, tensors, names)
            ctx.ints = [(i, saved[i]) for i in plan.chunks[0][0].saved_numbers]
            kept = [v for v in saved if isinstance(v, torch.Tensor)] if ctx.ints else saved
            ctx.save_for_backward(*tensors, *kept)
            ctx.models = _models(outs)
        else:
            outs, ctx.kept, ctx.models = run_forward(plan, tensors, names)
            ctx.save_for_backward(*tensors)
        ctx.inputs = len(tensors)
        ctx.mark_non_differentiable(*(outs[i] for i in plan.not_differentiable))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        plan, needed = ctx.plan, ctx.needs_input_grad[2:]
        saved = list(ctx.saved_tensors)
        tensors = saved[: ctx.inputs]
        # No compiled graph can be given gradients of which each is many (``is_grads_batched``).
        if torch.is_grad_enabled() or any(g is not None and _compat.is_batched(g) for g in grads):
            return None, None, *_differentiable_backward(plan, tensors, ctx.start, needed, grads)
        if plan.single:
            values = saved[ctx.inputs :]
            saved.clear()
            for position, value in ctx.ints:
                values.insert(position, value)
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained
            found = single_backward(plan, tensors, values, ctx.models, grads)
        else:
            keep = _compat.backward_keeps_graph()
            found = run_backward(plan, tensors, ctx.kept, ctx.models, grads, keep, ctx.names)
        return None, None, *(g if wanted else None for g, wanted in zip(found, needed))


def _differentiable_backward(
    plan: Plan, tensors: Sequence[torch.Tensor], start: States | None, needed: Sequence[bool], grads: Sequence[Any]
) -> list[torch.Tensor | None]:
    """Gradients through the plain loop, which autograd can differentiate again, and for many outputs at a time."""
    again = torch.is_grad_enabled()
    before = read_states(plan.devices)
    if start is not None:
        write_states(start)
    with torch.enable_grad():
        # So that an input that was computed from another one is not counted twice.
        views = [t.view_as(t) if flag else t for t, flag in zip(tensors, needed)]
        outs = plan.plain(*views)
    write_states(before)
    roots = [(out, g) for out, g in zip(outs, grads) if g is not None and out.requires_grad]
    wanted = [v for v, flag in zip(views, needed) if flag]
    found = torch.autograd.grad(
        [out for out, _ in roots], wanted, [g for _, g in roots], create_graph=again, allow_unused=True
    )
    parts = iter(found)
    return [next(parts) if flag else None for flag in needed]
