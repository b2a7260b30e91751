"""``tensor.data`` in a capture."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READ, _WRITTEN = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]


class DataAsDetached(TorchFunctionMode):
    """Takes ``.data`` for ``.detach()``, which graphs know to be of the same memory: writes into it would be lost."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ:
            return args[0].detach()
        if func == _WRITTEN:
            raise NotImplementedError("the body gives a tensor the memory of another by way of .data")
        return func(*args, **(kwargs or {}))
