"""Layers that use ``torch.utils.checkpoint`` themselves, in compiled loops: what it leaves out is not kept."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchlift
from torchlift import _compat

G = {"backend": "aot_eager"}


def products(ctx, op, *args, **kwargs):
    kept = not ctx.is_recompute and op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.up, self.down, self.options = nn.Linear(4, 16), nn.Linear(16, 4), options

    def inner(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False, **self.options)


class Bare(Layer):
    forward = Layer.inner


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, products)
BY_NAME = functools.partial(create_selective_checkpoint_contexts, policy_fn_or_list=products)
LISTED = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
OPTIONS = {
    "all": {},
    "a policy": {"context_fn": SELECTIVE},
    "a policy by name": {"context_fn": BY_NAME},
    "operators": {"context_fn": LISTED},
    "no rng": {"preserve_rng_state": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_computed_again_is_not_kept(name, float64):
    twins = [torchlift.scan_layers([cls(**OPTIONS[name]) for _ in range(3)], compile=G) for cls in (Layer, Bare)]
    twins[1].load_state_dict(twins[0].state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    grads = [torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()]) for layers in twins]
    torch.testing.assert_close(*grads)
    kept, all_of_it = (torchlift.explain(layers, x).loops[0].saved_bytes for layers in twins)
    selective = "context_fn" in OPTIONS[name]
    products_alone = 5 * 16 * 8  # the other one is not needed
    assert kept == (products_alone if selective else 0) < all_of_it
    like = torchlift.scan_layers(
        [Bare() for _ in range(3)], remat=True, policy=products if selective else None, compile=G
    )
    assert torchlift.explain(like, x).loops[0].saved_bytes == kept


def test_other_contexts_are_torchs_own():
    seen = []

    def contexts():
        seen.append("asked")
        return create_selective_checkpoint_contexts(products)

    layers = torchlift.scan_layers([Layer(context_fn=contexts) for _ in range(2)], compile=G)
    twin = nn.Sequential(*layers)
    x = torch.randn(5, 4, requires_grad=True)
    found, expected = (torch.autograd.grad(fn(x).sum(), x) for fn in (layers, twin))
    torch.testing.assert_close(found, expected)
    assert seen


def test_other_threads_are_left_alone():
    entered, x = [], torch.ones(2, requires_grad=True)

    def enter(policy):
        entered.append(policy)
        return torch.enable_grad()

    with _compat.checkpoints_seen(enter):
        checkpoint(torch.cos, x, use_reentrant=False)
        thread = threading.Thread(target=lambda: checkpoint(torch.cos, x, use_reentrant=False).sum().backward())
        thread.start()
        thread.join()
    assert entered == [None] and x.grad is not None
