"""Random streams: which there are, where they stand, and who may draw from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from torchlift import _compat
from torchlift._context import context, entered
from torchlift.engine.capture import CaptureError
from torchlift.engine.draws import States, read_states, write_states
from torchlift.errors import RandomnessError

# NOTE [Streams]. `params` is what is drawn while a lifted class is constructed, `dropout` everything drawn from
# torch's default generators while it runs: torch's operators do not say who draws. All further streams are seeded by
# seed_rngs and drawn from through make_rng. A stream stands where its (seed, count of generators made) says, so a
# body can be run again from the same place, and a loop that neither saves nor restores it behaves as the plain loop.
PARAMS, DROPOUT = "params", "dropout"

_MASK = (1 << 64) - 1
_CPU = (torch.device("cpu"),)
_APART = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class _NoGenerator(RandomnessError, CaptureError):
    """A graph would draw from a generator of its own. A loop that is captured for itself runs in Python instead."""


def fold(seed: int, data: int) -> int:
    """A new 63-bit seed from a seed and a number (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + data + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def make_rng(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator of a named random stream, for use inside a module.

    Every call gives another one. Inside transforms the streams follow ``split_rngs``: in a loop a split stream runs
    on from iteration to iteration, one that is not split starts anew in each.

    Args:
        name: a stream seeded by :func:`seed_rngs`. ``dropout``, where it is not seeded, is torch's default generator.
        device: the device of the generator.

    Returns:
        A generator that no one else holds.

    Raises:
        RandomnessError: the stream has no seed, or the enclosing transform was not told how to treat it.

    Example:
        >>> with torchlift.seed_rngs(noise=0):
        ...     a = torch.rand(2, generator=torchlift.make_rng("noise"))
        ...     b = torch.rand(2, generator=torchlift.make_rng("noise"))
        >>> bool((a == b).any())
        False
    """
    for stream, why in context.refused:
        if stream == name:
            raise RandomnessError(why)
    if name not in context.streams:
        if name == DROPOUT and torch.device(device).type == "cpu":
            return torch.default_generator
        raise RandomnessError(
            f"make_rng({name!r}): the stream has no seed, expected one of {sorted(context.streams)}; "
            f"seed it: with torchlift.seed_rngs({name}=0): ..."
        )
    if _compat.is_tracing():
        if _compat.are_only_shapes_wanted():
            return torch.Generator(device)  # nothing is drawn from it
        raise _NoGenerator(f"make_rng({name!r}): a generator cannot be part of a compiled graph")
    seed, count = context.streams[name]
    context.streams = {**context.streams, name: (seed, count + 1)}
    return torch.Generator(device).manual_seed(fold(seed, count))


@contextmanager
def seed_rngs(**seeds: int) -> Iterator[None]:
    """Seeds random streams for the duration of the block.

    Args:
        **seeds: a seed for each stream. ``dropout`` and ``params`` seed torch's default generators, which are put
            back where they stood when the block ends.

    Raises:
        RandomnessError: a seed is not an int.

    Example:
        >>> with torchlift.seed_rngs(dropout=0):
        ...     a = torch.rand(3)
        >>> with torchlift.seed_rngs(dropout=0):
        ...     bool((torch.rand(3) == a).all())
        True
    """
    for name, seed in seeds.items():
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise RandomnessError(f"seed_rngs({name}=): got {seed!r} of type {type(seed).__name__}, expected an int")
    streams = {name: (seed, 0) for name, seed in seeds.items() if name not in (PARAMS, DROPOUT)}
    defaults = [seeds[name] for name in (PARAMS, DROPOUT) if name in seeds]
    before = default_states() if defaults else ()
    try:
        for seed in defaults:
            torch.manual_seed(seed)
        with entered(streams={**context.streams, **streams}):
            yield
    finally:
        write_states(before)


def positions() -> dict[str, tuple[int, int]]:
    """Where each seeded stream stands."""
    return dict(context.streams)


def rewind(positions: dict[str, tuple[int, int]]) -> None:
    """Puts streams back to where they stood."""
    if positions:
        context.streams = {**context.streams, **positions}


def default_states() -> States:
    """The states of the default generators that exist: the CPU's, and each accelerator's once it is in use."""
    if not torch.cuda.is_initialized():
        return read_states(_CPU)
    return read_states((*_CPU, *[torch.device("cuda", index) for index in range(torch.cuda.device_count())]))


def drew(since: States) -> bool:
    """Whether anything was drawn from the default generators since ``since`` (1.6 us on a CPU)."""
    return any(not torch.equal(a, b) for (_, a), (_, b) in zip(since, default_states()))


def is_apart(value: Any) -> bool:
    """Whether a value is a generator of Python's or NumPy's, or a function of one; not the global ones.

    Those may stand anywhere: a capture notes when they are drawn from.
    """
    generator = getattr(value, "__self__", value)
    known = [getattr(fn, "__self__", None) for fn in (random.random, np.random.rand)]
    return isinstance(generator, _APART) and all(generator is not other for other in known)
