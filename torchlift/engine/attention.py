"""Attention over short sequences as products of matrices.

NOTE [Short attention]. On a CPU torch attends block by block, so that no matrix of scores is ever whole. Where such a
matrix is small that is the slower way: a block is a product of a few rows, which takes longer to call than to compute.
Here the scores of all heads are one batch of products, and kernels of Inductor's make probabilities of them, fused with
what is around. Backward computes them again from the logarithms of their sums, as torch's does, so no more is saved. At
16 heads of 64 x 64 scores forward takes 0.8 and backward 0.7 of the time; at 96 x 96 both take 0.9; at 128 x 128 it
depends on the number of threads, and beyond that torch is faster. Only rounding differs, and where a NaN goes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torchlift import _compat
from torchlift.engine.capture import CaptureError, like_strided
from torchlift.engine.packs import belonging_to

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_LONGEST = 96  # sequence
_MOST = 2**20  # scores, of all heads together: they are in memory at once, three times in backward


def attend_by_products(graph: GraphModule) -> None:
    """Puts products in the place of attention over short sequences.

    :class:`CaptureError` where torch declares a dtype that the operator does not return: Inductor would believe it.
    """
    traces: dict[Hashable, GraphModule] = {}  # equal calls, as of unrolled iterations, are traced once
    for node in list(graph.graph.nodes):
        args: Any = node.args
        if node.target is _FORWARD and not _declared(*node.meta["val"][:2]):
            raise CaptureError("this torch takes a result of attention in float64 for float32; torch 2.13 does not")
        # Behind the tensors may stand the probability of dropout and whether it is causal.
        if node.target is _FORWARD and _fits(*args[:3], *args[3:4], **node.kwargs):
            _replace(graph.graph, node, _forward, args[:3], args[4:] == (True,), traces)
        elif node.target is _BACKWARD and _fits(*args[1:4], *args[6:7], **node.kwargs):
            _replace(graph.graph, node, _backward, args[:6], args[7:] == (True,), traces)
    if traces:
        graph.recompile()


def _declared(out: Tensor, log_sums: Tensor) -> bool:
    return log_sums.dtype == torch.promote_types(out.dtype, torch.float32)


def _fits(q: Node, k: Node, v: Node, dropout: float = 0.0, *, scale: float | None = None, **others: Any) -> bool:
    """Whether this attention is computed here: nothing but softmax, in float32, of short sequences of known length."""
    a, b, c = (node.meta["val"] for node in (q, k, v))
    if a.dtype is not torch.float32 or dropout or any(other is not None for other in others.values()):
        return False
    known = all(isinstance(size, int) and size > 0 for size in (*a.shape, *b.shape))
    if not known or a.shape[:2] != b.shape[:2] or b.shape != c.shape:
        return False
    return max(a.shape[2], b.shape[2]) <= _LONGEST and math.prod(a.shape[:3]) * b.shape[2] <= _MOST


def _replace(
    graph: Graph, node: Node, function: Callable[..., Any], inputs: Any, causal: bool, traces: dict[Any, GraphModule]
) -> None:
    fakes, scale = [a.meta["val"] for a in inputs], node.kwargs.get("scale")
    key = (function, causal, scale, *((t.shape, t.stride()) for t in (*fakes, *node.meta["val"])))

    def over_heads(*tensors: Tensor) -> list[Tensor]:
        sizes = tensors[0].shape
        factor = sizes[3] ** -0.5 if scale is None else scale
        outs = function(*(t.flatten(0, 1) for t in tensors), causal, factor)
        # Laid out as the nodes behind were told, since those may be views.
        return [like_strided(out.unflatten(0, sizes[:2]), like) for out, like in zip(outs, node.meta["val"])]

    if key not in traces:
        traces[key] = _compat.joint_graph(over_heads, fakes, train=False, inductor=True)
    copies = dict(zip(traces[key].graph.find_nodes(op="placeholder"), inputs))
    with graph.inserting_before(node):
        new: Any = graph.graph_copy(traces[key].graph, copies)
    for copy in copies.values():
        if copy not in inputs:
            copy.meta |= belonging_to(node)
    for user in list(node.users):
        assert user.target is operator.getitem
        out = new[user.args[1]]
        out.meta = dict(user.meta)
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.bmm(q, k.mT) * scale
    if not causal:
        return scores
    rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[1:])
    return scores.masked_fill(columns > rows.unsqueeze(1), -torch.inf)


def _finite(most: Tensor) -> Tensor:
    """``most`` of each row, but 0 where all scores are minus infinity: the weights, and what comes out, are 0 then."""
    return most.masked_fill(most == -torch.inf, 0)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    scores = _scores(q, k, causal, scale)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - _finite(most)).exp()
    sums = weights.sum(-1, keepdim=True)
    return torch.bmm(weights / sums.masked_fill(sums == 0, 1), v), (most + sums.log()).squeeze(-1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    weights = (_scores(q, k, causal, scale) - _finite(log_sums).unsqueeze(-1)).exp()
    inner = (grad * out).sum(-1, keepdim=True)
    to_scores = weights * (torch.bmm(grad, v.mT) - inner) * scale
    return torch.bmm(to_scores, k), torch.bmm(to_scores.mT, q), torch.bmm(weights.mT, grad)
