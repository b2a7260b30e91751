"""Flax scenarios of axis metadata: the record's `names` are those of the stored variables."""

import flax.linen as nn

from .flax_side import NORMAL, Case, D, N, steps

LAYERS = dict(variable_axes={"params": 0}, split_rngs={"params": True}, metadata_params={nn.PARTITION_NAME: "layers"})
AXIS_ONE = {**LAYERS, "variable_axes": {"params": 1}}


class Named(nn.Module):
    """A linear layer that names the axes of its weight, and not those of its bias."""

    def setup(self):
        self.w = self.param("w", nn.with_partitioning(NORMAL, ("embed", "mlp")), (D, D))
        self.b = self.param("b", NORMAL, (D,))

    def __call__(self, x):
        return x @ self.w + self.b


def metadata_plain(draw):
    return Case(Named(), [draw(2, D)])


def metadata_vmap(draw):
    return Case(nn.vmap(Named, **LAYERS)(), [draw(N, 2, D)])


def metadata_vmap_axis_one(draw):
    return Case(nn.vmap(Named, **AXIS_ONE)(), [draw(N, 2, D)])


def metadata_scan(draw):
    lifted = nn.scan(steps(Named), length=N, **LAYERS)
    return Case(lifted(), [draw(2, D)], lambda m, x: m(x, None)[0])


def metadata_vmap_of_scan(draw):
    inner = nn.scan(steps(Named), length=N, **AXIS_ONE)
    stages = {**LAYERS, "metadata_params": {nn.PARTITION_NAME: "stages"}}
    lifted = nn.vmap(inner, in_axes=(0, None), **stages)
    return Case(lifted(), [draw(2, 2, D)], lambda m, x: m(x, None)[0])


def metadata_shared_params(draw):
    lifted = nn.vmap(Named, variable_axes={"params": None}, split_rngs={"params": False})
    return Case(lifted(), [draw(N, 2, D)])


def metadata_add_axis(draw):
    options = dict(variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "layers"})
    return Case(nn.add_metadata_axis(Named, **options)(), [draw(2, D)])
