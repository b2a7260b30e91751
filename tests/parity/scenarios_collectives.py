"""Flax scenarios of named collectives inside `vmap`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from .flax_side import Case, D, Layer, N, Norm

SHARED = dict(variable_axes={"params": None}, split_rngs={"params": False}, axis_name="batch")
SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True}, axis_name="batch")


def _mapped(draw, body, options=SHARED):
    return Case(Layer(), [draw(N, 2, D)], nn.vmap(body, **options))


def collective_psum(draw):
    return _mapped(draw, lambda m, x: m(x) * lax.psum(m(x) ** 2, "batch"))


def collective_pmean(draw):
    return _mapped(draw, lambda m, x: m(x) - lax.pmean(m(x), "batch"))


def collective_pmax(draw):
    body = lambda m, x: m(x) - lax.stop_gradient(lax.pmax(lax.stop_gradient(m(x)), "batch"))
    return _mapped(draw, body)


def collective_pmin(draw):
    body = lambda m, x: m(x) - lax.stop_gradient(lax.pmin(lax.stop_gradient(m(x)), "batch"))
    return _mapped(draw, body)


def collective_all_gather(draw):
    return _mapped(draw, lambda m, x: lax.all_gather(m(x), "batch") * m(x))


def collective_all_gather_axis_one(draw):
    return _mapped(draw, lambda m, x: lax.all_gather(m(x), "batch", axis=1))


def collective_axis_index(draw):
    return _mapped(draw, lambda m, x: m(x) * (1.0 + lax.axis_index("batch")))


def collective_pytree(draw):
    return _mapped(draw, lambda m, x: lax.psum({"a": m(x), "b": (x,)}, "batch"))


def collective_separate_params(draw):
    return _mapped(draw, lambda m, x: m(lax.pmean(m(x), "batch")), SEPARATE)


def collective_nested_axes(draw):
    inner = nn.vmap(
        lambda m, x: (lax.psum(m(x), ("batch", "model")), lax.psum(m(x), "batch")), **{**SHARED, "axis_name": "model"}
    )
    return Case(Layer(), [draw(N, 2, D)], nn.vmap(inner, **SHARED))


def collective_through_grad(draw):
    """The transpose of a sum over the axis is a sum over the axis."""

    def body(m, x):
        return nn.grad(lambda m, x: (m(x) * lax.psum(m(x), "batch")).sum(), m, x)[0]

    return Case(Layer(), [draw(N, 2, D)], nn.vmap(body, **SHARED), init=nn.vmap(lambda m, x: m(x), **SHARED))


def collective_sync_batch_norm(draw):
    """Statistics over the mapped axis too: equal at every index, so they are shared."""

    class Synced(Norm):
        def __call__(self, x):
            mean = lax.pmean(x.mean(0), "batch")
            var = lax.pmean((x**2).mean(0), "batch") - mean**2
            self.mean.value = 0.9 * self.mean.value + 0.1 * mean
            self.var.value = 0.9 * self.var.value + 0.1 * var
            return (x - mean) / jnp.sqrt(var + 1e-5) * self.scale

    axes = {"params": None, "batch_stats": None}
    lifted = nn.vmap(Synced, variable_axes=axes, split_rngs={"params": False}, axis_name="batch")
    return Case(lifted(), [draw(N, 5, D)])


def collective_softmax(draw):
    """A softmax over the mapped axis."""

    def body(m, x):
        z = jnp.exp(m(x))
        return z / jax.lax.psum(z, "batch")

    return _mapped(draw, body)
