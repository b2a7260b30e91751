"""A loop as one operator of an outer ``torch.compile`` graph, ``fullgraph=True`` included.

The outer graph holds a call of ``torchlift::loop_forward`` whatever the length of the loop, so its compile time does
not grow with depth. What backward needs is among the operator's outputs.

NOTE [who runs when]: Dynamo traces :func:`opaque_run`, calls :func:`_in_graph` with fake tensors to see what comes
out, and puts a call of it in its graph. AOTAutograd calls it again, on functional tensors over fakes, and sees the
operators. The body is captured and compiled at the first of these, in a thread of its own: compiling needs a
dispatcher without the modes, keys and locks of the tracing around it.

NOTE [handles]: the operator names its program by a hash of content, the text of the graphs included, because a
compiled outer graph may come from a cache that another process wrote. A number would go stale there.

NOTE [few outputs]: Inductor takes time in the square of the number of tensors that one operator returns. So values of
all iterations come back as stacks, gradients of a thousand parameters included, and the graph cuts them.

NOTE [call sites]: common-subexpression elimination merges equal calls, and two passes through one dropout would get
one mask. So every call bears a number of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine import compiled
from torchlift.engine.capture import CaptureError, Signature, like_strided, stride_order
from torchlift.engine.compiled import Request, capture_program, settle
from torchlift.engine.draws import devices_of, read_states
from torchlift.engine.graphs import Backend
from torchlift.engine.loop import Body, Stacked, Tree, Xs, plain_run
from torchlift.engine.node import Plan, Program, Residuals, pieces_of, run_backward, run_forward
from torchlift.engine.structure import decode, encode, mutable
from torchlift.engine.trees import Template, split
from torchlift.errors import TorchliftCompileWarning, TorchliftError

Options = tuple[tuple[str, Any], ...]

_bodies: dict[str, tuple[Callable[[], Body], Any]] = {}  # what makes a body, and its remat policy
_sites = itertools.count()
_outputs: dict[str, Any] = {}  # structure of a loop's y, by key and call site; read once, while tracing
_prepared: dict[Any, _Handle | str] = {}
_handles: dict[str, _Handle] = {}  # never dropped: compiled graphs name them
_warned: set[str] = set()


class OpaqueError(TorchliftError, RuntimeError):
    """A loop cannot be part of a compiled graph."""


def register_body(key: str, factory: Callable[[], Body], policy: Callable[..., Any] | None = None) -> str:
    """Makes the body that ``factory`` builds known under ``key``, a hash of its content; returns ``key``.

    ``policy`` is that of ``remat``, if it is one; the key tells it from others. Called while Dynamo traces, from a
    function under ``torch.compiler.assume_constant_result``.
    """
    _bodies[key] = factory, policy
    return key


@torch.compiler.assume_constant_result
def _new_site() -> int:
    return next(_sites)


@torch.compiler.assume_constant_result
def _y_structure(site: int) -> Any:
    return _outputs[site]


def opaque_run(
    key: str,
    consts: Tree,
    carry: Tree,
    xs: Xs,
    length: int,
    *,
    reverse: bool = False,
    shared_draws: bool = False,
    unroll: int = 1,
    remat: Any = None,
    lengths: Sequence[int] | None = None,
    every: int = 1,
    compile: bool | dict[str, Any] = True,
) -> tuple[Tree, Xs]:
    """:func:`torchlift.engine.run.run` for code that Dynamo traces; ``key`` is that of :func:`register_body`.

    Trees are of dicts, lists, tuples and named tuples. Of a policy given as ``remat`` only that it is there counts;
    the one that was registered with the body is used.
    """
    site = _new_site()
    stacked = isinstance(xs, Stacked)
    options = (
        ("reverse", reverse),
        ("shared_draws", shared_draws),
        ("unroll", unroll),
        ("remat", remat if remat is None or remat is True else "policy"),
        ("lengths", None if lengths is None else tuple(lengths)),
        ("every", every),
    )
    # As they are: Dynamo is slow at taking trees of a thousand parameters apart.
    outs = _in_graph(key, site, length, stacked, options, _backend(compile), consts, carry, xs.tree if stacked else xs)
    carry_structure, y_structures = _y_structure(site)
    at = iter(outs)
    carry = decode(carry_structure, at)
    if stacked:
        return carry, Stacked(decode(y_structures[0], at))
    return carry, [decode(y, at) for y in y_structures]


def _backend(compile: bool | dict[str, Any]) -> Any:
    """``compile`` as constants that a graph can hold."""
    if not isinstance(compile, dict):
        return ()
    return tuple((k, tuple(v.items()) if isinstance(v, dict) else v) for k, v in compile.items())


@dataclass(frozen=True)
class _Spec:
    """Everything about a loop but its tensors."""

    key: str
    consts: Template
    carry: Template
    x: Template
    length: int
    stacked: bool
    options: Options
    backend: Backend
    train: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.consts.tensors, self.carry.tensors, self.x.tensors


@dataclass
class _Handle:
    """A compiled loop that an operator can name."""

    name: str
    spec: _Spec
    program: Program
    plan: Plan
    orders: list[list[int]]  # of the dimensions in memory, per tensor
    state_sizes: list[int]
    guards: tuple[Any, str | None]


@_compat.allow_in_graph
def _in_graph(
    key: str, site: int, length: int, stacked: bool, options: Options, backend: Any, consts: Tree, carry: Tree, xs: Tree
) -> list[torch.Tensor]:
    factory, policy = _bodies[key]
    body = factory()
    consts, carry, xs = mutable((consts, carry, xs))
    settings = dict(options)
    if settings["remat"] == "policy":
        settings["remat"] = policy
    elif settings["lengths"] is not None:
        settings["remat"] = True
    options = tuple(settings.items())
    compile = {k: dict(v) if isinstance(v, tuple) else v for k, v in backend}
    flat_consts, flat_carry = split(consts), split(carry)
    flat_xs = [split(xs)] if stacked else [split(x) for x in xs]
    tensors = [*flat_consts[0], *flat_carry[0], *(t for x, _ in flat_xs for t in x)]
    if tensors and not any(_compat.is_traced(t) for t in tensors):
        from torchlift.engine.run import run

        out = run(body, consts, carry, Stacked(xs) if stacked else xs, length, compile=compile or True, **settings)
        return _publish(site, *out)
    try:
        handle = _prepare(body, key, length, stacked, options, compile, flat_consts, flat_carry, flat_xs, tensors)
    except CaptureError as error:
        if key not in _warned:
            _warned.add(key)
            text = f"{body.name} is unrolled into the surrounding graph: {error}"
            warnings.warn(text, TorchliftCompileWarning, stacklevel=2)
        settings.pop("unroll")
        out = plain_run(body, consts, carry, Stacked(xs) if stacked else xs, length, **settings)
        return _publish(site, *out)
    tensors = [like_strided(t, t) for t in tensors]
    if handle.spec.train:
        outs = list(_Opaque.apply(handle, site, *tensors))
    else:
        outs = list(torch.ops.torchlift.loop_forward(tensors, handle.name, site))
    y = handle.program.ys[0]
    at = handle.spec.carry.tensors
    carry = handle.spec.carry.fill(outs[:at])
    stacks = outs[at : at + y.tensors]
    if stacked:
        return _publish(site, carry, Stacked(y.fill(stacks)))
    rows = zip(*(s.unbind(0) for s in stacks)) if stacks else [()] * length
    return _publish(site, carry, [y.fill(row) for row in rows])


def _publish(site: int, carry: Tree, ys: Xs) -> list[torch.Tensor]:
    """The tensors of a result, its structure left for :func:`opaque_run` to read."""
    leaves: list[Any] = []
    carry_structure = encode(carry, leaves, static=True)
    parts = [ys.tree] if isinstance(ys, Stacked) else ys
    _outputs[site] = carry_structure, [encode(part, leaves, static=True) for part in parts]
    return leaves


def _prepare(
    body: Body, key: str, length: int, stacked: bool, options: Options, compile: dict[str, Any],
    consts: Any, carry: Any, xs: list[Any], tensors: list[torch.Tensor],
) -> _Handle:  # fmt: skip
    """The handle for a loop on tensors like these; captured and compiled if they are the first of their kind."""
    if length == 0:
        raise CaptureError("length 0")
    if _compat.functorch_active():
        raise CaptureError("a torch.func transform is around it")
    templates = {template for _, template in xs}
    if len(templates) != 1:
        raise CaptureError("iterations differ in structure")
    train = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    spec = _Spec(
        key, consts[1], carry[1], xs[0][1], length, stacked, options, Backend.of(compile), train
    )  # fmt: skip
    metas = tuple(_meta(t, train) for t in tensors)
    known = (spec, metas, compiled.environment())
    found = _prepared.get(known)
    if found is None:
        found = _prepared[known] = _in_own_thread(lambda: _make(body, spec, metas))
    if isinstance(found, str):
        raise CaptureError(found)
    # In the symbols of the graph around this one.
    if not _compat.guards_hold(*found.guards, _graph_inputs(found, tensors)):
        raise CaptureError("sizes do not meet the conditions of the captured graph")
    return found


_Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool, frozenset[int]]


def _meta(t: torch.Tensor, train: bool) -> _Meta:
    """Size, memory order, dtype, device, whether a gradient is wanted, and the symbolic dimensions."""
    dims = frozenset(d for d in range(t.ndim) if isinstance(t.size(d), torch.SymInt))
    order = tuple(stride_order(t)) if not dims else tuple(range(t.ndim))
    return tuple(_compat.size_hint(s) for s in t.size()), order, t.dtype, t.device, train and t.requires_grad, dims


def _in_own_thread(make: Callable[[], Any]) -> Any:
    """``make()`` without the tracing around it, but with its autocast and grad mode."""
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
            with torch.set_grad_enabled(grad), compiled.locked(), _compat.dynamo_off():
                result.append(make())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(result[0], TorchliftError) or not isinstance(result[0], Exception | BaseException):
        if isinstance(result[0], TorchliftError):
            raise result[0]
        return result[0]
    if not isinstance(result[0], Exception):
        raise result[0]
    return compiled.reason_of(result[0])


def _make(body: Body, spec: _Spec, metas: tuple[_Meta, ...]) -> _Handle:
    """Captures and compiles one iteration of ``spec`` and names it."""
    blanks = [_blank(meta) for meta in metas]
    c, h, _ = spec.counts
    shift = int(spec.stacked)
    one = _one_iteration(spec, blanks)
    dims = [meta[5] for meta in metas[: c + h]]
    dims += [frozenset(d - shift for d in meta[5] if d >= shift) for meta in metas[c + h :]][: spec.x.tensors]
    flags = [meta[4] for meta in metas]
    x_flags = flags[c + h :]
    width = spec.x.tensors
    x_flags = [any(x_flags[i::width]) for i in range(width)]
    settings = dict(spec.options)
    pieces = pieces_of(settings["remat"] is True, settings["lengths"], settings["every"])
    policy = None if settings["remat"] is True else settings["remat"]
    request = Request(
        body,
        Signature(spec.consts, spec.carry, (spec.x,)),
        one,
        tuple(flags[: c + h] + x_flags),
        spec.train,
        spec.backend,
        policy,
    )
    request, closures = settle(request)
    if closures:
        raise OpaqueError(
            f"{body.name}: the body reads a tensor of shape {tuple(closures[0].shape)} by a closure or an attribute, "
            "which a compiled graph around the loop would not see change; pass it as an argument or register a buffer"
        )
    unroll = settings["unroll"]
    if unroll > 1 and not pieces and spec.length % unroll == 0 and not settings["shared_draws"]:
        several = (spec.x,) * unroll
        request = Request(
            body, Signature(spec.consts, spec.carry, several), [*one[: c + h], *one[c + h :] * unroll],
            request.flags[: c + h] + request.flags[c + h :] * unroll, spec.train, spec.backend, policy,
        )  # fmt: skip
        dims = dims[: c + h] + dims[c + h :] * unroll
    else:
        unroll = 1
    variant = capture_program(request, dims, [], shapes=True)
    program = variant.program
    order = range(spec.length)[:: -1 if settings["reverse"] else 1]
    chunks = [(program, range(at, at + unroll)) for at in range(0, spec.length, unroll)]
    devices = devices_of(blanks)
    plan = Plan(
        chunks=chunks, order=order, consts=c, closures=0, carries=h, x_tensors=width, stacked=spec.stacked,
        shared_draws=settings["shared_draws"], pieces=pieces, devices=devices, plain=_no_double_backward, joined=True,
    )  # fmt: skip
    assert program.shapes is not None
    text = repr((spec, metas, compiled.environment(), torch.__version__, body.key, program.feeds, program.grads))
    name = hashlib.sha256((text + program.shapes.code).encode()).hexdigest()
    sizes = [state.numel() for _, state in read_states(devices)] if plan.random and pieces else []
    handle = _Handle(
        name, spec, program, plan, [list(m[1]) for m in metas], sizes, (variant.mode, variant.guards)
    )  # fmt: skip
    return _handles.setdefault(name, handle)


def _no_double_backward(*tensors: torch.Tensor) -> Any:
    raise RuntimeError("a compiled graph is differentiated once")


def _blank(meta: _Meta) -> torch.Tensor:
    size, order, dtype, device, _, _ = meta
    back = _inverse(order)
    return torch.empty([size[d] for d in order], dtype=dtype, device=device).permute(back)


def _one_iteration(spec: _Spec, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consts, carry and the x of one iteration."""
    c, h, width = spec.counts
    xs = tensors[c + h : c + h + width]
    return [*tensors[: c + h], *(t.detach()[0] if spec.stacked else t for t in xs)]


def _graph_inputs(handle: _Handle, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like those that a call of the graph is given."""
    one = _one_iteration(handle.spec, tensors)
    start = len(one) - handle.spec.x.tensors
    return one[:start] + one[start:] * handle.program.steps


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: _Handle, site: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.ops.torchlift.loop_forward(list(tensors), handle.name, site)
        program = handle.program
        count = program.carries + program.ys[0].tensors
        outs = found[:count]
        ctx.handle, ctx.site, ctx.count = handle, site, len(tensors)
        ctx.save_for_backward(*tensors, *found[count:])
        flags = program.requires_grad[:count]
        ctx.mark_non_differentiable(*(out for out, flag in zip(outs, flags) if not flag))
        ctx.flags = flags
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, kept = list(saved[: ctx.count]), list(saved[ctx.count :])
        given = [g for g, flag in zip(grads, ctx.flags) if flag]
        found = iter(torch.ops.torchlift.loop_backward(tensors, kept, given, ctx.handle.name, ctx.site))
        c, h, width = ctx.handle.spec.counts
        parts = [next(found) if has else None for has in _has_grad(ctx.handle)]
        if ctx.handle.spec.stacked:
            return None, None, *parts
        length = ctx.handle.spec.length
        columns = [[None] * length if stack is None else stack.unbind(0) for stack in parts[c + h :]]
        return None, None, *parts[: c + h], *(column[i] for i in range(length) for column in columns)


def _has_grad(handle: _Handle) -> list[bool]:
    """Whether backward gives a gradient: per const, per carry, and per leaf of xs."""
    return handle.program.grads[: sum(handle.spec.counts)]


def _laid_out(handle: _Handle, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as the graphs expect them, whatever layout the surrounding graph gave them."""
    fitted = []
    for t, order in zip(tensors, handle.orders):
        if not t.permute(order).is_contiguous():
            t = t.permute(order).contiguous().permute(_inverse(order))
        fitted.append(t)
    return fitted


def _forward(tensors: list[torch.Tensor], name: str, site: int) -> list[torch.Tensor]:
    handle = _handles[name]
    outs, kept, _ = run_forward(handle.plan, _laid_out(handle, tensors))
    return outs + _stacked_residuals(handle.program, kept) if handle.spec.train else outs


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _stacked_residuals(program: Program, kept: Residuals) -> list[torch.Tensor]:
    """Residuals as few tensors: carries of all pieces but the first, saved values, ints, states of generators."""
    pieces = [piece for piece in kept.pieces if piece is not None]
    columns: list[torch.Tensor] = []
    rows = [carry for carry, _, _ in pieces[1:]]
    columns += [torch.stack(column) for column in zip(*rows)]
    width = len(pieces[0][1])
    for i in range(width):
        if isinstance(pieces[0][1][i], torch.Tensor):
            order = program.saved_orders[i]
            columns.append(torch.stack([saved[i].permute(order) for _, saved, _ in pieces]))
            for _, saved, _ in pieces:
                saved[i] = None
        else:
            columns.append(torch.tensor([int(saved[i]) for _, saved, _ in pieces]))
    for i in range(len(pieces[0][2] or ())):
        columns.append(torch.stack([states[i][1] for _, _, states in pieces if states is not None]))
    return columns


def _unstacked_residuals(handle: _Handle, columns: list[torch.Tensor]) -> Residuals:
    plan, program = handle.plan, handle.program
    size = plan.pieces[0] if plan.pieces else 1
    count = -(-len(plan.chunks) // size)
    carries = plan.carries if plan.pieces else len(program.kept_carries)
    at = carries if count > 1 else 0
    rows = list(zip(*(column.unbind(0) for column in columns[:at]))) if at else [()] * (count - 1)
    end = len(columns) - len(handle.state_sizes)
    ints = {i for i, flag in enumerate(_int_flags(program)) if flag}
    saved = [
        c.tolist() if i in ints else [t.permute(_inverse(program.saved_orders[i])) for t in c.unbind(0)]
        for i, c in enumerate(columns[at:end])
    ]
    states = [column.unbind(0) for column in columns[end:]]
    kept = Residuals(honour_hooks=False)
    for i in range(count):
        state = tuple((d, s[i].clone()) for d, s in zip(plan.devices, states)) if states else None
        kept.push(list(rows[i - 1]) if i else [], [column[i] for column in saved], state)
    return kept


def _saved_nodes(program: Program) -> list[torch.fx.Node]:
    assert program.shapes is not None
    return list(next(iter(reversed(program.shapes.graph.nodes))).args[0])[program.outputs :]


def _int_flags(program: Program) -> list[bool]:
    return [not isinstance(node.meta["val"], torch.Tensor) for node in _saved_nodes(program)]


def _backward(
    tensors: list[torch.Tensor], kept: list[torch.Tensor], grads: list[torch.Tensor], name: str, site: int
) -> list[torch.Tensor]:
    handle = _handles[name]
    plan, program = handle.plan, handle.program
    flags = program.requires_grad[: program.carries + program.ys[0].tensors]
    parts = iter(grads)
    given = [next(parts) if flag else None for flag in flags]
    found = run_backward(
        plan, _laid_out(handle, tensors), _unstacked_residuals(handle, kept), [], given, keep=False
    )  # fmt: skip
    used = {t.untyped_storage().data_ptr() for t in (*tensors, *kept, *grads)}
    outs = []
    for t, grad, has in zip(tensors, found, _has_grad(handle)):
        if not has:
            continue
        if grad is None:
            grad = torch.zeros_like(t)
        elif grad.shape == t.shape:
            grad = like_strided(grad, t)
        outs.append(grad.clone() if grad.untyped_storage().data_ptr() in used else grad)
        used.add(outs[-1].untyped_storage().data_ptr())
    return outs


class _Shapes(torch.fx.Interpreter):
    """Runs a graph on the fakes of another tracing; its constants become fakes too."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return torch.empty_like(value, device=value.device) if isinstance(value, torch.Tensor) else value


def _fake_forward(tensors: list[torch.Tensor], name: str, site: int) -> list[torch.Tensor]:
    handle = _handles[name]
    plan, program, spec = handle.plan, handle.program, handle.spec
    assert program.shapes is not None
    h = plan.carries
    outs = _Shapes(program.shapes).run(*_graph_inputs(handle, tensors))
    carry, y = outs[:h], outs[h : h + program.ys[0].tensors]

    def many(n: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((n, *like.shape))

    found = [torch.empty_like(t) for t in carry]
    found += [many(spec.length, t) for t in y]
    if not spec.train:
        return found
    size = plan.pieces[0] if plan.pieces else 1
    count = -(-len(plan.chunks) // size)
    if count > 1:
        kept = range(h) if plan.pieces else program.kept_carries
        found += [many(count - 1, carry[i]) for i in kept]
    if not plan.pieces:
        for i, value in enumerate(outs[program.outputs :]):
            if isinstance(value, torch.Tensor):
                found.append(many(count, value.permute(program.saved_orders[i])))
            else:
                found.append(torch.empty(count, dtype=torch.int64))
    found += [torch.empty((count, n), dtype=torch.uint8) for n in handle.state_sizes]
    return found


def _fake_backward(
    tensors: list[torch.Tensor], kept: list[torch.Tensor], grads: list[torch.Tensor], name: str, site: int
) -> list[torch.Tensor]:
    handle = _handles[name]
    c, h, _ = handle.spec.counts
    outs = []
    for i, (t, has) in enumerate(zip(tensors, _has_grad(handle))):
        if has:
            one = i < c + h or handle.spec.stacked
            outs.append(torch.empty_like(t) if one else t.new_empty((handle.spec.length, *t.shape)))
    return outs


_library = torch.library.Library("torchlift", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("loop_forward(Tensor[] tensors, str handle, int site) -> Tensor[]", tags=_TAGS)
_library.define(
    "loop_backward(Tensor[] tensors, Tensor[] kept, Tensor[] grads, str handle, int site) -> Tensor[]", tags=_TAGS
)
_library.impl("loop_forward", _forward, "CompositeExplicitAutograd")
_library.impl("loop_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("torchlift::loop_forward", _fake_forward, lib=_library)
torch.library.register_fake("torchlift::loop_backward", _fake_backward, lib=_library)
