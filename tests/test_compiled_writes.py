"""State that is read-only in a transform is not written unnoticed inside torch.compile either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlift


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        torchlift.variable(self, "state", "total", lambda: torch.zeros(1))
        self.register_buffer("scale", torch.ones(2))


def reads(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * m.scale + m.total


def writes(m: Any, x: Tensor) -> Tensor:
    m.total.add_(1)
    return reads(m, x)


WAYS = {
    "remat": lambda body: torchlift.remat(body, variables="params"),
    "apply": lambda body: lambda m, x: torchlift.apply(m, {}, x, method=body),
    "vmap": torchlift.vmap,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_write_in_place_is_refused_by_name(way: str) -> None:
    net = Net()
    run = torch.compile(WAYS[way](writes), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"changed 'total' of collection 'state', which is read-only there"):
        run(net, torch.ones(3, 2))
    assert net.total.item() == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_is_only_read_compiles(way: str) -> None:
    net, x = Net(), torch.ones(3, 2)
    run = torch.compile(WAYS[way](reads), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(net, x), reads(net, x))


class Counting(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        torchlift.variable(self, "state", "n", lambda: torch.zeros((), dtype=dtype))

    def forward(self, x):
        self.n.add_(1)
        return self.linear(x)


GRAPHS = {"backend": "aot_eager"}
LOOP = {"variable_carry": "state", "compile": GRAPHS}
# A way to call a module in compiled code, and how often that runs its body.
COUNTED = {
    "vmap": (lambda m, x: torchlift.vmap(lambda m, x: m(x), variable_axes={"state": None})(m, x[None])[0], 1),
    "remat": (lambda m, x: torchlift.remat(lambda m, x: m(x))(m, x), 1),
    "scan": (lambda m, x: torchlift.scan(lambda m, c: (m(c), None), length=3, **LOOP)(m, x)[0], 3),
    "remat_scan": (
        lambda m, x: torchlift.remat_scan(lambda m, c: m(c), lengths=(3,), variable_axes={}, **LOOP)(m, x),
        3,
    ),
    "cond": (lambda m, x: torchlift.cond(x.sum() > -9, lambda m, x: m(x), lambda m, x: 2 * m(x), m, x), 1),
    "map_variables": (lambda m, x: torchlift.map_variables(lambda m, x: m(x), "params", lambda v: v)(m, x), 1),
    "vjp": (lambda m, x: torchlift.vjp(lambda m, x: m(x).sum(), m, x)[0], 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("way", COUNTED)
def test_state_without_dimensions_is_written_in_compiled_code(way, dtype):
    call, times = COUNTED[way]
    module = Counting(dtype)
    before = module.n
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        compiled(module, torch.ones(2))
        assert module.n is before and module.n == count * times


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_state_without_dimensions_is_written_by_jit_and_scan_layers(dtype):
    module = Counting(dtype)
    before = module.n
    lifted = torchlift.jit(lambda m, x: m(x), backend="aot_eager")
    layers = torchlift.scan_layers([Counting(dtype) for _ in range(2)], compile=GRAPHS)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        lifted(module, torch.ones(2))
        compiled(torch.ones(2))
        assert module.n is before and module.n == count and all(layer.n == count for layer in layers)


def test_a_parameter_without_dimensions_is_written_in_compiled_code():
    module = nn.Module()
    module.p = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def step(x):
        torchlift.Variable(module, "params", "p").value = x
        return x * 2

    torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones((), dtype=torch.float64))
    assert module.p == 1
