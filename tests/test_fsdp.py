"""scan_layers whose layers FSDP shards, each by itself, inside torch.compile."""

import copy

import pytest
import torch
from torch import nn

import torchlift


@pytest.fixture
def shard(one_process):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return lambda module: fully_shard(module, mesh=mesh)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(self.norm(x)).relu()


@pytest.mark.parametrize(
    "how",
    [{}, {"remat": True}, {"remat": True, "every": 2}, {"policy": torchlift.checkpoint_policies.dots_saveable}],
    ids=["kept", "remat", "every", "policy"],
)
def test_layers_that_run_again_see_gathered_parameters(shard, how):
    layers = [Block() for _ in range(4)]
    plain = nn.Sequential(*copy.deepcopy(layers))
    stack = torchlift.scan_layers(layers, compile={"backend": "aot_eager"}, **how)
    model = nn.Sequential(stack, nn.Tanh())
    for layer in stack:
        shard(layer)
    shard(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 4)
        out, expected = compiled(x), plain(x).tanh()
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
