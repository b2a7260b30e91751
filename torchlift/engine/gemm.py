"""Products of float32 matrices on a CPU, in the fastest of the ways that torch has for them.

NOTE [oneDNN]. torch multiplies float32 matrices with MKL, which keeps its fastest kernels for Intel's processors. On a
Zen 5 oneDNN, which ``nn.LSTM`` is made of, takes half the time: 290 us for 660 at 256 x 256 x 1024, and as much less in
the gradients. On a Zen 4 it takes a tenth less where products are large, and up to three times as long where they are
small or the first factor is transposed, as in gradients of weights. Other processors were not measured and keep MKL.
Only rounding differs. ``torch.backends.mkldnn.enabled = False`` leaves all products where they are. Which it is depends
on the processor and on sizes, not on a timing, so that two runs compute the same.

NOTE [Few rows]. The product of a recurrence has as many rows as the batch, and MKL shares few rows out badly between
threads: 16 x 256 x 1024 takes a Zen 4 with two threads 84 us, and 57 as a batch of four products, of a quarter of the
columns each, which it hands to one thread each. A single thread takes as long in either way; more than four threads
were not measured, nor other processors.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Graph, Node

from torchlift import _compat
from torchlift.engine.packs import call

aten = torch.ops.aten


@dataclass(frozen=True)
class Faster:
    """Where oneDNN is the faster one: from so many multiplications on, and with a transposed first factor or not.

    And whether a product of few rows is faster in parts.
    """

    least: int
    transposed: bool
    few_rows: bool


# Zen 4, Zen 5
_BY_FAMILY = {25: Faster(2**24, transposed=False, few_rows=True), 26: Faster(2**20, transposed=True, few_rows=False)}
_PARTS, _ROWS, _LEAST = 4, range(2, 65), 2**19


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


def tune_products(graph: torch.fx.GraphModule) -> None:
    """Computes the products of a graph in the way that is fastest here."""
    faster = _faster()
    if faster is None:
        return
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    parts = faster.few_rows and 1 < torch.get_num_threads() <= _PARTS
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        out = node.meta["val"]
        sizes = (*out.shape, a.meta["val"].shape[1])
        if out.dtype is not torch.float32 or out.device.type != "cpu":
            continue
        work = math.prod(map(_compat.size_hint, sizes))
        with graph.graph.inserting_before(node):
            if onednn and work >= faster.least and (faster.transposed or a.meta["val"].is_contiguous()):
                new, bias = _by_onednn(graph.graph, node, a, b, bias)
            elif parts and work >= _LEAST and _is_wide(sizes):
                new = _by_columns(graph.graph, node, a, b)
            else:
                continue
            if bias:
                new = call(graph.graph, node, aten.add.Tensor, new, bias[0])
        new.meta["val"] = out
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _by_onednn(graph: Graph, like: Node, a: Node, b: Node, bias: list[Node]) -> tuple[Node, list[Node]]:
    """oneDNN's product, and the bias that is to be added to it."""
    _compat.inductor_products(_OP)
    # One row, which oneDNN adds to every row; of its full length, since oneDNN stretches none.
    if bias and bias[0].meta["val"].ndim == 1 and _length(bias[0]) == _compat.size_hint(like.meta["val"].shape[1]):
        return call(graph, like, _OP, a, b, bias[0]), []
    return call(graph, like, _OP, a, b, None), bias


def _is_wide(sizes: Sequence[int | torch.SymInt]) -> bool:
    """Whether a product has few rows, all sizes known, and columns for every part."""
    return all(isinstance(n, int) for n in sizes) and sizes[0] in _ROWS and sizes[1] % (16 * _PARTS) == 0


def _by_columns(graph: Graph, like: Node, a: Node, b: Node) -> Node:
    """The columns of a product in parts, as a batch; what reads them puts them side by side."""
    m, n = like.meta["val"].shape
    k = a.meta["val"].shape[1]
    blocks = call(graph, like, aten.view.default, b, [k, _PARTS, n // _PARTS])
    blocks = call(graph, like, aten.permute.default, blocks, [1, 0, 2])
    rows = call(graph, like, aten.expand.default, a, [_PARTS, m, k])
    product = call(graph, like, aten.permute.default, call(graph, like, aten.bmm.default, rows, blocks), [1, 0, 2])
    # A copy in name only: Inductor reads a pointwise operation in place. A view of what is laid out so there is none.
    laid = graph.call_function(aten.clone.default, (product,), {"memory_format": torch.contiguous_format})
    laid.meta = dict(product.meta) | {"val": product.meta["val"].contiguous()}
    return call(graph, like, aten.view.default, laid, [m, n])


@torch.library.custom_op("torchlift::product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _compat.onednn_linear(a, b.t(), bias)


_product.register_fake(lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
_OP = torch.ops.torchlift.product.default
