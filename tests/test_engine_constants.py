"""Tensors that a body makes where no mode sees it: constants of its graph, and told from those of a closure."""

import warnings

import pytest
import torch
from torch import nn

import torchlift
from torchlift.engine.run import last_report

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


@torch.jit.script
def scale(q: torch.Tensor, factor: int) -> torch.Tensor:
    return torch.sqrt(torch.tensor(q.size(0), dtype=torch.float) * factor)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.a(x) / scale(x, 2)


@pytest.fixture
def layers():
    return [Layer() for _ in range(3)]


@pytest.mark.parametrize("around", [lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)])
def test_what_torchscript_makes_is_a_constant(layers, around):
    stack = torchlift.scan_layers(layers, compile={"backend": "aot_eager"})
    call = around(stack)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftWarning)
        for rows in (2, 3, 5, 7):  # of which the constant is made
            x = torch.randn(rows, 4)
            torch.testing.assert_close(call(x), nn.Sequential(*layers)(x))
            call(x).sum().backward()
    if call is stack:
        assert last_report().path == "compiled"


def test_a_number_from_outside_is_none(layers):
    """It may be another at the next call."""

    class Scaled(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.a, self.table = nn.Linear(4, 4), table

        def forward(self, x):
            return self.a(x) * self.table["scale"] / scale(x, 1)

    table = {"scale": torch.tensor(2.0)}
    stack = torchlift.scan_layers([Scaled(table) for _ in range(2)], compile={"backend": "aot_eager"})
    x = torch.randn(2, 4)
    for number in (2.0, 3.0):
        table["scale"] = torch.tensor(number)
        torch.testing.assert_close(stack(x), nn.Sequential(*stack)(x))
    assert last_report().path == "compiled"
