"""The twins of `scenarios_remat`."""

import functools

import torch
from torch import nn

from torchlift import checkpoint_policies, remat, remat_scan

from .torch_side import Block, Counter, Layer, N, Noise, Pair, Sower, equal_rows


def remat_layer():
    return remat(Layer)()


def remat_batch_stats():
    return remat(Block)()


def remat_counter():
    return remat(Counter)(), lambda m, x: m(m(x))


def remat_policy():
    return remat(Block, policy=checkpoint_policies.dots_saveable)()


def remat_methods():
    return remat(Layer, methods=["forward", "back"])(), lambda m, x, y: m.back(m(x), y)


def remat_function_form():
    return Layer(), remat(lambda m, x: {"y": m(x), "z": m.project(x)})


def remat_decorated_method():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        @functools.partial(remat, static_argnums=2)
        def forward(self, x, double):
            y = self.block(x)
            return 2 * y if double else y

    return Decorated(), lambda m, x: m(x, True)


def remat_static_argument():
    lifted = remat(lambda m, x, flag: m(x) if flag else x, static_argnums=(2,))
    return Layer(), lambda m, x: lifted(m, x, True)


def remat_shared_submodule():
    shared = Layer()
    return Pair(shared, shared), remat(lambda m, x: m(x))


def remat_intermediates():
    return remat(Sower)()


def remat_nested():
    return Layer(), remat(lambda m, x: remat(lambda m, x: m(torch.sin(x)))(m, m(x)))


def remat_dropout():
    lifted = remat(lambda m, x: torch.stack([m(0 * x), m(0 * x)]))
    return Noise(), lambda m, x: equal_rows(lifted(m, x))


def remat_scan_flat():
    return remat_scan(Layer, lengths=(N,))()


def remat_scan_two_levels():
    return remat_scan(Layer, lengths=(2, 3))()


def remat_scan_three_levels():
    return remat_scan(Layer, lengths=(2, 1, 2))()


def remat_scan_batch_stats():
    return remat_scan(Block, lengths=(2, 3))()


def remat_scan_function_form():
    return Layer(), remat_scan(lambda m, x: m(x) + x, lengths=(2, 2))


def remat_scan_shared_params():
    return remat_scan(Layer, lengths=(2, 3), variable_broadcast="params", variable_axes={})()


def remat_scan_carried_state():
    lifted = remat_scan(
        lambda m, x: m(x),
        lengths=(2, 3),
        variable_broadcast="params",
        variable_carry="state",
        variable_axes={},
    )
    return Counter(), lifted


def remat_scan_params_axis_one():
    return remat_scan(Layer, lengths=(2, 3), variable_axes={"params": 1})()


def remat_scan_pytree_carry():
    lifted = remat_scan(lambda m, c: {"x": m(c["x"]), "n": c["n"] + c["x"]}, lengths=(2, 2))
    return Layer(), lambda m, x, n: lifted(m, {"x": x, "n": n})
