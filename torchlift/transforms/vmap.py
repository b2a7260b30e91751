"""Lifted vmap: one module for many, each with its own or shared variables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, metadata, rng, stacked_classes, stacking
from torchlift.changes import Update
from torchlift.engine.run import Report, record
from torchlift.errors import (
    AxisError,
    ModifyCollectionError,
    RandomnessError,
    TorchliftWarning,
    UnsupportedError,
    warn,
)
from torchlift.groups import Groups, groups_of
from torchlift.lifting import Target, Transform, lift
from torchlift.named_axes import and_named
from torchlift.pack import Packed
from torchlift.transforms.options import check_axes, check_count, check_name, check_params, check_size


@dataclass(frozen=True, kw_only=True)
class _Vmap(Transform):
    variable_axes: Mapping[Any, Any] = field(default_factory=dict)
    split_rngs: Mapping[Any, bool] = field(default_factory=dict)
    in_axes: Any = 0
    out_axes: Any = 0
    axis_size: int | None = None
    axis_name: str | None = None
    spmd_axis_name: str | None = None
    metadata_params: Mapping[Any, Any] = field(default_factory=dict)
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_size(self.axis_size, "vmap: axis_size")
        check_name(self.axis_name, "vmap: axis_name")
        check_name(self.spmd_axis_name, "vmap: spmd_axis_name")
        check_params(self.metadata_params, "vmap: metadata_params")
        if self.chunk_size is not None:
            check_count(self.chunk_size, "vmap: chunk_size")

    def groups(self, label: str) -> Groups:
        return groups_of(label, self.variable_axes, False, False, self.split_rngs)

    def stacking(self, base: type[nn.Module]) -> stacking.Stacking | None:
        groups = self.groups(self.label(base))
        sizes = None if self.axis_size is None else (self.axis_size,)
        return stacking.Stacking(groups, sizes, self.partition_params) if groups.has_axis else None

    @property
    def partition_params(self) -> Mapping[Any, Any]:
        """What axis metadata is told: the axis is named as the mesh axis it is sharded over, unless told otherwise."""
        named = {} if self.spmd_axis_name is None else {metadata.PARTITION_NAME: self.spmd_axis_name}
        return {**named, **self.metadata_params}

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        groups = self.groups(label)
        leaf_axes = _argument_axes(self.in_axes, args, kwargs, label)
        names = lambda: _tree.argument_names(args, kwargs)
        if stacking.is_pending(module):
            leaves, _ = _tree.flatten((args, kwargs))
            stacked_classes.materialize(module, self._size([], [], [], leaves, leaf_axes, names, label))
        packed = Packed(fn, module, args, kwargs, label, inside)
        roles = packed.group(groups.role)
        packed.allow(lambda c: groups.role(c).writable, lambda c: f"give it an axis: variable_axes={{{c!r}: 0}}")
        packed.refuse(groups.untold_streams(rng.positions()))
        size = self._size(packed.entries, packed.tensors, roles, packed.leaves, leaf_axes, names, label)
        run = _Run(packed, groups, self.out_axes, size, self.axis_name)
        run.attributes = metadata.without_axis(packed, [role.axis for role in roles], self.partition_params)
        in_dims = (0, [role.axis for role in roles], [leaf_axes[at] for at in packed.tensor_leaves])
        # A body may ask for it by the axis's name, and torch's own vmap needs something to map.
        needed = self.axis_name is not None or self.chunk_size is not None or _compat.is_compiling()
        index = torch.arange(size, device=packed.device) if needed else None
        inputs = (index, packed.tensors, [packed.leaves[at] for at in packed.tensor_leaves])
        out, update = run.finish(self._map(run, in_dims, inputs, groups))
        packed.publish(update)
        return out

    def _map(self, run: _Run, in_dims: Any, inputs: Any, groups: Groups) -> list[Tensor]:
        # In compiled code no stream has a generator of its own.
        seeded = () if _compat.is_compiling() else rng.positions()
        splits = {stream: groups.splits(stream) for stream in (rng.DROPOUT, *seeded)}
        if run.size == 0:
            return run.empty(in_dims, inputs)
        told = {split for split in splits.values() if split is not None}
        if len(told) > 1:
            # torch's vmap knows one kind of randomness at a time.
            return run.by_index(in_dims, inputs, splits, "random streams differ in whether they are split")
        # It asks no generator whose it is: where one stream may be drawn from, it is `pure` that refuses the others.
        randomness = {True: "different", False: "same", None: "error"}[next(iter(told), None)]
        start = () if _compat.is_compiling() else rng.default_states()
        try:
            if _compat.is_compiling() or self.chunk_size is not None:
                return torch.func.vmap(run.one, in_dims, randomness=randomness, chunk_size=self.chunk_size)(*inputs)
            index, tensors, leaves = inputs
            first = [] if index is None else [index]
            at, end = len(first), len(first) + len(tensors)
            return _compat.vmap_of_lists(
                lambda rows: run.one(rows[0] if first else None, rows[at:end], rows[end:]),
                [*first, *tensors, *leaves], [*[0] * at, *in_dims[1], *in_dims[2]], run.size, randomness,
            )  # fmt: skip
        except RuntimeError as error:
            text = str(error)
            if "randomness error mode" in text:
                raise RandomnessError(dict(run.packed.refused)[rng.DROPOUT]) from error
            shared = _shared(run.packed, groups)
            if shared and run.packed.wrote_shared(error):
                raise ModifyCollectionError(_shared_write(run.packed, shared)) from error
            if not any(part in text for part in _NO_BATCHING_RULE):
                raise
            why = text.splitlines()[0]
            if self.axis_name is not None:
                raise UnsupportedError(
                    f"{groups.label}: torch cannot map an operator of the body, which would have to run index by "
                    f"index; expected one with a batching rule, since axis_name={self.axis_name!r} is for collectives, "
                    f"which need all indices at once: write that operator as others, or leave out axis_name=. {why}"
                ) from error
            _warn_once(run.packed.fn, f"{groups.label}: runs index by index, since torch says: {why}")
        rng.write_states(start)
        return run.by_index(in_dims, inputs, splits, why)

    def _size(
        self, entries: Any, tensors: Any, roles: Any, leaves: Sequence[Any], leaf_axes: Sequence[Any],
        names: Callable[[], list[str]], label: str,
    ) -> int:  # fmt: skip
        mapped: list[tuple[Tensor, int, Any]] = [
            (tensor, role.axis, entry)
            for entry, tensor, role in zip(entries, tensors, roles, strict=True)
            if role.axis is not None
        ]
        for number, (leaf, axis) in enumerate(zip(leaves, leaf_axes, strict=True)):
            if axis is not None and isinstance(leaf, Tensor):
                mapped.append((leaf, axis, number))
        sizes = [] if self.axis_size is None else [self.axis_size]
        for tensor, axis, what in mapped:
            if not -tensor.ndim <= axis < tensor.ndim:
                name = _named(what, names)
                raise AxisError(
                    f"{label}: {name} has shape {tuple(tensor.shape)}, which has no axis {axis}{_by_position(name)}"
                )
            sizes.append(_extent(tensor, axis))
        if not sizes:
            raise AxisError(f"{label}: nothing has a mapped axis, so the size is not known; pass axis_size=")
        if len(set(sizes)) > 1:
            found = [f"axis_size: {self.axis_size}"] if self.axis_size is not None else []
            counts = Counter(_extent(tensor, axis) for tensor, axis, what in mapped if not isinstance(what, int))
            for tensor, axis, what in mapped:  # all arguments, but of the variables of one size only the first
                size = _extent(tensor, axis)
                others = 0 if isinstance(what, int) else counts.pop(size, 0) - 1
                if others >= 0:
                    more = f" and {others} more in the module" if others else ""
                    found.append(f"{_named(what, names)} (axis {axis}){more}: {size}")
            listed = ", ".join(found)
            raise AxisError(
                f"{label}: the sizes of the mapped axis disagree, expected one: {listed}{_by_position(listed)}"
            )
        return sizes[0]


def _extent(tensor: Tensor, axis: int) -> int:
    """A size, as a number also where ``torch.jit.trace`` has tensors for sizes."""
    size: Any = tensor.shape[axis]
    return int(size) if isinstance(size, Tensor) else size


def _named(what: Any, names: Callable[[], list[str]]) -> str:
    """An entry, or the number of an argument leaf, in an error."""
    if isinstance(what, int):
        return names()[what]
    return f"{what.name!r} in {what.collection!r}"


def _by_position(names: str) -> str:
    """The fix, where an error names keyword arguments."""
    keyword = "keyword argument" in names
    return "; keyword arguments are mapped on axis 0, pass by position what in_axes is to tell" if keyword else ""


def _shared(packed: Packed, groups: Groups) -> list[str]:
    """The buffers that all indices share."""
    return [
        entry.name
        for entry in packed.entries
        if entry.store == "_buffers" and groups.role(entry.collection).axis is None
    ]


def _shared_write(packed: Packed, shared: Sequence[str]) -> str:
    collections = sorted({entry.collection for entry in packed.entries if entry.name in shared})
    return (
        f"{packed.label}: a body wrote what differs from index to index into a variable that all indices share, one of "
        f"{shared}; give its collection an axis: variable_axes={{{', '.join(f'{c!r}: 0' for c in collections)}}}"
    )


_NO_BATCHING_RULE = (
    "Batching rule not implemented",
    "batching rule",
    "we could not generate a fallback",
    "does not have a batching rule",
    "vmap: It looks like you're",
    "different inplace randomness",  # torch.empty(n).normal_(), as in torch.distributions
    "must override the setup_context",  # an autograd.Function of the old style
    "attempting to call Tensor.requires_grad_()",
    "batching operators that can",  # give or take results whose shape depends on values: nonzero, a boolean mask
    "vmap: Attempted to vmap over `mask`",
    # What is mapped is written into what is not: a tensor that the body made.
    "vmap: inplace arithmetic",
    "is not possible because there exists a Tensor `other`",
    "doesn't match the broadcast shape",
    "which will be updated in place, were not batched",
    "accessing `data` under vmap transform",
    "Cannot access data pointer of Tensor",  # numpy(), tolist()
    "does not require grad and does not have a grad_fn",  # autograd.grad, by an autograd that is above the map
)
_warned: set[Any] = set()


def _warn_once(fn: Any, message: str) -> None:
    if fn not in _warned:
        _warned.add(fn)
        warn(message, TorchliftWarning)


def _argument_axes(in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any], label: str) -> list[Any]:
    """The axis of each leaf of ``(args, kwargs)``; keyword arguments are mapped on axis 0, as in torch.func.vmap."""
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    found = _tree.broadcast_prefix(in_axes, args, f"{label}: in_axes")
    check_axes(found, f"{label}: in_axes")
    return found + [0] * len(_tree.flatten(kwargs)[0]) if kwargs else found


class _Run:
    """One mapped call: the body as a function of flat tensors, and how its results are put together again."""

    def __init__(self, packed: Packed, groups: Groups, out_axes: Any, size: int, axis_name: str | None):
        self.attributes: Mapping[tuple[int, str], Any] = {}
        self.packed, self.groups, self.out_axes, self.size, self.axis_name = packed, groups, out_axes, size, axis_name

    def one(self, index: Tensor | None, tensors: Any, leaves: Any) -> list[Tensor]:
        """The body at one index. What is static about its results is kept in ``self``: it is the same at each."""
        self.packed.context["axes"] = and_named(self.axis_name, self.size, index)
        out, update = self.packed.pure(tensors, self.packed.with_tensors(leaves), self.attributes)
        leaves, self.out_spec = _tree.flatten(out)
        sown, self.sown_spec = _tree.flatten(update.sown)
        self.results = len(leaves)
        flat = [*leaves, *update.changed, *sown]
        flat = [torch.as_tensor(x, device=self.packed.device) if type(x) in _NUMBERS else x for x in flat]
        self.meta = update.meta
        self.static = [None if isinstance(x, Tensor) else (x,) for x in flat]
        level = _compat.functorch_depth() if index is None else _compat.functorch_level(index)
        results = [x for x in flat if isinstance(x, Tensor)]
        self.mapped = [_compat.functorch_level(x) >= level for x in results]
        return results

    def by_index(self, in_dims: Any, inputs: Any, splits: Mapping[str, bool | None], why: str) -> list[Tensor]:
        """The same, index after index: for operators without a batching rule, and streams that differ in splitting."""
        record(Report(self.groups.label, "index by index", why))
        rows = []
        start, positions = rng.default_states(), rng.positions()
        for i in range(self.size):
            if splits[rng.DROPOUT] is False:
                rng.write_states(start)
            rng.rewind({name: at for name, at in positions.items() if not splits.get(name)})
            rows.append(self.one(*_slices(in_dims, inputs, i)))
        for number, column in enumerate(zip(*rows, strict=True)):
            for i, x in enumerate(column):
                if x.shape != column[0].shape:
                    tensors = [at for at, static in enumerate(self.static) if static is None]
                    name = self._result(tensors[number])
                    raise AxisError(
                        f"{self.groups.label}: {name} has shape {tuple(x.shape)} at index {i}, expected "
                        f"{tuple(column[0].shape)} as at index 0; pad it, or return what has one shape"
                    )
        self.mapped = [any(not torch.equal(x, column[0]) for x in column) for column in zip(*rows, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def empty(self, in_dims: Any, inputs: Any) -> list[Tensor]:
        """What comes out of no index at all: the shapes of one, with 0 on the new axis."""
        one = _compat.run_on_fakes(self.one, *_empty_slices(in_dims, inputs))
        self.mapped = [True] * len(one)
        return [torch.zeros((0, *x.shape), dtype=x.dtype, device=x.device) for x in one]

    def finish(self, stacked: Sequence[Tensor]) -> tuple[Any, Update]:
        """The results, each with the new axis where it belongs; ``stacked`` has it on 0."""
        columns = iter(zip(stacked, self.mapped, strict=True))
        found = [next(columns) if static is None else static[0] for static in self.static]
        ends = self.results, self.results + len(self.meta.changes)
        results, changed, sown = found[: ends[0]], found[ends[0] : ends[1]], found[ends[1] :]
        tree = _tree.unflatten(results, self.out_spec)  # leaves are (tensor, whether it is mapped)
        axes_out = _tree.broadcast_prefix(self.out_axes, tree, f"{self.groups.label}: out_axes", self._is_column)
        check_axes(axes_out, f"{self.groups.label}: out_axes")
        placed = enumerate(zip(results, axes_out, strict=True))
        out = [self._place(leaf, axis, partial(self._result, at)) for at, (leaf, axis) in placed]
        new = [
            self._place(value, self.groups.role(change.collection).out_axis, partial(self._result, self.results + at))
            for at, (value, change) in enumerate(zip(changed, self.meta.changes, strict=True))
        ]
        sites = self.meta.sites
        values = _tree.unflatten(sown, self.sown_spec) if sites else []
        values = [self._place_sown(value, site.collection) for value, site in zip(values, sites, strict=True)]
        return _tree.unflatten(out, self.out_spec), Update(new, values, self.meta)

    def _result(self, at: int) -> str:
        """What errors call a result of the body, by its number among all: outputs, new variables, what was sown."""
        if at < self.results:
            path = _tree.paths(_tree.unflatten([0] * self.results, self.out_spec))[at]
            return f"output{path}" if path else "the output"
        if at < self.results + len(self.meta.changes):
            change = self.meta.changes[at - self.results]
            return f"{change.key!r} of {change.collection!r}"
        return "a value that was sown"

    @staticmethod
    def _is_column(x: Any) -> bool:
        return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], Tensor) and isinstance(x[1], bool)

    def _place_sown(self, value: Any, collection: str) -> Any:
        leaves, spec = _tree.flatten(value, self._is_column)
        axis = self.groups.sown_axis(collection)
        what = lambda: f"a value sown in {collection!r}"
        return _tree.unflatten([self._place(leaf, axis, what) for leaf in leaves], spec)

    def _place(self, column: Any, axis: int | None, what: Callable[[], str]) -> Any:
        if not self._is_column(column):
            return column
        value, mapped = column
        if axis is None:
            if self.size == 0:
                raise AxisError(
                    f"{self.groups.label}: {what()} has no value, since the axis has no index: give it an axis, "
                    "expected where its axis is None is at least one"
                )
            if mapped:
                raise AxisError(
                    f"{self.groups.label}: {what()} differs from index to index, but its axis is None; give it an axis"
                )
            return value[0]
        if not -value.ndim <= axis < value.ndim:
            raise AxisError(
                f"{self.groups.label}: {what()} has {value.ndim} dimensions, the mapped one included, so no axis {axis}"
            )
        return value.movedim(0, axis) if axis else value


_NUMBERS = (bool, int, float, complex)


def _slices(in_dims: Any, inputs: Any, at: int) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Index ``at`` of ``(index, tensors, leaves)``."""
    (_, dims, leaf_dims), (index, tensors, leaves) = in_dims, inputs
    pick = [
        [x if d is None else x.select(d, at) for x, d in zip(xs, ds, strict=True)]
        for xs, ds in ((tensors, dims), (leaves, leaf_dims))
    ]
    return None if index is None else index[at], pick[0], pick[1]


def _empty_slices(in_dims: Any, inputs: Any) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    (_, dims, leaf_dims), (index, tensors, leaves) = in_dims, inputs
    pick = [
        [x if d is None else x.new_empty(x.movedim(d, 0).shape[1:]) for x, d in zip(xs, ds, strict=True)]
        for xs, ds in ((tensors, dims), (leaves, leaf_dims))
    ]
    return None if index is None else index.new_empty(()), pick[0], pick[1]


def vmap(
    target: Target = None,
    variable_axes: Mapping[Any, Any] = {},  # noqa: B006  never mutated; an empty dict reads better in help()
    split_rngs: Mapping[Any, bool] = {},  # noqa: B006
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = {},  # noqa: B006
    methods: Any = None,
    *,
    chunk_size: int | None = None,
) -> Any:
    """Maps a module over an axis, with variables of its own for each index or shared ones.

    The lifted counterpart of ``torch.func.vmap`` (and of ``flax.linen.vmap``). A collection or random stream that is
    not listed follows ``params``: where parameters have an axis, batch statistics are stacked and dropout masks
    differ; where they are shared, other state is shared and read-only, and drawing raises.

    Args:
        target: a module class, a ``functools.partial`` of one, a function ``(module, *args)``, or nothing, for use as
            a decorator.
        variable_axes: for each collection filter the axis of its stacked variables, ``None`` for shared ones,
            ``In(axis)`` for read-only, ``Out(axis)`` for ones that the body creates.
        split_rngs: for each random stream whether its draws differ from index to index. ``params`` is what is drawn in
            construction, ``dropout`` everything drawn from torch's default generators.
        in_axes: the mapped axis of each positional argument: an int, None, or a tree that is a prefix of the
            arguments. Keyword arguments are mapped on axis 0.
        out_axes: where the axis goes in the outputs; None for outputs that are the same at every index.
        axis_size: the number of indices, where it cannot be read off. A class lifted without it has parameters that
            are uninitialised until the first call or ``load_state_dict``.
        axis_name: a name for the axis, for ``psum`` and the like.
        spmd_axis_name: the mesh axis over which the mapped axis is sharded.
        metadata_params: passed to ``AxisMetadata.add_axis`` and ``remove_axis``.
        methods: the methods to lift, for a class: a list, or a dict of arguments for each.
        chunk_size: how many indices are computed at a time; None for all.

    Returns:
        A subclass of ``target``, or a function of the same signature.

    Raises:
        AxisError: sizes disagree, are missing, or an axis does not exist.
        AliasError: one tensor is asked for on two axes.
        ModifyCollectionError: the body changed a shared collection.
        RandomnessError: the body drew from a stream that the transform was not told about.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.
        UnsupportedError: an operator has no batching rule, and there is an ``axis_name``.

    Example:
        >>> Heads = torchlift.vmap(torch.nn.Linear, variable_axes={"params": 0}, in_axes=None, axis_size=4)
        >>> heads = Heads(8, 2)
        >>> heads.weight.shape, heads(torch.ones(5, 8)).shape
        (torch.Size([4, 2, 8]), torch.Size([4, 5, 2]))
    """
    arguments = {
        "variable_axes": variable_axes,
        "split_rngs": split_rngs,
        "in_axes": in_axes,
        "out_axes": out_axes,
        "axis_size": axis_size,
        "axis_name": axis_name,
        "spmd_axis_name": spmd_axis_name,
        "metadata_params": metadata_params,
        "chunk_size": chunk_size,
    }
    return lift(_Vmap, target, arguments, methods)
