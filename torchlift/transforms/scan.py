"""Lifted loops: scan, over time or over stacked layers, and remat_scan, its rematerialised nest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, fingerprint, rng, stacking
from torchlift._context import context, entered
from torchlift.engine import loop
from torchlift.engine.run import run
from torchlift.errors import AxisError, CarryError, RandomnessError, TransformTargetError
from torchlift.filters import Filter
from torchlift.groups import Groups, Role
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Change, Meta, Packed, Update


class _Broadcast:
    """The type of :data:`torchlift.broadcast`."""

    def __repr__(self) -> str:
        return "broadcast"

    def __reduce__(self) -> str:
        return "broadcast"


broadcast = _Broadcast()
_NUMBERS = (bool, int, float, complex)


@dataclass(frozen=True, kw_only=True)
class _Loop(Transform):
    """What ``scan`` and ``remat_scan`` share. ``lengths`` has one size for each level of the nest."""

    variable_axes: Mapping[Any, Any] = field(default_factory=dict)
    variable_broadcast: Filter = False
    variable_carry: Filter = False
    split_rngs: Mapping[Any, bool] = field(default_factory=dict)

    def groups(self, label: str) -> Groups:
        return Groups(label, self.variable_axes, self.variable_broadcast, self.variable_carry, self.split_rngs)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        raise AssertionError  # pragma: no cover

    def stacking(self, base: type[nn.Module]) -> stacking.Stacking | None:
        groups = self.groups(self.label(base))
        return stacking.Stacking(groups, self.sizes) if groups.has_axis else None


@dataclass(frozen=True, kw_only=True)
class _Scan(_Loop):
    in_axes: Any = 0
    out_axes: Any = 0
    length: int | None = None
    reverse: bool = False
    unroll: int = 1
    data_transform: Callable[..., Any] | None = None
    metadata_params: Mapping[Any, Any] = field(default_factory=dict)
    compile: Any = True

    @property
    def sizes(self) -> tuple[int, ...] | None:
        return None if self.length is None else (self.length,)

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if not args:
            raise TransformTargetError(f"{label}: got no carry, expected a call (carry, *xs), with None for no carry")
        axes = _tree.broadcast_prefix(_as_tuple(self.in_axes, args[1:]), args[1:], f"{label}: in_axes")
        axes = [*[broadcast] * len(_tree.flatten(args[0])[0]), *axes, *[broadcast] * len(_tree.flatten(kwargs)[0])]
        run = _Iterations(self, fn, module, args, kwargs, label, inside, axes, 1)
        carry, ys = run.loop(reverse=self.reverse, unroll=self.unroll, compile=self.compile)
        return carry, run.placed(ys, self.out_axes)


@dataclass(frozen=True, kw_only=True)
class _Remat_scan(_Loop):
    lengths: tuple[int, ...] = ()
    policy: Callable[..., Any] | None = None
    compile: Any = True

    @property
    def sizes(self) -> tuple[int, ...] | None:
        return self.lengths

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if len(args) != 1 or kwargs:
            raise TransformTargetError(f"{label}: got {len(args)} arguments, expected one, the carry: the body is (module, carry)")
        axes = [broadcast] * len(_tree.flatten(args)[0])

        def body(module: nn.Module, carry: Any) -> Any:
            return fn(module, carry), None

        run = _Iterations(self, body, module, args, kwargs, label, inside, axes, len(self.lengths))
        return run.loop(remat=self.policy or True, lengths=self.lengths, compile=self.compile)[0]


def _as_tuple(axes: Any, xs: tuple[Any, ...]) -> Any:
    return tuple(axes) if isinstance(axes, list) else axes


@dataclass(frozen=True)
class _Result:
    """What is static about what an iteration returns; the same in each."""

    ys: _tree.Spec
    sown: _tree.Spec
    meta: Meta  # of the variables that come out stacked
    carried: tuple[Change, ...]


class _Iterations:
    """One call of a loop: the body as the engine wants it, and what the engine returns as the user wants it."""

    def __init__(
        self, config: _Loop, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str,
        inside: type | None, axes: list[Any], levels: int,
    ):  # fmt: skip
        self.label, self.levels = label, levels
        self.groups = groups = config.groups(label)
        self.transform = getattr(config, "data_transform", None)
        if stacking.is_pending(module):
            stacking.materialize(module, _length(label, config.sizes, [], [], _tree.flatten((args, kwargs))[0], axes, 1)[0])
        self.packed = packed = Packed(fn, module, args, kwargs, label, inside)
        self.roles = packed.group(groups.role)
        packed.allow(lambda c: groups.role(c).writable, _how_to_write)
        packed.refuse(groups.untold_streams(rng.positions()))
        self.axes = axes
        self.lengths = _length(label, config.sizes, packed.entries, self.roles, packed.leaves, axes, levels)
        self.carried = [at for at, role in enumerate(self.roles) if role.carried]
        self.scanned = [at for at, role in enumerate(self.roles) if role.axis is not None]
        self.shared = [at for at, role in enumerate(self.roles) if role.axis is None and not role.carried]
        count = len(_tree.flatten(args[0])[0])
        self.carry_leaves = [_as_tensor(leaf, packed.device) for leaf in packed.leaves[:count]]
        self.carry_spec = _tree.flatten(args[0])[1]
        self.carry_tree = args[0]
        self.xs_at = [at for at, axis in enumerate(axes) if axis is not broadcast and at >= count and axis is not None]
        self.const_at = [at for at in range(count, len(axes)) if at not in set(self.xs_at)]
        self.starts: dict[int, dict[str, tuple[int, int]]] = {}

    # Body ------------------------------------------------------------------------------------------------------------

    def body(self, consts: Any, carry: Any, x: Any) -> Any:
        """One iteration: ``(consts, carry, x) -> (carry, y)``, each a pair of variables and argument leaves."""
        tensors: list[Any] = [None] * len(self.roles)
        for places, values in ((self.shared, consts[0]), (self.carried, carry[0]), (self.scanned, x[0])):
            for at, value in zip(places, values, strict=True):
                tensors[at] = value
        leaves: list[Any] = [*carry[1], *[None] * (len(self.axes) - len(carry[1]))]
        for places, values in ((self.const_at, consts[1]), (self.xs_at, x[1])):
            for at, value in zip(places, values, strict=True):
                leaves[at] = value
        if self.transform is not None:
            tensors = self._transformed(tensors)
        with self._streams(x[2]):
            out, update = self.packed.pure(tensors, leaves)
        new_carry, ys = self._checked(out)
        return self._sorted(tensors, update, new_carry, ys)

    def _checked(self, out: Any) -> tuple[list[Any], Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise CarryError(
                f"{self.label}: the body returned {type(out).__name__}, expected a pair (carry, ys), with None for no ys"
            )
        leaves, spec = _tree.flatten(out[0])
        if spec != self.carry_spec:
            got, expected = _tree.paths(out[0]), _tree.paths(self.carry_tree)
            raise CarryError(
                f"{self.label}: the carry changed its structure: got {type(out[0]).__name__} with leaves {got}, "
                f"expected {type(self.carry_tree).__name__} with leaves {expected}, as in the carry that went in"
            )
        leaves = [_as_tensor(leaf, self.packed.device) for leaf in leaves]
        for path, new, old in zip(_tree.paths(out[0]), leaves, self.carry_leaves, strict=True):
            if _described(new) != _described(old):
                raise CarryError(
                    f"{self.label}: carry{path} changed: got {_described(new)}, expected {_described(old)}, as in the "
                    "carry that went in"
                )
        return leaves, out[1]

    def _sorted(self, tensors: list[Tensor], update: Update, new_carry: list[Any], ys: Any) -> Any:
        """The iteration's results: what is carried on, what comes out of each iteration, and what is static."""
        state = {at: tensors[at] for at in self.carried}
        stacked: list[tuple[Change, Tensor]] = []
        carried: list[Change] = []
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            if change.entry in state:
                state[change.entry] = value
                carried.append(change)
            else:
                stacked.append((change, value if self.packed.nested else value.detach()))
        y_leaves, y_spec = _tree.flatten(ys)
        sown, sown_spec = _tree.flatten(update.sown)
        meta = Meta(tuple(change for change, _ in stacked), update.meta.sites)
        static = _Result(y_spec, sown_spec, meta, tuple(carried))
        y_leaves = [_as_tensor(leaf, self.packed.device) for leaf in y_leaves]
        return ([state[at] for at in self.carried], new_carry), (y_leaves, [v for _, v in stacked], sown, static)

    def _streams(self, index: Any) -> Any:
        """NOTE [Streams in loops]. An iteration that is recomputed draws from its streams as it did at first."""
        if index is None or _compat.is_tracing():
            return entered()
        now = rng.positions()
        start = self.starts.setdefault(int(index), {n: now[n] if self.groups.splits(n) else at for n, at in self.begin.items()})
        recomputing = len(self.starts) > 0 and start != now and int(index) in self.seen
        self.seen.add(int(index))
        if recomputing:
            return entered(streams=start)
        rng.rewind(start)
        return entered()

    def _transformed(self, tensors: list[Any]) -> list[Any]:
        groups = [self.shared, self.carried, self.scanned]
        trees = tuple(self._tree_of(places, tensors) for places in groups)
        streams = tuple({name: at} for name, at in rng.positions().items())
        trees, _ = self.transform(trees, streams)
        new = list(tensors)
        for places, tree in zip(groups, trees, strict=True):
            for at in places:
                entry = self.packed.entries[at]
                if entry.store != "attribute":
                    new[at] = tree[entry.collection][entry.name]
        return new

    def _tree_of(self, places: Sequence[int], tensors: Sequence[Any]) -> dict[str, dict[str, Any]]:
        tree: dict[str, dict[str, Any]] = {}
        for at in places:
            entry = self.packed.entries[at]
            if entry.store != "attribute":
                tree.setdefault(entry.collection, {})[entry.name] = tensors[at]
        return tree

    # Loop ------------------------------------------------------------------------------------------------------------

    def loop(self, *, compile: Any, **options: Any) -> tuple[Any, Any]:
        """Runs the loop and publishes its state; the carry as the user's tree, and the engine's ys."""
        packed, length = self.packed, math.prod(self.lengths)
        tensors = packed.snapshot()
        consts = ([tensors[at] for at in self.shared], [packed.leaves[at] for at in self.const_at])
        carry = ([tensors[at] for at in self.carried], self.carry_leaves)
        self.begin, self.seen = rng.positions(), set()
        index = torch.arange(length) if self.begin else None
        xs = (
            [self._to_front(tensors[at], self.roles[at].axis, self.levels) for at in self.scanned],
            [self._to_front(packed.leaves[at], self.axes[at], 1) for at in self.xs_at],
            index,
        )
        compiled = compile is not False and not _compat.is_compiling()
        key = (fingerprint.of_packed(packed), self.transform) if compiled else self.label
        body = loop.Body(self.body, key, self.label)
        drawn = rng.default_states() if any(s == rng.DROPOUT for s, _ in packed.refused) and not _compat.is_tracing() else None
        if packed.has_hooks(skip_root=packed.inside is not None):
            compile = False
        (state, leaves), ys = run(
            body, consts, carry, loop.Stacked(xs), length,
            shared_draws=self.groups.splits(rng.DROPOUT) is False, compile=compile, **options,
        )  # fmt: skip
        if drawn is not None and rng.drew(drawn):
            rng.restore_defaults(drawn)
            raise RandomnessError(dict(packed.refused)[rng.DROPOUT])
        y_leaves, changed, sown, static = ys.tree
        self._publish(state, changed, sown, static)
        return _tree.unflatten(leaves, self.carry_spec), (y_leaves, static)

    def _to_front(self, value: Any, axis: int, levels: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        axis = axis % (value.ndim - levels + 1)
        value = value.movedim(tuple(range(axis, axis + levels)), tuple(range(levels)))
        return value.flatten(0, levels - 1) if levels > 1 else value

    def _to_place(self, value: Tensor, axis: int, levels: int) -> Tensor:
        if not -(value.ndim) <= axis < value.ndim:
            raise AxisError(f"{self.label}: out axis {axis} does not exist in a value of {value.ndim} dimensions, stacked")
        if levels == 1:
            return value.movedim(0, axis)
        value = value.unflatten(0, self.lengths)
        axis = axis % (value.ndim - levels + 1)
        return value.movedim(tuple(range(levels)), tuple(range(axis, axis + levels)))

    def _publish(self, state: list[Tensor], changed: list[Tensor], sown: list[Any], static: _Result) -> None:
        changed = [
            self._to_place(value, self.groups.role(change.collection).out_axis or 0, self.levels)
            for value, change in zip(changed, static.meta.changes, strict=True)
        ]
        carried = [state[self.carried.index(change.entry)] for change in static.carried]
        sown = [
            _tree.map_leaves(lambda v, s=site: self._to_place(v, self.groups.sown_axis(s.collection), 1) if isinstance(v, Tensor) else v, tree)
            for site, tree in zip(static.meta.sites, _tree.unflatten(sown, static.sown), strict=True)
        ]
        self.packed.publish(Update([*changed, *carried], sown, Meta((*static.meta.changes, *static.carried), static.meta.sites)))

    def placed(self, ys: Any, out_axes: Any) -> Any:
        """The ys, with the iterations on the axis where each belongs."""
        leaves, static = ys
        tree = _tree.unflatten(leaves, static.ys)
        out_axes = tuple(out_axes) if isinstance(out_axes, list) else out_axes
        axes = _tree.broadcast_prefix(out_axes, tree, f"{self.label}: out_axes")
        names = _tree.paths(tree) if any(axis is broadcast for axis in axes) else [""] * len(axes)
        return _tree.unflatten(
            [self._placed_leaf(leaf, axis, name) for leaf, axis, name in zip(leaves, axes, names, strict=True)], static.ys
        )

    def _placed_leaf(self, leaf: Any, axis: Any, name: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if axis is not broadcast and axis is not None:
            return self._to_place(leaf, axis, 1)
        if not _compat.is_compiling() and leaf.shape[0] and not bool((leaf == leaf[:1]).all()):
            raise AxisError(
                f"{self.label}: ys{name} differs between iterations, but its out axis is {axis!r}; give it an axis"
            )
        return leaf[0]


def _how_to_write(collection: str) -> str:
    return (
        f"give it an axis, variable_axes={{{collection!r}: 0}}, for a value of its own in each iteration, or carry it "
        f"through the loop, variable_carry={collection!r}"
    )


def _as_tensor(leaf: Any, device: torch.device) -> Any:
    return torch.as_tensor(leaf, device=device) if type(leaf) in _NUMBERS else leaf


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {list(leaf.shape)}"
    return repr(leaf)


def _length(
    label: str, sizes: tuple[int, ...] | None, entries: Sequence[Any], roles: Sequence[Role], leaves: Sequence[Any],
    axes: Sequence[Any], levels: int,
) -> tuple[int, ...]:  # fmt: skip
    """The lengths of the loop's levels, on which all that is scanned must agree."""
    found: dict[str, tuple[int, ...]] = {} if sizes is None else {"length": sizes}
    for entry, role in zip(entries, roles, strict=True):
        if role.axis is not None:
            where = f"{label}: {entry.name!r} in {entry.collection!r}"
            free = entry.tensor.ndim - levels + 1
            if not -free <= role.axis < free:
                raise AxisError(f"{where} has shape {tuple(entry.tensor.shape)}, which has no axis {role.axis} to scan over")
            axis = role.axis % free
            found[f"{entry.name!r} in {entry.collection!r}"] = tuple(entry.tensor.shape[axis : axis + levels])
            if sizes is not None and found[f"{entry.name!r} in {entry.collection!r}"] != sizes:
                got = found[f"{entry.name!r} in {entry.collection!r}"]
                raise AxisError(f"{where} has {_plain(got)} on axis {axis}, expected {_plain(sizes)}")
    for number, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        if isinstance(leaf, Tensor) and axis is not broadcast and axis is not None:
            if not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
                raise AxisError(f"{label}: argument leaf {number} has shape {tuple(leaf.shape)}, which has no axis {axis!r}")
            found[f"argument leaf {number} (axis {axis})"] = (leaf.shape[axis],)
    if not found:
        raise AxisError(f"{label}: nothing is scanned over, so the length is not known; pass length=")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}: {_plain(size)}" for name, size in found.items())
        raise AxisError(f"{label}: the lengths disagree, expected one: {listed}")
    return next(iter(found.values()))


def _plain(sizes: tuple[int, ...]) -> Any:
    return sizes[0] if len(sizes) == 1 else sizes


def scan(
    target: Target = None,
    variable_axes: Mapping[Any, Any] = {},  # noqa: B006  never mutated; an empty dict reads better in help()
    variable_broadcast: Filter = False,
    variable_carry: Filter = False,
    split_rngs: Mapping[Any, bool] = {},  # noqa: B006
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = {},  # noqa: B006
    methods: Any = None,
    *,
    compile: bool | dict[str, Any] = True,
) -> Any:
    """Runs a module in a loop: over time with shared variables, or over depth with variables of its own for each layer.

    The lifted counterpart of ``jax.lax.scan`` (and of ``flax.linen.scan``). The body is ``(module, carry, *xs) ->
    (carry, ys)``. It is compiled once, whatever the length.

    Args:
        target: a module class, a ``functools.partial`` of one, a function ``(module, carry, *xs)``, or nothing, for
            use as a decorator.
        variable_axes: for each collection filter the axis of its stacked variables: iteration ``i`` gets slice ``i``.
        variable_broadcast: collections that all iterations share, read-only.
        variable_carry: collections that each iteration gets from the one before, and may change.
        split_rngs: for each random stream whether its draws differ from iteration to iteration.
        in_axes: the scanned axis of each x: an int, ``torchlift.broadcast`` for one that every iteration gets whole,
            or a tree that is a prefix of the xs. Keyword arguments are broadcast.
        out_axes: where the axis goes in the ys; ``torchlift.broadcast`` for a y that is the same in every iteration.
        length: the number of iterations, where it cannot be read off.
        reverse: iterate from the end; every y lands at its own index.
        unroll: how many iterations make one compiled graph.
        data_transform: ``(variable_groups, rng_groups) -> the same``, applied to each iteration's slices.
        metadata_params: passed to ``AxisMetadata.add_axis`` and ``remove_axis``.
        methods: the methods to lift, for a class: a list, or a dict of arguments for each.
        compile: True for Inductor, False for the plain Python loop, or options of ``torch.compile``.

    Returns:
        A subclass of ``target``, or a function of the same signature, that returns ``(carry, ys)``. Numbers in the
        carry come back as tensors.

    Raises:
        AxisError: lengths disagree, are missing, or an axis does not exist.
        CarryError: the carry changed its structure, a shape or a dtype.
        ModifyCollectionError: the body changed a collection that is read-only in the loop.
        RandomnessError: the body drew from a stream that the transform was not told about.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.

    Example:
        >>> class Block(torch.nn.Linear):
        ...     def forward(self, carry):
        ...         return carry + super().forward(carry).relu(), None
        >>> stack = torchlift.scan(Block, variable_axes={"params": 0}, length=12, compile=False)(8, 8)
        >>> carry, _ = stack(torch.ones(2, 8))
        >>> stack.weight.shape, carry.shape
        (torch.Size([12, 8, 8]), torch.Size([2, 8]))
    """
    arguments = {
        "variable_axes": variable_axes, "variable_broadcast": variable_broadcast, "variable_carry": variable_carry,
        "split_rngs": split_rngs, "in_axes": in_axes, "out_axes": out_axes, "length": length, "reverse": reverse,
        "unroll": unroll, "data_transform": data_transform, "metadata_params": metadata_params, "compile": compile,
    }  # fmt: skip
    return lift(_Scan, target, arguments, methods)


def remat_scan(
    target: Target = None,
    lengths: Sequence[int] = (),
    policy: Callable[..., Any] | None = None,
    variable_broadcast: Filter = False,
    variable_carry: Filter = False,
    variable_axes: Mapping[Any, Any] = {True: 0},  # noqa: B006  never mutated
    split_rngs: Mapping[Any, bool] = {True: True},  # noqa: B006
    *,
    compile: bool | dict[str, Any] = True,
) -> Any:
    """A deep stack of one layer in memory that grows with a root of its depth.

    A nest of loops, each level of which is rematerialised: with ``d`` lengths, about ``n ** (1 / d)`` carries are kept
    for backward in each of ``d`` levels (the counterpart of ``flax.linen.remat_scan``).

    Args:
        target: a module class, a ``functools.partial`` of one, or a function ``(module, carry) -> carry``.
        lengths: the number of iterations at each level, outermost first; their product is the depth.
        policy: what an iteration saves; see ``torchlift.checkpoint_policies``. Nothing but its carry, by default.
        variable_broadcast: collections that all iterations share, read-only.
        variable_carry: collections that each iteration gets from the one before, and may change.
        variable_axes: the stacked collections; a variable gets the axes ``lengths`` there.
        split_rngs: for each random stream whether its draws differ from iteration to iteration.
        compile: True for Inductor, False for the plain Python loop, or options of ``torch.compile``.

    Returns:
        A subclass of ``target``, or a function of the same signature, that runs it ``prod(lengths)`` times.

    Raises:
        AxisError: no lengths are given, or stacked variables do not have them.
        CarryError: the carry changed its structure, a shape or a dtype.

    Example:
        >>> Deep = torchlift.remat_scan(torch.nn.Linear, lengths=(3, 4), compile=False)
        >>> deep = Deep(8, 8)
        >>> deep.weight.shape, deep(torch.ones(2, 8)).shape
        (torch.Size([3, 4, 8, 8]), torch.Size([2, 8]))
    """
    if not lengths:
        raise AxisError("remat_scan: lengths is empty, expected the number of iterations at each level, as in (4, 6)")
    arguments = {
        "lengths": tuple(lengths), "policy": policy, "variable_broadcast": variable_broadcast,
        "variable_carry": variable_carry, "variable_axes": variable_axes, "split_rngs": split_rngs, "compile": compile,
    }  # fmt: skip
    return lift(_Remat_scan, target, arguments)
