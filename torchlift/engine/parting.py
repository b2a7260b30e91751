"""From a graph of a whole batch to one of a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from torchlift.engine.capture import stride_order
from torchlift.engine.placements import Inseparable, Placement, Rows, rule_of, sources_of

aten = torch.ops.aten


class WantedError(Exception):
    """An input has to come in parts, which it did not so far."""

    def __init__(self, node: Node, rows: Rows):
        self.node, self.rows = node, rows


class Parting:
    """A graph on its way to one that computes a single part of it."""

    def __init__(
        self,
        graph: Graph,
        parts: int,
        given: Mapping[Node, Placement],
        values: Mapping[Node, torch.Tensor],
        open_inputs: bool,
    ) -> None:
        """``given`` and ``values``: how inputs are placed, and what a part has of those that are in parts already.

        With ``open_inputs`` others may be wanted in parts as well.
        """
        self.parts, self.given, self.values, self.open_inputs = parts, given, values, open_inputs
        self.places: dict[Node, Placement] = {}
        self.graph = Graph()
        self.local: dict[Node, Node] = {}
        self.made: dict[tuple[Node, Rows], Node] = {}  # parts of values that are whole elsewhere
        for node in graph.nodes:
            if node.op == "placeholder":
                self._place_input(node)
        for node in graph.nodes:
            if node.op == "call_function":
                self._compute(node)
            elif node.op not in ("placeholder", "output"):
                raise Inseparable(node.op)

    def _place_input(self, node: Node) -> None:
        place = self.places[node] = self.given.get(node)
        new = self.local[node] = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        if node in self.values:
            new.meta["val"] = self.values[node]
        elif isinstance(place, Rows):
            value = node.meta["val"]
            if place.blocks != 1 or value.shape[place.dim] % self.parts:
                raise Inseparable(f"an input in parts {place} of {tuple(value.shape)}")
            new.meta["val"] = value.narrow(place.dim, 0, value.shape[place.dim] // self.parts)

    def emit(self, like: Node, target: Any, args: Any, kwargs: dict[str, Any]) -> Node:
        """An operator of the new graph, in the place of ``like``."""
        positional, named = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            value = target(*positional, **named)
        except (RuntimeError, ValueError) as error:
            if target is not aten.view.default or positional[0].is_contiguous():
                raise Inseparable(str(error)) from error
            flat = self.emit(like, aten.clone.default, args[:1], {"memory_format": torch.contiguous_format})
            return self.emit(like, target, (flat, args[1]), kwargs)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(like.meta) | {"val": value}
        return node

    def _compute(self, node: Node) -> None:
        self.local[node], self.places[node] = self._apply(node)

    def _apply(self, node: Node) -> tuple[Node, Placement]:
        """The operator in the new graph, of its arguments as they are placed now, and how what it gives is."""
        args, kwargs, place = rule_of(node)(self, node)
        if node.kwargs and not kwargs:
            raise Inseparable(f"{node.target} with {list(node.kwargs)}")
        new = self.emit(node, node.target, args, kwargs)
        value = new.meta["val"]
        if isinstance(value, torch.Tensor) and list(value.shape) != self.sizes(node, place):
            raise Inseparable(f"{node} has {tuple(value.shape)} as {place} of {tuple(self.shape(node))}")
        return new, place

    # What rules ask ---------------------------------------------------------------------------------------------------

    def shape(self, node: Node) -> torch.Size:
        """Of the whole."""
        return node.meta["val"].shape

    def sizes(self, node: Node, place: Placement) -> list[int]:
        """Those of a part of ``node``."""
        sizes = [int(n) for n in self.shape(node)]
        if isinstance(place, Rows):
            sizes[place.dim] = self.cut(sizes[place.dim], place)
        return sizes

    def cut(self, size: int, rows: Rows) -> int:
        if size % (rows.blocks * self.parts):
            raise Inseparable(f"{size} rows in {rows.blocks} blocks")
        return size // self.parts

    def here(self, arg: Any) -> Any:
        """``arg`` of the old graph in the new one, as it is placed."""
        return torch.fx.node.map_arg(arg, self.local.__getitem__)

    def want(self, node: Node, place: Placement) -> Node:
        """``node`` in the new graph, placed as ``place`` says, which it is or could be."""
        found = self.places[node]
        if found == place:
            return self.local[node]
        if found is not None or not isinstance(place, Rows):
            raise Inseparable(f"{node} is placed {found}, wanted {place}")
        if (node, place) not in self.made:
            self.made[node, place] = self._share_out(node, place)
        return self.made[node, place]

    def _share_out(self, node: Node, rows: Rows) -> Node:
        if node.op == "placeholder":
            if self.open_inputs and rows.blocks == 1:
                raise WantedError(node, rows)
            raise Inseparable(f"{node} is whole")
        if node.target is aten.full.default:
            return self.emit(node, node.target, (self.sizes(node, rows), node.args[1]), dict(node.kwargs))
        if node.target is aten.expand.default and not sources_of(self, node, rows):
            return self.emit(node, node.target, (self.here(node.args[0]), self.sizes(node, rows)), {})
        before = {source: (self.local[source], self.places[source]) for source, _ in sources_of(self, node, rows)}
        for source, wanted in sources_of(self, node, rows):
            self.local[source], self.places[source] = self.want(source, wanted), wanted
        new, place = self._apply(node)
        for source, (local, placed) in before.items():
            self.local[source], self.places[source] = local, placed
        if place != rows:
            raise Inseparable(f"{node} comes as {place}, wanted {rows}")
        return new


def dense(value: torch.Tensor) -> bool:
    """Whether a tensor has no gaps in memory, nor two places for one number."""
    return value.permute(stride_order(value)).is_contiguous()
