"""What holds on every supported release of torch, though not in the same way."""

import copy

import pytest
import torch
from torch import nn

import torchlift
from torchlift import _compat

AOT = {"backend": "aot_eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class Net(nn.Module):
    """Lifted modules among plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.blocks = torchlift.scan_layers([Block() for _ in range(3)], compile=AOT)
        self.heads = torchlift.vmap(Block, variable_axes={"params": 0}, in_axes=None, axis_size=2)()
        self.tail = torchlift.remat(Block)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.heads(self.blocks(self.inner(x).relu())).mean(0)
        x = torchlift.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x - m(x), self.inner, self.tail(x))
        return x.sin()


def results(run, net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(net.parameters())), *net.buffers()]


@pytest.mark.usefixtures("float64")
def test_a_model_with_lifted_modules_is_compiled() -> None:
    """As one graph, or, where torch.compile cannot trace a lifted module, as several."""
    net, x = Net(), torch.randn(5, 4)
    plain = copy.deepcopy(net)
    run = torch.compile(net, **AOT)
    for _ in range(2):
        torch.testing.assert_close(results(run, net, x), results(plain, plain, x), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(_compat.TRACES_MODULES, reason="this release of torch traces lifted modules")
def test_a_graph_that_cannot_hold_a_lifted_module_is_refused_by_name() -> None:
    net, x = Net(), torch.randn(5, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="cannot trace a lifted module; leave out fullgraph=True"):
        torch.compile(net, fullgraph=True, **AOT)(x)
    with pytest.raises(torchlift.UnsupportedError, match="cannot trace a lifted module; leave out fullgraph=True"):
        torchlift.jit(Net, **AOT)()(x)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
