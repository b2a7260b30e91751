"""The twins of `scenarios_jit`."""

import functools

from torch import nn

import torchlift
from torchlift import scan, vmap

from .torch_side import Block, Counter, Layer, N, Pair, steps

STATS = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
jit = functools.partial(torchlift.jit, backend="aot_eager")


def jit_layer():
    return jit(Layer)()


def jit_batch_stats():
    return jit(Block)()


def jit_counter_called_twice():
    return jit(Counter)(), lambda m, x: m(m(x))


def jit_function_form():
    return Layer(), jit(lambda m, x: {"y": m(x), "z": m.project(x)})


def jit_methods():
    return jit(Layer, methods=["forward", "back"])(), lambda m, x, y: m.back(m(x), y)


def jit_static_argnums():
    class Switched(Layer):
        def forward(self, x, double):
            return 2 * super().forward(x) if double else x

    return jit(Switched, static_argnums=2)(), lambda m, x: m(m(x, True), False)


def jit_decorated_method():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        @jit
        def forward(self, x):
            return self.block(x)

    return Decorated()


def jit_shared_submodule():
    shared = Layer()
    return Pair(shared, shared), jit(lambda m, x: m(x))


def jit_in_vmap():
    return vmap(jit(Block), axis_size=N, **STATS)()


def jit_of_scan():
    return jit(scan(steps(Block), length=N, compile=False, **STATS))(), lambda m, x: m(x, None)[0]
