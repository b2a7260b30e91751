"""Which path a call takes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchlift import _compat, rng
from torchlift.applying import apply
from torchlift.engine.run import Report, listen
from torchlift.errors import TransformTargetError


@dataclass(frozen=True)
class Explanation:
    """How the loops of a call ran, in order: what :func:`explain` returns. Prints as a table."""

    loops: tuple[Report, ...]

    def __iter__(self) -> Iterator[Report]:
        return iter(self.loops)

    def __len__(self) -> int:
        return len(self.loops)

    def __getitem__(self, index: int) -> Report:
        return self.loops[index]

    def __str__(self) -> str:
        if not self.loops:
            return "no loop ran"
        lines = []
        for loop in self.loops:
            if loop.path == "compiled":
                detail = (
                    f"{loop.compilations} compilations, {loop.nodes} autograd nodes, {loop.saved_bytes} bytes saved "
                    f"and {loop.recomputed} operations recomputed per iteration"
                )
            else:
                detail = f"because: {loop.reason}"
            lines.append(f"{loop.name}: {loop.path} ({detail})")
        return "\n".join(lines)


def explain(module: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Tells which path each loop of a call takes, and why: compiled, plain, or index by index.

    The module is run once, and left as it was; so are the random generators. What is under ``torch.compile`` runs as it
    is: there a loop is an operator of a graph, which tells nothing.

    Args:
        module: a module, lifted or with lifted modules in it.
        *args: what it is called with.
        **kwargs: likewise.

    Returns:
        An :class:`Explanation`: for each loop its name, its path and the reason where that is not the compiled one,
        how often its body was compiled so far, the bytes saved for backward per iteration, and the number of operations
        that backward recomputes.

    Raises:
        TransformTargetError: ``module`` is no module.

    Example:
        >>> blocks = torchlift.scan_layers([torch.nn.Linear(4, 4) for _ in range(3)], remat=True, compile=False)
        >>> print(torchlift.explain(blocks, torch.ones(2, 4)))
        scan_layers(Linear): plain (because: compile=False)
    """
    if not isinstance(module, nn.Module):
        raise TransformTargetError(f"explain: got {module!r}, expected an nn.Module, and what to call it with")
    before = rng.default_states()
    try:
        with listen() as reports, _compat.dynamo_off():
            apply(module, {}, *args, mutable=True, **kwargs)
    finally:
        rng.write_states(before)
    return Explanation(tuple(reports))
