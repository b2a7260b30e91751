"""Flax scenarios of `scan`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from .flax_side import (
    Block,
    Case,
    Cell,
    Constant,
    Counter,
    D,
    Layer,
    N,
    Noise,
    Pair,
    Sower,
    equal_rows,
    step,
    steps,
)

LAYERS = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=N)
STATS = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=N)
TIME = dict(variable_broadcast="params", split_rngs={"params": False})


def through(lifted):
    """Call a scan over layers on x alone, for its carry."""
    return lambda m, x: lifted(m, x, None)[0]


def over(m, x):
    return m(x, None)[0]


def scan_layers(draw):
    return Case(nn.scan(steps(Layer), **LAYERS)(), [draw(2, D)], over)


def scan_layers_params_axis_one(draw):
    lifted = nn.scan(steps(Layer), variable_axes={"params": 1}, split_rngs={"params": True}, length=N)
    return Case(lifted(), [draw(2, D)], over)


def scan_layers_reverse(draw):
    return Case(nn.scan(steps(Layer), reverse=True, **LAYERS)(), [draw(2, D)], over)


def scan_layers_unroll(draw):
    return Case(nn.scan(steps(Layer), unroll=3, **LAYERS)(), [draw(2, D)], over)


def scan_layers_batch_stats(draw):
    return Case(nn.scan(steps(Block), **STATS)(), [draw(5, D)], over)


def scan_layers_counter(draw):
    axes = {"params": 0, "state": 0}
    lifted = nn.scan(steps(Counter), variable_axes=axes, split_rngs={"params": True}, length=N)
    return Case(lifted(), [draw(2, D)], over)


def scan_length_one(draw):
    options = {**STATS, "length": 1}
    return Case(nn.scan(steps(Block), **options)(), [draw(5, D)], over)


def scan_time(draw):
    return Case(nn.scan(Cell, **TIME)(), [draw(2, D), draw(7, 2, D)])


def scan_time_axis_one(draw):
    return Case(nn.scan(Cell, in_axes=1, out_axes=1, **TIME)(), [draw(2, D), draw(2, 7, D)])


def scan_time_negative_axes(draw):
    return Case(nn.scan(Cell, in_axes=-1, out_axes=-2, **TIME)(), [draw(2, D), draw(2, D, 7)])


def scan_time_reverse(draw):
    return Case(nn.scan(Cell, reverse=True, **TIME)(), [draw(2, D), draw(7, 2, D)])


def scan_time_unroll_remainder(draw):
    return Case(nn.scan(Cell, unroll=3, **TIME)(), [draw(2, D), draw(7, 2, D)])


def scan_time_separate_params(draw):
    lifted = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True})
    return Case(lifted(), [draw(2, D), draw(N, 2, D)])


def scan_broadcast_input(draw):
    def body(m, carry, x, scale):
        carry, y = m(carry, x * scale)
        return carry, y + scale

    lifted = nn.scan(body, in_axes=(0, nn.broadcast), **TIME)
    return Case(Cell(), [draw(2, D), draw(7, 2, D), draw(D)], lifted)


def scan_broadcast_output(draw):
    def body(m, carry, x):
        carry, y = m(carry, x)
        return carry, (y, m.u * 2.0)

    init = nn.scan(Cell.__call__, **TIME)
    lifted = nn.scan(body, out_axes=(0, nn.broadcast), **TIME)
    return Case(Cell(), [draw(2, D), draw(7, 2, D)], lifted, init=init)


def scan_pytrees(draw):
    def body(m, carry, xs):
        h, y = m(carry["h"], xs["a"])
        return {"h": h, "sum": carry["sum"] + xs["b"] * y}, (y, {"h": h})

    lifted = nn.scan(body, in_axes=({"a": 1, "b": 0},), out_axes=(0, {"h": 1}), **TIME)
    call = lambda m, h, a, b: lifted(m, {"h": h, "sum": jnp.zeros((2, D))}, {"a": a, "b": b})
    return Case(Cell(), [draw(2, D), draw(2, 7, D), draw(7, D)], call)


def scan_carried_state(draw):
    lifted = nn.scan(step, variable_broadcast="params", variable_carry="state", length=N)
    return Case(Counter(), [draw(2, D)], through(lifted), init=Counter.__call__)


def scan_carried_batch_stats(draw):
    lifted = nn.scan(step, variable_broadcast="params", variable_carry="batch_stats", length=N)
    return Case(Block(), [draw(5, D)], through(lifted), init=Block.__call__)


def scan_broadcast_state(draw):
    lifted = nn.scan(
        steps(Constant), variable_axes={"params": 0}, variable_broadcast="const", split_rngs={"params": True}, length=N
    )
    return Case(lifted(), [draw(2, D)], over)


def scan_axes_carry_and_broadcast(draw):
    class Mixed(nn.Module):
        def setup(self):
            self.constant = Constant()
            self.counter = Counter()

        def __call__(self, x):
            return self.constant(x) + self.counter(x)

    axes = dict(variable_axes={"params": 0}, variable_broadcast="const", split_rngs={"params": True})
    lifted = nn.scan(step, variable_carry="state", length=N, **axes)
    split = nn.vmap(
        lambda m, x: m(x),
        variable_axes={"params": 0, "state": None, "const": None},
        in_axes=None,
        axis_size=N,
        split_rngs={"params": True},
    )
    return Case(Mixed(), [draw(2, D)], through(lifted), init=lambda m, x: split(m, x))


def scan_function_form(draw):
    return Case(Layer(), [draw(2, D)], through(nn.scan(step, **LAYERS)))


def scan_decorated_method(draw):
    class Stack(nn.Module):
        def setup(self):
            self.layer = Layer()

        @functools.partial(nn.scan, **LAYERS)
        def __call__(self, x, _):
            return self.layer(x), x

    return Case(Stack(), [draw(2, D)], lambda m, x: m(x, None))


def scan_methods_list(draw):
    class Two(Cell):
        def other(self, carry, x):
            carry = carry @ self.w + x
            return carry, carry

    lifted = nn.scan(Two, methods=["__call__", "other"], **TIME)

    def call(m, h, x):
        h, y = m(h, x)
        return m.other(h, y)

    return Case(lifted(), [draw(2, D), draw(5, 2, D)], call)


def scan_methods_dict(draw):
    class Both(Cell):
        def back(self, carry, x):
            carry = carry @ self.w + x
            return carry, carry

    methods = {"__call__": TIME, "back": dict(reverse=True, out_axes=1, **TIME)}

    def call(m, h, x):
        h, y = m(h, x)
        return m.back(h, y)

    return Case(nn.scan(Both, methods=methods)(), [draw(2, D), draw(5, 2, D)], call)


def scan_module_argument(draw):
    lifted = nn.scan(lambda m, x, other, _: (other(m(x)), None), in_axes=(nn.broadcast, 0), **LAYERS)
    call = lambda m, x: lifted(m.first, x, m.second, None)[0]
    return Case(Pair(Layer(), Layer()), [draw(2, D)], call)


def scan_shared_submodule(draw):
    shared = Layer()
    return Case(Pair(shared, shared), [draw(2, D)], through(nn.scan(step, **LAYERS)))


def scan_intermediates(draw):
    axes = {"params": 0, "intermediates": 0}
    lifted = nn.scan(steps(Sower), variable_axes=axes, split_rngs={"params": True}, length=N)
    return Case(lifted(), [draw(2, D)], over)


def scan_dropout_split(draw):
    return _noise(draw, True)


def scan_dropout_same(draw):
    return _noise(draw, False)


def _noise(draw, split):
    lifted = nn.scan(lambda m, carry, x: (carry, m(0 * x)), split_rngs={"dropout": split})
    call = lambda m, h, x: equal_rows(lifted(m, h, x)[1])
    return Case(Noise(), [draw(1), draw(N, 5)], call, random=True)


def scan_data_transform(draw):
    def double(variable_groups, rng_groups):
        return jax.tree.map(lambda x: 2.0 * x, variable_groups), rng_groups

    init = nn.scan(step, **LAYERS)
    lifted = nn.scan(step, data_transform=double, **LAYERS)
    return Case(Layer(), [draw(2, D)], through(lifted), init=through(init), mutable=[])


def scan_of_scan(draw):
    inner = nn.scan(steps(Block), **STATS)
    outer = nn.scan(inner, **{**STATS, "length": 2})
    return Case(outer(), [draw(5, D)], over)


def scan_time_in_layers(draw):
    """A stack of recurrent layers: time inside, layers outside."""

    class Recurrent(nn.Module):
        def setup(self):
            self.cell = nn.scan(Cell, **TIME)()

        def __call__(self, x, h):
            return self.cell(h, x)[::-1]

    lifted = nn.scan(Recurrent, variable_axes={"params": 0}, split_rngs={"params": True})
    return Case(lifted(), [draw(7, 2, D), draw(N, 2, D)])


def scan_of_vmap(draw):
    options = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    inner = nn.vmap(steps(Block), in_axes=(0, None), out_axes=0, **options)
    return Case(nn.scan(inner, **STATS)(), [draw(2, 5, D)], over)


def vmap_of_scan(draw):
    options = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    outer = nn.vmap(nn.scan(steps(Block), **STATS), in_axes=(0, None), **options)
    return Case(outer(), [draw(2, 5, D)], over)


def vmap_shared_of_scan_time(draw):
    outer = nn.vmap(
        nn.scan(Cell, **TIME),
        variable_axes={"params": None},
        split_rngs={"params": False},
        in_axes=(0, 1),
        out_axes=(0, 1),
    )
    return Case(outer(), [draw(2, D), draw(7, 2, D)])


def scan_of_remat(draw):
    return Case(nn.scan(nn.remat(steps(Block)), **STATS)(), [draw(5, D)], over)


def remat_of_scan(draw):
    return Case(nn.remat(nn.scan(steps(Block), **STATS))(), [draw(5, D)], over)
