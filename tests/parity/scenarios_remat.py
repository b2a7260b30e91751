"""Flax scenarios of `remat` and `remat_scan`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from .flax_side import Block, Case, Counter, D, Layer, N, Noise, Pair, Sower, equal_rows


def remat_layer(draw):
    return Case(nn.remat(Layer)(), [draw(2, D)])


def remat_batch_stats(draw):
    return Case(nn.remat(Block)(), [draw(5, D)])


def remat_counter(draw):
    lifted = nn.remat(Counter)
    return Case(lifted(), [draw(2, D)], lambda m, x: m(m(x)))


def remat_policy(draw):
    return Case(nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable)(), [draw(5, D)])


def remat_methods(draw):
    lifted = nn.remat(Layer, methods=["__call__", "back"])
    return Case(lifted(), [draw(2, D), draw(2, D)], lambda m, x, y: m.back(m(x), y))


def remat_function_form(draw):
    lifted = nn.remat(lambda m, x: {"y": m(x), "z": m.project(x)})
    return Case(Layer(), [draw(2, D)], lifted)


def remat_decorated_method(draw):
    class Decorated(nn.Module):
        def setup(self):
            self.block = Block()

        @functools.partial(nn.remat, static_argnums=2)
        def __call__(self, x, double):
            y = self.block(x)
            return 2 * y if double else y

    return Case(Decorated(), [draw(5, D)], lambda m, x: m(x, True))


def remat_static_argument(draw):
    lifted = nn.remat(lambda m, x, flag: m(x) if flag else x, static_argnums=(2,))
    return Case(Layer(), [draw(2, D)], lambda m, x: lifted(m, x, True))


def remat_shared_submodule(draw):
    shared = Layer()
    return Case(Pair(shared, shared), [draw(2, D)], nn.remat(lambda m, x: m(x)))


def remat_intermediates(draw):
    return Case(nn.remat(Sower)(), [draw(2, D)])


def remat_nested(draw):
    lifted = nn.remat(lambda m, x: nn.remat(lambda m, x: m(jnp.sin(x)))(m, m(x)))
    return Case(Layer(), [draw(2, D)], lifted)


def remat_dropout(draw):
    """Two calls draw different numbers; the recomputation draws the same (the gradient is exact)."""

    def twice(m, x):
        return jnp.stack([m(0 * x), m(0 * x)])

    lifted = nn.remat(twice)
    return Case(Noise(), [draw(5)], lambda m, x: equal_rows(lifted(m, x)), random=True)


def remat_scan_flat(draw):
    return Case(nn.remat_scan(Layer, lengths=(N,))(), [draw(2, D)])


def remat_scan_two_levels(draw):
    return Case(nn.remat_scan(Layer, lengths=(2, 3))(), [draw(2, D)])


def remat_scan_three_levels(draw):
    return Case(nn.remat_scan(Layer, lengths=(2, 1, 2))(), [draw(2, D)])


def remat_scan_batch_stats(draw):
    return Case(nn.remat_scan(Block, lengths=(2, 3))(), [draw(5, D)])


def remat_scan_function_form(draw):
    lifted = nn.remat_scan(lambda m, x: m(x) + x, lengths=(2, 2))
    return Case(Layer(), [draw(2, D)], lifted)


def remat_scan_shared_params(draw):
    lifted = nn.remat_scan(
        Layer, lengths=(2, 3), variable_broadcast="params", variable_axes={}, split_rngs={"params": False}
    )
    return Case(lifted(), [draw(2, D)])


def remat_scan_carried_state(draw):
    lifted = nn.remat_scan(
        lambda m, x: m(x), lengths=(2, 3), variable_broadcast="params", variable_carry="state", variable_axes={}
    )
    return Case(Counter(), [draw(2, D)], lifted, init=Counter.__call__)


def remat_scan_params_axis_one(draw):
    lifted = nn.remat_scan(Layer, lengths=(2, 3), variable_axes={"params": 1})
    return Case(lifted(), [draw(2, D)])


def remat_scan_pytree_carry(draw):
    lifted = nn.remat_scan(lambda m, c: {"x": m(c["x"]), "n": c["n"] + c["x"]}, lengths=(2, 2))
    return Case(Layer(), [draw(2, D), draw(2, D)], lambda m, x, n: lifted(m, {"x": x, "n": n}))
