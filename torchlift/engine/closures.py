"""Tensors that reach a function by a closure, a global or an attribute: found when operators use them.

NOTE [Finding closures]. Looking into cells, globals and attributes of a function finds too much (every parameter of a
module that it mentions) and too little (what a method returns). A ``TorchFunctionMode`` sees every tensor at the
moment it is used. What it cannot tell by looking is whether a wrapper of a ``torch.func`` transform comes from
outside: levels are numbered by depth, and inside an autograd function the transforms around it are off the stack, so
that numbers repeat. Therefore it remembers what the function was given and what its operators returned; the rest came
from outside, or is a wrapper that a transform in the body put around something known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchlift import _compat
from torchlift.errors import ClosureError


class ForeignTensor(BaseException):
    """Ends a run that met a tensor from outside. Not an Exception: bodies catch those."""


class Closures(TorchFunctionMode):
    """Puts operands in the place of closure tensors; if ``watch``, raises :class:`ForeignTensor` at any other one."""

    def __init__(
        self,
        given: Iterable[torch.Tensor],
        foreign: Sequence[torch.Tensor] = (),
        operands: Sequence[torch.Tensor] = (),
        *,
        watch: bool = False,
        outer: Iterable[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        # The arguments as the caller holds them, wrapped: one that the body meets as such came by a closure.
        self.outer = {id(tensor) for tensor in outer}
        self.operands = {id(tensor): operand for tensor, operand in zip(foreign, operands)}
        self.watch = watch
        self.given = {id(tensor) for tensor in (*given, *operands)}
        # By identity, and weakly: the address of a tensor that is gone is soon another's.
        self.made: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*self.replace(args), **self.replace(kwargs or {}))
        self.note(out)
        return out

    def replace(self, x: Any) -> Any:
        """``x``, an argument, with closure tensors replaced."""
        if isinstance(x, torch.Tensor):
            if id(x) in self.operands:
                return self.operands[id(x)]
            if self.watch and not self.is_ours(x):
                self.on_foreign(x)
            return x
        if type(x) in (tuple, list):
            return type(x)([self.replace(item) for item in x])
        if type(x) is dict:
            return {key: self.replace(item) for key, item in x.items()}
        return x

    def returned(self, x: Any) -> Any:
        """A leaf that the function returns.

        What it did not make itself is returned as an alias: autograd would hang its history onto the tensor of a
        caller, or onto a buffer.
        """
        x = self.replace(x)
        return x.view_as(x) if isinstance(x, torch.Tensor) and (id(x) in self.given or not self.is_made(x)) else x

    def note(self, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self.made[id(out)] = weakref.ref(out)
        elif isinstance(out, tuple | list):
            for item in out:
                self.note(item)

    def is_made(self, x: torch.Tensor) -> bool:
        made = self.made.get(id(x))
        return made is not None and made() is x

    def is_known(self, x: torch.Tensor) -> bool:
        return id(x) in self.given or self.is_made(x)

    def is_ours(self, x: torch.Tensor) -> bool:
        """Given, made here, a wrapper around such a tensor, or a constant."""
        if self.is_known(x):
            return True
        if not _compat.is_wrapped(x):
            return not x.requires_grad
        if id(x) in self.outer:
            return False
        while _compat.is_wrapped(x):
            x = _compat.unwrapped_once(x)
            if self.is_known(x):
                return True
        return False

    def on_foreign(self, x: torch.Tensor) -> None:
        raise ForeignTensor


class _Finder(Closures):
    """Collects what comes from outside, in a run with the transforms around the function in effect."""

    def __init__(self, given: Sequence[torch.Tensor], refuse: Callable[[torch.Tensor], None]) -> None:
        super().__init__(given, watch=True)
        self.depth = _compat.functorch_depth()
        self.around = [mode for mode in reversed(_compat.function_modes()) if isinstance(mode, Closures)]
        self.refuse = refuse
        self.found: dict[int, torch.Tensor] = {}

    def on_foreign(self, x: torch.Tensor) -> None:
        if id(x) in self.found:
            return
        # Levels are unambiguous here: what is wrapped deeper than we stand was wrapped in the body. But where a region
        # around this one runs again, it has its own operand in the place of `x`, and that is what counts.
        resolved = x
        for mode in self.around:
            resolved = mode.operands.get(id(resolved), resolved)
        inner = resolved
        while _compat.functorch_level(inner) > self.depth:
            inner = _compat.unwrapped_once(inner)
        if inner is not resolved:
            if _compat.is_wrapped(inner) or inner.requires_grad:
                self.refuse(inner)
            return
        self.found[id(x)] = x


def find_closures(
    name: str, fn: Callable[..., Any], run: Callable[[Any], Any], given: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The tensors from outside that ``run(given)`` uses and that need a gradient or belong to a transform around it."""

    def refuse(tensor: torch.Tensor) -> None:
        raise ClosureError(
            f"{name}({_name_of(fn)}): {_where(fn, tensor)} of shape {tuple(tensor.shape)} reaches the body by a "
            "closure and is there given to a torch.func transform, where its gradient would be lost; "
            "pass it as an argument"
        )

    with _Finder(given, refuse) as finder:
        out = run(given)
        for leaf in _compat.pytree.tree_leaves(out):
            finder.replace(leaf)
    return list(finder.found.values())


def _name_of(fn: Any) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def _where(fn: Any, tensor: torch.Tensor) -> str:
    """The variable of ``fn`` that holds ``tensor``, if it is a plain one."""
    code = getattr(fn, "__code__", None)
    cells = dict(zip(code.co_freevars, fn.__closure__ or ())) if code is not None else {}
    for variable, cell in cells.items():
        try:
            if cell.cell_contents is tensor:
                return repr(variable)
        except ValueError:  # an empty cell
            continue
    for variable in code.co_names if code is not None else ():
        if fn.__globals__.get(variable) is tensor:
            return repr(variable)
    return "a tensor"
