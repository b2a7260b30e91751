"""How the rows of a batch travel through a graph: what each part of a batch computes, found operator by operator.

A value of a graph that is computed in parts, each for its share of the batch, is one of three things. ``Rows``: each
part has its share of one dimension. ``SUM``: the whole is the sum of what the parts have, as for gradients of weights.
``None``: every part has the whole. What an operator makes of them is a rule here; one without a rule, or given what its
rule does not take, raises ``Inseparable``, and the graph stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Node

aten, prims = torch.ops.aten, torch.ops.prims


class Inseparable(Exception):
    """A graph cannot be computed in parts. Never leaves the engine."""


@dataclass(frozen=True)
class Rows:
    """A dimension of which each part has its share: of each of so many equal blocks, one after the other.

    Blocks come of the iterations of a loop over time: of ``[16 * batch, width]`` a part has its share of every batch.
    """

    dim: int
    blocks: int = 1


SUM = "sum"
Placement = Rows | str | None
Found = tuple[Any, dict[str, Any], Placement]  # arguments for a part, and how the result is placed


def carried(shape: Sequence[int], rows: Rows, new: Sequence[int], parts: int) -> Rows:
    """Where the ``rows`` of a tensor of ``shape`` are when it is viewed as ``new``."""
    if 0 in shape:
        raise Inseparable("empty")
    before = math.prod(shape[: rows.dim]) * rows.blocks
    length = shape[rows.dim] // rows.blocks
    outer = 1
    for dim, size in enumerate(new):
        blocks, rest = divmod(before, outer)
        if rest == 0 and blocks and size % blocks == 0 and size // blocks > 1:
            own = size // blocks
            # It holds all that is shared out, and perhaps what is inside, or an outer factor of it.
            if own % parts == 0 and (own % length == 0 or length % own == 0):
                return Rows(dim, blocks)
        outer *= size
    raise Inseparable(f"rows {rows} of {tuple(shape)} seen as {tuple(new)}")


class Places(Protocol):
    """What a rule asks about a graph on its way to one of a part."""

    parts: int
    places: dict[Node, Placement]

    def shape(self, node: Node) -> torch.Size:
        """Of the whole."""

    def sizes(self, node: Node, place: Placement) -> list[int]:
        """Those of a part of ``node``, placed so."""

    def here(self, arg: Any) -> Any:
        """``arg`` in the new graph, as it is placed."""

    def want(self, node: Node, place: Placement) -> Node:
        """``node`` in the new graph, placed as ``place`` says."""


# Rules: the operator's arguments for a part, and how what it gives is placed ------------------------------------------

Rule = Callable[[Places, Node], Found]
RULES: dict[Any, Rule] = {}


def rule_for(*targets: Any) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return enter


def rule_of(node: Node) -> Rule:
    op: Any = node.target
    tags = getattr(op, "tags", ())
    if op in RULES:
        return RULES[op]
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _pointwise
    raise Inseparable(f"{op} has no rule")


_ADDS = {aten.add.Tensor, aten.sub.Tensor}
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.neg.default, aten.clone.default}
_CASTS = {prims.convert_element_type.default, aten._to_copy.default}


def aligned(s: Places, node: Node, arg: Node, rows: Rows) -> Rows | None:
    """What of ``arg`` goes with ``rows`` of a pointwise operator's result; None where it is the same for all rows."""
    dim = rows.dim - (node.meta["val"].ndim - arg.meta["val"].ndim)
    return Rows(dim, rows.blocks) if dim >= 0 and s.shape(arg)[dim] != 1 else None


def _pointwise(s: Places, node: Node) -> Found:
    args = node.all_input_nodes
    places = [s.places[arg] for arg in args]
    if SUM in places:
        return s.here(node.args), s.here(node.kwargs), _linear(s, node)
    ndim = node.meta["val"].ndim
    found = {Rows(p.dim + ndim - arg.meta["val"].ndim, p.blocks) for arg, p in zip(args, places) if isinstance(p, Rows)}
    if not found:
        return s.here(node.args), s.here(node.kwargs), None
    if len(found) > 1:
        raise Inseparable(f"{node} of {places}")
    (rows,) = found
    parts = {arg: s.want(arg, wanted) for arg in args if (wanted := aligned(s, node, arg, rows))}
    take = lambda arg: parts.get(arg) or s.want(arg, None)  # noqa: E731
    return torch.fx.node.map_arg(node.args, take), torch.fx.node.map_arg(node.kwargs, take), rows


def _linear(s: Places, node: Node) -> Placement:
    """That of what is linear in a sum among its arguments, which is a sum."""
    places = [s.places[arg] if isinstance(arg, Node) else None for arg in node.args]
    sums = places.count(SUM)
    if not any(isinstance(place, Rows) for place in places) and not any(
        isinstance(v, Node) for v in node.kwargs.values()
    ):
        if node.target in _ADDS and sums == len(places):
            return SUM
        if sums == 1 and (node.target in _SCALES or node.target is aten.div.Tensor and places[0] == SUM):
            return SUM
        if node.target in _CASTS and node.meta["val"].dtype.is_floating_point:
            return SUM
    raise Inseparable(f"{node.target} of a sum")


RULES[aten._to_copy.default] = _pointwise  # which torch does not say of it


@rule_for(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(s: Places, node: Node) -> Found:
    (x, *_), new = node.args, s.shape(node)
    place = s.places[x]  # type: ignore[index]
    if isinstance(place, Rows):
        place = carried(s.shape(x), place, new, s.parts)  # type: ignore[arg-type]
    return (s.here(x), s.sizes(node, place)), {}, place


def _moved(order: Callable[[Node], list[int]]) -> Rule:
    """The rule of an operator that gives the dimensions another order, by where each came from."""

    def rule(s: Places, node: Node) -> Found:
        place = s.places[node.args[0]]  # type: ignore[index]
        if isinstance(place, Rows):
            place = Rows(order(node).index(place.dim), place.blocks)
        return s.here(node.args), {}, place

    return rule


def _order(node: Node) -> list[int]:
    """Of what a permutation gives: where each dimension came from."""
    ndim = node.meta["val"].ndim
    order = list(range(ndim))
    args: Any = node.args
    if node.target is aten.permute.default:
        return [d % ndim for d in args[1]]
    a, b = (0, 1) if node.target is aten.t.default else (d % ndim for d in args[1:3])
    if ndim > 1:
        order[a], order[b] = order[b], order[a]
    return order


RULES.update(dict.fromkeys([aten.permute.default, aten.t.default, aten.transpose.int], _moved(_order)))


@rule_for(aten.expand.default)
def _expand(s: Places, node: Node) -> Found:
    x: Any = node.args[0]
    place = s.places[x]
    if isinstance(place, Rows):
        place = Rows(place.dim + node.meta["val"].ndim - x.meta["val"].ndim, place.blocks)
    return (s.here(x), s.sizes(node, place)), {}, place


@rule_for(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int)
def _counted(s: Places, node: Node) -> Found:
    """Of operators that put in dimensions or take some out."""
    place = s.places[node.args[0]]  # type: ignore[index]
    if isinstance(place, Rows):
        kept = _kept(node)
        if place.dim not in kept:
            raise Inseparable(f"{node.target} in the dimension of the rows")
        place = Rows(kept.index(place.dim), place.blocks)
    return s.here(node.args), {}, place


def _kept(node: Node) -> list[int | None]:
    """Of each dimension of the result: which one it was; None where it is new."""
    ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    if node.target is aten.unsqueeze.default:
        dims: list[int | None] = list(range(ndim))
        dims.insert(int(node.args[1]) % (ndim + 1), None)  # type: ignore[arg-type]
        return dims
    out: Any = node.args[1]
    gone = {int(d) % ndim for d in (out if isinstance(out, list | tuple) else [out])}
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return [d for d in range(ndim) if d not in gone or node.target is not aten.select.int and shape[d] != 1]


@rule_for(aten.slice.Tensor)
def _slice(s: Places, node: Node) -> Found:
    x, dim, lo, hi = _bounds(node)
    place = s.places[x]
    if not isinstance(place, Rows) or place.dim != dim:
        return s.here(node.args), {}, place
    block = s.shape(x)[dim] // place.blocks
    if len(node.args) > 4 and node.args[4] != 1 or lo % block or hi % block or hi <= lo:
        raise Inseparable(f"rows {lo} to {hi} of blocks of {block}")
    return (s.here(x), dim, lo // s.parts, hi // s.parts), {}, Rows(dim, (hi - lo) // block)


def _bounds(node: Node) -> tuple[Node, int, int, int]:
    x, dim, lo, hi, *_ = (*node.args, *(0, None, None)[len(node.args) - 1 :])  # type: ignore[misc]
    size = int(x.meta["val"].shape[dim])  # type: ignore[union-attr]
    lo, hi = (0 if lo is None else int(lo)), (size if hi is None else int(hi))  # type: ignore[arg-type]
    lo, hi = (max(n + size, 0) if n < 0 else min(n, size) for n in (lo, hi))
    return x, int(dim) % x.meta["val"].ndim, lo, hi  # type: ignore[return-value, arg-type, union-attr]


@rule_for(aten.cat.default)
def _cat(s: Places, node: Node) -> Found:
    members, dim = _members(node)
    places = [s.places[m] for m in members]
    if all(place == places[0] for place in places) and not isinstance(places[0], Rows):
        return (s.here(members), dim), {}, places[0]
    rows = next((place for place in places if isinstance(place, Rows)), None)
    if rows is None:
        raise Inseparable(f"{node} of {places}")
    if rows.dim != dim:
        return ([s.want(m, rows) for m in members], dim), {}, rows
    # Along the rows there are as many blocks of equal size as all members have.
    block = s.shape(members[places.index(rows)])[dim] // rows.blocks
    if any(s.shape(m)[dim] % block for m in members):
        raise Inseparable(f"{node} of blocks of other sizes")
    blocks = [s.shape(m)[dim] // block for m in members]
    return ([s.want(m, Rows(dim, n)) for m, n in zip(members, blocks)], dim), {}, Rows(dim, sum(blocks))


def _members(node: Node) -> tuple[list[Node], int]:
    """What is put together, and in which dimension."""
    args: Any = node.args
    return list(args[0]), (args[1] if len(args) > 1 else node.kwargs.get("dim", 0)) % node.meta["val"].ndim


@rule_for(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(s: Places, node: Node) -> Found:
    """Of operators that put one value into another, in a dimension that is not that of the rows."""
    args: Any = node.args
    (base, source), rest = args[:2], args[2:]
    dim = (rest[0] if rest else 0) % node.meta["val"].ndim
    places = {s.places[base], s.places[source]}
    if places in ({None}, {SUM}):
        return s.here(node.args), s.here(node.kwargs), s.places[base]
    gone = node.target is aten.select_scatter.default
    outer, inner = s.places[base], s.places[source]
    rows = Rows(inner.dim + (gone and inner.dim >= dim), inner.blocks) if isinstance(inner, Rows) else outer
    if not isinstance(rows, Rows) or rows.dim == dim:
        raise Inseparable(f"{node} of {places}")
    part = s.want(source, Rows(rows.dim - (gone and rows.dim > dim), rows.blocks))
    return (s.want(base, rows), part, *rest), {}, rows


@rule_for(operator.getitem)
def _item(s: Places, node: Node) -> Found:
    return s.here(node.args), {}, s.places[node.args[0]]  # type: ignore[index]


@rule_for(aten.split_with_sizes.default, aten.split.Tensor)
def _split(s: Places, node: Node) -> Found:
    x: Any = node.args[0]
    place = s.places[x]
    dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % x.meta["val"].ndim  # type: ignore
    if isinstance(place, Rows) and place.dim == dim:
        raise Inseparable(f"{node} in the dimension of the rows")
    return (s.here(x), node.args[1], dim), {}, place


@rule_for(aten.mm.default, aten.bmm.default)
def _product(s: Places, node: Node) -> Found:
    a, b = node.args
    left, right, place = _factors(s, s.places[a], s.places[b], node.meta["val"].ndim)  # type: ignore[index]
    return (s.want(a, left), s.want(b, right)), {}, place  # type: ignore[arg-type]


def _factors(s: Places, a: Placement, b: Placement, ndim: int) -> tuple[Placement, Placement, Placement]:
    """How the factors of a product have to be placed, and how it then is."""
    row, column = ndim - 2, ndim - 1
    if a is None and b is None:
        return None, None, None
    if SUM in (a, b):
        if a is None or b is None:
            return a, b, SUM
    elif isinstance(a, Rows) and a.dim == row and b is None:
        return a, None, a
    elif isinstance(b, Rows) and b.dim == column and a is None:
        return None, b, b
    elif isinstance(a, Rows) and a.dim == column and b in (None, Rows(row, a.blocks)):
        return a, Rows(row, a.blocks), SUM
    elif isinstance(b, Rows) and b.dim == row and a is None:
        return Rows(column, b.blocks), b, SUM
    elif ndim == 3 and len(rows := {a, b} - {None}) == 1:
        (both,) = rows
        if isinstance(both, Rows) and both.dim == 0:
            return both, both, both
    raise Inseparable(f"a product of {a} and {b}")


@rule_for(aten.addmm.default)
def _addmm(s: Places, node: Node) -> Found:
    bias, a, b = node.args
    left, right, place = _factors(s, s.places[a], s.places[b], 2)  # type: ignore[index]
    if place == SUM:
        raise Inseparable("a sum with a bias")
    wanted = aligned(s, node, bias, place) if isinstance(place, Rows) else None  # type: ignore[arg-type]
    return (s.want(bias, wanted), s.want(a, left), s.want(b, right)), s.here(node.kwargs), place  # type: ignore[arg-type]


def _reduction(s: Places, node: Node) -> Found:
    x: Any = node.args[0]
    place, ndim = s.places[x], x.meta["val"].ndim
    dims, keep = _reduced(node, ndim)
    if isinstance(place, Rows):
        if place.dim in dims:
            if node.target not in (aten.sum.dim_IntList, aten.sum.default):
                raise Inseparable(f"{node.target} over the rows")
            place = SUM
        elif not keep:
            place = Rows(place.dim - sum(d < place.dim for d in dims), place.blocks)
    elif place == SUM and node.target not in (aten.sum.dim_IntList, aten.sum.default, aten.mean.dim):
        raise Inseparable(f"{node.target} of a sum")
    return s.here(node.args), s.here(node.kwargs), place


def _reduced(node: Node, ndim: int) -> tuple[set[int], bool]:
    """The dimensions that a reduction goes over, and whether they stay."""
    named = {argument.name: at for at, argument in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]

    def value(name: str, otherwise: Any) -> Any:
        at = named.get(name)
        given = node.args[at] if at is not None and at < len(node.args) else node.kwargs.get(name)
        return otherwise if given is None else given

    dims = value("dim", None)
    dims = range(ndim) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    return {int(d) % max(ndim, 1) for d in dims}, bool(value("keepdim", False))


_REDUCTIONS = (
    "sum.dim_IntList sum.default mean.dim amax.default amin.default prod.dim_int any.dim any.dims all.dim all.dims"
    " var.correction var_mean.correction argmax.default argmin.default"
)
for _name in _REDUCTIONS.split():
    _packet, _overload = _name.split(".")
    RULES[getattr(getattr(aten, _packet), _overload)] = _reduction


@rule_for(
    aten._softmax.default, aten._log_softmax.default, aten.flip.default, prims.rev.default, aten.constant_pad_nd.default
)
def _within(s: Places, node: Node) -> Found:
    """Of operators along some dimensions that keep the others."""
    x: Any = node.args[0]
    place, ndim = s.places[x], x.meta["val"].ndim
    touched: Any = node.args[1]
    if node.target is aten.constant_pad_nd.default:
        dims = {ndim - 1 - at // 2 for at, pad in enumerate(touched) if pad}
    else:
        dims = {d % ndim for d in (touched if isinstance(touched, list | tuple) else [touched])}
    if place == SUM or isinstance(place, Rows) and place.dim in dims:
        raise Inseparable(f"{node.target} of {place}")
    return s.here(node.args), s.here(node.kwargs), place


@rule_for(aten.full.default, prims.iota.default, aten.scalar_tensor.default)
def _made(s: Places, node: Node) -> Found:
    return s.here(node.args), s.here(node.kwargs), None


_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


@rule_for(_FLASH, aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention(s: Places, node: Node) -> Found:
    places = {s.places[arg] for arg in node.all_input_nodes}
    dropout = node.args[3 if node.target is _FLASH else 6 :][:1]
    if not places <= {None, Rows(0)} or any(dropout) or any(isinstance(value, Node) for value in node.kwargs.values()):
        raise Inseparable(f"attention of {places}")
    if places == {None}:
        return s.here(node.args), dict(node.kwargs), None
    return torch.fx.node.map_arg(node.args, lambda arg: s.want(arg, Rows(0))), dict(node.kwargs), Rows(0)


# What an operator's arguments would have to be ------------------------------------------------------------------------


def sources_of(s: Places, node: Node, rows: Rows) -> list[tuple[Node, Rows]]:
    """Of which arguments of ``node`` which rows are needed for ``rows`` of what it gives."""
    op: Any = node.target
    x: Any = node.args[0] if node.args else None
    if torch.Tag.pointwise in getattr(op, "tags", ()):
        return [(arg, wanted) for arg in node.all_input_nodes if (wanted := aligned(s, node, arg, rows))]
    if RULES.get(op) is _view:
        return [(x, carried(s.shape(node), rows, s.shape(x), s.parts))]
    if op in (aten.permute.default, aten.t.default, aten.transpose.int):
        return [(x, Rows(_order(node)[rows.dim], rows.blocks))]
    if op is aten.expand.default:
        return [(x, wanted)] if (wanted := aligned(s, node, x, rows)) else []
    if RULES.get(op) is _counted:
        dim = _kept(node)[rows.dim]
        if dim is not None:
            return [(x, Rows(dim, rows.blocks))]
    if op is aten.slice.Tensor:
        _, dim, _, _ = _bounds(node)
        if dim != rows.dim:
            return [(x, rows)]
        block = s.shape(node)[dim] // rows.blocks
        if s.shape(x)[dim] % block == 0:
            return [(x, Rows(dim, s.shape(x)[dim] // block))]
    if RULES.get(op) in (_within, _split, _item):
        return [(x, rows)]
    if op is aten.cat.default and _members(node)[1] != rows.dim:
        return [(member, rows) for member in _members(node)[0]]
    if op in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        a, b = node.args[-2:]
        ndim = node.meta["val"].ndim
        return [(a if rows.dim == ndim - 2 else b, rows)] if rows.dim >= ndim - 2 else [(a, rows), (b, rows)]  # type: ignore
    raise Inseparable(f"{op} gives no rows {rows}")
