"""The twins of `scenarios_scan`: each takes the argument `compile` of `scan`."""

import functools

import torch
from torch import nn

import torchlift
from torchlift import broadcast, remat, vmap

from .torch_side import Block, Cell, Constant, Counter, Layer, N, Noise, Pair, Sower, equal_rows, step, steps
from .twins_vmap import SEPARATE, SHARED, STATS

TIME = dict(variable_broadcast="params", split_rngs={"params": False})
LAYERS = dict(length=N, **SEPARATE)
STATS_LAYERS = dict(length=N, **STATS)


def scan(target, compile, **options):
    return torchlift.scan(target, compile=compile, **options)


def over(m, x):
    return m(x, None)[0]


def through(lifted):
    return lambda m, x: lifted(m, x, None)[0]


def scan_layers(compile):
    return scan(steps(Layer), compile, **LAYERS)(), over


def scan_layers_params_axis_one(compile):
    return scan(steps(Layer), compile, variable_axes={"params": 1}, length=N)(), over


def scan_layers_reverse(compile):
    return scan(steps(Layer), compile, reverse=True, **LAYERS)(), over


def scan_layers_unroll(compile):
    return scan(steps(Layer), compile, unroll=3, **LAYERS)(), over


def scan_layers_batch_stats(compile):
    return scan(steps(Block), compile, **STATS_LAYERS)(), over


def scan_layers_counter(compile):
    return scan(steps(Counter), compile, variable_axes={"params": 0, "state": 0}, length=N)(), over


def scan_length_one(compile):
    return scan(steps(Block), compile, length=1, **STATS)(), over


def scan_time(compile):
    return scan(Cell, compile, **TIME)()


def scan_time_axis_one(compile):
    return scan(Cell, compile, in_axes=1, out_axes=1, **TIME)()


def scan_time_negative_axes(compile):
    return scan(Cell, compile, in_axes=-1, out_axes=-2, **TIME)()


def scan_time_reverse(compile):
    return scan(Cell, compile, reverse=True, **TIME)()


def scan_time_unroll_remainder(compile):
    return scan(Cell, compile, unroll=3, **TIME)()


def scan_time_separate_params(compile):
    return scan(Cell, compile, length=N, **SEPARATE)()


def scan_broadcast_input(compile):
    def body(m, carry, x, scale):
        carry, y = m(carry, x * scale)
        return carry, y + scale

    return Cell(), scan(body, compile, in_axes=(0, broadcast), **TIME)


def scan_broadcast_output(compile):
    def body(m, carry, x):
        carry, y = m(carry, x)
        return carry, (y, m.u * 2.0)

    return Cell(), scan(body, compile, out_axes=(0, broadcast), **TIME)


def scan_pytrees(compile):
    def body(m, carry, xs):
        h, y = m(carry["h"], xs["a"])
        return {"h": h, "sum": carry["sum"] + xs["b"] * y}, (y, {"h": h})

    lifted = scan(body, compile, in_axes=({"a": 1, "b": 0},), out_axes=(0, {"h": 1}), **TIME)
    return Cell(), lambda m, h, a, b: lifted(m, {"h": h, "sum": torch.zeros(2, 3)}, {"a": a, "b": b})


def scan_carried_state(compile):
    return Counter(), through(scan(step, compile, variable_broadcast="params", variable_carry="state", length=N))


def scan_carried_batch_stats(compile):
    return Block(), through(scan(step, compile, variable_broadcast="params", variable_carry="batch_stats", length=N))


def scan_broadcast_state(compile):
    return scan(steps(Constant), compile, variable_broadcast="const", **LAYERS)(), over


def scan_axes_carry_and_broadcast(compile):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.constant, self.counter = Constant(), Counter()

        def forward(self, x):
            return self.constant(x) + self.counter(x)

    lifted = scan(step, compile, variable_broadcast="const", variable_carry="state", **LAYERS)
    return Mixed(), through(lifted)


def scan_function_form(compile):
    return Layer(), through(scan(step, compile, **LAYERS))


def scan_decorated_method(compile):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        @functools.partial(torchlift.scan, compile=compile, **LAYERS)
        def forward(self, x, _):
            return self.layer(x), x

    return Stack(), lambda m, x: m(x, None)


def scan_methods_list(compile):
    class Two(Cell):
        def other(self, carry, x):
            carry = carry @ self.w + x
            return carry, carry

    def call(m, h, x):
        h, y = m(h, x)
        return m.other(h, y)

    return scan(Two, compile, methods=["forward", "other"], **TIME)(), call


def scan_methods_dict(compile):
    class Both(Cell):
        def back(self, carry, x):
            carry = carry @ self.w + x
            return carry, carry

    def call(m, h, x):
        h, y = m(h, x)
        return m.back(h, y)

    methods = {"forward": {}, "back": dict(reverse=True, out_axes=1)}
    return scan(Both, compile, methods=methods, **TIME)(), call


def scan_module_argument(compile):
    lifted = scan(lambda m, x, other, _: (other(m(x)), None), compile, in_axes=(broadcast, 0), **LAYERS)
    return Pair(Layer(), Layer()), lambda m, x: lifted(m.first, x, m.second, None)[0]


def scan_shared_submodule(compile):
    shared = Layer()
    return Pair(shared, shared), through(scan(step, compile, **LAYERS))


def scan_intermediates(compile):
    return scan(steps(Sower), compile, **LAYERS)(), over


def scan_dropout_split(compile):
    lifted = scan(lambda m, h, x: (h, m(0 * x)), compile, split_rngs={"dropout": True})
    return Noise(), lambda m, h, x: equal_rows(lifted(m, h, x)[1])


def scan_dropout_same(compile):
    lifted = scan(lambda m, h, x: (h, m(0 * x)), compile, split_rngs={"dropout": False})
    return Noise(), lambda m, h, x: equal_rows(lifted(m, h, x)[1])


def scan_data_transform(compile):
    def double(variable_groups, rng_groups):
        return torch.utils._pytree.tree_map(lambda x: 2.0 * x, variable_groups), rng_groups

    return Layer(), through(scan(step, compile, data_transform=double, **LAYERS))


def scan_of_scan(compile):
    inner = scan(steps(Block), compile, **STATS_LAYERS)
    return scan(inner, compile, length=2, **STATS)(), over


def scan_time_in_layers(compile):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = scan(Cell, compile, **TIME)()

        def forward(self, x, h):
            return self.cell(h, x)[::-1]

    return scan(Recurrent, compile, **LAYERS)()


def scan_of_vmap(compile):
    inner = vmap(steps(Block), in_axes=(0, None), axis_size=2, **STATS)
    return scan(inner, compile, **STATS_LAYERS)(), over


def vmap_of_scan(compile):
    inner = scan(steps(Block), compile, **STATS_LAYERS)
    return vmap(inner, in_axes=(0, None), axis_size=2, **STATS)(), over


def vmap_shared_of_scan_time(compile):
    return vmap(scan(Cell, compile, **TIME), in_axes=(0, 1), out_axes=(0, 1), **SHARED)()


def scan_of_remat(compile):
    return scan(remat(steps(Block)), compile, **STATS_LAYERS)(), over


def remat_of_scan(compile):
    return remat(scan(steps(Block), compile, **STATS_LAYERS))(), over
