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
