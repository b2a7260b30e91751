"""The twins of `scenarios_vmap`."""

import functools

import torch
from torch import nn

from torchlift import In, remat, vmap

from .torch_side import Block, Constant, Counter, Layer, N, Noise, Norm, Pair, Sower, equal_rows

SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True})
SHARED = dict(variable_axes={"params": None}, split_rngs={"params": False})
STATS = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})


def vmap_separate_params():
    return vmap(Layer, axis_size=N, **SEPARATE)()


def vmap_shared_params():
    return vmap(Layer, **SHARED)()


def vmap_params_axis_one():
    return vmap(Layer, variable_axes={"params": 1}, axis_size=N)()


def vmap_params_axis_last():
    return vmap(Layer, variable_axes={"params": -1}, axis_size=N)()


def vmap_batch_stats_per_index():
    return vmap(Block, axis_size=N, **STATS)()


def vmap_batch_stats_shared_params():
    return vmap(Norm, variable_axes={"params": None, "batch_stats": 0}, axis_size=N)()


def vmap_read_only_collection():
    return vmap(Constant, variable_axes={"params": 0, "const": None}, axis_size=N)()


def vmap_in_collection():
    return Constant(), vmap(lambda m, x: m(x), variable_axes={"params": 0, "const": In(1)}, axis_size=N)


def vmap_counter_per_index():
    return vmap(Counter, variable_axes={"params": 0, "state": 0}, axis_size=N)()


def vmap_negative_axes():
    return vmap(Layer, in_axes=-1, out_axes=-1, axis_size=N, **SEPARATE)()


def vmap_none_in_axes():
    return Layer(), vmap(lambda m, x, y: m(x) * y, in_axes=(0, None), **SEPARATE)


def vmap_axis_size_only():
    return vmap(Layer, in_axes=None, axis_size=N, **SEPARATE)()


def vmap_pytree_axes():
    def body(m, pair, scale):
        return {"left": m(pair["a"]) * scale, "right": (pair["b"], m(pair["b"]))}

    axes = ({"a": 0, "b": 1}, None)
    lifted = vmap(body, in_axes=axes, out_axes={"left": 1, "right": 0}, **SEPARATE)
    return Layer(), lambda m, a, b, scale: lifted(m, {"a": a, "b": b}, scale)


def vmap_methods_list():
    lifted = vmap(Layer, methods=["forward", "project"], axis_size=N, **SEPARATE)
    return lifted(), lambda m, x: m.project(m(x))


def vmap_methods_dict():
    methods = {"forward": {}, "back": dict(in_axes=(0, None), out_axes=1)}
    lifted = vmap(Layer, methods=methods, axis_size=N, **SEPARATE)
    return lifted(), lambda m, x, y: m.back(m(x), y)


def vmap_function_form():
    return Layer(), vmap(lambda m, x: m.project(x) + m(x), **SEPARATE)


def vmap_decorated_method():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        @functools.partial(vmap, **SEPARATE)
        def forward(self, x):
            return self.layer(x)

    return Decorated()


def vmap_partial_class():
    return vmap(functools.partial(Layer, dim=3), axis_size=N, **SEPARATE)()


def vmap_module_argument():
    lifted = vmap(lambda m, other, x: other(m(x)), **SEPARATE)
    return Pair(Layer(), Layer()), lambda m, x: lifted(m.first, m.second, x)


def vmap_shared_submodule():
    shared = Layer()
    return Pair(shared, shared), vmap(lambda m, x: m(x), **SEPARATE)


def vmap_intermediates():
    return vmap(Sower, axis_size=N, **SEPARATE)()


def vmap_dropout_split():
    lifted = vmap(Noise, split_rngs={"dropout": True}, axis_size=N)
    return lifted(), lambda m, x: equal_rows(m(0 * x))


def vmap_dropout_same():
    lifted = vmap(Noise, split_rngs={"dropout": False}, axis_size=N)
    return lifted(), lambda m, x: equal_rows(m(0 * x))


def vmap_of_vmap():
    return vmap(vmap(Block, axis_size=N, **STATS), axis_size=2, **STATS)()


def vmap_separate_of_vmap_shared():
    return vmap(vmap(Layer, in_axes=1, out_axes=1, **SHARED), axis_size=N, **SEPARATE)()


def vmap_of_remat():
    return vmap(remat(Block), axis_size=N, **STATS)()


def vmap_twice_in_one_call():
    lifted = vmap(lambda m, x: m(x), **STATS)
    return Block(), lambda m, x: lifted(m, lifted(m, x))


def vmap_submodule():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Layer()
            self.members = vmap(Layer, in_axes=None, axis_size=N, **SEPARATE)()

        def forward(self, x):
            return self.members(self.stem(x)).mean(0)

    return Ensemble()


def vmap_jacobian_inside():
    def body(m, x):
        return torch.func.jacfwd(lambda x: torch.tanh(x @ m.w))(x)

    return Layer(), vmap(body, **SEPARATE)
