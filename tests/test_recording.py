"""Lifted modules in programs that others record: torch.export, make_fx, torch.jit.trace."""

import copy

import pytest
import torch
from torch import nn

import torchlift


class Block(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)

    def forward(self, x):
        return self.norm(self.linear(x)).relu()


POLICY = torchlift.checkpoint_policies.dots_saveable
LIFTED = {
    "remat": lambda: torchlift.remat(Block)(),
    "a policy": lambda: torchlift.remat(Block, policy=POLICY)(),
    "vmap": lambda: torchlift.vmap(Block, variable_axes={True: 0}, in_axes=None, axis_size=2)(),
    "scan_layers": lambda: torchlift.scan_layers([Block() for _ in range(2)], compile=False),
    "compiled layers": lambda: torchlift.scan_layers([Block() for _ in range(2)], compile={"backend": "aot_eager"}),
    "layers again": lambda: torchlift.scan_layers([Block() for _ in range(2)], remat=True, compile=False),
}
CASES = [(name, strict) for name in LIFTED for strict in (False, True) if not (strict and "layers" in name)]


@pytest.mark.parametrize(("name", "strict"), CASES)
def test_an_exported_program_writes_batch_statistics(name, strict):
    module, x = LIFTED[name](), torch.randn(3, 4)
    plain = copy.deepcopy(module)
    program = torch.export.export(module, (x,), strict=strict).module()
    for _ in range(2):
        torch.testing.assert_close(program(x), plain(x))
    state = program.state_dict()
    for key, expected in plain.state_dict().items():
        torch.testing.assert_close(state[key], expected)


@pytest.mark.parametrize("name", ["remat", "a policy", "layers again"])
def test_a_recorded_remat_is_its_operators(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    module, x = LIFTED[name]().eval(), torch.randn(3, 4, requires_grad=True)

    def gradient(x):
        return torch.autograd.grad(module(x).square().sum(), x)[0]

    for fn in (module, gradient):
        torch.testing.assert_close(make_fx(fn)(x)(x), fn(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("in_axes", "size"), [(None, 2), (0, 2), (0, None)])
def test_vmap_in_a_torchscript_trace(in_axes, size):
    """There sizes are tensors."""
    many = torchlift.vmap(nn.Linear, variable_axes={"params": 0}, in_axes=in_axes, axis_size=size)(4, 4)
    x = torch.randn(2, 3, 4)
    expected = many(x)
    torch.testing.assert_close(torch.jit.trace(many, x)(x), expected)
    if size is not None:
        with pytest.raises(torchlift.AxisError, match=r"sizes of the mapped axis disagree.*axis_size: 2"):
            torch.jit.trace(torchlift.vmap(nn.Linear, in_axes=0, axis_size=2)(4, 4), torch.randn(3, 4))
