"""A loop in the body of a compiled loop, as one operator of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchlift.engine.capture import CaptureError
from torchlift.engine.handles import Options, prepare
from torchlift.engine.inlining import loops_inline, note_nested
from torchlift.engine.loop import Body, Stacked, Tree, Xs
from torchlift.engine.operators import OpaqueLoop, forward, laid_out
from torchlift.engine.remat import captures_body
from torchlift.engine.trees import split
from torchlift.errors import ClosureError

SHORT = 8  # iterations; so few are part of the graph around, which can join them with the rest


def nested_run(
    body: Body, consts: Tree, carry: Tree, xs: Xs, length: int, options: Options, compile: Any
) -> tuple[Tree, Xs] | None:
    """What the loop gives in the capture of a body around it; None outside of one, or if it is to be a part of that.

    NOTE [Loops in loops]. A layer that runs over time would be captured with all its steps, in a graph that grows with
    their number. Captured so is a loop that draws, for its draws stand between those of the body around; one in a body
    with a policy, which is asked about each operator; and one whose gradient the body differentiates.
    """
    if not captures_body() or loops_inline() or compile is False or length <= SHORT:
        return None
    stacked = isinstance(xs, Stacked)
    parts = [split(tree) for tree in (consts, carry, *([xs.tree] if isinstance(xs, Stacked) else xs))]
    length = int(length)  # of a size that is symbolic in the graph around, one graph a size
    tensors = [tensor for found, _ in parts for tensor in found]
    try:
        handle = prepare(
            body, body.key, length, stacked, options, compile if isinstance(compile, dict) else {}, parts[0], parts[1],
            parts[2:], tensors, nested=True,
        )  # fmt: skip
    except (CaptureError, ClosureError):
        return None
    if handle.program.marks:
        return None
    note_nested(body.name)
    tensors = laid_out(handle, tensors)
    # One site, 0, for all: calls that are equal may be merged, since none of them draws.
    outs: Sequence[torch.Tensor]
    outs = OpaqueLoop.apply(handle, 0, [], *tensors) if handle.train else forward(handle, 0, [], tensors)
    at, y = handle.spec.carry.tensors, handle.program.ys[0]
    stacks = outs[at : at + y.tensors]
    out = handle.spec.carry.fill(list(outs[:at]))
    if stacked:
        return out, Stacked(y.fill(list(stacks)))
    rows = zip(*(stack.unbind(0) for stack in stacks)) if stacks else [()] * length
    return out, [y.fill(list(row)) for row in rows]
