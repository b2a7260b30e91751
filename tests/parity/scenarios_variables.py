"""Flax scenarios of `map_variables`, of Variables as arguments and of In and Out axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.lift import In, Out

from .flax_side import NORMAL, Block, Case, Constant, Counter, D, Layer, N, Sower, step, steps


class Linear(nn.Module):
    dim: int = D

    def setup(self):
        self.w = self.param("w", NORMAL, (self.dim, self.dim))

    def __call__(self, x):
        return x @ self.w


def each(fn):
    """Apply `fn` to every variable of a tree."""
    return lambda variables: jax.tree.map(fn, variables)


def call(m, *args):
    return m(*args)


def mapped(cls, trans_in, args):
    """A class whose params are mapped; in Flax a function, so that the making of variables is not."""
    return Case(cls(), args, nn.map_variables(call, "params", each(trans_in)), init=call)


def map_variables_causal_mask(draw):
    return mapped(Linear, jnp.triu, [draw(2, D)])


def map_variables_tied(draw):
    class Autoencoder(nn.Module):
        def setup(self):
            self.encoder = Linear()

        def __call__(self, x):
            decode = nn.map_variables(lambda m, z: m(z), "params", each(jnp.transpose))
            return decode(self.encoder, jnp.tanh(self.encoder(x)))

    init = lambda m, x: m.encoder(x)
    return Case(Autoencoder(), [draw(2, D)], init=init)


def map_variables_one_bit(draw):
    return mapped(Layer, lambda w: w + jax.lax.stop_gradient(jnp.sign(w) - w), [draw(2, D)])


def map_variables_low_rank(draw):
    """A weight given as a product: the stored tree differs from the one the module sees."""
    join = lambda tree: {"params": {"w": tree["params"]["a"] @ tree["params"]["b"]}}
    make = lambda m, x: m.scope.param("a", NORMAL, (D, 1)) @ m.scope.param("b", NORMAL, (1, D))
    return Case(Linear(), [draw(2, D)], nn.map_variables(call, "params", join), init=make)


def map_variables_other_state_passes(draw):
    lifted = nn.map_variables(call, "params", each(jnp.sin))
    return Case(Block(), [draw(5, D)], lifted, init=Block.__call__)


def map_variables_mutable(draw):
    halve, double = each(lambda v: v / 2), each(lambda v: v * 2)
    lifted = nn.map_variables(call, "state", halve, double, mutable=True)
    return Case(Counter(), [draw(2, D)], lifted, init=Counter.__call__)


def map_variables_all_collections(draw):
    lifted = nn.map_variables(call, ["params", "const"], each(jnp.exp))
    return Case(Constant(), [draw(2, D)], lifted, init=Constant.__call__)


def map_variables_init(draw):
    """What the constructor makes (2) is stored as its logarithm; returned: the variables of `init`."""

    class Two(nn.Module):
        def setup(self):
            self.w = self.param("w", nn.initializers.constant(2.0), (D,))

        def __call__(self, x):
            return x * self.w

    class Made(nn.Module):
        def __call__(self, x):
            lifted = nn.map_variables(Two, "params", each(jnp.exp), each(jnp.log), init=True)
            variables = lifted(parent=None).init(jax.random.key(0), x)
            return variables["params"]["w"]

    return Case(Made(), [draw(2, D)])


def map_variables_in_scan(draw):
    options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=N)
    inner = nn.map_variables(step, "params", each(jnp.triu))
    run = lambda body: lambda m, x: nn.scan(body, **options)(m, x, None)[0]
    return Case(Linear(), [draw(2, D)], run(inner), init=run(step))


def map_variables_in_vmap(draw):
    options = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    inner = nn.map_variables(call, "params", each(jnp.transpose))
    return Case(Linear(), [draw(N, 2, D)], nn.vmap(inner, **options), init=nn.vmap(call, **options))


def map_variables_methods(draw):
    sines = lambda fn: nn.map_variables(fn, "params", each(jnp.sin))
    both = lambda m, x: sines(Layer.project)(m, sines(Layer.__call__)(m, x))
    return Case(Layer(), [draw(2, D)], both, init=call)


class WithCount(nn.Module):
    """A counter in a module of its own, so that its Variable can be handed to another one."""

    def setup(self):
        self.count = self.variable("state", "count", jnp.zeros, ())
        self.layer = Layer()

    def __call__(self, x):
        return self.layer(x) * self.count.value


def variable_argument_read(draw):
    lifted = nn.remat(lambda m, count, x: m(x) * count.value)
    call = lambda m, x: lifted(m.layer, m.count, x)
    return Case(WithCount(), [draw(2, D)], call, init=WithCount.__call__)


def variable_argument_written(draw):
    def body(m, count, x):
        count.value = count.value + x.sum()
        return m(x) * count.value

    call = lambda m, x: nn.remat(body)(m.layer, count=m.count, x=x)
    return Case(WithCount(), [draw(2, D)], call, init=WithCount.__call__)


def variable_argument_of_scan(draw):
    def body(m, x, count, _):
        count.value = count.value + 1.0
        return m(x) * count.value, None

    lifted = nn.scan(body, variable_broadcast="params", variable_carry="state", in_axes=(nn.broadcast, 0), length=N)
    call = lambda m, x: lifted(m.layer, x, m.count, None)[0]
    return Case(WithCount(), [draw(2, D)], call, init=WithCount.__call__)


def in_axis_read_only(draw):
    axes = {"params": 0, "const": In(1)}
    lifted = nn.scan(steps(Constant), variable_axes=axes, split_rngs={"params": True}, length=N)
    both = nn.scan(steps(Constant), variable_axes={"params": 0, "const": 1}, split_rngs={"params": True}, length=N)
    call = lambda m, x: m(x, None)[0]
    return Case(lifted(), [draw(2, D)], call, init=lambda m, x: both(parent=m.scope)(x, None), mutable=[])


def out_axis_vmap(draw):
    axes = {"params": 0, "intermediates": Out(1)}
    return Case(nn.vmap(Sower, variable_axes=axes, split_rngs={"params": True})(), [draw(N, 2, D)])


def out_axis_scan(draw):
    axes = {"params": 0, "intermediates": Out(1)}
    lifted = nn.scan(steps(Sower), variable_axes=axes, split_rngs={"params": True}, length=N)
    return Case(lifted(), [draw(2, D)], lambda m, x: m(x, None)[0])
