"""What the arguments of transforms may be, checked where a transform is made and not where torch trips over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine.graphs import OPTIONS
from torchlift.errors import AxisError, OptionError, likely


def check_size(size: Any, where: str) -> None:
    """A number of indices or iterations; None where it is to be read off."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 0):
        return
    if not isinstance(size, torch.SymInt):
        raise AxisError(f"{where} is {size!r}, expected an int from 0 on")


def check_count(count: Any, where: str) -> None:
    """A number of which there is at least one."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise OptionError(f"{where} is {count!r}, expected an int from 1 on")


def check_unroll(unroll: Any, where: str) -> None:
    """How many iterations make one graph."""
    if unroll != "auto":
        check_count(unroll, f"{where} (or 'auto')")


def check_lengths(lengths: Any, where: str) -> None:
    """The sizes of a nest of loops."""
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise AxisError(f"{where} is {lengths!r}, expected the number of iterations at each level, as in (4, 6)")
    for at, length in enumerate(lengths):
        check_size(length, f"{where}[{at}]")


def check_compile(compile: Any, where: str) -> None:
    """Whether, or with which options, a loop is compiled."""
    if not isinstance(compile, (bool, dict)):
        raise OptionError(f"{where} is {compile!r}, expected True, False, or a dict of options of torch.compile")
    unknown = [] if isinstance(compile, bool) else [key for key in compile if key not in OPTIONS]
    if unknown:
        raise OptionError(f"{where} has {unknown}, expected {', '.join(OPTIONS)}")
    if isinstance(compile, dict):
        check_backend(compile.get("backend"), compile.get("mode"), f"{where} has")


def check_backend(backend: Any, mode: Any, where: str) -> None:
    """The backend of ``torch.compile`` and its mode; None for the usual ones."""
    if _compat.is_compiling():  # which cannot ask; torch refuses them later
        return
    if backend is not None and not callable(backend):
        names = torch.compiler.list_backends(exclude_tags=None)
        if backend not in names:
            meant = likely(backend, names)
            raise OptionError(
                f"{where} the backend {backend!r}, expected one of {torch.compiler.list_backends()} or a function of a "
                f"graph and its inputs{f'; did you mean {meant!r}?' if meant else ''}"
            )
    if mode is not None and backend in (None, "inductor"):
        try:
            _compat.inductor_mode_options(mode)
        except (RuntimeError, TypeError) as error:
            raise OptionError(f"{where} the mode {mode!r}, expected one that torch.compile knows: {error}") from error


def check_device(device: Any, where: str, there: bool) -> None:
    """A device, or None; ``there`` asks for one that this machine has, which may start it."""
    if device is None or _compat.is_compiling():
        return
    try:
        torch.empty(0, device=device) if there else torch.device(device)
    except (RuntimeError, TypeError, AssertionError) as error:
        expected = "one that this machine has" if there else "a torch.device or the name of one, as in 'cuda:0'"
        raise OptionError(f"{where} is {device!r}, expected {expected}: {str(error).splitlines()[0]}") from error


def check_flag(flag: Any, where: str) -> None:
    """True or False."""
    if not isinstance(flag, bool):
        raise OptionError(f"{where} is {flag!r}, expected True or False")


def check_name(name: Any, where: str) -> None:
    """The name of an axis, or None."""
    if name is not None and not isinstance(name, str):
        raise OptionError(f"{where} is {name!r}, expected a str")


def check_callable(fn: Any, where: str, what: str) -> None:
    """A function, or None."""
    if fn is not None and not callable(fn):
        raise OptionError(f"{where} is {fn!r}, expected {what}")


def check_params(params: Any, where: str) -> None:
    """What axis metadata is told."""
    if not isinstance(params, Mapping):
        raise OptionError(f"{where} is {params!r}, expected a dict such as {{torchlift.PARTITION_NAME: 'layers'}}")


def check_policy(policy: Any, where: str) -> None:
    """A policy of what is kept for backward, or None."""
    check_callable(policy, where, "one of torchlift.checkpoint_policies, or a function like them")


def check_remat(remat: Any, policy: Any, name: str) -> None:
    """Whether to compute again in backward, and the policy, which are two arguments."""
    check_policy(policy, f"{name}: policy")
    if not isinstance(remat, bool):
        raise OptionError(f"{name}: remat is {remat!r}, expected a bool; what is kept all the same is policy=")


def check_axes(axes: Sequence[Any], where: str, others: Sequence[Any] = (None,)) -> None:
    """Axes of arguments or outputs: ints, and what is in ``others``."""
    for axis in axes:
        if not any(axis is other for other in others) and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise AxisError(f"{where} has {axis!r}, expected ints and {' and '.join(map(repr, others))}")
