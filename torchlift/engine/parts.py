"""Graphs that every thread computes a part of the batch of.

NOTE [Parts]. Inductor shares out each kernel and each product of a graph between the threads, and after each of them
they wait for one another; where a kernel takes ten microseconds the waiting takes as long. But most bodies treat the
members of a batch alike and apart. Such a graph is compiled for the share of one thread, without threads, and each runs
it from its first operator to its last for a share of its own. On a Xeon with two threads 24 layers of width 64 take 0.9
of the time that way, smaller ones 0.85, an LSTM of width 64 takes 0.76 and, as a chain, 0.6; at width 128 it makes no
difference, and at 256, where all weights are read twice and their gradients added up, it would take longer. That it may
be done is found in the graph; see ``placements``. What the whole is a sum of, like gradients of weights, is added up at
the end; what comes in rows lies in one tensor, as if nothing had happened; and what is saved for backward stays in
parts. Only the order of sums differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchlift.engine.capture import stride_order
from torchlift.engine.driver import OWN, SUMMED, Chain, Driver
from torchlift.engine.parting import Parting, WantedError, dense
from torchlift.engine.placements import SUM, Inseparable, Placement, Rows
from torchlift.engine.signature import Graphs

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
MOST = 4  # threads; more were not measured
SHARED = 2**15  # numbers in the weights of a product: every thread reads all, and has a gradient for each to be summed
LEAST = 100_000  # numbers computed: to start the threads and to put together what they made takes 20 us


@dataclass
class Part:
    """A graph of one part, and how its inputs and outputs are placed; ``OWN``: every part has its own."""

    graph: GraphModule
    inputs: list[Any]  # on fakes
    takes: list[Placement]
    gives: list[Placement]
    locals: list[Any]  # of each output, that of the part
    wholes: list[Any]  # that of all parts

    def driver(self, parts: int, chain: Chain | None, unpacked: Sequence[int | None] = (), step: int = 0) -> Driver:
        """What makes the program of this graph one for all parts; it knows the program by the name of an input."""
        takes, gives = list(zip(self.inputs, self.takes)), list(zip(self.wholes, self.gives))
        driver = Driver(parts, takes, gives, unpacked, step, chain)
        first = _holders(self.graph)[0]
        first.name = first.target = driver.name
        self.graph.recompile()
        return driver

    def spread(self, parts: int, graphs: Graphs, forward: Driver) -> list[int | None]:
        """Tells ``graphs`` how what is saved reaches the backward, this part: in a pack, or a value for every part.

        Returns the place in the pack of each input.
        """
        firsts, count = {}, 0
        for i in range(graphs.outputs, len(forward.outputs)):
            if i not in forward.packed:
                firsts[i], count = count, count + parts
        feeds, values, slots = [], [], []
        for (kind, i), value in zip(graphs.feeds, self.inputs, strict=True):
            output = graphs.outputs + i
            slots.append(forward.packed.get(output) if kind == "saved" else None)
            if slots[-1] is None:
                several = [firsts[output] + part for part in range(parts)] if kind == "saved" else [i]
                feeds += [(kind, n) for n in several]
                values += [value] * len(several)
        if forward.packed:
            feeds.append(("saved", count))
            values.append(next(value for value, slot in zip(self.inputs, slots) if slot is not None).new_empty([1]))
        graphs.feeds[:], graphs.bw_inputs[:] = feeds, values
        return slots


def divide(graphs: Graphs, carries: range, parts: int) -> tuple[Part, Part | None] | None:
    """A part of the forward and one of the backward, if the graphs can be computed in so many.

    ``carries`` are the inputs that come in parts; which others do is found.
    """
    if not 1 < parts <= MOST or graphs.marks:
        return None
    for dim in (0, 1):
        try:
            return _divide(graphs, carries, parts, dim)
        except Inseparable:
            continue
    return None


def _divide(graphs: Graphs, carries: range, parts: int, dim: int) -> tuple[Part, Part | None]:
    holders = _holders(graphs.fw)
    if not all(isinstance(node.meta["val"], torch.Tensor) and _known(node.meta["val"]) for node in holders):
        raise Inseparable("inputs that are no tensors, or of sizes that change")
    batches = [(node, node.meta["val"].shape[dim]) for i in carries if (node := holders[i]).meta["val"].ndim > dim]
    if not batches:
        raise Inseparable("nothing carried has such a dimension")
    given: dict[Node, Placement] = {node: Rows(dim) for node, size in batches if size == batches[0][1]}
    while True:
        try:
            forward = Parting(graphs.fw.graph, parts, given, {}, open_inputs=True)
            break
        except WantedError as wanted:
            given[wanted.node] = wanted.rows
    if _shared(graphs.fw, forward) > SHARED:
        raise Inseparable("not worth it")
    outs = _outputs(graphs.fw)
    visible, saved = outs[: graphs.outputs], outs[graphs.outputs :]
    gives = [forward.places[node] for node in visible]
    fw = _part(forward, outs, [forward.places[node] for node in holders], [*gives, *(OWN for _ in saved)])
    if graphs.bw is None:
        return fw, None
    places, values, takes = {}, {}, []
    for node, (kind, i) in zip(_holders(graphs.bw), graphs.feeds, strict=True):
        source = {"input": holders, "saved": saved, "tangent": visible}[kind][i]
        # The gradient of a sum is the same for all that is added up.
        places[node] = None if kind == "tangent" and forward.places[source] == SUM else forward.places[source]
        takes.append(OWN if kind == "saved" else places[node])
        if kind == "saved":
            values[node] = forward.local[source].meta["val"]
    backward = Parting(graphs.bw.graph, parts, places, values, open_inputs=False)
    grads = _outputs(graphs.bw)
    return fw, _part(backward, grads, takes, [None if node is None else backward.places[node] for node in grads])


def _shared(graph: GraphModule, parting: Parting) -> float:
    """Numbers in what all threads read alike, for each product with such: layers in one graph weigh as one."""
    read = [
        [a.meta["val"].numel() for a in node.args if isinstance(a, Node) and parting.places[a] is None]
        for node in graph.graph.nodes
        if node.target in PRODUCTS
    ]
    return sum(map(sum, read)) / max(1, len([some for some in read if some]))


def is_small(graph: GraphModule) -> bool:
    """Whether a graph computes too little to be called once in parts.

    Numbers are counted, as many as sixteen multiplications in a product take the time of one.
    """
    work = 0
    for node in graph.graph.nodes:
        value, args = node.meta.get("val"), node.args
        if (
            node.op == "call_function"
            and isinstance(value, torch.Tensor)
            and not getattr(node.target, "is_view", False)
        ):
            product = node.target in PRODUCTS
            work += value.numel() * (args[-2].meta["val"].shape[-1] if product else 16) // 16
    return work < LEAST


def _holders(graph: GraphModule | Parting) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _outputs(graph: GraphModule) -> list[Any]:
    return list(next(iter(reversed(graph.graph.nodes))).args[0])


def _known(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _part(parting: Parting, outs: list[Any], takes: list[Placement], gives: list[Placement]) -> Part:
    """The graph of a parting with its outputs, which are ``outs`` in that of the whole."""
    local = [None if node is None else parting.local[node] for node in outs]
    cells = Counter(_cell(node) for node in {*local, *_holders(parting)} if node is not None)
    for node, whole, place in zip(local, outs, gives):
        if node is None or place == OWN:
            continue
        value, like = node.meta["val"], whole.meta["val"]
        alike = (
            value.permute(stride_order(like)).is_contiguous()
            if isinstance(place, Rows)
            else value.stride() == like.stride()
        )
        if not alike or not dense(like):
            raise Inseparable("an output that a part lays out otherwise")
        # What is added to must be nothing else.
        if place == SUM and (cells[_cell(node)] > 1 or local.count(node) > 1 or value.dtype not in SUMMED):
            raise Inseparable("a sum that is something else as well")
    output = parting.graph.output(tuple(local))
    output.meta = {"val": tuple(None if node is None else node.meta["val"] for node in local)}
    graph = GraphModule(torch.nn.Module(), parting.graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    wholes = [None if node is None else node.meta["val"] for node in outs]
    return Part(graph, [node.meta["val"] for node in _holders(graph)], takes, gives, list(output.meta["val"]), wholes)


def _cell(node: Node) -> int:
    return node.meta["val"].untyped_storage()._cdata
