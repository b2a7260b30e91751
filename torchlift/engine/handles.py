"""Compiled loops that an operator of an outer graph can name.

NOTE [handles]: the operator names its loop by a hash of content, the text of the graphs included, because a compiled
outer graph may come from a cache that another process wrote. A number would go stale there.

NOTE [own thread]: the first who needs a loop are Dynamo and AOTAutograd, in the midst of tracing. Capturing and
compiling need a dispatcher without the modes and keys of the tracing around, so they get a thread of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine import compiled
from torchlift.engine.capture import CaptureError, KeptTensorError, inverse, order_of, rows_of, stride_order
from torchlift.engine.compiled import Request, capture_program, settle
from torchlift.engine.draws import devices_of, read_states
from torchlift.engine.graphs import Backend
from torchlift.engine.kept import is_first
from torchlift.engine.loop import Body
from torchlift.engine.plan import Plan, Program, pieces_of, unroll_of
from torchlift.engine.signature import Signature
from torchlift.engine.trees import Parts, Template
from torchlift.errors import ClosureError, TorchliftError

Options = tuple[tuple[str, Any], ...]

_prepared: dict[Any, Handle | str] = {}  # a string: why there is none
_numbers = itertools.count()
_handles: dict[str, Handle] = {}  # never dropped: compiled graphs name them


@dataclass(frozen=True)
class Spec:
    """Everything about a loop but its tensors."""

    key: Hashable
    consts: Template
    carry: Template
    x: Template
    length: int
    stacked: bool
    options: Options
    backend: Backend
    train: bool
    enrolled: bool  # the xs are no inputs of the graph around

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.consts.tensors, self.carry.tensors, self.x.tensors


_Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool, frozenset[int]]


@dataclass(frozen=True)
class Row:
    """What the x of any iteration is like, where a graph around the loop does not hold it."""

    template: Template
    metas: tuple[_Meta, ...]  # of each tensor; a gradient is wanted if any iteration wants it

    @staticmethod
    def of(xs: Sequence[Parts]) -> Row:
        """Of xs that are alike, but for the gradients that are wanted."""
        columns = zip(*(x.tensors for x in xs))
        metas = [(column[0], any(tensor.requires_grad for tensor in column)) for column in columns]
        return Row(xs[0].template, tuple((*_meta(t, False)[:4], wanted, frozenset()) for t, wanted in metas))


@dataclass
class Handle:
    """A compiled loop that an operator can name."""

    name: str
    spec: Spec
    program: Program
    plan: Plan
    orders: list[list[int]]  # of the dimensions in memory, per tensor
    state_sizes: list[int]
    guards: tuple[Any, str | None]
    row: tuple[_Meta, ...] | None  # that of Row, if xs are enrolled
    nested: bool  # in the body of another loop

    def __post_init__(self) -> None:
        # Of enrolled xs, the columns that backward reads: those that the loop writes, as they were before, and others.
        self.kept_columns: dict[int, _Meta] = {}
        self.live_columns: list[int] = []
        if self.row is not None:
            y, width = self.program.ys[0], self.spec.x.tensors
            written = y.fill(range(y.tensors))[1]
            start = sum(self.spec.counts[:2])
            read = {(i - start) % width for kind, i in self.program.feeds if kind == "input" and i >= start}
            if self.plan.pieces:  # it runs the layers again
                read = set(range(width))
            self.kept_columns = {at: self.row[at] for at in written if at in read}
            self.live_columns = sorted(read - set(written))

    @property
    def train(self) -> bool:
        """Whether there is a backward: a loop that is to get gradients may have no output that wants one."""
        return self.program.bw is not None


def handle_named(name: str) -> Handle:
    """The loop of that name."""
    return _handles[name]


def prepare(
    body: Body, key: Hashable, length: int, stacked: bool, options: Options, compile: dict[str, Any],
    consts: Any, carry: Any, xs: list[Any], tensors: list[torch.Tensor], row: Row | None = None, nested: bool = False,
) -> Handle:  # fmt: skip
    """The handle for a loop on tensors like these; captured and compiled if they are the first of their kind.

    With ``row``, which says of the xs what there is to know, ``tensors`` are only the rest. ``nested`` says that this
    thread captures another body.
    """
    if length == 0:
        raise CaptureError("length 0")
    if _compat.functorch_active():
        raise CaptureError("a torch.func transform is around it")
    template = xs[0][1] if row is None else row.template
    kinds = () if row is None else row.metas
    train = torch.is_grad_enabled() and any([t.requires_grad for t in tensors] + [meta[4] for meta in kinds])
    spec = Spec(
        key, consts[1], carry[1], template, length, stacked, options, Backend.of(compile), train,
        row is not None,
    )  # fmt: skip
    metas = (*(_meta(t, train) for t in tensors), *((*meta[:4], train and meta[4], meta[5]) for meta in kinds))
    if any(other != template for _, other in xs):
        raise CaptureError(_depends_on_values(body, spec, metas, nested) or "iterations differ in structure")
    known = (spec, metas, compiled.environment(body.key))
    found = _prepared.get(known)
    if found is None:
        try:
            found = _in_own_thread(lambda: _make(body, spec, metas, nested), nested)
        except KeptTensorError as error:
            if is_first(known):
                raise
            found = str(error)
        # Asked again: only now it is known whether the body has optional spans.
        _prepared[spec, metas, compiled.environment(body.key)] = found
    if isinstance(found, str):
        raise CaptureError(found)
    # In the symbols of the graph around this one.
    mode, guards = found.guards
    if guards and not _compat.guards_hold(mode, guards, graph_inputs(found, tensors)):
        raise CaptureError("sizes do not meet the conditions of the captured graph")
    return found


def _meta(t: torch.Tensor, train: bool) -> _Meta:
    """Size, memory order, dtype, device, whether a gradient is wanted, and the symbolic dimensions."""
    dims = frozenset(d for d in range(t.ndim) if isinstance(t.size(d), torch.SymInt))
    sizes, strides = (tuple(map(_compat.size_hint, numbers)) for numbers in (t.size(), t.stride()))
    order = tuple(order_of(sizes, strides) if dims else stride_order(t))
    return sizes, order, t.dtype, t.device, train and t.requires_grad, dims


def _in_own_thread(make: Callable[[], Any], nested: bool) -> Any:
    """``make()`` without the tracing around it, but with its autocast and grad mode."""
    # A thread that captures the body around has the lock, which is nobody else's, and waits for this one.
    lock: Any = nullcontext() if nested else compiled.locked()
    autocast = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    ]
    grad, device = torch.is_grad_enabled(), torch.get_default_device()
    result: list[Any] = []

    def work() -> None:
        try:
            for name, enabled, dtype in autocast:
                torch.set_autocast_enabled(name, enabled)
                torch.set_autocast_dtype(name, dtype)
            if device.type != "cpu":
                torch.set_default_device(device)
            with torch.set_grad_enabled(grad), lock, _compat.dynamo_off():
                result.append(make())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    refused = (TorchliftError, KeptTensorError)
    if isinstance(result[0], refused) or not isinstance(result[0], BaseException):
        if isinstance(result[0], refused):
            raise result[0]
        return result[0]
    if not isinstance(result[0], Exception):
        raise result[0]
    return compiled.reason_of(result[0])


def _depends_on_values(body: Body, spec: Spec, metas: tuple[_Meta, ...], nested: bool) -> str:
    """Why no graph at all can hold the first iteration, which may be unlike the others; empty where one can."""
    metas = metas[: sum(spec.counts)]

    def run() -> str:
        with suppress(TorchliftError, KeptTensorError):  # as the body will raise it where it runs
            settle(_request(body, spec, metas, [blank(meta) for meta in metas]))
        return ""

    reason: str = _in_own_thread(run, nested)
    return reason if compiled.ON_VALUES in reason else ""


def _request(body: Body, spec: Spec, metas: Sequence[_Meta], blanks: Sequence[torch.Tensor]) -> Request:
    """That of a program for one iteration of ``spec``."""
    c, h, width = spec.counts
    flags = [meta[4] for meta in metas]
    x_flags = [any(flags[c + h :][i::width]) for i in range(width)]
    policy = dict(spec.options)["remat"]
    return Request(
        body,
        Signature(spec.consts, spec.carry, (spec.x,)),
        one_iteration(spec, blanks, None),
        tuple(flags[: c + h] + x_flags),
        spec.train,
        spec.backend,
        None if policy is True else policy,
    )


def _make(body: Body, spec: Spec, metas: tuple[_Meta, ...], nested: bool) -> Handle:
    """Captures and compiles one iteration of ``spec`` and names it."""
    blanks = [blank(meta) for meta in metas]
    c, h, width = spec.counts
    shift = int(spec.stacked)
    dims = [meta[5] for meta in metas[: c + h]]
    dims += [frozenset(d - shift for d in meta[5] if d >= shift) for meta in metas[c + h :]][: spec.x.tensors]
    row = metas[c + h :] if spec.enrolled else None
    settings = dict(spec.options)
    pieces = pieces_of(settings["remat"] is True, settings["lengths"], settings["every"])
    request, seen = settle(_request(body, spec, metas, blanks))
    one = request.tensors
    if nested and seen.random:
        raise CaptureError("it draws, and its draws stand between those of the body around")
    if closures := seen.closures:
        raise ClosureError(
            f"{body.name}: the body reads a tensor of shape {tuple(closures[0].shape)} by a closure or an attribute, "
            "which a compiled graph around the loop would not see change; pass it as an argument or register a buffer"
        )
    unroll = unroll_of(settings["unroll"], spec.length, one[:c] if spec.stacked else [], one[c + h :], even=True)
    if unroll > 1 and not pieces and spec.length % unroll == 0 and not settings["shared_draws"]:
        count = 1 if spec.stacked else unroll
        packed = unroll if spec.stacked else 0
        signature = Signature(
            spec.consts, spec.carry, (spec.x,) * count, packed, spec.stacked and settings["reverse"]
        )  # fmt: skip
        shifted = [frozenset(d + 1 for d in some) if spec.stacked else some for some in dims[c + h :]]
        dims = dims[: c + h] + shifted * count
        request = Request(
            body, signature, _inputs(spec, one, blanks, unroll),
            request.flags[: c + h] + request.flags[c + h :] * count, spec.train, spec.backend, request.policy,
        )  # fmt: skip
    else:
        unroll = 1
    variant = capture_program(request, dims, [], shapes=True, dense=not pieces)
    program = variant.program
    order = range(spec.length)[:: -1 if settings["reverse"] else 1]
    chunks = [(program, range(at, at + unroll)) for at in range(0, spec.length, unroll)]
    devices = devices_of(blanks)
    plan = Plan(
        chunks=chunks, order=order, consts=c, closures=0, carries=h, x_tensors=width, stacked=spec.stacked,
        shared_draws=settings["shared_draws"], pieces=pieces, devices=devices, plain=_no_double_backward, joined=True,
    )  # fmt: skip
    assert program.shapes is not None
    around = (compiled.environment(body.key), torch.__version__)
    text = repr((spec, metas, around, body.key, program.feeds, program.grads, program.marks))
    # The key of a nested body may have the address of an object in its text, which another may have later on.
    number = f" {next(_numbers)}" if nested else ""
    name = hashlib.sha256((text + program.shapes.code).encode()).hexdigest() + number
    sizes = [state.numel() for _, state in read_states(devices)] if plan.random and pieces else []
    handle = Handle(
        name, spec, program, plan, [list(m[1]) for m in metas], sizes, (variant.mode, variant.guards), row, nested
    )  # fmt: skip
    return _handles.setdefault(name, handle)


def _no_double_backward(*tensors: torch.Tensor) -> Any:
    raise RuntimeError("a compiled graph is differentiated once")


def blank(meta: _Meta) -> torch.Tensor:
    size, order, dtype, device, _, _ = meta
    return torch.empty([size[d] for d in order], dtype=dtype, device=device).permute(inverse(order))


def one_iteration(spec: Spec, tensors: Sequence[torch.Tensor], row: tuple[_Meta, ...] | None) -> list[torch.Tensor]:
    """Consts, carry and the x of one iteration, which is made up if ``tensors`` do not hold it."""
    c, h, width = spec.counts
    if row is not None:
        return [*tensors[: c + h], *map(blank, row)]
    xs = tensors[c + h : c + h + width]
    return [*tensors[: c + h], *(t.detach()[0] if spec.stacked else t for t in xs)]


def graph_inputs(handle: Handle, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like those that a call of the graph is given."""
    return _inputs(handle.spec, one_iteration(handle.spec, tensors, handle.row), tensors, handle.program.steps)


def _inputs(spec: Spec, one: list[torch.Tensor], tensors: Sequence[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Those of a graph of so many iterations, of which ``one`` has a single one's."""
    start = len(one) - spec.x.tensors
    if steps > 1 and spec.stacked:
        return [*one[:start], *(rows_of(t.detach())(0, steps) for t in tensors[start:])]
    return [*one[:start], *one[start:] * steps]
