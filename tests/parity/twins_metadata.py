"""The twins of `scenarios_metadata`, and how the axis names of a module are read."""

import torch
from torch import nn

from torchlift import PARTITION_NAME, add_metadata_axis, axis_metadata, scan, vmap, with_partitioning

from .torch_side import D, N, steps

LAYERS = dict(variable_axes={"params": 0}, metadata_params={PARTITION_NAME: "layers"})
AXIS_ONE = {**LAYERS, "variable_axes": {"params": 1}}


class Named(nn.Module):
    """A linear layer that names the axes of its weight, and not those of its bias."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D))
        self.b = nn.Parameter(torch.randn(D))
        with_partitioning(self, "w", ("embed", "mlp"))

    def forward(self, x):
        return x @ self.w + self.b


def names_of(module):
    """`{'params/w': 'layers,embed,mlp'}`, as a record has them."""
    return {f"params/{name}": ",".join(map(str, found.names)) for name, found in axis_metadata(module).items()}


def over(m, x):
    return m(x, None)[0]


def metadata_plain():
    return Named()


def metadata_vmap():
    return vmap(Named, axis_size=N, **LAYERS)()


def metadata_vmap_axis_one():
    return vmap(Named, axis_size=N, **AXIS_ONE)()


def metadata_scan():
    return scan(steps(Named), length=N, compile=False, **LAYERS)(), over


def metadata_vmap_of_scan():
    inner = scan(steps(Named), length=N, compile=False, **AXIS_ONE)
    stages = {**LAYERS, "metadata_params": {PARTITION_NAME: "stages"}}
    return vmap(inner, in_axes=(0, None), axis_size=2, **stages)(), over


def metadata_shared_params():
    return vmap(Named, variable_axes={"params": None}, axis_size=N)()


def metadata_add_axis():
    return add_metadata_axis(Named, **LAYERS)()
