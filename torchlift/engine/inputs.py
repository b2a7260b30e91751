"""What a loop is given, and why it may have to run in Python."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine import compiled
from torchlift.engine.data import DataAsDetached
from torchlift.engine.loop import Stacked, Tree, Xs
from torchlift.engine.plain import CAPTURED, why_not
from torchlift.engine.remat import captures_body
from torchlift.engine.trees import Template, split


def why_plain(length: int, compile: Any) -> tuple[str | None, bool]:
    """Why the plain loop must run (None: it need not), and whether the caller is to be warned."""
    if compile is False:
        return "compile=False", False
    if length == 0:
        return "length 0", False
    if captures_body():
        return CAPTURED, False
    if torch.compiler.is_compiling():
        return "inside torch.compile", False
    if _compat.functorch_active():
        return "a torch.func transform is around it", True
    if _compat.forward_ad_active():
        return "forward-mode differentiation is around it", True
    if _compat.dispatch_modes_active():
        return "a TorchDispatchMode is active", True
    modes = [mode for mode in _compat.function_modes() if not isinstance(mode, DataAsDetached)]
    if modes:
        return f"a {type(modes[-1]).__name__} is active", True
    forbidden = _compat.compiler_forbidden()
    return forbidden, forbidden is not None


Split = tuple[list[torch.Tensor], Template]


@dataclass
class Inputs:
    """The inputs of a loop, taken apart once: ``xs`` has one part, of stacks, or one for each iteration."""

    consts: Split
    carry: Split
    xs: list[Split]
    stacked: bool
    alike: list[bool] = field(init=False)  # whether the tensors of each part of xs are like those of the first

    @staticmethod
    def of(consts: Tree, carry: Tree, xs: Xs) -> Inputs:
        trees = [xs.tree] if isinstance(xs, Stacked) else xs
        return Inputs(split(consts), split(carry), [split(x) for x in trees], isinstance(xs, Stacked))

    def why_not(self, key: Hashable) -> tuple[str | None, bool]:
        """As :func:`why_plain`, for the tensors. What is like the first iteration is not looked at again.

        Nor is that, if it is like the one at the last call of the body with this ``key``.
        """
        first = self.xs[0][0]
        known = compiled.plain_ones.find(key, first)
        reason = why_not(t for tensors, _ in (self.consts, self.carry) for t in tensors)
        if reason[0] is None and known is None:
            reason = why_not(first)
        if reason[0] is not None:
            return reason
        form = compiled.plain_ones.note(key, first) if known is None else known[0]
        # All others at once, if they are as they were when this very form was theirs too: layers have hundreds.
        others, of_others = [t for tensors, _ in self.xs[1:] for t in tensors], (key, len(self.xs))
        at_last = compiled.plain_ones.find(of_others, others) if known is not None and others else None
        if at_last is not None and at_last[1] is form:
            self.alike = [True] * len(self.xs)
            return None, False
        self.alike = [True, *[form.fits(tensors) for tensors, _ in self.xs[1:]]]
        if known is not None and others and all(self.alike):
            compiled.plain_ones.note(of_others, others, form)
        return why_not(t for (tensors, _), like in zip(self.xs, self.alike) if not like for t in tensors)
