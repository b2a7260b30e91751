"""Products of float32 matrices on a CPU, in the fastest of the ways that torch has for them.

NOTE [oneDNN]. torch multiplies float32 matrices with MKL, which keeps its fastest kernels for Intel's processors. On a
Zen 5 oneDNN, which ``nn.LSTM`` is made of, takes half the time: 290 us for 660 at 256 x 256 x 1024, and as much less in
the gradients. On a Zen 4 it takes a tenth less where products are large, and up to three times as long where they are
small or the first factor is transposed, as in gradients of weights. Other processors were not measured and keep MKL.
Only rounding differs. ``torch.backends.mkldnn.enabled = False`` leaves all products where they are. Which it is depends
on the processors and on sizes, not on a timing, so that two runs compute the same.

NOTE [Few rows]. The product of a recurrence has as many rows as the batch, and MKL shares few rows out badly between
threads: 16 x 256 x 1024 takes a Zen 4 with two threads 84 us, and 57 as a batch of four products, of a quarter of the
columns each, which it hands to one thread each. An Intel Xeon with AVX-512 takes 41 and 36, and for 16 x 1024 x 256 37
and 22. A single thread takes as long either way. Where there are more than four processors the rest would have nothing
to do; those, and other kinds, keep the one product.

NOTE [Halves]. Where the second factor lies row by row, as in all gradients, a Xeon with two threads takes 0.76 to 0.95
of the time, from a million multiplications to a hundred million, if each of them gets half of the rows. Of forward's
products, whose second factor is a transposed weight, it does not; a Zen 4 was not measured.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from torchlift import _compat
from torchlift.engine.packs import call

aten = torch.ops.aten


@dataclass(frozen=True)
class Ways:
    """Which ways of multiplying are faster than MKL's.

    Those are oneDNN's from so many multiplications on, with a transposed first factor or not; a product of few rows in
    parts; and one whose second factor lies row by row in halves.
    """

    least: float
    transposed: bool
    parts: bool
    halves: bool = False


_BY_FAMILY = {
    ("AuthenticAMD", 25): Ways(2**24, transposed=False, parts=True),  # Zen 4
    ("AuthenticAMD", 26): Ways(2**20, transposed=True, parts=False),  # Zen 5
    ("GenuineIntel", 6): Ways(math.inf, transposed=False, parts=True, halves=True),
}
_PARTS, _ROWS, _LEAST = 4, range(2, 65), 2**19  # the last one of multiplications
_HALVED = range(2**20, 2**27)  # multiplications
_COLUMNS = 16 * _PARTS  # a multiple of it, or kernels read across the bounds of parts number by number


@functools.cache
def _ways() -> Ways | None:
    """Those that are faster on this processor, if any."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    kind = re.search(r"^vendor_id\s*: (\w+)\ncpu family\s*: (\d+)$", text, re.MULTILINE)
    if kind is None or "avx512f" not in text or not torch.backends.mkl.is_available():
        return None
    found, count = _BY_FAMILY.get((kind[1], int(kind[2]))), os.cpu_count() or 1
    return found and replace(found, parts=found.parts and 1 < count <= _PARTS, halves=found.halves and count == 2)


def _length(row: torch.fx.Node) -> int:
    return _compat.size_hint(row.meta["val"].shape[0])


def is_for_onednn(graph: torch.fx.GraphModule) -> bool:
    """Whether oneDNN is to compute products of ``graph`` of every kind, on all threads, in half of MKL's time."""
    ways = _ways()
    if ways is None or not ways.transposed or not torch.backends.mkldnn.enabled:
        return False
    return any(_is_product(node) and _work(node) >= ways.least for node in graph.graph.nodes)


def _is_product(node: Node) -> bool:
    return node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs


def _work(node: Node) -> int:
    """The multiplications of a product."""
    a: Any = node.args[-2]
    return math.prod(map(_compat.size_hint, (*node.meta["val"].shape, a.meta["val"].shape[1])))


def tune_products(graph: torch.fx.GraphModule) -> None:
    """Computes the products of a graph in the way that is fastest here."""
    ways = _ways()
    if ways is None:
        return
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    for node in list(graph.graph.nodes):
        if not _is_product(node):
            continue
        *bias, a, b = node.args
        out = node.meta["val"]
        sizes = (*out.shape, a.meta["val"].shape[1])
        if out.dtype is not torch.float32 or out.device.type != "cpu":
            continue
        work = _work(node)
        with graph.graph.inserting_before(node):
            if onednn and work >= ways.least and (ways.transposed or a.meta["val"].is_contiguous()):
                new = _by_onednn(graph.graph, node, a, b, *bias)
            elif ways.halves and not bias and work in _HALVED and _is_even(sizes) and b.meta["val"].is_contiguous():
                new = _in_halves(graph.graph, node, a, b)
            elif ways.parts and work >= _LEAST and _divides(sizes):
                new = _in_parts(graph.graph, node, a, b, *bias)
            else:
                continue
        new.meta["val"] = out  # what is around was traced with its strides
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _by_onednn(graph: Graph, like: Node, a: Node, b: Node, bias: Node | None = None) -> Node:
    _compat.inductor_products(_OP)
    # One row, which oneDNN adds to every row; of its full length, since oneDNN stretches none.
    if bias is None or bias.meta["val"].ndim == 1 and _length(bias) == _compat.size_hint(like.meta["val"].shape[1]):
        return call(graph, like, _OP, a, b, bias)
    return call(graph, like, aten.add.Tensor, call(graph, like, _OP, a, b, None), bias)


def _divides(sizes: Sequence[int | torch.SymInt]) -> bool:
    """Whether a product has few rows, and columns for every part; all sizes are known."""
    return all(isinstance(n, int) for n in sizes) and sizes[0] in _ROWS and sizes[1] % _COLUMNS == 0


def _in_parts(graph: Graph, like: Node, a: Node, b: Node, bias: Node | None = None) -> Node:
    """The columns of a product in parts, as a batch; what reads them puts them side by side."""
    m, n = like.meta["val"].shape
    k = a.meta["val"].shape[1]
    parts = call(graph, like, aten.view.default, b, [k, _PARTS, n // _PARTS])
    parts = call(graph, like, aten.permute.default, parts, [1, 0, 2])
    rows = call(graph, like, aten.expand.default, a, [_PARTS, m, k])
    product = call(graph, like, aten.permute.default, call(graph, like, aten.bmm.default, rows, parts), [1, 0, 2])
    # Inductor copies nothing here unless the whole product is wanted in memory: its kernels read through the clone.
    laid = call(graph, like, aten.clone.default, product, memory_format=torch.contiguous_format)
    new = call(graph, like, aten.view.default, laid, [m, n])
    return new if bias is None else call(graph, like, aten.add.Tensor, new, bias)


def _is_even(sizes: Sequence[int | torch.SymInt]) -> bool:
    """Whether a product has halves, of more than a few rows; all sizes are known."""
    return all(isinstance(n, int) for n in sizes) and sizes[0] % 2 == 0 and sizes[0] >= _ROWS[-1]


def _in_halves(graph: Graph, like: Node, a: Node, b: Node) -> Node:
    """Half of the rows of a product each, as a batch, which is the whole in memory."""
    m, n = like.meta["val"].shape
    k = a.meta["val"].shape[1]
    halves = call(graph, like, aten.view.default, a, [2, m // 2, k])
    again = call(graph, like, aten.expand.default, b, [2, k, n])
    return call(graph, like, aten.view.default, call(graph, like, aten.bmm.default, halves, again), [m, n])


@torch.library.custom_op("torchlift::product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _compat.onednn_linear(a, b.t(), bias)


_product.register_fake(lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
_OP = torch.ops.torchlift.product.default
