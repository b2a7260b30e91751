"""Which tensors compiled code may take for ordinary ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torchlift import _compat

CAPTURED = "a part of the graph of what is around it"


def is_plain(t: torch.Tensor) -> bool:
    """Whether compiled code may take ``t`` for an ordinary tensor."""
    known = type(t) is torch.Tensor or isinstance(t, torch.nn.Parameter | torch.nn.Buffer)
    return (
        known
        and type(t).__torch_function__ in (torch.Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)
        and t.layout is torch.strided
        and t.device.type != "meta"
        and not t.is_quantized
        and not t.is_nested
        and not t.is_conj()
        and not t.is_neg()
    )


def why_not(tensors: Iterable[torch.Tensor]) -> tuple[str | None, bool]:
    """Why compiled code may not (None: it may), and whether the caller is to be warned of it."""
    for t in tensors:
        if _compat.is_traced(t):
            return CAPTURED, False
        if not is_plain(t):
            return f"an input is a {type(t).__name__} ({t.layout}, {t.device.type})", True
    return None, False
