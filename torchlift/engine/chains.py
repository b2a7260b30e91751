"""Programs of parts that run one after the other: the turns of a loop over time.

NOTE [Chains]. A loop over time calls one program again and again, for a step or a few of them. Between two calls Python
hands on what is carried, and all threads meet; for an LSTM of width 64 that is a third of the time with sixteen steps
in a graph, and two thirds with one. Yet what a thread carries on is of its own part of the batch. So a program of a
part, if all that it hands on is rows of that part, is run by its thread for many turns: as if its graph were that much
longer, at no more time to compile. How many turns there are is seen in the stacks. What each turn started from is saved
beside what it saves; gradients of weights are added up by each thread, and in the end those of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchlift.engine.driver import SAME, STACK, Chain
from torchlift.engine.parting import dense
from torchlift.engine.parts import Part
from torchlift.engine.placements import SUM, Rows
from torchlift.engine.shelf import aligned
from torchlift.engine.signature import Graphs, Signature


def chains(
    graphs: Graphs, signature: Signature, forward: Part, backward: Part | None
) -> tuple[Chain, Chain | None] | None:
    """How the forward and the backward of the parts of ``graphs`` can be run turn by turn; None if they cannot."""
    a = signature.consts.tensors
    b = a + signature.carry.tensors
    carries, stacks = range(a, b), range(b, b + signature.xs[0].tensors)
    rows = signature.packed or int(signature.rowwise)
    if not rows or not stacks or not carries:
        return None
    first = _forward(graphs, forward, carries, stacks, signature.packed == 0)
    second = None if first is None or backward is None else _backward(graphs, backward, carries, stacks, first)
    if first is None or (backward is not None and second is None):
        return None
    first = replace(first, rows=rows, reverse=signature.reverse, trains=backward is not None, counted=b)
    return first, second and replace(second, rows=rows, reverse=signature.reverse)


def _forward(graphs: Graphs, part: Part, carries: range, stacks: range, rowwise: bool) -> Chain | None:
    """How forward programs hang together."""
    count = len(carries)
    before = [(part.inputs[i], part.takes[i]) for i in carries]
    ys = range(count, graphs.outputs)
    fine = (
        _go_on(before, list(zip(part.locals, part.gives))[:count])
        and all(value.dtype is torch.float32 for value, _ in before)  # for the pack
        and all(rowwise or _in_turn(part.inputs[i]) for i in stacks)
        and all(isinstance(part.gives[i], Rows) and _stands(part.wholes[i], rowwise) for i in ys)
    )
    if not fine:
        return None
    slots, size = _slots([value for value, _ in before])
    inputs, outputs = [SAME] * len(part.inputs), [SAME] * len(part.wholes)
    for i, at in enumerate(slots):
        inputs[carries[i]] = outputs[i] = ("CARRIED", at)
    for i in stacks:
        inputs[i] = STACK
    for i in ys:
        outputs[i] = STACK
    return Chain(inputs, outputs, slot_bytes=size, rowwise=rowwise)


def _backward(graphs: Graphs, part: Part, carries: range, stacks: range, forward: Chain) -> Chain | None:
    """How backward programs hang together."""
    rowwise = forward.rowwise
    inputs, outputs = [SAME] * len(part.inputs), [SAME] * len(part.wholes)
    tangents: dict[int, int] = {}  # of what is carried: the input that is its gradient
    for at, (kind, i) in enumerate(graphs.feeds):
        if kind == "tangent" and i < len(carries):
            tangents[i] = at
        elif kind == "tangent" or (kind == "input" and i in stacks):
            inputs[at] = STACK
        elif kind == "input" and i in carries:  # behind what is saved, at the end of what the pack has of a turn
            inputs[at] = ("STARTED", (forward.inputs[i][1] - forward.slot_bytes) // 4)
    grads = list(zip(part.locals, part.gives))
    given = [i for i, (value, _) in enumerate(grads) if value is not None]
    fine = (
        all(grads[i][1] == SUM for i in given if i not in carries and i not in stacks)
        and all(isinstance(grads[i][1], Rows) and _stands(part.wholes[i], rowwise) for i in given if i in stacks)
        and all(rowwise or _in_turn(value) for value, turn in zip(part.inputs, inputs) if turn == STACK)
        and [carries[i] for i in sorted(tangents)] == [i for i in given if i in carries]
        and _go_on(
            [(part.inputs[at], part.takes[at]) for at in tangents.values()], [grads[carries[i]] for i in tangents]
        )
    )
    if not fine:
        return None
    slots, size = _slots([part.inputs[at] for at in tangents.values()])
    for (i, at), slot in zip(tangents.items(), slots):
        inputs[at] = outputs[carries[i]] = ("CARRIED", slot)
    for i in stacks:
        outputs[i] = STACK
    return Chain(inputs, outputs, slot_bytes=size, rowwise=rowwise, backward=True)


_Placed = tuple[Any, Any]  # a value of a part, and its placement


def _go_on(before: Sequence[_Placed], after: Sequence[_Placed]) -> bool:
    """Whether a turn leaves what the next one takes: the same rows, laid out the same."""
    return all(
        isinstance(taken, Rows)
        and taken == given
        and old.shape == new.shape
        and old.dtype is new.dtype
        and _strides(old) == _strides(new)
        and dense(old)
        for (old, taken), (new, given) in zip(before, after, strict=True)
    )


def _strides(value: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(value.shape, value.stride()) if size > 1]


def _stands(value: torch.Tensor, rowwise: bool) -> bool:
    """Whether those of all turns make one stack in memory: rows, each a value, or stacks of several."""
    return dense(value) if rowwise else _in_turn(value)


def _in_turn(value: torch.Tensor) -> bool:
    return value.ndim > 0 and all(value.stride(0) >= stride for stride in value.stride())


def _slots(values: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where in a slot each lies, and its size in bytes."""
    at, end = [], 0
    for value in values:
        at.append(end)
        end += aligned(value.numel() * value.element_size())
    return at, end
