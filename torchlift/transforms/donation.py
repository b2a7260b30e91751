"""Donated tensors: what jit was given to use up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchlift import _tree
from torchlift.errors import DonatedTensorError
from torchlift.variables import own_tensors


class Donated(Tensor):
    """NOTE [Donation]. What a donated tensor becomes: empty, so that its memory is free, and of a class of which every
    use raises. Freeing the storage alone would let a later use crash."""

    _torchlift_donated_to: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next(x for x in _tree.flatten((args, kwargs))[0] if isinstance(x, Donated)).error()

    def error(self) -> DonatedTensorError:
        return DonatedTensorError(
            f"a tensor was used that had been donated to {self.__dict__['_torchlift_donated_to']}; use what the call "
            "returned, or do not donate it"
        )

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "<donated tensor>"


def give_up(donated: list[tuple[Tensor, str]], out: Any, roots: Sequence[nn.Module]) -> Any:
    """Takes donated tensors from their owners; ``out``, with new tensors where it has donated ones."""
    mine = {tensor for tensor, _ in donated}
    alias = lambda x: x.detach() if isinstance(x, Tensor) and x in mine else x
    out = _tree.map_leaves(alias, out)
    for root in roots:
        for owner in root.modules():
            for store, key, tensor in list(own_tensors(owner)):
                owner.__dict__[store][key] = alias(tensor)
    for tensor, to in donated:
        tensor.data = tensor.new_empty(0)
        tensor.__dict__["_torchlift_donated_to"] = to
        tensor.__class__ = Donated
    return out
