"""Flax scenarios of `while_loop`, `cond` and `switch`."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .flax_side import Block, Case, Counter, D, Layer, N, step


class Accumulator(nn.Module):
    """A layer that counts its calls in `state`."""

    def setup(self):
        self.layer = Layer()
        self.acc = self.variable("state", "acc", jnp.zeros, ())

    def __call__(self, x):
        self.acc.value = self.acc.value + 1.0
        return self.layer(x)


class Heads(nn.Module):
    """Branches with parameters of their own, and a counter for each."""

    def setup(self):
        self.heads = [Layer(), Block(), Counter()]

    def __call__(self, x):
        return sum(head(x) for head in self.heads)


def while_loop_carried_state(draw):
    fn = lambda m, x: nn.while_loop(lambda m, c: m.acc.value < 5.0, lambda m, c: m(c), m, x, carry_variables="state")
    return Case(Accumulator(), [draw(2, D)], fn, init=Accumulator.__call__, grad=False)


def while_loop_carry(draw):
    def body(m, c):
        return {"x": m(c["x"]), "n": c["n"] + 1}

    fn = lambda m, x: nn.while_loop(lambda m, c: c["n"] < 3, body, m, {"x": x, "n": jnp.array(0)})
    return Case(Layer(), [draw(2, D)], fn, init=Layer.__call__, grad=False)


def while_loop_until_small(draw):
    """How often it runs depends on the values."""
    fn = lambda m, x: nn.while_loop(
        lambda m, c: jnp.abs(c[0]).sum() > c[1], lambda m, c: (m(c[0]), c[1] + 1), m, (x, jnp.array(0))
    )
    return Case(Layer(), [3 * draw(2, D)], fn, init=Layer.__call__, grad=False)


def while_loop_never_entered(draw):
    fn = lambda m, x: nn.while_loop(lambda m, c: m.acc.value < 0.0, lambda m, c: m(c), m, x, carry_variables="state")
    return Case(Accumulator(), [draw(2, D)], fn, init=Accumulator.__call__, grad=False)


def while_loop_batch_stats(draw):
    def body(m, c):
        return m(c[0]), c[1] + 1

    fn = lambda m, x: nn.while_loop(lambda m, c: c[1] < 3, body, m, (x, jnp.array(0)), carry_variables="batch_stats")
    return Case(Block(), [draw(5, D)], fn, init=Block.__call__, grad=False)


def _cond(draw, flag):
    fn = lambda m, x, flag: nn.cond(flag, lambda m, x: m(x), lambda m, x: 2 * x, m, x)
    return Case(Block(), [draw(5, D), np.array(flag)], fn, init=lambda m, x, flag: m(x))


def cond_true(draw):
    return _cond(draw, True)


def cond_false(draw):
    return _cond(draw, False)


def cond_two_operands(draw):
    fn = lambda m, x, y: nn.cond(
        x.sum() < y.sum() + 1e3, lambda m, x, y: (m(x), {"y": y}), lambda m, x, y: (m(y), {"y": x}), m, x, y
    )
    return Case(Layer(), [draw(2, D), draw(2, D)], fn, init=lambda m, x, y: m(x))


def cond_state_in_both(draw):
    def more(m, x):
        m.acc.value = m.acc.value + 10.0
        return m.layer(x)

    def less(m, x):
        m.acc.value = m.acc.value - 10.0
        return -m.layer(x)

    fn = lambda m, x, flag: nn.cond(flag, more, less, m, x)
    return Case(Accumulator(), [draw(2, D), np.array(False)], fn, init=lambda m, x, flag: m(x))


def cond_in_vmap(draw):
    """A predicate for each row selects, state included."""
    lifted = {"variable_axes": {"params": 0, "state": 0}, "split_rngs": {"params": True}}
    fn = nn.vmap(lambda m, x, flag: nn.cond(flag, lambda m, x: m(x), lambda m, x: 2 * x, m, x), **lifted)
    init = nn.vmap(lambda m, x, flag: m(x), **lifted)
    flags = np.array([True, False, False, True])
    return Case(Accumulator(), [draw(N, 2, D), flags], fn, init=init)


def cond_in_scan(draw):
    body = lambda m, x, flag: (nn.cond(flag, lambda m, x: m(x), lambda m, x: 2 * x, m, x), None)
    options = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    lifted = nn.scan(body, **options)
    init = nn.scan(step, **options)
    flags = np.array([True, False, True, True])
    return Case(Block(), [draw(5, D), flags], lambda m, x, f: lifted(m, x, f)[0], init=init)


def _switch(draw, index):
    branches = [lambda m, x, i=i: m.heads[i](x) for i in range(3)]
    fn = lambda m, x, index: nn.switch(index, branches, m, x)
    return Case(Heads(), [draw(5, D), np.array(index)], fn, init=lambda m, x, index: m(x))


def switch_first(draw):
    return _switch(draw, 0)


def switch_second(draw):
    return _switch(draw, 1)


def switch_third(draw):
    return _switch(draw, 2)


def switch_clamped_above(draw):
    return _switch(draw, 7)


def switch_clamped_below(draw):
    return _switch(draw, -2)


def switch_in_vmap(draw):
    lifted = {"variable_axes": {"params": 0, "batch_stats": 0, "state": 0}, "split_rngs": {"params": True}}
    branches = [lambda m, x, i=i: m.heads[i](x) for i in range(3)]
    fn = nn.vmap(lambda m, x, index: nn.switch(index, branches, m, x), **lifted)
    init = nn.vmap(lambda m, x, index: m(x), **lifted)
    return Case(Heads(), [draw(N, 5, D), np.array([2, 0, 1, 9])], fn, init=init)
