"""The twins of `scenarios_control`."""

import torch
from torch import nn

from torchlift import cond, scan, switch, variable, vmap, while_loop

from .torch_side import Block, Counter, Layer


class Accumulator(nn.Module):
    """A layer that counts its calls in `state`."""

    def __init__(self):
        super().__init__()
        self.layer = Layer()
        variable(self, "state", "acc", torch.zeros, ())

    def forward(self, x):
        self.acc = self.acc + 1.0
        return self.layer(x)


class Heads(nn.Module):
    """Branches with parameters of their own; named as Flax names the items of a list."""

    def __init__(self):
        super().__init__()
        self.heads_0, self.heads_1, self.heads_2 = Layer(), Block(), Counter()


def double(m, x):
    return 2 * x


def run(m, x):
    return m(x)


def while_loop_carried_state():
    return Accumulator(), lambda m, x: while_loop(lambda m, c: m.acc < 5.0, run, m, x, carry_variables="state")


def while_loop_carry():
    def body(m, c):
        return {"x": m(c["x"]), "n": c["n"] + 1}

    return Layer(), lambda m, x: while_loop(lambda m, c: c["n"] < 3, body, m, {"x": x, "n": torch.tensor(0)})


def while_loop_until_small():
    def fn(m, x):
        start = (x, torch.tensor(0))
        return while_loop(lambda m, c: c[0].abs().sum() > c[1], lambda m, c: (m(c[0]), c[1] + 1), m, start)

    return Layer(), fn


def while_loop_never_entered():
    return Accumulator(), lambda m, x: while_loop(lambda m, c: m.acc < 0.0, run, m, x, carry_variables="state")


def while_loop_batch_stats():
    def fn(m, x):
        start = (x, torch.tensor(0))
        body = lambda m, c: (m(c[0]), c[1] + 1)
        return while_loop(lambda m, c: c[1] < 3, body, m, start, carry_variables="batch_stats")

    return Block(), fn


def cond_true():
    return Block(), lambda m, x, flag: cond(flag, run, double, m, x)


cond_false = cond_true


def cond_two_operands():
    def fn(m, x, y):
        flag = x.sum() < y.sum() + 1e3
        return cond(flag, lambda m, x, y: (m(x), {"y": y}), lambda m, x, y: (m(y), {"y": x}), m, x, y)

    return Layer(), fn


def cond_state_in_both():
    def more(m, x):
        m.acc = m.acc + 10.0
        return m.layer(x)

    def less(m, x):
        m.acc = m.acc - 10.0
        return -m.layer(x)

    return Accumulator(), lambda m, x, flag: cond(flag, more, less, m, x)


def cond_in_vmap():
    lifted = vmap(lambda m, x, flag: cond(flag, run, double, m, x), variable_axes={"params": 0, "state": 0})
    return Accumulator(), lifted


def cond_in_scan():
    body = lambda m, x, flag: (cond(flag, run, double, m, x), None)
    lifted = scan(body, variable_axes={"params": 0, "batch_stats": 0}, compile=False)
    return Block(), lambda m, x, flags: lifted(m, x, flags)[0]


BRANCHES = [lambda m, x: m.heads_0(x), lambda m, x: m.heads_1(x), lambda m, x: m.heads_2(x)]


def choose(m, x, index):
    return switch(index, BRANCHES, m, x)


def switch_first():
    return Heads(), choose


switch_second = switch_third = switch_clamped_above = switch_clamped_below = switch_first


def switch_in_vmap():
    return Heads(), vmap(choose, variable_axes={"params": 0, "batch_stats": 0, "state": 0})
