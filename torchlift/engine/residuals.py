"""What the forward of a loop keeps for its backward."""

from __future__ import annotations

from typing import Any

import torch

from torchlift import _compat
from torchlift.engine.draws import States

Tensors = list[torch.Tensor]


class Residuals:
    """What the backward of the loop needs besides its inputs, piece by piece; freed as it is consumed.

    NOTE [one node, many iterations]: ``save_for_backward`` would hold all of it until the node is done. So it is held
    here, given to ``saved_tensors_hooks`` as torch gives what it saves, and dropped piece by piece unless the graph
    is retained.
    """

    def __init__(self, honour_hooks: bool = True) -> None:
        self.pieces: list[tuple[Tensors, list[Any], States | None] | None] = []
        self.hooks = _compat.saved_tensor_hooks() if honour_hooks else None

    def push(self, carry: Tensors, saved: list[Any], states: States | None = None) -> None:
        """Keeps the carry that a piece was given (of the first piece it is the loop's own) and what the piece saved."""
        self.pieces.append((self._pack(carry) if self.pieces else [], self._pack(saved), states))

    def pop(self, piece: int, keep: bool) -> tuple[Tensors, list[Any], States | None]:
        """The piece's values, in lists of the caller's own."""
        entry = self.pieces[piece]
        if entry is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, after what it saved was freed. Specify "
                "retain_graph=True if you need to backward through the graph a second time."
            )
        if not keep:
            self.pieces[piece] = None
        carry, saved, states = entry
        return self._unpack(carry), self._unpack(saved), states

    def _pack(self, values: list[Any]) -> list[Any]:
        if self.hooks is None:
            return values
        pack = self.hooks[0]
        return [pack(v) if isinstance(v, torch.Tensor) else v for v in values]

    def _unpack(self, values: list[Any]) -> list[Any]:
        if self.hooks is None:
            return list(values)
        unpack = self.hooks[1]
        return [v if isinstance(v, int | torch.SymInt) else unpack(v) for v in values]
