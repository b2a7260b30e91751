"""Axis metadata: names for the axes of a module's parameters, which transforms keep in step with the axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchlift.errors import MetadataError

PARTITION_NAME = "partition_name"

# NOTE [Metadata]. In a module's __dict__: {name of its own parameter or buffer: AxisMetadata}. Not on the parameter,
# whose attributes deepcopy loses. Replaced, never mutated: modules bound in a body share it with their own.
METADATA = "_torchlift_metadata"


class AxisMetadata:
    """What is known of the axes of a parameter, beyond their sizes.

    A base class: :class:`Partitioned` gives each axis a name; subclasses may keep anything else, and give it to
    :func:`with_partitioning`. They should be immutable, and equal where they say the same. A torch tensor is not boxed
    in its metadata, so flax's ``unbox`` and ``replace_boxed`` have no counterpart.

    Example:
        >>> class Fans(torchlift.AxisMetadata):
        ...     def __init__(self, axis=1):
        ...         self.axis = axis
        ...     def add_axis(self, index, params):
        ...         return Fans(self.axis + (index <= self.axis))
        ...     def remove_axis(self, index, params):
        ...         return Fans(self.axis - (index < self.axis))
        >>> linear = torchlift.with_partitioning(torch.nn.Linear(2, 3), "weight", Fans())
        >>> torchlift.axis_metadata(linear)["weight"].add_axis(0, {}).axis
        2
    """

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> AxisMetadata:
        """The metadata of a parameter that got a new axis at ``index``, which is not negative.

        ``params`` is the ``metadata_params`` of the transform.
        """
        raise NotImplementedError(f"{type(self).__name__}.add_axis")

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> AxisMetadata:
        """The metadata of a parameter that lost its axis at ``index``; undoes :meth:`add_axis`."""
        raise NotImplementedError(f"{type(self).__name__}.remove_axis")


@dataclass(frozen=True)
class Partitioned(AxisMetadata):
    """A name for each axis of a parameter, None for axes without one. :func:`torchlift.shard` maps names to meshes.

    Args:
        names: the names, in the order of the axes.

    Example:
        >>> named = torchlift.Partitioned(("embed", "mlp"))
        >>> named.add_axis(0, {torchlift.PARTITION_NAME: "layers"})
        Partitioned(names=('layers', 'embed', 'mlp'))
    """

    names: tuple[str | None, ...]

    def __post_init__(self) -> None:
        several = isinstance(self.names, Sequence) and not isinstance(self.names, str)
        if not several or not all(name is None or isinstance(name, str) for name in self.names):
            raise MetadataError(f"Partitioned: names is {self.names!r}, expected a name or None for each axis")
        object.__setattr__(self, "names", tuple(self.names))

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Partitioned:
        unnamed = [None] * (index - len(self.names))  # axes that there must be, if one is added behind them
        return Partitioned((*self.names[:index], *unnamed, self._name(params), *self.names[index:]))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Partitioned:
        name = self._name(params)
        if index >= len(self.names) or self.names[index] != name:
            raise MetadataError(f"axis {index} of {self} is to be removed, expected it to be named {name!r}")
        return Partitioned((*self.names[:index], *self.names[index + 1 :]))

    def _name(self, params: Mapping[Any, Any]) -> str | None:
        if PARTITION_NAME not in params:
            raise MetadataError(
                f"a transform adds an axis to {self}, but has no name for it; add "
                "metadata_params={torchlift.PARTITION_NAME: name}, or None for an axis without a name"
            )
        return params[PARTITION_NAME]


def with_partitioning(module: nn.Module, name: str, names: Sequence[str | None] | AxisMetadata) -> nn.Module:
    """Names the axes of a parameter or buffer, for :func:`torchlift.shard`; call it in ``__init__``.

    ``vmap`` and ``scan`` insert the name that their ``metadata_params`` gives for the axis they add.

    Args:
        module: the module that owns the parameter, or has a submodule that does.
        name: the parameter's name, dotted for one of a submodule.
        names: a name or None for each axis, or an :class:`AxisMetadata` of another kind.

    Returns:
        ``module``.

    Raises:
        MetadataError: there is no such parameter, or it has another number of axes.

    Example:
        >>> class Mlp(torch.nn.Linear):
        ...     def __init__(self, *args):
        ...         super().__init__(*args)
        ...         torchlift.with_partitioning(self, "weight", ("mlp", "embed"))
        >>> named = {torchlift.PARTITION_NAME: "layers"}
        >>> Layers = torchlift.vmap(Mlp, {"params": 0}, axis_size=3, metadata_params=named)
        >>> torchlift.axis_metadata(Layers(2, 4))
        {'weight': Partitioned(names=('layers', 'mlp', 'embed'))}
    """
    path, _, key = name.rpartition(".")
    where = f"with_partitioning({type(module).__name__}, {name!r})"
    known = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if name not in known:
        raise MetadataError(f"{where}: there is no such parameter or buffer, expected one of {known}")
    metadata = names if isinstance(names, AxisMetadata) else Partitioned(names)  # type: ignore[arg-type]  # any sequence
    owner = module.get_submodule(path)
    tensor: Tensor = getattr(owner, key)
    if isinstance(metadata, Partitioned) and not nn.parameter.is_lazy(tensor) and len(metadata.names) != tensor.ndim:
        raise MetadataError(
            f"{where}: got {len(metadata.names)} names {metadata.names}, expected {tensor.ndim}, one for each axis of "
            f"shape {tuple(tensor.shape)}"
        )
    owner.__dict__[METADATA] = {**owner.__dict__.get(METADATA, {}), key: metadata}
    return module


def axis_metadata(module: nn.Module) -> dict[str, AxisMetadata]:
    """The metadata of all parameters and buffers of a module that have any.

    Args:
        module: the module; nothing in it is changed.

    Returns:
        ``{dotted_name: metadata}``, named as ``named_parameters`` names them.

    Example:
        >>> linear = torchlift.with_partitioning(torch.nn.Linear(2, 3), "weight", ("mlp", "embed"))
        >>> torchlift.axis_metadata(torch.nn.Sequential(linear))
        {'0.weight': Partitioned(names=('mlp', 'embed'))}
    """
    return {
        f"{path}.{key}" if path else key: metadata
        for path, owner in module.named_modules()
        for key, metadata in owner.__dict__.get(METADATA, {}).items()
    }


# For transforms ------------------------------------------------------------------------------------------------------


def added(
    label: str, module: nn.Module, place: Callable[[nn.Module, str], int | None], params: Mapping[Any, Any],
    times: int = 1,
) -> None:  # fmt: skip
    """Adds axes to the metadata in a module, in place: ``times`` of them at ``place(owner, key)``, None for none."""
    for path, owner in module.named_modules():
        if METADATA in owner.__dict__:
            owner.__dict__[METADATA] = _changed(label, path, owner, place, "add_axis", params, times)


def removed(
    label: str, module: nn.Module, place: Callable[[nn.Module, str], int | None], params: Mapping[Any, Any],
    times: int = 1,
) -> None:  # fmt: skip
    """Undoes :func:`added`."""
    for path, owner in module.named_modules():
        if METADATA in owner.__dict__:
            owner.__dict__[METADATA] = _changed(label, path, owner, place, "remove_axis", params, times)


def without_axis(
    packed: Any, axes: Sequence[int | None], params: Mapping[Any, Any], missing: int = 0
) -> dict[tuple[int, str], Any]:
    """The metadata that a body sees, which does not know of the axis: plain attributes for ``packed.pure``.

    ``axes`` has the axis of each entry, whose tensors have it too, unless it is ``missing`` from them. Without
    ``params`` the metadata stays as it is.
    """
    found = {}
    for at, node in enumerate(packed.nodes if params else ()):
        if METADATA in node.module.__dict__:
            places = {
                key: axis if axis is None else axis % (packed.tensors[entry].ndim + missing)
                for _, key, entry in node.tensors
                for axis in (axes[entry],)
            }
            place = lambda owner, key, places=places: places.get(key)
            found[at, METADATA] = _changed(packed.label, node.path, node.module, place, "remove_axis", params, 1)
    return found


def _changed(
    label: str, path: str, owner: nn.Module, place: Callable[[nn.Module, str], int | None], how: str,
    params: Mapping[Any, Any], times: int,
) -> dict[str, AxisMetadata]:  # fmt: skip
    new = dict(owner.__dict__[METADATA])
    for key, metadata in new.items():
        index = place(owner, key)
        for _ in range(times if index is not None else 0):
            try:
                metadata = getattr(metadata, how)(index, params)
            except MetadataError as error:
                name = f"{path}.{key}" if path else key
                raise MetadataError(f"{label}: {name!r}: {error}") from error
        new[key] = metadata
    return new
