"""Tensors of several iterations as one: what a graph of several iterations takes, gives and saves.

NOTE [Packs]. A graph of sixteen iterations of an LSTM would save 95 tensors of a few kilobytes, and to make each, hand
it to Python, hold it and take it up again takes longer than to compute it. So a graph of several iterations of a loop
over stacks takes its xs as one stack and gives its ys as one, and what it saves of one shape lies row under row in few
tensors, where Inductor's kernels write it: nothing is copied. They stay small enough for memory that is used again:
glibc asks the system for what is larger, and clears every page of it anew.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torchlift.engine.signature import Graphs

aten = torch.ops.aten
PACK = 2**17 - 2**12  # bytes, and no value of more than half of it: those take longer to compute than to hand around


def call(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node for the pass that ``like`` belongs to, with its value on fakes."""
    node = graph.call_function(target, args, kwargs)
    node.meta = belonging_to(like) | {"val": target(*torch.fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)}
    return node


def belonging_to(like: Node) -> dict[str, Any]:
    """What the nodes put in the place of ``like`` have in common with it: its pass, its span, its number."""
    return {key: value for key, value in like.meta.items() if key in ("partitioner_tag", "custom", "seq_nr")}


def select_rows(joint: GraphModule) -> None:
    """Takes each row of a stack by itself: what backward needs of it is then a view of the stack."""
    graph = joint.graph
    for node in list(graph.nodes):
        rows = node.args[0] if node.target is operator.getitem else None
        if isinstance(rows, Node) and rows.target is aten.unbind.int and rows.args[1:] in ((), (0,)):
            with graph.inserting_before(node):
                node.replace_all_uses_with(call(graph, node, aten.select.int, rows.args[0], 0, node.args[1]))
            graph.erase_node(node)
            if not rows.users:
                graph.erase_node(rows)
    joint.recompile()


# Rows of one tensor, put together again -------------------------------------------------------------------------------


def view_wholes(graph: Graph, outputs: Iterable[Node]) -> None:
    """Takes views where rows of one tensor are put under one another as they were; not for ``outputs``, ever fresh.

    Of gradients that are no outputs here it is noted afterwards which share memory.
    """
    fresh = {base for node in outputs for base in _bases(node)}
    for node in list(graph.nodes):
        if node.target is not aten.cat.default or node in fresh or len(node.args) > 1 and node.args[1] != 0:
            continue
        with graph.inserting_before(node):
            members = [_joined(graph, node, run) for run in _runs(node.args[0])]
        if len(members) == len(node.args[0]):
            continue
        node.args = (members,)
        if len(members) == 1:
            node.replace_all_uses_with(members[0])
            graph.erase_node(node)


def _bases(node: Node) -> Iterator[Node]:
    """``node``, and what it is a view of."""
    yield node
    while getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
        yield node


def _runs(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """``nodes`` in runs of consecutive rows of one tensor."""
    run: list[Node] = []
    last = None
    for node in nodes:
        part = _part_of(node)
        if run and not (last and part and last[0] is part[0] and last[2] == part[1]):
            yield run
            run = []
        run.append(node)
        last = part
    yield run


def _joined(graph: Graph, like: Node, run: list[Node]) -> Node:
    """A run as one node."""
    first, last = _part_of(run[0]), _part_of(run[-1])
    if len(run) == 1 or first is None or last is None:
        return run[0]
    whole = call(graph, like, aten.slice.Tensor, first[0], 0, first[1], last[2])
    if not whole.meta["val"].is_contiguous():
        whole = call(graph, like, aten.clone.default, whole)
        whole.kwargs = {"memory_format": torch.contiguous_format}
        whole.meta["val"] = whole.meta["val"].contiguous()
    shapes = [node.meta["val"].shape for node in run]
    rows = sum(shape[0] for shape in shapes)
    return call(graph, like, aten.view.default, whole, [rows if isinstance(rows, int) else -1, *shapes[0][1:]])


def _part_of(node: Node) -> tuple[Node, int, int] | None:
    """A tensor, the first row of it that is in ``node`` and the first that is not any more, if it is rows of one."""
    if not all(isinstance(size, int) and size > 0 for size in node.meta["val"].shape[1:]):
        return None  # a symbolic size is no number to write in a graph
    while node.target is aten.view.default:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.select.int and node.args[1] == 0:
        base, _, lo = node.args
        hi = lo + 1 if isinstance(lo, int) else None
    elif node.target is aten.slice.Tensor and node.args[1] == 0 and len(node.args) == 4:
        base, _, lo, hi = node.args  # type: ignore[assignment]
    else:
        return None
    if isinstance(base, Node) and isinstance(lo, int) and isinstance(hi, int) and 0 <= lo < hi:
        return base, lo, hi
    return None


# Saved values ---------------------------------------------------------------------------------------------------------


def pack_saved(graphs: Graphs, stacks_from: int) -> None:
    """Has the forward save small tensors of one shape in one, and the backward take them from there.

    That may be one of the outputs from ``stacks_from`` on.
    """
    assert graphs.bw is not None
    output = next(iter(reversed(graphs.fw.graph.nodes)))
    outs, saved = list(output.args[0])[: graphs.outputs], list(output.args[0])[graphs.outputs :]
    packs = _output_packs(outs[stacks_from:], saved)
    inside = {node for pack in packs for node in pack.args[0]}  # type: ignore[union-attr]
    alike: dict[Hashable, list[Node]] = defaultdict(list)
    for node in saved:
        if _is_small(node) and node not in inside:
            alike[node.meta["val"].shape, node.meta["val"].dtype, node.meta["val"].device].append(node)
    with graphs.fw.graph.inserting_before(output):
        for some in alike.values():
            count = PACK // _bytes(some[0])
            for part in (some[at : at + count] for at in range(0, len(some), count)):
                if len(part) > 1:
                    packs.append(call(graphs.fw.graph, part[0], aten.cat.default, part))
    places: dict[Node, tuple[int, int]] = {}  # of a saved value: the number of its pack, its first row there
    for i, pack in enumerate(packs):
        row = 0
        for node in pack.args[0]:  # type: ignore[union-attr]
            places[node], row = (i, row), row + node.meta["val"].shape[0]  # type: ignore[index, union-attr]
    apart = [i for i, node in enumerate(saved) if node not in places]
    output.args = ((*outs, *(saved[i] for i in apart), *packs),)
    _take_from_packs(graphs, [places.get(node) for node in saved], [pack.meta["val"] for pack in packs])
    gradients = next(iter(reversed(graphs.bw.graph.nodes))).args[0]
    view_wholes(graphs.bw.graph, [node for node in gradients if isinstance(node, Node)])
    graphs.bw.graph.eliminate_dead_code()
    for graph in (graphs.fw, graphs.bw):
        graph.graph.lint()
        graph.recompile()


def _output_packs(outs: list[Any], saved: list[Node]) -> list[Node]:
    """Outputs that are packs of values which, for the most part, are saved as well."""
    found: list[Node] = []
    wanted = set(saved)
    for out in outs:
        pack = out.args[0] if out.target is aten.view.default else out
        if pack.target is aten.cat.default and pack.args[1:] in ((), (0,)):
            members = [node for node in pack.args[0] if node in wanted]
            if 2 * len(members) > len(pack.args[0]) and all(map(_is_small, members)):
                found.append(pack)
                wanted.difference_update(members)
    return found


def _is_small(node: Node) -> bool:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not value.is_contiguous():
        return False
    return all(isinstance(size, int) for size in value.shape) and 0 < 2 * _bytes(node) <= PACK


def _bytes(node: Node) -> int:
    return node.meta["val"].numel() * node.meta["val"].element_size()


def _take_from_packs(graphs: Graphs, places: list[tuple[int, int] | None], packs: list[torch.Tensor]) -> None:
    """Rewires the backward: the i-th saved value is in a pack at ``places[i]``, or else by itself."""
    assert graphs.bw is not None
    graph = graphs.bw.graph
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    apart = [i for i, place in enumerate(places) if place is None]
    with graph.inserting_before(first):
        sources = [graph.placeholder(f"pack_{i}") for i in range(len(packs))]
    for source, value in zip(sources, packs):
        source.meta["val"] = value
    feeds, inputs = [], []
    for holder, (kind, i), value in zip(holders, graphs.feeds, graphs.bw_inputs):
        place = places[i] if kind == "saved" else None
        if place is None:
            feeds.append((kind, apart.index(i) if kind == "saved" else i))
            inputs.append(value)
            continue
        pack, row = place
        with graph.inserting_before(first):
            part = call(graph, holder, aten.slice.Tensor, sources[pack], 0, row, row + value.shape[0])
        holder.replace_all_uses_with(part)
        graph.erase_node(holder)
    graphs.feeds[:] = feeds + [("saved", len(apart) + i) for i in range(len(packs))]
    graphs.bw_inputs[:] = inputs + packs
