"""The operators that run a loop inside an outer graph, their fakes, and the autograd function around them.

NOTE [few outputs]: Inductor takes time in the square of the number of tensors that one operator returns. So values of
all iterations come back as stacks, gradients of a thousand parameters included, and the graph cuts them.
"""

from __future__ import annotations

from typing import Any

import torch

from torchlift.engine.capture import NestedLoopError, inverse, like_strided
from torchlift.engine.handles import Handle, blank, graph_inputs, handle_named
from torchlift.engine.node import run_backward, run_forward
from torchlift.engine.plan import Program
from torchlift.engine.residuals import Residuals
from torchlift.engine.roster import check_versions, roster_of
from torchlift.engine.spans import Names


class OpaqueLoop(torch.autograd.Function):
    """A loop as one node of an outer graph."""

    @staticmethod
    def forward(
        ctx: Any, handle: Handle, site: int, names: list[str], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        found = forward(handle, site, names, list(tensors))
        program = handle.program
        count = program.carries + program.ys[0].tensors
        outs = found[:count]
        ctx.handle, ctx.site, ctx.names, ctx.count = handle, site, names, len(tensors)
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
        if ctx.handle.nested and torch.is_grad_enabled():
            raise NestedLoopError("its gradient is differentiated in the body around")
        ops = torch.ops.torchlift
        backward = ops.loop_backward if ctx.handle.row is None else ops.roster_backward
        found = iter(backward(tensors, kept, given, ctx.handle.name, ctx.site, ctx.names))
        c, h, width = ctx.handle.spec.counts
        parts = [next(found) if has else None for has in _has_grad(ctx.handle)]
        if ctx.handle.spec.stacked:
            return None, None, None, *parts
        if ctx.handle.row is not None:
            standins = [part for part, meta in zip(parts[c + h :], ctx.handle.row) if meta[4]]
            return None, None, None, *parts[: c + h], None, *standins
        length = ctx.handle.spec.length
        columns = [[None] * length if stack is None else stack.unbind(0) for stack in parts[c + h :]]
        return None, None, None, *parts[: c + h], *(column[i] for i in range(length) for column in columns)


def _has_grad(handle: Handle) -> list[bool]:
    """Whether backward gives a gradient: per const, per carry, and per leaf of xs."""
    return handle.program.grads[: sum(handle.spec.counts)]


def laid_out(handle: Handle, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as the graphs expect them, whatever layout the surrounding graph gave them."""
    end = len(tensors) if handle.row is None else sum(handle.spec.counts[:2])
    fitted = []
    for t, order in zip(tensors[:end], handle.orders):
        if not t.permute(order).is_contiguous():
            t = t.permute(order).contiguous().permute(inverse(order))
        fitted.append(t)
    return fitted + tensors[end:]


def _names(names: list[str]) -> Names | None:
    """What the roots are called: a string of names, one in a line, for each iteration, or one for all."""
    return (lambda index: names[index % len(names)].split("\n")) if names else None


def _with_rows(handle: Handle, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as the graphs expect them, those of a roster among them."""
    found = laid_out(handle, tensors)
    if handle.row is None:
        return found
    end = sum(handle.spec.counts[:2])
    return found[:end] + roster_of(tensors[end]).tensors


def _forward(
    on: torch.Tensor | None, tensors: list[torch.Tensor], name: str, site: int, names: list[str]
) -> list[torch.Tensor]:
    handle = handle_named(name)
    # Hooks on saved tensors are given what this returns: the graph around saves it.
    outs, kept, _ = run_forward(handle.plan, _with_rows(handle, tensors), _names(names), honour_hooks=False)
    if not handle.train:
        return outs
    rows = roster_of(tensors[sum(handle.spec.counts[:2])]).rows if handle.kept_columns else []
    before = [torch.stack([row[column] for row in rows]) for column in handle.kept_columns]
    return outs + _stacked_residuals(handle.program, kept) + before


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


def _unstacked_residuals(handle: Handle, columns: list[torch.Tensor]) -> Residuals:
    plan, program = handle.plan, handle.program
    size = plan.pieces[0] if plan.pieces else 1
    count = -(-len(plan.chunks) // size)
    carries = plan.carries if plan.pieces else len(program.kept_carries)
    at = carries if count > 1 else 0
    rows = list(zip(*(column.unbind(0) for column in columns[:at]))) if at else [()] * (count - 1)
    end = len(columns) - len(handle.state_sizes)
    ints = {i for i, flag in enumerate(_int_flags(program)) if flag}
    saved = [
        c.tolist() if i in ints else [t.permute(inverse(program.saved_orders[i])) for t in c.unbind(0)]
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
    tensors: list[torch.Tensor], kept: list[torch.Tensor], grads: list[torch.Tensor], name: str, site: int,
    names: list[str],
) -> list[torch.Tensor]:  # fmt: skip
    handle = handle_named(name)
    plan, program = handle.plan, handle.program
    inputs = _with_rows(handle, tensors)
    if handle.row is not None:
        start = sum(handle.spec.counts[:2])
        check_versions(tensors[start], handle.live_columns)
        for column in reversed(handle.kept_columns):
            inputs[start + column :: len(handle.row)] = kept.pop().unbind(0)
    flags = program.requires_grad[: program.carries + program.ys[0].tensors]
    parts = iter(grads)
    given = [next(parts) if flag else None for flag in flags]
    found = run_backward(plan, inputs, _unstacked_residuals(handle, kept), [], given, False, _names(names))
    used = {t.untyped_storage().data_ptr() for t in (*inputs, *kept, *grads)}
    outs = []
    for t, grad, has in zip(inputs, found, _has_grad(handle)):
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
        if not isinstance(value, torch.Tensor):
            return value
        # From its form alone: Dynamo's fakes take no real tensor beside them.
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _fake_forward(
    on: torch.Tensor | None, tensors: list[torch.Tensor], name: str, site: int, names: list[str]
) -> list[torch.Tensor]:
    handle = handle_named(name)
    plan, program, spec = handle.plan, handle.program, handle.spec
    assert program.shapes is not None
    h = plan.carries
    outs = _Shapes(program.shapes).run(*graph_inputs(handle, tensors))
    carry, y = outs[:h], outs[h : h + program.ys[0].tensors]

    def many(n: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((n, *like.shape))

    found = [torch.empty_like(t) for t in carry]
    found += [many(spec.length, t[0] if program.packed else t) for t in y]
    if not handle.train:
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
    return found + [many(spec.length, blank(meta)) for meta in handle.kept_columns.values()]


def _fake_backward(
    tensors: list[torch.Tensor],
    kept: list[torch.Tensor],
    grads: list[torch.Tensor],
    name: str,
    site: int,
    names: list[str],
) -> list[torch.Tensor]:
    handle = handle_named(name)
    c, h, _ = handle.spec.counts
    outs = []
    inputs = tensors if handle.row is None else graph_inputs(handle, tensors)
    for i, (t, has) in enumerate(zip(inputs, _has_grad(handle))):
        if has:
            one = i < c + h or handle.spec.stacked
            outs.append(torch.empty_like(t) if one else t.new_empty((handle.spec.length, *t.shape)))
    return outs


_library = torch.library.Library("torchlift", "FRAGMENT")
_WHICH = "str handle, int site, str[] names"
# A replay of a CUDA graph would not look at a roster again.
for _name, _tags in (("loop", ()), ("roster", (torch.Tag.cudagraph_unsafe,))):
    # It may draw, and who recomputes it must know. Which generator's state is kept then is told by the first argument
    # that is a tensor, and not a list of them.
    _library.define(
        f"{_name}_forward(Tensor? on, Tensor[] tensors, {_WHICH}) -> Tensor[]",
        tags=(*_tags, torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
    )
    _library.define(
        f"{_name}_backward(Tensor[] tensors, Tensor[] kept, Tensor[] grads, {_WHICH}) -> Tensor[]",
        tags=(*_tags, torch.Tag.pt2_compliant_tag),
    )
    _library.impl(f"{_name}_forward", _forward, "CompositeExplicitAutograd")
    _library.impl(f"{_name}_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchlift::{_name}_forward", _fake_forward, lib=_library)
    torch.library.register_fake(f"torchlift::{_name}_backward", _fake_backward, lib=_library)


# For loops that do not draw, in graphs of our own: there an operator with the tag is one that does.
_library.define(f"nested_forward(Tensor? on, Tensor[] tensors, {_WHICH}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
_library.impl("nested_forward", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("torchlift::nested_forward", _fake_forward, lib=_library)


def _write(ticket: torch.Tensor, stacks: list[torch.Tensor], columns: list[int]) -> None:
    roster_of(ticket).write(columns, stacks)


_library.define("roster_write(Tensor(a!) ticket, Tensor[] stacks, int[] columns) -> ()", tags=_tags)
_library.impl("roster_write", _write, "CompositeExplicitAutograd")
torch.library.register_fake("torchlift::roster_write", lambda ticket, stacks, columns: None, lib=_library)


def forward(handle: Handle, site: int, names: list[str], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the loop returns, then, if it trains, what backward needs."""
    # On the device where it draws, if it does.
    on = next((t for t in tensors if t.device.type != "cpu"), tensors[0] if tensors else None)
    ops = torch.ops.torchlift
    call = ops.roster_forward if handle.row is not None else ops.nested_forward if handle.nested else ops.loop_forward
    with torch.no_grad():  # also where parameters want gradients and no output has one
        return call(on, tensors, handle.name, site, names)
