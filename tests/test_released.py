"""What a call was given is let go of with its result, not at Python's next search for garbage."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import torchlift
from torchlift import checkpoint_policies

G = {"backend": "aot_eager"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, scale=1.0):
        return x + nn.functional.dropout(self.norm(self.linear(x)).tanh() * scale, 0.5, self.training)


class Cell(Block):
    def forward(self, carry, x):
        carry = super().forward(carry + x)
        return carry, carry


def layers(**options):
    return torchlift.scan_layers([Block() for _ in range(4)], **options)


def over_time(**options):
    cell = torchlift.scan(
        Cell, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"dropout": True}, **options
    )()
    return lambda x: cell(x, x.expand(3, 2, 4))[1].sum(0)


CALLS = {
    **{
        f"scan_layers {name}": lambda options=options: layers(**options)
        for name, options in {
            "plain": {"compile": False},
            "compiled": {"compile": G},
            "unrolled": {"compile": G, "unroll": 2},
            "plain, remat": {"compile": False, "remat": True},
            "compiled, remat": {"compile": G, "remat": True},
            "a policy": {"compile": G, "policy": checkpoint_policies.dots_saveable},
            "plain, nested": {"compile": False, "lengths": (2, 2)},
            "nested": {"compile": G, "lengths": (2, 2)},
            "in pieces": {"compile": G, "every": 2, "remat": True},
        }.items()
    },
    "layers in a graph": lambda: torch.compile(layers(compile=G), backend="aot_eager"),
    "layers with a keyword": lambda: lambda x: layers(compile=G)(x, scale=x.detach().mean()),
    "layers one by one": lambda: torchlift.scan_layers([Block(), Block().eval()], compile=False),
    "scan plain": lambda: over_time(compile=False),
    "scan compiled": lambda: over_time(compile=G),
    "scan unrolled": lambda: over_time(compile=G, unroll=2),
    "remat_scan": lambda: torchlift.remat_scan(Block, (2, 2), compile=False)(),
    "remat": lambda: torchlift.remat(Block)(),
    "vmap": lambda: torchlift.vmap(Block, {"params": 0, "batch_stats": 0}, in_axes=None, axis_size=2)(),
    "jit": lambda: torchlift.jit(Block, backend="aot_eager")(),
    "map_variables": lambda: torchlift.map_variables(Block, "params", lambda v: v)(),
    "cond": lambda: lambda x: torchlift.cond(True, lambda m, x: m(x), lambda m, x: x, Block(), x),
    "while_loop": lambda: (
        lambda x: torchlift.while_loop(
            lambda m, c: c[0] < 2,
            lambda m, c: (c[0] + 1, m(c[1])),
            Block(),
            (0, x),
            remat=True,
            carry_variables="batch_stats",
            split_rngs={"dropout": True},
        )[1]
    ),
    "vjp": lambda: lambda x: torchlift.vjp(lambda m, x: m(x), Block(), x)[0],
    "custom_vjp": lambda: (
        lambda x: torchlift.custom_vjp(lambda m, x: m(x), lambda m, x: (m(x), x), lambda r, ct: ({}, ct))(Block(), x)
    ),
}


@pytest.fixture
def no_search_for_garbage():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.filterwarnings("ignore::torchlift.TorchliftCompileWarning")
@pytest.mark.parametrize("name", CALLS)
def test_what_was_given_is_let_go_of(name, no_search_for_garbage):
    call, start = CALLS[name](), torch.ones(2, 4, requires_grad=True)
    for run in range(3):
        x = start * 2
        kept = weakref.ref(x)
        call(x).sum().backward()
        with torch.no_grad():
            call(x)
        del x
        assert run == 0 or kept() is None  # what is made at first may run in circles
