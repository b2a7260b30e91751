"""Axis metadata alone: names for an axis that something else than a transform of this package adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchlift import _compat, metadata
from torchlift.groups import Groups
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.transforms.options import check_params
from torchlift.variables import collection_of


@dataclass(frozen=True, kw_only=True)
class _Add_metadata_axis(Transform):
    variable_axes: Mapping[Any, Any] = field(default_factory=dict)
    metadata_params: Mapping[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_params(self.metadata_params, "add_metadata_axis: metadata_params")

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        groups = Groups(self.label(base), self.variable_axes)

        def place(owner: nn.Module, key: str) -> int | None:
            store = "_parameters" if key in owner.__dict__["_parameters"] else "_buffers"
            axis = groups.role(collection_of(owner, store, key)).axis
            return axis if axis is None or axis >= 0 else axis % (owner.__dict__[store][key].ndim + 1)

        def __init__(module: nn.Module, /, *args: Any, **kwargs: Any) -> None:
            base.__init__(module, *args, **kwargs)
            metadata.added(groups.label, module, place, self.metadata_params)

        __init__.__wrapped__ = base.__init__  # type: ignore[attr-defined]  # for help() and inspect.signature
        return {"__init__": __init__}

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        packed = Packed(fn, module, args, kwargs, label, inside)
        packed.allow(lambda c: True, str)
        groups = Groups(label, self.variable_axes)
        axes = [groups.role(entry.collection).axis for entry in packed.entries]
        attributes = metadata.without_axis(packed, axes, self.metadata_params, missing=1)
        out, update = packed.pure(packed.snapshot(), packed.leaves, attributes)
        packed.publish(update)
        return out


def add_metadata_axis(
    target: Target = None,
    variable_axes: Mapping[Any, Any] = {},  # noqa: B006  never mutated; an empty dict reads better in help()
    metadata_params: Mapping[Any, Any] = {},  # noqa: B006
) -> Any:
    """Adds an axis to the metadata of a module's variables, and to nothing else; its body does not see it.

    The counterpart of ``flax.linen.add_metadata_axis``, for code that stacks variables by itself: it does to axis
    metadata what ``vmap`` and ``scan`` do.

    Args:
        target: a module class, a ``functools.partial`` of one, a function whose first argument is a module, or
            nothing, for use as a decorator.
        variable_axes: for each collection filter where the axis is, or None.
        metadata_params: passed to ``AxisMetadata.add_axis`` and ``remove_axis``.

    Returns:
        A subclass of ``target`` whose instances have the axis in their metadata, or a function of the same signature
        whose body sees metadata without it.

    Raises:
        MetadataError: ``metadata_params`` has no name for the axis.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.

    Example:
        >>> class Mlp(torch.nn.Linear):
        ...     def __init__(self, *args):
        ...         super().__init__(*args)
        ...         torchlift.with_partitioning(self, "weight", ("mlp", "embed"))
        >>> Stage = torchlift.add_metadata_axis(Mlp, {"params": 0}, {torchlift.PARTITION_NAME: "stage"})
        >>> torchlift.axis_metadata(Stage(2, 4))
        {'weight': Partitioned(names=('stage', 'mlp', 'embed'))}
    """
    return lift(_Add_metadata_axis, target, {"variable_axes": variable_axes, "metadata_params": metadata_params})
