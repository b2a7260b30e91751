"""Lifted loops: scan, over time or over stacked layers, and remat_scan, its rematerialised nest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from torchlift import _compat, _tree, fingerprint, stacking
from torchlift._context import context
from torchlift.engine.loop import Body
from torchlift.errors import AxisError, TorchliftWarning, TransformTargetError, UnsupportedError, warn
from torchlift.filters import DenyList, Filter, In, Out
from torchlift.groups import Groups, groups_of
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.transforms.compiling import fleshed, out_of_graph, register, skeleton
from torchlift.transforms.iterations import Iterations, warn_plain
from torchlift.transforms.lengths import broadcast
from torchlift.transforms.options import (
    check_axes,
    check_callable,
    check_compile,
    check_flag,
    check_lengths,
    check_params,
    check_policy,
    check_size,
)


@dataclass(frozen=True, kw_only=True)
class _Loop(Transform):
    """What ``scan`` and ``remat_scan`` share. ``lengths`` has one size for each level of the nest."""

    variable_axes: Mapping[Any, Any] = field(default_factory=dict)
    variable_broadcast: Filter = False
    variable_carry: Filter = False
    split_rngs: Mapping[Any, bool] = field(default_factory=dict)

    def kind(self) -> tuple[type, dict[str, Any]]:
        """What it takes to make the transform again: its class and its settings."""
        return type(self), {f.name: _spelled(getattr(self, f.name)) for f in fields(self)}

    def groups(self, label: str) -> Groups:
        return groups_of(label, self.variable_axes, self.variable_broadcast, self.variable_carry, self.split_rngs)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        raise AssertionError  # pragma: no cover

    def stacking(self, base: type[nn.Module]) -> stacking.Stacking | None:
        groups = self.groups(self.label(base))
        return stacking.Stacking(groups, self.sizes, loops=True) if groups.has_axis else None


@dataclass(frozen=True, kw_only=True)
class _Scan(_Loop):
    in_axes: Any = 0
    out_axes: Any = 0
    length: int | None = None
    reverse: bool = False
    unroll: int | str = 1
    data_transform: Callable[..., Any] | None = None
    metadata_params: Mapping[Any, Any] = field(default_factory=dict)
    compile: Any = True

    def __post_init__(self) -> None:
        check_size(self.length, "scan: length")
        check_compile(self.compile, "scan: compile=")
        check_flag(self.reverse, "scan: reverse")
        check_params(self.metadata_params, "scan: metadata_params")
        check_callable(self.data_transform, "scan: data_transform", "a function of (variable_groups, rng_groups)")

    @property
    def sizes(self) -> tuple[int, ...] | None:
        return None if self.length is None else (self.length,)

    def stacking(self, base: type[nn.Module]) -> stacking.Stacking | None:
        how = super().stacking(base)
        return how and replace(how, metadata_params=self.metadata_params)

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if not args:
            raise TransformTargetError(f"{label}: got no carry, expected a call (carry, *xs), with None for no carry")
        iterations = self.iterations(fn, module, args, kwargs, label, inside)
        done = iterations.loop(
            lambda settled: _register(
                *self.kind(), fn, module, skeleton(args), skeleton(kwargs), label, inside, None, settled, _asked_for()
            ),
            reverse=self.reverse, unroll=self.unroll, compile=self.compile,
        )  # fmt: skip
        if done is None:
            return out_of_graph(self.call, fn, module, args, kwargs, label, inside)
        carry, ys = done
        return carry, iterations.placed(ys, self.out_axes)

    def iterations(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None,
        lengths: tuple[int, ...] | None = None,
    ) -> Iterations:  # fmt: skip
        in_axes = tuple(self.in_axes) if isinstance(self.in_axes, list) else self.in_axes
        axes = _tree.broadcast_prefix(in_axes, args[1:], f"{label}: in_axes")
        check_axes(axes, f"{label}: in_axes", (broadcast, None))
        axes = [*[broadcast] * len(_tree.flatten(args[0])[0]), *axes, *[broadcast] * len(_tree.flatten(kwargs)[0])]
        return Iterations(
            self.groups(label), fn, module, args, kwargs, label, inside, axes, self.sizes,
            transform=self.data_transform, metadata_params=self.metadata_params, lengths=lengths,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Remat_scan(_Loop):
    lengths: tuple[int, ...] = ()
    policy: Callable[..., Any] | None = None
    compile: Any = True

    def __post_init__(self) -> None:
        check_compile(self.compile, "remat_scan: compile=")
        check_policy(self.policy, "remat_scan: policy")

    @property
    def sizes(self) -> tuple[int, ...] | None:
        return self.lengths

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if len(args) != 1 or kwargs:
            raise TransformTargetError(
                f"{label}: got {len(args) + len(kwargs)} arguments, expected one, the carry: the body is "
                "(module, carry) -> carry"
            )
        iterations = self.iterations(fn, module, args, kwargs, label, inside)
        again = {} if _runs_once(iterations.packed, label) else {"remat": self.policy or True, "lengths": self.lengths}
        done = iterations.loop(
            lambda settled: _register(
                *self.kind(), fn, module, skeleton(args), skeleton(kwargs), label, inside, self.policy, settled,
                _asked_for(),
            ),
            compile=self.compile, **again,
        )  # fmt: skip
        if done is None:
            return out_of_graph(self.call, fn, module, args, kwargs, label, inside)
        return done[0]

    def iterations(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None,
        lengths: tuple[int, ...] | None = None,
    ) -> Iterations:  # fmt: skip
        def body(module: nn.Module, carry: Any) -> Any:
            return fn(module, carry), None

        axes = [broadcast] * len(_tree.flatten(args)[0])
        return Iterations(
            self.groups(label), body, module, args, kwargs, label, inside, axes, self.sizes,
            levels=len(self.lengths), lengths=lengths,
        )  # fmt: skip


def _runs_once(packed: Packed, label: str) -> bool:
    """Whether a recomputation would not be given what the body was given, with a warning if so.

    A carry that is an object, a cache, is another one in each iteration: what the body put into it is there when the
    nest runs again.
    """
    found = fingerprint.opaques(packed.leaves)
    if found and torch.is_grad_enabled() and not _compat.is_compiling():
        warn(
            f"{label}: intermediate values are kept, not computed again, and no memory is saved: an argument is a "
            f"{type(found[0]).__name__}, which a recomputation would find as the body left it; pass tensors and "
            "numbers, or a dict, tuple or dataclass of them",
            TorchliftWarning,
        )
    return len(found) > 0


# What Dynamo cannot hand to a function that it does not trace: frozen dataclasses inside of a dict.
_SPELLED = (DenyList, In, Out)


def _spelled(value: Any) -> Any:
    """A setting with ``(class, field)`` for each filter and axis that is a dataclass."""
    if isinstance(value, _SPELLED):
        return type(value), _spelled(value.deny if isinstance(value, DenyList) else value.axis)
    return {_spelled(k): _spelled(v) for k, v in value.items()} if isinstance(value, dict) else value


def _meant(value: Any) -> Any:
    """The setting that :func:`_spelled` spelled."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _SPELLED:
        return value[0](_meant(value[1]))
    return {_meant(k): _meant(v) for k, v in value.items()} if isinstance(value, dict) else value


def _asked_for() -> list[Any]:
    """The filters of the captures around the call. Dynamo, which reads them, traces the loop anew for others."""
    return [_spelled(frame.filter) for frame in context.captures]


@torch.compiler.assume_constant_result
def _register(
    cls: type[Any], settings: dict[str, Any], fn: Any, module: nn.Module, args: Any, kwargs: Any, label: str,
    inside: Any, policy: Any, settled: tuple[bool | str, ...], captures: list[Any],
) -> str:  # fmt: skip
    """Called while Dynamo traces, with the real module: the key of the loop's body in a graph around it.

    It is empty if it cannot be told what the body depends on. The transform comes as its class and settings: one that
    was made in the code that Dynamo traces does not exist yet.
    """

    def make(module: nn.Module) -> Iterations:
        return cls(**_meant(settings)).iterations(
            fn, module, fleshed(args), fleshed(kwargs), label, inside, lengths=(1,)
        )

    iterations = make(module)
    try:
        key = fingerprint.digest(
            (fingerprint.of_packed(iterations.packed), fingerprint.of_value(iterations.transform), policy)
        )
    except UnsupportedError as error:
        warn_plain(label, error)
        return ""
    return register(key, [module], lambda module: Body(make(module).body, key, label), policy)


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
    unroll: int | str = 1,
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
        unroll: how many iterations make one compiled graph, in which products by one and the same weight are joined:
            the projection of the inputs, the gradients of weights. ``"auto"`` picks: up to sixteen steps of a cell,
            four small layers. A larger graph takes longer to compile.
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
    check_lengths(lengths, "remat_scan: lengths")
    if not lengths:
        raise AxisError("remat_scan: lengths is empty, expected the number of iterations at each level, as in (4, 6)")
    arguments = {
        "lengths": tuple(lengths), "policy": policy, "variable_broadcast": variable_broadcast,
        "variable_carry": variable_carry, "variable_axes": variable_axes, "split_rngs": split_rngs, "compile": compile,
    }  # fmt: skip
    return lift(_Remat_scan, target, arguments)
