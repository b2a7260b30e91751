"""Names of axes as placements on a mesh of devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchlift.errors import MetadataError
from torchlift.metadata import METADATA, Partitioned
from torchlift.stacking import Stacking
from torchlift.variables import own_tensors

if TYPE_CHECKING:  # torch.distributed is not in every build of torch
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: nn.Module, mesh: DeviceMesh, rules: Mapping[str, str | None] | None = None) -> nn.Module:
    """Distributes the parameters and buffers of a module over a mesh of devices, as the names of their axes say.

    Each becomes a ``DTensor``, split where one of its names (:func:`torchlift.with_partitioning`) leads to a dimension
    of the mesh, and whole everywhere else. The axis of a ``scan`` is never split: every device runs every iteration.

    Args:
        module: the module; changed in place. Make the optimizer after this call.
        mesh: a mesh whose dimensions have names.
        rules: the mesh dimension for each name, or None. Names that are not listed lead to the dimension of the same
            name, if there is one.

    Returns:
        ``module``.

    Raises:
        MetadataError: ``mesh`` is no mesh, or has no names, a rule leads to no dimension of it, two axes of a parameter
            or the axis of a ``scan`` lead to one.

    Example:
        >>> linear = torchlift.with_partitioning(torch.nn.Linear(8, 8), "weight", ("mlp", "embed"))
        >>> def tensor_parallel():  # in each process, with torch.distributed initialised
        ...     mesh = torch.distributed.init_device_mesh("cuda", (8,), mesh_dim_names=("model",))
        ...     return torchlift.shard(linear, mesh, {"mlp": "model"})
    """
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(mesh, "mesh_dim_names"):
        raise MetadataError(f"shard: mesh is {mesh!r}, expected a DeviceMesh, as init_device_mesh makes one")
    known = tuple(mesh.mesh_dim_names or ())
    if not known:
        raise MetadataError("shard: the mesh has no names, expected one made with mesh_dim_names=")
    rules = {**{name: name for name in known}, **(rules or {})}
    for name, dim in rules.items():
        if dim is not None and dim not in known:
            raise MetadataError(f"shard: the rule for {name!r} leads to {dim!r}, expected a mesh dimension of {known}")
    new: dict[Tensor, Tensor] = {}
    for path, owner in module.named_modules():
        for store, key, tensor in list(own_tensors(owner)):
            where = f"shard: {path}.{key}" if path else f"shard: {key}"
            placements = _placements(
                owner, key, tensor, known, rules, where, _loop_axes(module, path, store, key, tensor)
            )
            if tensor not in new:
                spread: Tensor = distribute_tensor(tensor.detach(), mesh, placements)
                is_param = isinstance(tensor, nn.Parameter)
                new[tensor] = nn.Parameter(spread, tensor.requires_grad) if is_param else spread
            owner.__dict__[store][key] = new[tensor]
    return module


def _placements(
    owner: nn.Module, key: str, tensor: Tensor, known: Sequence[str], rules: Mapping[str, str | None], where: str,
    loops: set[int],
) -> list[Any]:  # fmt: skip
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = [Replicate() for _ in known]
    metadata = owner.__dict__.get(METADATA, {}).get(key)
    for axis, name in enumerate(metadata.names if isinstance(metadata, Partitioned) else ()):
        dim = None if name is None else rules.get(name)
        if dim is None:
            continue
        if axis in loops:
            raise MetadataError(
                f"{where}: axis {axis}, {name!r}, is that of a scan, which runs every iteration on every device, but "
                f"its rule leads to {dim!r}; give it None"
            )
        at = known.index(dim)
        if not isinstance(placements[at], Replicate):
            raise MetadataError(f"{where}: two axes of {metadata.names} lead to {dim!r}, expected one at most")
        placements[at] = Shard(axis)
    return placements


def _loop_axes(module: nn.Module, path: str, store: str, key: str, tensor: Tensor) -> set[int]:
    """The axes of a tensor that scans around its owner iterate over."""
    found: set[int] = set()
    free = list(range(tensor.ndim))
    parts = path.split(".") if path else []
    owner = module.get_submodule(path)
    for depth in range(len(parts) + 1):
        stack = module.get_submodule(".".join(parts[:depth]))
        for cls in type(stack).__mro__:  # outermost lift first
            how: Stacking | None = cls.__dict__.get("_torchlift_stacking")
            axis = None if how is None else how.axis(owner, store, key)
            if how is not None and axis is not None:
                at = axis % (len(free) - how.levels + 1)
                if how.loops:
                    found.update(free[at : at + how.levels])
                del free[at : at + how.levels]
    return found
