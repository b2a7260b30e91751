"""Flax scenarios of `jit`."""

import functools

import flax.linen as nn

from .flax_side import Block, Case, Counter, D, Layer, N, Pair, steps

STATS = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})


def jit_layer(draw):
    return Case(nn.jit(Layer)(), [draw(2, D)])


def jit_batch_stats(draw):
    return Case(nn.jit(Block)(), [draw(5, D)])


def jit_counter_called_twice(draw):
    return Case(nn.jit(Counter)(), [draw(2, D)], lambda m, x: m(m(x)))


def jit_function_form(draw):
    return Case(Layer(), [draw(2, D)], nn.jit(lambda m, x: {"y": m(x), "z": m.project(x)}))


def jit_methods(draw):
    lifted = nn.jit(Layer, methods=["__call__", "back"])
    return Case(lifted(), [draw(2, D), draw(2, D)], lambda m, x, y: m.back(m(x), y))


def jit_static_argnums(draw):
    class Switched(Layer):
        def __call__(self, x, double):
            return 2 * super().__call__(x) if double else x

    lifted = nn.jit(Switched, static_argnums=2)
    return Case(lifted(), [draw(2, D)], lambda m, x: m(m(x, True), False))


def jit_decorated_method(draw):
    class Decorated(nn.Module):
        def setup(self):
            self.block = Block()

        @functools.partial(nn.jit)
        def __call__(self, x):
            return self.block(x)

    return Case(Decorated(), [draw(5, D)])


def jit_shared_submodule(draw):
    shared = Layer()
    return Case(Pair(shared, shared), [draw(2, D)], nn.jit(lambda m, x: m(x)))


def jit_in_vmap(draw):
    return Case(nn.vmap(nn.jit(Block), **STATS)(), [draw(N, 5, D)])


def jit_of_scan(draw):
    lifted = nn.jit(nn.scan(steps(Block), length=N, **STATS))
    return Case(lifted(), [draw(5, D)], lambda m, x: m(x, None)[0])
