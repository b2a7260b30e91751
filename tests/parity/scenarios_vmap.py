"""Flax scenarios of `vmap`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.lift import In

from .flax_side import Block, Case, Constant, Counter, D, Layer, N, Noise, Norm, Pair, Sower, equal_rows

SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True})
SHARED = dict(variable_axes={"params": None}, split_rngs={"params": False})
STATS = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})


def vmap_separate_params(draw):
    return Case(nn.vmap(Layer, **SEPARATE)(), [draw(N, 2, D)])


def vmap_shared_params(draw):
    return Case(nn.vmap(Layer, **SHARED)(), [draw(N, 2, D)])


def vmap_params_axis_one(draw):
    lifted = nn.vmap(Layer, variable_axes={"params": 1}, split_rngs={"params": True})
    return Case(lifted(), [draw(N, 2, D)])


def vmap_params_axis_last(draw):
    lifted = nn.vmap(Layer, variable_axes={"params": -1}, split_rngs={"params": True})
    return Case(lifted(), [draw(N, 2, D)])


def vmap_batch_stats_per_index(draw):
    return Case(nn.vmap(Block, **STATS)(), [draw(N, 5, D)])


def vmap_batch_stats_shared_params(draw):
    lifted = nn.vmap(Norm, variable_axes={"params": None, "batch_stats": 0}, split_rngs={"params": False})
    return Case(lifted(), [draw(N, 5, D)])


def vmap_read_only_collection(draw):
    lifted = nn.vmap(Constant, variable_axes={"params": 0, "const": None}, split_rngs={"params": True})
    return Case(lifted(), [draw(N, 2, D)])


def vmap_in_collection(draw):
    axes = {"params": 0, "const": In(1)}
    call = nn.vmap(lambda m, x: m(x), variable_axes=axes, axis_size=N)
    init = nn.vmap(lambda m, x: m(x), variable_axes={"params": 0, "const": 1}, split_rngs={"params": True})
    return Case(Constant(), [draw(N, 2, D)], call, init=init, mutable=[])


def vmap_counter_per_index(draw):
    lifted = nn.vmap(Counter, variable_axes={"params": 0, "state": 0}, split_rngs={"params": True})
    return Case(lifted(), [draw(N, 2, D)])


def vmap_negative_axes(draw):
    lifted = nn.vmap(Layer, in_axes=-1, out_axes=-1, **SEPARATE)
    return Case(lifted(), [draw(2, D, N)])


def vmap_none_in_axes(draw):
    lifted = nn.vmap(lambda m, x, y: m(x) * y, in_axes=(0, None), **SEPARATE)
    return Case(Layer(), [draw(N, 2, D), draw(2, D)], lifted)


def vmap_axis_size_only(draw):
    lifted = nn.vmap(Layer, in_axes=None, axis_size=N, **SEPARATE)
    return Case(lifted(), [draw(2, D)])


def vmap_pytree_axes(draw):
    def body(m, pair, scale):
        return {"left": m(pair["a"]) * scale, "right": (pair["b"], m(pair["b"]))}

    axes = ({"a": 0, "b": 1}, None)
    lifted = nn.vmap(body, in_axes=axes, out_axes={"left": 1, "right": 0}, **SEPARATE)
    call = lambda m, a, b, scale: lifted(m, {"a": a, "b": b}, scale)
    return Case(Layer(), [draw(N, 2, D), draw(2, N, D), draw(D)], call)


def vmap_methods_list(draw):
    lifted = nn.vmap(Layer, methods=["__call__", "project"], **SEPARATE)
    return Case(lifted(), [draw(N, 2, D)], lambda m, x: m.project(m(x)))


def vmap_methods_dict(draw):
    methods = {"__call__": dict(**SEPARATE), "back": dict(in_axes=(0, None), out_axes=1, **SEPARATE)}
    lifted = nn.vmap(Layer, methods=methods)
    return Case(lifted(), [draw(N, 2, D), draw(2, D)], lambda m, x, y: m.back(m(x), y))


def vmap_function_form(draw):
    lifted = nn.vmap(lambda m, x: m.project(x) + m(x), **SEPARATE)
    return Case(Layer(), [draw(N, 2, D)], lifted)


def vmap_decorated_method(draw):
    class Decorated(nn.Module):
        def setup(self):
            self.layer = Layer()

        @functools.partial(nn.vmap, **SEPARATE)
        def __call__(self, x):
            return self.layer(x)

    return Case(Decorated(), [draw(N, 2, D)])


def vmap_partial_class(draw):
    return Case(nn.vmap(functools.partial(Layer, dim=D), **SEPARATE)(), [draw(N, 2, D)])


def vmap_module_argument(draw):
    lifted = nn.vmap(lambda m, other, x: other(m(x)), **SEPARATE)
    return Case(Pair(Layer(), Layer()), [draw(N, 2, D)], lambda m, x: lifted(m.first, m.second, x))


def vmap_shared_submodule(draw):
    shared = Layer()
    lifted = nn.vmap(lambda m, x: m(x), **SEPARATE)
    return Case(Pair(shared, shared), [draw(N, 2, D)], lifted)


def vmap_intermediates(draw):
    axes = {"params": 0, "intermediates": 0}
    return Case(nn.vmap(Sower, variable_axes=axes, split_rngs={"params": True})(), [draw(N, 2, D)])


def vmap_dropout_split(draw):
    lifted = nn.vmap(Noise, split_rngs={"dropout": True})
    call = lambda m, x: equal_rows(m(0 * x))
    return Case(lifted(), [draw(N, 5)], call, random=True)


def vmap_dropout_same(draw):
    lifted = nn.vmap(Noise, split_rngs={"dropout": False})
    call = lambda m, x: equal_rows(m(0 * x))
    return Case(lifted(), [draw(N, 5)], call, random=True)


def vmap_of_vmap(draw):
    lifted = nn.vmap(nn.vmap(Block, **STATS), axis_size=2, **STATS)
    return Case(lifted(), [draw(2, N, 5, D)])


def vmap_separate_of_vmap_shared(draw):
    lifted = nn.vmap(nn.vmap(Layer, in_axes=1, out_axes=1, **SHARED), **SEPARATE)
    return Case(lifted(), [draw(N, 2, 5, D)])


def vmap_of_remat(draw):
    return Case(nn.vmap(nn.remat(Block), **STATS)(), [draw(N, 5, D)])


def vmap_twice_in_one_call(draw):
    lifted = nn.vmap(lambda m, x: m(x), **STATS)
    return Case(Block(), [draw(N, 5, D)], lambda m, x: lifted(m, lifted(m, x)))


def vmap_submodule(draw):
    class Ensemble(nn.Module):
        def setup(self):
            self.stem = Layer()
            self.members = nn.vmap(Layer, in_axes=None, axis_size=N, **SEPARATE)()

        def __call__(self, x):
            return self.members(self.stem(x)).mean(0)

    return Case(Ensemble(), [draw(2, D)])


def vmap_jacobian_inside(draw):
    def body(m, x):
        project = lambda x: jnp.tanh(x @ m.w)
        return jax.jacfwd(project)(x)

    return Case(Layer(), [draw(N, D)], nn.vmap(body, **SEPARATE), init=nn.vmap(Layer.__call__, **SEPARATE))
