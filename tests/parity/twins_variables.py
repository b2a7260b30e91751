"""The twins of `scenarios_variables`."""

import torch
from torch import nn
from torch.utils._pytree import tree_map

from torchlift import In, Out, Variable, broadcast, map_variables, remat, scan, variable, vmap

from .torch_side import Block, Constant, Counter, D, Layer, N, Sower, step, steps

SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True})


class Linear(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.w = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x):
        return x @ self.w


def each(fn):
    """Apply `fn` to every variable of a tree."""
    return lambda variables: tree_map(fn, variables)


def call(m, *args):
    return m(*args)


def map_variables_causal_mask():
    return map_variables(Linear, "params", each(torch.triu))()


def map_variables_tied():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Linear()

        def forward(self, x):
            decode = map_variables(call, "params", each(lambda w: w.mT))
            return decode(self.encoder, torch.tanh(self.encoder(x)))

    return Autoencoder()


def map_variables_one_bit():
    return map_variables(Layer, "params", each(lambda w: w + (torch.sign(w) - w).detach()))()


def map_variables_low_rank():
    join = lambda tree: {"params": {"w": tree["params"]["a"] @ tree["params"]["b"]}}
    split = lambda tree: {"params": {"a": tree["params"]["w"][:, :1], "b": tree["params"]["w"][:1]}}
    return map_variables(Linear, "params", join, split, init=True)()


def map_variables_other_state_passes():
    return Block(), map_variables(call, "params", each(torch.sin))


def map_variables_mutable():
    return Counter(), map_variables(call, "state", each(lambda v: v / 2), each(lambda v: v * 2), mutable=True)


def map_variables_all_collections():
    return map_variables(Constant, ["params", "const"], each(torch.exp))()


def map_variables_init():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((D,), 2.0))

    lifted = map_variables(Two, "params", each(torch.exp), each(torch.log), init=True)
    return nn.Module(), lambda m, x: lifted().w


def map_variables_in_scan():
    inner = map_variables(steps(Linear), "params", each(torch.triu))
    return scan(inner, length=N, compile=False, **SEPARATE)(), lambda m, x: m(x, None)[0]


def map_variables_in_vmap():
    return vmap(map_variables(Linear, "params", each(lambda w: w.mT)), axis_size=N, **SEPARATE)()


def map_variables_methods():
    lifted = map_variables(Layer, "params", each(torch.sin), methods=["forward", "project"])
    return lifted(), lambda m, x: m.project(m(x))


class WithCount(nn.Module):
    def __init__(self):
        super().__init__()
        variable(self, "state", "count", torch.zeros, ())
        self.layer = Layer()

    def reference(self):
        return Variable(self, "state", "count")


def variable_argument_read():
    lifted = remat(lambda m, count, x: m(x) * count.value)
    return WithCount(), lambda m, x: lifted(m.layer, m.reference(), x)


def variable_argument_written():
    def body(m, count, x):
        count.value = count.value + x.sum()
        return m(x) * count.value

    return WithCount(), lambda m, x: remat(body)(m.layer, count=m.reference(), x=x)


def variable_argument_of_scan():
    def body(m, x, count, _):
        count.value = count.value + 1.0
        return m(x) * count.value, None

    lifted = scan(
        body,
        variable_broadcast="params",
        variable_carry="state",
        in_axes=(broadcast, 0),
        length=N,
        compile=False,
    )
    return WithCount(), lambda m, x: lifted(m.layer, x, m.reference(), None)[0]


def in_axis_read_only():
    lifted = scan(step, variable_axes={"params": 0, "const": In(1)}, length=N, compile=False)
    return Constant(), lambda m, x: lifted(m, x, None)[0]


def out_axis_vmap():
    return vmap(Sower, variable_axes={"params": 0, "intermediates": Out(1)}, axis_size=N)()


def out_axis_scan():
    lifted = scan(steps(Sower), variable_axes={"params": 0, "intermediates": Out(1)}, length=N, compile=False)
    return lifted(), lambda m, x: m(x, None)[0]
