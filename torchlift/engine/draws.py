"""Draws: the states of the default generators, and which operators of a graph take random numbers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from torchlift import _compat

States = tuple[tuple[torch.device, torch.Tensor], ...]


def devices_of(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """The devices whose default generators a computation on ``tensors`` may draw from; the CPU is always one."""
    found = {torch.device("cpu")}
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            found.add(tensor.device)
    return tuple(sorted(found, key=str))


# torch wraps the state while it holds the generator's mutex. If that runs the garbage collector, and so Python, another
# thread may get the interpreter and wait for the mutex with it, for good; here it waits outside of the interpreter.
_reading = threading.RLock()


def read_states(devices: tuple[torch.device, ...]) -> States:
    """The states of the default generators of ``devices``."""
    with _reading:
        return tuple(
            (d, torch.get_rng_state() if d.type == "cpu" else torch.get_device_module(d).get_rng_state(d))
            for d in devices
        )


def write_states(states: States) -> None:
    """Puts the default generators back to ``states``."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def node_draws(node: torch.fx.Node) -> bool:
    """Whether an operator of a graph draws from a generator."""
    return isinstance(node.target, _compat.OpOverload) and draws(node.target, node.args, node.kwargs)


def draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``op`` draws. Attention bears the tag, and draws only if its ``dropout_p`` is not 0."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return given != 0.0
    return True


class _Undrawn:
    """Stands for an operator that could draw, in a call that does not.

    NOTE [Undrawn]. Attention bears the tag of operators that draw, whatever its ``dropout_p``. What has the tag and is
    recomputed makes the partitioner hand states of generators from forward to backward, which nothing needs here.
    """

    def __init__(self, op: Any):
        self.op, self.__name__, self.__module__ = op, f"undrawn_{op.overloadpacket.__name__}", __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)


_undrawn = functools.cache(_Undrawn)


def hide_undrawn(joint: torch.fx.GraphModule) -> None:
    """Before a graph is cut: no operator that draws nothing looks as if it drew. :func:`show_undrawn` undoes it."""
    for node in joint.graph.nodes:
        if isinstance(node.target, _compat.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            if not node_draws(node):
                node.target = _undrawn(node.target)


def show_undrawn(graph: torch.fx.GraphModule) -> None:
    """Puts the operators back that :func:`hide_undrawn` hid."""
    for node in graph.graph.nodes:
        if isinstance(node.target, _Undrawn):
            node.target = node.target.op
