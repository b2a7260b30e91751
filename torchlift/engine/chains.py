"""Programs of parts that run one after the other: the turns of a loop over time.

NOTE [Chains]. A loop over time calls one program again and again, for a few steps each. Between two calls Python hands
on what is carried, and all threads meet; for an LSTM of width 64 that is a third of the time. Yet what a thread carries
on is of its own part of the batch. So a program of a part, if all that it hands on is rows of that part, is run by its
thread for many turns: as if its graph were that much longer, at no more time to compile. How many turns there are is
seen in the stacks. What each turn started from is saved beside what it saves; gradients of weights are added up by each
thread, and in the end those of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchlift.engine.capture import stride_order
from torchlift.engine.driver import SAME, Chain
from torchlift.engine.parts import Part
from torchlift.engine.placements import SUM, Rows
from torchlift.engine.signature import Graphs, Signature

_ALIGNED = 64  # bytes, as torch aligns them


def chains(
    graphs: Graphs, signature: Signature, forward: Part, backward: Part | None
) -> tuple[Chain, Chain | None] | None:
    """How the forward and the backward of the parts of ``graphs`` can be run turn by turn; None if they cannot."""
    a = signature.consts.tensors
    b = a + signature.carry.tensors
    c = b + signature.xs[0].tensors
    carries, stacks = range(a, b), range(b, c)
    if not signature.packed or not stacks or not carries:
        return None
    before = [forward.inputs[i] for i in carries]
    after = forward.locals[: len(carries)]
    fine = (
        _go_on(before, after, [*(forward.takes[i] for i in carries), *forward.gives[: len(carries)]])
        and all(value.dtype is torch.float32 for value in before)
        and all(_in_turn(forward.inputs[i]) for i in stacks)
        and all(
            isinstance(forward.gives[i], Rows) and _in_turn(forward.wholes[i]) for i in range(b - a, graphs.outputs)
        )
    )
    if not fine:
        return None
    at, size = _slots(before)
    inputs = [
        ("CARRIED", at[i - a]) if i in carries else ("STACK", 0) if i in stacks else SAME
        for i in range(len(forward.inputs))
    ]
    outputs = [("CARRIED", n) for n in at] + [("STACK", 0)] * (graphs.outputs - len(at))
    outputs += [SAME] * (len(forward.wholes) - len(outputs))
    first = Chain(signature.packed, signature.reverse, False, backward is not None, b, size, inputs, outputs)
    if backward is None:
        return first, None
    given: dict[int, int] = {}  # which input is the gradient of what is carried
    inputs = []
    for at_input, (kind, i) in enumerate(graphs.feeds):
        carried = i < len(carries) if kind == "tangent" else i in carries
        if kind == "tangent" and carried:
            given[i] = at_input
        if kind == "tangent" and not carried or kind == "input" and i in stacks:
            inputs.append(("STACK", 0))
        elif kind == "tangent":
            inputs.append(("CARRIED", i))
        elif kind == "input" and carried:  # behind what is saved, at the end of what is in the pack of each turn
            inputs.append(("STARTED", (at[i - a] - size) // 4))
        else:
            inputs.append(SAME)
    grads, gives = backward.locals, backward.gives
    fine = (
        all(grads[i] is None or gives[i] == SUM for i in range(len(grads)) if i not in (*carries, *stacks))
        and all(grads[i] is None or isinstance(gives[i], Rows) and _in_turn(backward.wholes[i]) for i in stacks)
        and all(_in_turn(value) for value, turn in zip(backward.inputs, inputs) if turn[0] == "STACK")
        and {i - a for i in carries if grads[i] is not None} == given.keys()
        and _go_on(
            [backward.inputs[at_input] for at_input in given.values()],
            [grads[a + i] for i in given],
            [*(backward.takes[at_input] for at_input in given.values()), *(gives[a + i] for i in given)],
        )
    )
    if not fine:
        return None
    at, size = _slots([grads[a + i] for i in given])
    slot = dict(zip(given, at))
    inputs = [(turn, slot[i]) if turn == "CARRIED" else (turn, i) for turn, i in inputs]
    outputs = [SAME] * len(grads)
    for i in stacks:
        outputs[i] = ("STACK", 0)
    for i in given:
        outputs[a + i] = ("CARRIED", slot[i])
    return first, Chain(signature.packed, signature.reverse, True, False, 0, size, inputs, outputs)


def _go_on(before: Sequence[Any], after: Sequence[Any], places: Sequence[Any]) -> bool:
    """Whether a turn leaves what the next one takes: rows, laid out the same."""
    return all(isinstance(place, Rows) for place in places) and all(
        old.shape == new.shape and old.dtype is new.dtype and _strides(old) == _strides(new) and _dense(old)
        for old, new in zip(before, after, strict=True)
    )


def _strides(value: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(value.shape, value.stride()) if size > 1]


def _dense(value: torch.Tensor) -> bool:
    return value.permute(stride_order(value)).is_contiguous()


def _in_turn(value: torch.Tensor) -> bool:
    """Whether the rows of one turn lie behind those of another."""
    return value.ndim > 0 and all(value.stride(0) >= stride for stride in value.stride())


def _slots(values: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where in a slot each lies, and its size in bytes."""
    at, end = [], 0
    for value in values:
        at.append(end)
        end += -(-value.numel() * value.element_size() // _ALIGNED) * _ALIGNED
    return at, end
