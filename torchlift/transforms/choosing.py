"""What cond, switch and while_loop share: what a predicate says, and what to do where Python cannot look into it.

NOTE [Choosing]. A predicate that Python can look into, be it a number or a tensor, runs one branch and nothing else.
Two kinds cannot be looked into. One that differs between the rows of a ``vmap``: each branch runs on its own rows
(engine/rows.py). And one that is only being recorded, as under ``torch.compile``: all branches run, and their results
are selected. ``torch.cond`` would run one, but it knows no gradients and tangents of ``torch.func``, and refuses bodies
that assign a buffer (``nn.Module.__setattr__`` cannot be traced inside of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat
from torchlift.engine.capture import CaptureError
from torchlift.engine.draws import States, devices_of, read_states
from torchlift.engine.rows import Rows
from torchlift.errors import BranchError, TransformTargetError
from torchlift.named_axes import around
from torchlift.transforms.calls import unbound

_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True)
class Unseen:
    """A choice that Python cannot look into: a tensor with the number of the branch."""

    index: Tensor
    values: Tensor | None = None  # at each row, where the rows of a vmap are what differs
    rows: Rows | None = None  # where branches can be run on their own rows

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Unseen:
        """The same with other numbers."""
        return Unseen(fn(self.index), None if self.values is None else fn(self.values), self.rows)


def truth(value: Any, what: str, label: str) -> Any:
    """``value`` as a tensor or a bool.

    Raises:
        BranchError: it is neither a tensor nor a number: a forgotten ``return`` would be a choice.
    """
    if isinstance(value, Tensor):
        return value
    if value is None or (not _compat.is_compiling() and not hasattr(type(value), "__bool__")):
        raise BranchError(f"{label}: {what} is {value!r}, expected a number or a tensor of one element")
    return bool(value)


def look(index: Any, label: str) -> int | Unseen:
    """The number of the branch that a predicate or an index stands for."""
    if not isinstance(index, Tensor):
        return int(index)
    if index.numel() != 1:
        raise BranchError(
            f"{label}: got a tensor of shape {tuple(index.shape)} to choose by, expected one element; to choose in "
            "each row, map the call with torchlift.vmap or torch.func.vmap"
        )
    index = index.detach().reshape(())
    index = (index != 0 if index.is_floating_point() else index).long()
    rows = Rows.of(index)
    if _compat.is_tracing():
        return Unseen(index)
    if rows is None:
        return int(_compat.plain(index))
    return Unseen(index, rows.values(index), rows if rows.runnable else None)


def guarded(tensors: Sequence[Tensor], taken: Tensor) -> list[Tensor]:
    """``tensors``, through which no gradient comes back from a branch that was not taken.

    NOTE [No NaN from a select]. The gradient of a select is zero in the branch not taken, and zero times infinity is
    NaN. So it is selected once more on its way out. What a branch reaches by a closure has no such guard. Nor has what
    lies in a named axis, where collectives are called: what a row computes there others see, whatever it chose itself.
    """
    if not torch.is_grad_enabled() or around():
        return list(tensors)
    return [torch.where(taken, x, x.detach()) if x.is_floating_point() or x.is_complex() else x for x in tensors]


def guarded_variables(tensors: Sequence[Tensor], taken: Tensor) -> list[Tensor]:
    """The same for variables, but not where a ``torch.func`` transform is around.

    A predicate that is mapped would make a copy of each for each row.
    """
    return list(tensors) if _compat.functorch_active() else guarded(tensors, taken)


def label_of(name: str, mdl: Any) -> str:
    """How errors name a call of ``name`` with a module."""
    if not isinstance(mdl, nn.Module):
        raise TransformTargetError(
            f"{name}: got {type(mdl).__name__} as the module, expected an nn.Module: {name} calls "
            "its functions with a module first"
        )
    return f"{name}({type(mdl).__name__})"


def functions_of(name: str, functions: Sequence[Any], mdl: nn.Module) -> list[Callable[..., Any]]:
    """The functions as ``(module, *args)``: methods of the module without it.

    Raises:
        FunctionTargetError: one is a class, a module, no function, or a method of another module.
    """
    return [unbound(name, fn, mdl)[0] for fn in functions]


def draw_states(tensors: Sequence[Tensor]) -> States:
    """The states of the default generators of the tensors' devices."""
    return tuple((device, _compat.plain(state)) for device, state in read_states(devices_of(tensors)))


def as_tensor(leaf: Any, device: torch.device) -> Any:
    """``leaf``, a tensor if it is a number."""
    return torch.as_tensor(leaf, device=device) if type(leaf) in _NUMBERS else leaf


def describe(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def refusing_draws(label: str) -> AbstractContextManager[Any]:
    """While a graph is recorded: a draw ends the recording. Of a select both branches would draw."""
    return _NoDraws(label) if _compat.is_recording() else nullcontext()


class _NoDraws(_compat.TorchDispatchMode):
    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(f"{self.label}: a branch draws random numbers ({func}), in a graph it would always")
        return func(*args, **(kwargs or {}))
