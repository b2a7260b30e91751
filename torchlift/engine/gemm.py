"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch carries.

NOTE [oneDNN]. torch multiplies float32 matrices with MKL, which keeps its fastest kernels for Intel's processors. On a
Zen 5 oneDNN, which ``nn.LSTM`` is made of, takes half the time: 290 us for 660 at 256 x 256 x 1024, and as much less in
the gradients. On a Zen 4 it takes a tenth less where products are large, and up to three times as long where they are
small or the first factor is transposed, as in gradients of weights. Other processors were not measured and keep MKL.
Only rounding differs. ``torch.backends.mkldnn.enabled = False`` leaves all products where they are. Which it is depends
on the processor and on sizes, not on a timing, so that two runs compute the same.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from torchlift import _compat

aten = torch.ops.aten


@dataclass(frozen=True)
class Faster:
    """Where oneDNN is the faster one: from so many multiplications on, and with a transposed first factor or not."""

    least: int
    transposed: bool


_BY_FAMILY = {25: Faster(2**24, transposed=False), 26: Faster(2**20, transposed=True)}  # Zen 4, Zen 5


@functools.cache
def _faster() -> Faster | None:
    """Where oneDNN is faster on this processor, if anywhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    if family is None or "AuthenticAMD" not in text or "avx512f" not in text or not torch.backends.mkl.is_available():
        return None
    return _BY_FAMILY.get(int(family[1]))


def _length(row: torch.fx.Node) -> int:
    return _compat.size_hint(row.meta["val"].shape[0])


def use_onednn(graph: torch.fx.GraphModule) -> None:
    """Puts oneDNN's products in the place of MKL's, where they are faster."""
    faster = _faster()
    if faster is None or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    _compat.inductor_products(_OP)
    for node in graph.graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        out = node.meta["val"]
        sizes = (*out.shape, a.meta["val"].shape[1])
        if (
            out.dtype is not torch.float32
            or out.device.type != "cpu"
            or math.prod(map(_compat.size_hint, sizes)) < faster.least
            or (not faster.transposed and not a.meta["val"].is_contiguous())
        ):
            continue
        # One row, which oneDNN adds to every row; of its full length, since oneDNN stretches none.
        own = bias and bias[0].meta["val"].ndim == 1 and _length(bias[0]) == _compat.size_hint(out.shape[1])
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(_OP, (a, b, bias[0] if own else None))
            new.meta = dict(node.meta)
            if bias and not own:
                new = graph.graph.call_function(aten.add.Tensor, (new, bias[0]))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


@torch.library.custom_op("torchlift::product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _compat.onednn_linear(a, b.t(), bias)


_product.register_fake(lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
_OP = torch.ops.torchlift.product.default
