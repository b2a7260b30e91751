"""Runs a loop: compiled where that serves, else in Python, with the same answers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine import capture, compiled
from torchlift.engine.capture import CaptureError, KeptTensorError, like_strided, rows_of
from torchlift.engine.compiled import Request, find_program
from torchlift.engine.draws import devices_of, read_states, write_states
from torchlift.engine.forms import Likeness
from torchlift.engine.graphs import Backend
from torchlift.engine.inputs import Inputs, Split, why_plain
from torchlift.engine.loop import Body, Stacked, Tree, Xs, check_arguments, plain_run
from torchlift.engine.nested import nested_run
from torchlift.engine.node import Loop, Tensors, run_forward, run_single
from torchlift.engine.offload import carries_on_host
from torchlift.engine.plan import TOGETHER, Plan, Program, pieces_of, unroll_of
from torchlift.engine.policies import checkpoint_policies
from torchlift.engine.signature import Signature, settings
from torchlift.engine.spans import Names
from torchlift.engine.trees import Template, split, whole
from torchlift.errors import TorchliftCompileWarning, warn

__all__ = ["Body", "Report", "Stacked", "explain_run", "last_report", "run"]


@dataclass(frozen=True)
class Report:
    """How a loop ran. ``reason`` says why it was the plain loop; ``compilations`` counts captures of its body."""

    name: str
    path: str  # "compiled" or "plain"
    reason: str | None = None
    nodes: int = 0  # autograd nodes around the graphs
    compilations: int = 0
    saved_bytes: int = 0  # per iteration, besides inputs, as the graphs were cut
    recomputed: int = 0  # operators of forward that backward runs again, per iteration
    random: bool = False


@dataclass(frozen=True)
class _Options:
    reverse: bool
    shared_draws: bool
    unroll: int | str
    remat: Any
    lengths: tuple[int, ...] | None
    every: int


_local = threading.local()
_warned: set[Hashable] = set()


@contextmanager
def listen() -> Iterator[list[Report]]:
    """Collects the reports of all loops that this thread runs in the block."""
    before = getattr(_local, "reports", None)
    _local.reports = []
    try:
        yield _local.reports
    finally:
        _local.reports = before


def record(report: Report) -> None:
    """Notes how a loop ran, for :func:`last_report` and those who listen."""
    _local.report = report
    if getattr(_local, "reports", None) is not None:
        _local.reports.append(report)


def last_report() -> Report | None:
    """How the last loop of this thread ran."""
    return getattr(_local, "report", None)


def explain_run(*args: Any, **kwargs: Any) -> Report:
    """Runs a loop as :func:`run` does and says how."""
    run(*args, **kwargs)
    return _local.report


def run(
    body: Body,
    consts: Tree,
    carry: Tree,
    xs: Xs,
    length: int,
    *,
    reverse: bool = False,
    shared_draws: bool = False,
    unroll: int | str = 1,
    remat: Any = None,
    lengths: Sequence[int] | None = None,
    every: int = 1,
    compile: bool | dict[str, Any] = True,
) -> tuple[Tree, Xs]:
    """Runs ``body`` ``length`` times; returns the last carry and the ys.

    ``xs`` is :class:`Stacked` (the ys come back stacked; one autograd node around the loop) or a list of one pytree
    for each iteration (the ys are a list, where those without tensors may be one object; one autograd node for each
    iteration). ``reverse`` iterates from the end, and every y lands at its own index. Draws run on from iteration to
    iteration; with ``shared_draws`` every iteration starts from the same state of the generators. ``unroll`` iterations
    make one graph; ``"auto"`` picks how many.

    ``remat=True`` keeps only the carries for backward, and a policy decides otherwise (``offload_carries`` keeps them
    in the host's memory). ``lengths`` nests the recomputation, ``every`` recomputes pieces of that many iterations.

    ``compile`` is False for the plain Python loop, True, or options of ``torch.compile``. Where a body cannot be
    compiled the plain loop runs, with one warning that says why.
    """
    check_arguments(body, xs, length, unroll, lengths)
    if lengths is not None and remat is None:
        remat = True
    away = remat is checkpoint_policies.offload_carries
    options = _Options(
        reverse, shared_draws, unroll, away or remat, None if lengths is None else tuple(lengths), every
    )  # fmt: skip
    if not away or _compat.functorch_active():  # whose transforms refuse hooks
        return _run(body, consts, carry, xs, length, options, compile)
    trees = [consts, carry, *([xs.tree] if isinstance(xs, Stacked) else xs)]
    with carries_on_host(tensor for tree in trees for tensor in split(tree)[0]):
        return _run(body, consts, carry, xs, length, options, compile)


def _run(body: Body, consts: Tree, carry: Tree, xs: Xs, length: int, options: _Options, compile: Any) -> Any:
    nested = nested_run(body, consts, carry, xs, length, tuple(vars(options).items()), compile)
    if nested is not None:
        return nested
    reason, unexpected = why_plain(length, compile)
    if reason is None:
        given = Inputs.of(consts, carry, xs)
        reason, unexpected = given.why_not(body.key)
        if reason is None:
            try:
                return _compiled_run(body, given, length, options, Backend.of(compile))
            except CaptureError as error:
                reason, unexpected = str(error), not isinstance(error, KeptTensorError)
    record(Report(body.name, "plain", reason))
    out = _plain(body, consts, carry, xs, length, options)
    # After the loop, so that an error of the body comes alone.
    if unexpected and body.key not in _warned:
        _warned.add(body.key)
        warn(f"{body.name} runs as a plain Python loop: {reason}", TorchliftCompileWarning)
    return out


def _plain(body: Body, consts: Tree, carry: Tree, xs: Xs, length: int, o: _Options) -> tuple[Tree, Xs]:
    trees = xs if isinstance(xs, Stacked) else [whole(x) for x in xs]
    return plain_run(
        body, consts, carry, trees, length,
        reverse=o.reverse, shared_draws=o.shared_draws, remat=o.remat, lengths=o.lengths, every=o.every,
    )  # fmt: skip


@dataclass
class _Job:
    """The flattened inputs of a compiled run."""

    body: Body
    consts: list[torch.Tensor]
    consts_template: Template
    carry: list[torch.Tensor]
    carry_template: Template
    train: bool
    backend: Backend
    options: _Options

    def program(
        self, xs: Sequence[list[torch.Tensor]], templates: Sequence[Template], carry_flags: Sequence[bool],
        packed: int = 0, rowwise: bool = False,
    ) -> tuple[Program, list[torch.Tensor]]:  # fmt: skip
        """The program for iterations on ``xs``, and the tensors that the body closes over.

        With ``packed``, what is in ``xs`` is stacks, of so many iterations; with ``rowwise`` it is a row of stacks.
        """
        remat = self.options.remat
        flat = [t for x in xs for t in x]
        flags = [t.requires_grad for t in self.consts] + list(carry_flags) + [t.requires_grad for t in flat]
        return find_program(
            Request(
                self.body,
                Signature(
                    self.consts_template,
                    self.carry_template,
                    tuple(templates),
                    packed,
                    (packed > 0 or rowwise) and self.options.reverse,
                    rowwise,
                ),  # fmt: skip
                [*self.consts, *self.carry, *flat],
                tuple(self.train and flag for flag in flags),
                self.train,
                self.backend,
                None if remat is True else remat,
                around=self.settings,
            )
        )

    @functools.cached_property
    def settings(self) -> tuple[Hashable, ...]:
        return settings()

    @functools.cached_property
    def names(self) -> Names | None:
        """What modules are called; as it was at first where an iteration is recomputed, with nothing around it."""
        return None if self.body.names is None else functools.cache(self.body.names)

    @property
    def carry_flags(self) -> list[bool]:
        return [t.requires_grad for t in self.carry]


def _compiled_run(body: Body, given: Inputs, length: int, options: _Options, backend: Backend) -> tuple[Tree, Xs]:
    # One layout for the carry of all iterations.
    carry = [like_strided(t, t) for t in given.carry[0]]
    job = _Job(body, *given.consts, carry, given.carry[1], torch.is_grad_enabled(), backend, options)
    return _run_stacked(job, *given.xs[0], length) if given.stacked else _run_list(job, given, length)


def _plan(
    job: _Job, chunks: list[tuple[Program, range]], order: Sequence[int], closures: list[torch.Tensor],
    templates: Sequence[Template], stacked: bool, pieces: tuple[int, ...],
) -> Plan:  # fmt: skip
    def plain(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The plain loop over the node's tensors, its positions in the order they run."""

        def loop(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            consts, carry = inputs[: len(job.consts)], inputs[len(job.consts) :][: len(job.carry)]
            xs = inputs[len(job.consts) + len(job.carry) :]
            width = templates[0].tensors
            rows = [leaf.unbind(0) for leaf in xs] if stacked else [xs[i::width] for i in range(width)]
            slices = [templates[i].fill([row[i] for row in rows]) for i in order]
            out, ys = plain_run(
                job.body, job.consts_template.fill(consts), job.carry_template.fill(carry), slices, len(order),
                shared_draws=job.options.shared_draws,
            )  # fmt: skip
            assert isinstance(ys, list)
            outs, flat = split(out)[0], [split(y)[0] for y in ys]
            flat = [y for _, y in sorted(zip(order, flat))]
            return (*outs, *([torch.stack(c) for c in zip(*flat)] if stacked else [t for y in flat for t in y]))

        a = len(job.consts)
        rest = (*tensors[:a], *tensors[a + len(closures) :], *tensors[a : a + len(closures)])
        return capture.substituted(loop, closures)(*rest)

    return Plan(
        chunks=chunks, order=order, consts=len(job.consts), closures=len(closures), carries=len(job.carry),
        x_tensors=templates[0].tensors, stacked=stacked, shared_draws=job.options.shared_draws, pieces=pieces,
        devices=devices_of([*job.consts, *job.carry, *closures]), plain=plain,
    )  # fmt: skip


def _call(plan: Plan, names: Names | None, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Runs a plan, as an autograd node if there is anything to differentiate."""
    if plan.chunks[0][0].bw is None:
        with torch.no_grad():
            return (run_single if plan.single else run_forward)(plan, tensors, names)[0]
    return _compat.apply_node(Loop, (plan, names), tensors)


def _run_stacked(job: _Job, leaves: list[torch.Tensor], template: Template, length: int) -> tuple[Tree, Xs]:
    """One autograd node around the loop."""
    first = [leaf.detach()[0].requires_grad_(leaf.requires_grad) for leaf in leaves]
    single, closures = job.program([first], [template], job.carry_flags, rowwise=True)
    order = range(length)[:: -1 if job.options.reverse else 1]
    unroll = _unroll(job, lambda: single, length, job.consts, first)
    programs = [(single, 1)]
    if unroll > 1:
        pack = [rows_of(leaf.detach())(0, unroll).requires_grad_(leaf.requires_grad) for leaf in leaves]
        programs.insert(0, (job.program([pack], [template], job.carry_flags, packed=unroll)[0], unroll))
    chunks, at = list[tuple[Program, range]](), 0
    for program, steps in programs:
        most = max(1, TOGETHER // steps) if program.chained and not _pieces(job.options) else 1
        while count := min(most, (length - at) // steps):
            chunks.append((program, range(at, at + count * steps)))
            at += count * steps
    plan = _plan(job, chunks, order, closures, [template] * length, True, _pieces(job.options))
    outs = _call(plan, job.names if single.marks else None, [*job.consts, *closures, *job.carry, *leaves])
    _report(job, chunks[0][0], int(single.bw is not None))
    carries = len(job.carry)
    return job.carry_template.fill(list(outs[:carries])), Stacked(single.ys[0].fill(list(outs[carries:])))


def _unroll(job: _Job, program: Callable[[], Program], length: int, consts: Tensors, x: Tensors) -> int:
    """How many iterations of ``program`` to put in one graph."""
    o = job.options
    if o.unroll == 1 or o.lengths is not None or o.every > 1 or (o.shared_draws and program().random):
        return 1
    return unroll_of(o.unroll, length, consts, x)


def _names_from(names: Names | None, indices: Sequence[int]) -> Names | None:
    """``names`` for a node that runs the iterations ``indices``, which it numbers from 0 on."""
    return None if names is None else lambda at: names(indices[at])


def _pieces(o: _Options) -> tuple[int, ...]:
    return pieces_of(o.remat is True, o.lengths, o.every)


def _report(job: _Job, program: Program, nodes: int) -> None:
    saved, recomputed = program.saved_bytes // program.steps, program.recomputed // program.steps
    if nodes and _pieces(job.options):  # the forward graph runs again
        saved, recomputed = 0, recomputed + program.operators // program.steps
    made = compiled.compilations[job.body.key]
    record(Report(job.body.name, "compiled", None, nodes, made, saved, recomputed, program.random))


def _run_list(job: _Job, given: Inputs, length: int) -> tuple[Tree, Xs]:
    """One autograd node for each iteration (for each graph when unrolled, each outermost piece when nested)."""
    o = job.options
    order = list(range(length))[:: -1 if o.reverse else 1]
    flat = [given.xs[i] for i in order]
    # Everything is compiled before anything runs, so that a body that cannot be compiled is never run in part.
    plans = _list_plans(job, flat, [given.alike[i] for i in order])
    start = None
    if o.shared_draws and any(plan.random for plan, _, _ in plans):
        start = read_states(plans[0][0].devices)
    ys: list[Tree] = [None] * length
    filled: dict[int, Tree] = {}  # of templates without tensors, which the plans keep: one for all that have it
    carry = job.carry
    at = 0
    for plan, closures, templates in plans:
        if start is not None and at > 0:
            write_states(start)
        tensors = [t for x, _ in flat[at : at + plan.length] for t in x]
        names = _names_from(job.names, order[at : at + plan.length]) if plan.chunks[0][0].marks else None
        outs = _call(plan, names, [*job.consts, *closures, *carry, *tensors])
        carry = list(outs[: len(carry)])
        cursor = len(carry)
        for position, y in zip(range(at, at + plan.length), templates):
            tree = filled.get(id(y))
            if tree is None:
                tree = y.fill(outs[cursor : cursor + y.tensors])
                cursor += y.tensors
                if not y.tensors:
                    filled[id(y)] = tree
            ys[order[position]] = tree
        at += plan.length
    _report(job, plans[0][0].chunks[0][0], sum(plan.chunks[0][0].bw is not None for plan, _, _ in plans))
    return job.carry_template.fill(carry), ys


_Node = tuple[Plan, list[torch.Tensor], list[Template]]  # a plan, its closed-over tensors, the template of each y


def _list_plans(job: _Job, flat: list[Split], alike: list[bool]) -> list[_Node]:
    """The nodes of a list run, in the order they run; ``alike`` says which iterations are like each other."""
    o, length = job.options, len(flat)
    flags = job.carry_flags
    pieces = _pieces(o)
    size = max(pieces[0] if pieces else 1, 1)
    # Full remat keeps each carry unless told otherwise.
    if size == 1 and (o.unroll != "auto" or (o.remat is not True and len({x.tensors for _, x in flat}) == 1)):
        size = _unroll(job, lambda: job.program([flat[0][0]], [flat[0][1]], flags)[0], length, [], flat[0][0])
    memo: list[tuple[Any, Callable[[], Likeness], tuple[_Node, list[bool]]]] = []  # few: most iterations are alike
    nodes = []
    for at in range(0, length, size):
        part, like = flat[at : at + size], all(alike[at : at + size])
        key, tensors = (flags, [template for _, template in part], like), [t for x, _ in part for t in x]
        found = next((node for known, form, node in memo if known == key and (like or form().fits(tensors))), None)
        if found is None:
            found = _list_node(job, part, flags, pieces)
            memo.append((key, functools.cache(functools.partial(Likeness, tensors)), found))
        node, flags = found
        nodes.append(node)
    return nodes


def _list_node(job: _Job, part: list[Split], flags: list[bool], pieces: tuple[int, ...]) -> tuple[_Node, list[bool]]:
    """The node for the iterations ``part``, and which carries require grad after it."""
    templates = [template for _, template in part]
    chunks: list[tuple[Program, range]] = []
    closures: list[torch.Tensor] = []
    if pieces and len(part) > 1 and pieces[0] > 1:
        for position, (x, template) in enumerate(part):
            program, closures = job.program([x], [template], flags)
            chunks.append((program, range(position, position + 1)))
            flags = program.requires_grad[: program.carries]
    else:
        program, closures = job.program([x for x, _ in part], templates, flags)
        chunks.append((program, range(len(part))))
        flags = program.requires_grad[: program.carries]
    ys = [y for program, _ in chunks for y in program.ys]
    same = len({t.tensors for t in templates}) == len({y.tensors for y in ys}) == 1
    same = same and len({(p.bw is None, p.closures, tuple(p.requires_grad)) for p, _ in chunks}) == 1
    if not same:
        raise CaptureError("iterations that are recomputed or unrolled together differ in structure")
    return (_plan(job, chunks, range(len(part)), closures, templates, False, pieces), closures, ys), list(flags)
