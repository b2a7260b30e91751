"""Draws: the states of the default generators, and which operators of a graph take random numbers."""

from __future__ import annotations

import functools
import pickle
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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


# NOTE [Mutex]. ``get_state`` makes the tensor that it returns while it holds the generator's mutex. Up to Python 3.11
# that may run the garbage collector, which lets go of the interpreter where it frees a tensor or calls Python. Another
# thread that then reads, writes or seeds the generator waits for the mutex and keeps the interpreter: both wait for
# good. To make a clone runs no garbage collector, and no other thread knows the clone's mutex. A lock here would not be
# around what torch reads for itself, so nothing here leaves the states to ``fork_rng`` or to torch's checkpoint.
_reading = threading.RLock()  # accelerators: at least not among readers


def _read(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.default_generator.clone_state().get_state()
    with _reading:
        return torch.get_device_module(device).get_rng_state(device)


def read_states(devices: tuple[torch.device, ...]) -> States:
    """The states of the default generators of ``devices``."""
    return tuple((device, _read(device)) for device in devices)


def write_states(states: States) -> None:
    """Puts the default generators back to ``states``."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def undone_draws(devices: tuple[torch.device, ...] = (torch.device("cpu"),)) -> Iterator[None]:
    """Puts the default generators back where they stood: as ``torch.random.fork_rng``, but see NOTE [Mutex]."""
    before = read_states(devices)
    try:
        yield
    finally:
        write_states(before)


DRAWS_APART = "draws from Python's or NumPy's global generator"  # says why no graph can hold a body
WHY_NOT_APART = f"the body {DRAWS_APART}, whose numbers a graph would repeat; draw with torch, as torch.rand(()) does"


@contextmanager
def noting_apart() -> Iterator[list[bool]]:
    """Notes at its end whether the block drew from Python's or NumPy's global generator, and puts them back.

    A graph would have what was drawn in its capture as a constant. Draws of another thread look like the block's, and
    are put back as well.
    """
    numpy: Any = sys.modules.get("numpy.random")

    def states() -> tuple[Any, Any, bytes]:
        of_numpy = None if numpy is None else numpy.get_state(legacy=False)  # whatever its bit generator is
        return random.getstate(), of_numpy, pickle.dumps(of_numpy)

    before, drew = states(), []  # type: tuple[Any, Any, bytes], list[bool]
    try:
        yield drew
    finally:
        now = states()
        if now[0] != before[0]:
            random.setstate(before[0])
        if now[2] != before[2]:
            numpy.set_state(before[1])
        drew += [True] if (now[0], now[2]) != (before[0], before[2]) else []


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
