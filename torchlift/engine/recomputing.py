"""Whether code runs for the first time or again, and what is around it then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from torchlift import _compat
from torchlift.engine.draws import States, read_states, write_states
from torchlift.engine.policies import Policy
from torchlift.engine.selective import Replayer

Annotate = Callable[[Policy | None], AbstractContextManager[Any]]


class _State(threading.local):
    def __init__(self) -> None:  # in the instance: Dynamo's guards take a class attribute that is set for a new one
        self.recomputing = False
        self.inline: Annotate | None = None  # set inside inline_remat


_state = _State()


def is_recomputing() -> bool:
    """Whether this code runs again, in a backward, because of :func:`torchlift.remat`.

    A body that counts its calls, logs, or updates something outside of torchlift's variables asks this to do so once
    a call. In compiled code Python runs once whatever is recomputed, and the answer is that of the surroundings.

    Returns:
        True inside a recomputation in this thread.

    Example:
        >>> torchlift.is_recomputing()
        False
    """
    return _state.recomputing


@contextmanager
def inline_remat(annotate: Annotate | None = None) -> Iterator[None]:
    """In this block and thread, checkpointed functions run as they are, each inside ``annotate(its policy)`` if given.

    For an engine that captures a graph and decides about recomputation in it.
    """
    before = _state.inline
    _state.inline = annotate or (lambda policy: nullcontext())
    try:
        yield
    finally:
        _state.inline = before


def captures_body() -> bool:
    """Whether this thread is in a block of :func:`inline_remat`: it captures the body of a loop."""
    return _state.inline is not None


def inline() -> Annotate | None:
    """What checkpointed functions are to run inside of, in a block of :func:`inline_remat`."""
    return _state.inline


class Around(Protocol):
    """What is around a function, as it was before a run of it."""

    def again(self) -> AbstractContextManager[None]:
        """In this block it is as it was, and afterwards as if nothing had been done to it."""

    def put_back(self) -> None:
        """Makes it as it was."""


def states_of(devices: tuple[torch.device, ...]) -> States:
    """The states of the devices' generators."""
    # Inside a transform even a generator's state comes wrapped.
    return tuple((device, _compat.plain(state)) for device, state in read_states(devices))


class Recomputing:
    """Marks a recomputation; with a replayer, hands back what the policy kept. Entered anew by each backward.

    With ``draws`` it starts from those states, and puts the generators back where they stood (NOTE [Mutex]).
    """

    def __init__(
        self, replayer: Replayer | None = None, draws: States = (), around: Around | None = None
    ) -> None:  # fmt: skip
        self.replayer, self.draws, self.around = replayer, draws, around

    def __enter__(self) -> None:
        self.stood = states_of(tuple(device for device, _ in self.draws))
        write_states(self.draws)
        self.before = _state.recomputing
        _state.recomputing = True
        if self.around is not None:
            self.as_it_was = self.around.again()
            self.as_it_was.__enter__()
        if self.replayer is not None:
            self.replayer.__enter__()

    def __exit__(self, *error: Any) -> None:
        _state.recomputing = self.before
        try:
            if self.replayer is not None:
                self.replayer.__exit__(*error)
        finally:
            if self.around is not None:
                self.as_it_was.__exit__(None, None, None)
            write_states(self.stood)
