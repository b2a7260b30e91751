"""Equal products of unrolled iterations, done as one.

NOTE [Products]. What an iteration multiplies by a weight that all iterations share does not always wait for the carry:
the projection of a loop's inputs, the gradients of those, and of the weight itself. In a graph of several iterations
such products are joined, rows under rows, into one. That is how fused recurrent kernels win, and no more than rounding
changes: the order in which a gradient is summed. Backends that run graphs as they were traced get them unjoined.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torchlift import _compat
from torchlift.engine.packs import call, view_wholes

aten = torch.ops.aten
ROWS = 512  # a product of as many rows keeps the machine busy by itself


def join_products(joint: GraphModule, outputs: int) -> None:
    """Joins the products of a joint graph whose gradients come after so many ``outputs``. It must not draw."""
    graph = joint.graph
    output = next(iter(reversed(graph.nodes)))
    for gradient in dict.fromkeys(_flat(output)[outputs:]):
        if isinstance(gradient, Node):
            _join_sum(graph, gradient)
    for key in _groups(graph):
        for members in _levels(graph, _groups(graph).get(key, [])):
            if len(members) > 1:
                _join_rows(graph, members)
                _sort(graph)
    view_wholes(graph, [node for node in _flat(output)[:outputs] if isinstance(node, Node)])
    graph.eliminate_dead_code()
    graph.lint()
    joint.recompile()


# Sums of products: the gradient of a weight ---------------------------------------------------------------------------


def _join_sum(graph: Graph, total: Node) -> None:
    """``A1 @ B1 + A2 @ B2 + ...`` as ``[A1 A2 ...] @ [B1; B2; ...]``, and a sum of sums of rows as one sum."""
    leaves = _summands(total)[::-1]  # autograd adds them from the last iteration to the first
    if len(leaves) < 2:
        return
    with graph.inserting_before(total):
        factors = [_factors(leaf) for leaf in leaves]
        if all(pair is not None and _size(pair[0][0], 0 if pair[0][1] else 1) < ROWS for pair in factors):
            left = _stacked(graph, [pair[0] for pair in factors if pair], 1)
            right = _stacked(graph, [pair[1] for pair in factors if pair], 0)
            new = call(graph, total, aten.mm.default, left, right)
        elif all(_summed_rows(leaf) is not None for leaf in leaves):
            rows = [row for leaf in leaves if (row := _summed_rows(leaf)) is not None]
            if len({row.meta["val"].ndim for row in rows}) > 1:
                return
            sums = call(graph, total, aten.sum.dim_IntList, call(graph, total, aten.cat.default, rows, 0), [0], True)
            new = call(graph, total, aten.view.default, sums, list(total.meta["val"].shape))
        else:
            return
    total.replace_all_uses_with(new)


def _summands(total: Node) -> list[Node]:
    """What is added up to ``total``, and used for nothing else."""
    if total.target is not aten.add.Tensor or total.kwargs or not all(isinstance(a, Node) for a in total.args):
        return [total]
    if any(a.meta["val"].shape != total.meta["val"].shape for a in total.all_input_nodes):
        return [total]
    parts: list[Node] = []
    for a in total.args:
        assert isinstance(a, Node)
        parts += _summands(a) if len(a.users) == 1 else [a]
    return parts


_Factor = tuple[Node, bool]  # a matrix, and whether it is to be transposed


def _matrix(node: Node) -> _Factor:
    """What a matrix is a transpose of, if of anything."""
    transposed = False
    while node.target is aten.t.default or (node.target is aten.permute.default and list(node.args[1]) == [1, 0]):  # type: ignore[arg-type]
        node, transposed = node.args[0], not transposed  # type: ignore[assignment]
    return node, transposed


def _factors(leaf: Node) -> tuple[_Factor, _Factor] | None:
    """The two factors of a product, or of its transpose."""
    product, transposed = _matrix(leaf)
    if product.target is not aten.mm.default:
        return None
    left, right = (_matrix(a) for a in product.args)  # type: ignore[arg-type]
    return ((right[0], not right[1]), (left[0], not left[1])) if transposed else (left, right)


def _stacked(graph: Graph, factors: Sequence[_Factor], dim: int) -> Node:
    """Factors side by side (``dim`` 1) or one under the other (0)."""
    if all(transposed for _, transposed in factors):
        joined = call(graph, factors[0][0], aten.cat.default, [node for node, _ in factors], 1 - dim)
        return call(graph, joined, aten.permute.default, joined, [1, 0])
    parts = [call(graph, n, aten.permute.default, n, [1, 0]) if transposed else n for n, transposed in factors]
    return call(graph, parts[0], aten.cat.default, parts, dim)


def _summed_rows(leaf: Node) -> Node | None:
    """What ``leaf`` is the sum of the rows of."""
    node = leaf
    while node.target is aten.view.default:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not aten.sum.dim_IntList or list(node.args[1]) != [0] or len(node.args) > 3:  # type: ignore[arg-type]
        return None
    rows = node.args[0]
    assert isinstance(rows, Node)
    return rows


# Products that share their right factor -------------------------------------------------------------------------------


def _groups(graph: Graph) -> dict[tuple[Any, ...], list[Node]]:
    """Products of so many rows, which are few, by one and the same input of the graph."""
    found: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
            *bias, rows, by = node.args
            weight, transposed = _matrix(by)
            bias_is_input = not bias or bias[0].op == "placeholder" and bias[0].meta["val"].ndim == 1
            count, width = node.meta["val"].shape
            known = isinstance(width, int) and width > 0
            if weight.op == "placeholder" and bias_is_input and known and _size(rows, 0) < ROWS:
                backward = node.meta.get("partitioner_tag") == "is_backward"
                same = str(count)  # symbolic sizes have no hash
                found[(backward, node.target, *bias, weight, transposed, same, _compat.mark_of(node))].append(node)
    # Backward goes from the last iteration to the first; what is joined starts with the first.
    return {key: nodes[::-1] if key[0] else nodes for key, nodes in found.items()}


def _levels(graph: Graph, members: list[Node]) -> list[list[Node]]:
    """``members`` in sets that do not depend on each other."""
    chosen = set(members)
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth[a] + (a in chosen) for a in node.all_input_nodes), default=0)
    levels: dict[int, list[Node]] = defaultdict(list)
    for member in members:
        levels[depth[member]].append(member)
    return list(levels.values())


def _join_rows(graph: Graph, members: list[Node]) -> None:
    """One product in the place of ``members``, which have the same number of rows."""
    first = members[0]
    *bias, _, by = first.args
    rows = [member.args[-2] for member in members]
    with graph.inserting_after(first):  # its place is found by sorting
        joined = call(graph, first, aten.cat.default, rows, 0)
    with graph.inserting_after(joined):
        product = call(graph, first, first.target, *bias, joined, by)
    with graph.inserting_after(product):  # where the size is symbolic there is no number to write in a graph
        parts = call(graph, first, aten.view.default, product, [len(members), -1, product.meta["val"].shape[1]])
    cursor = parts
    for i, member in enumerate(members):
        with graph.inserting_after(cursor):
            cursor = call(graph, first, aten.select.int, parts, 0, i)
        member.replace_all_uses_with(cursor)
    for member in members:
        graph.erase_node(member)


def _sort(graph: Graph) -> None:
    """Every node after its inputs, and else in the order they were in."""
    nodes = list(graph.nodes)
    done: set[Node] = set()
    for last in nodes:
        waiting = [last]
        while waiting:
            node = waiting[-1]
            missing = [a for a in node.all_input_nodes if a not in done]
            if missing:
                waiting += reversed(missing)
                continue
            waiting.pop()
            if node not in done:
                done.add(node)
                if node.op != "output":
                    nodes[-1].prepend(node)


def _size(node: Any, dim: int) -> int:
    return _compat.size_hint(node.meta["val"].shape[dim])


def _flat(output: Node) -> list[Any]:
    return list(_compat.pytree.tree_leaves(output.args))
