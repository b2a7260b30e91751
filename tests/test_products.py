"""Unrolled iterations: equal products are joined, and nothing but rounding changes."""

from collections import Counter

import pytest
import torch
from engine_zoo import packed
from torch import nn

from torchlift import scan
from torchlift.engine import capture
from torchlift.engine.plan import unroll_of
from torchlift.engine.run import last_report

__all__ = ["packed"]  # a fixture
pytestmark = pytest.mark.usefixtures("float64", "packed")
AOT = {"backend": "aot_eager"}


class LSTM(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.input, self.hidden = nn.Linear(3, 16, bias=bias), nn.Linear(4, 16, bias=bias)

    def forward(self, carry, x):
        h, c = carry
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h


class TwoLayers(nn.Module):
    """The second layer's input waits for the first one's carry, so that its products are never the same pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.back = nn.Linear(7, 4), nn.Linear(8, 4), nn.Linear(4, 4, bias=False)

    def forward(self, carry, x):
        a, b = carry
        a = torch.tanh(self.first(torch.cat([x, a], -1)))
        b = torch.tanh(self.second(torch.cat([a, b], -1)) + self.back(a) + self.back(b))
        return (a, b), b


class Shared(nn.Module):
    """One weight, used for inputs, carry and output, in products of three dimensions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, carry, x):
        carry = torch.tanh(self.layer(x) + self.layer(carry[0])), carry[1] + 1
        return carry, self.layer(carry[0]) * 2


def starts(width, *batch):
    return torch.zeros(*batch, width), torch.zeros(*batch, width)


CELLS = {
    "lstm": (LSTM, lambda: starts(4, 2), (2,)),
    "without bias": (lambda: LSTM(bias=False), lambda: starts(4, 2), (2,)),
    "two layers": (TwoLayers, lambda: starts(4, 2), (2,)),
    "one weight": (Shared, lambda: starts(3, 2, 5), (2, 5)),
}


@pytest.mark.parametrize("leaf", [False, True], ids=["x without grad", "x with grad"])
@pytest.mark.parametrize("unroll", [2, 4, "auto"])
@pytest.mark.parametrize("cell", CELLS)
def test_joined_products_equal_the_plain_loop(cell, unroll, leaf):
    make, carry, batch = CELLS[cell]
    module, x = make(), torch.randn(9, *batch, 3, requires_grad=leaf)
    found = []
    for settings in ({"compile": False}, {"compile": AOT, "unroll": unroll}):
        (h, c), ys = scan(type(module).forward, variable_broadcast="params", **settings)(module, carry(), x)
        inputs = [*module.parameters(), x] if leaf else [*module.parameters()]
        found.append([h, c, ys, *torch.autograd.grad(ys.square().sum() + (h * c).sum(), inputs)])
    assert last_report().path == "compiled"
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_weights_are_multiplied_once(monkeypatch):
    """Of four steps of an LSTM: one projection of the inputs, one gradient for each weight and each bias."""
    counts = []

    def join(joint, outputs):
        join_products(joint, outputs)
        counts.append(Counter(str(node.target) for node in joint.graph.nodes))

    join_products = capture.join_products
    monkeypatch.setattr(capture, "join_products", join)
    module, x = LSTM(), torch.randn(4, 2, 3, requires_grad=True)
    lifted = scan(LSTM.forward, variable_broadcast="params", unroll=4, compile=AOT)
    lifted(module, starts(4, 2), x)[1].sum().backward()
    (count,) = counts
    assert count["aten.addmm.default"] == 1 + 4  # of the inputs; of each carry
    assert count["aten.mm.default"] == 4 + 1 + 2  # gradients of each carry, of the inputs, of the two weights
    assert count["aten.sum.dim_IntList"] == 2


def test_draws_keep_their_order():
    """A body that draws is not rearranged."""

    class Noisy(LSTM):
        def forward(self, carry, x):
            (h, c), y = super().forward(carry, x)
            return (nn.functional.dropout(h, 0.5), c), y

    module, x, found = Noisy(), torch.randn(8, 2, 3), []
    for settings in ({"compile": False}, {"compile": AOT, "unroll": 4}):
        torch.manual_seed(0)
        lifted = scan(Noisy.forward, variable_broadcast="params", split_rngs={"dropout": True}, **settings)
        found.append(lifted(module, starts(4, 2), x)[1])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("consts", "x", "length", "expected"),
    [
        ([(8, 8), (8, 8), (8,), (8,)], [(8,)], 100, 16),  # a cell
        ([(8, 8)] * 8, [(8,)], 100, 8),
        ([(8, 8), (8,)], [(8,)], 10, 10),
        ([(3, 1)], [(8,)], 7, 7),
        ([], [(64, 64), (64,)], 12, 4),  # stacked layers
        ([(8,)], [(64, 64), (64,)], 9, 3),
        ([], [(64, 64)], 7, 1),
        ([], [(1024, 1024), (1024,)], 12, 1),
    ],
)
def test_auto_is_sixteen_steps_of_a_cell_and_four_small_layers(consts, x, length, expected):
    assert unroll_of("auto", length, [torch.empty(s) for s in consts], [torch.empty(s) for s in x]) == expected


def test_a_loop_inside_an_outer_graph_unrolls_evenly():
    module, x = LSTM(), torch.randn(6, 2, 3)
    lifted = scan(LSTM.forward, variable_broadcast="params", unroll="auto", compile=AOT)
    plain = scan(LSTM.forward, variable_broadcast="params", compile=False)
    compiled = torch.compile(lambda x: lifted(module, starts(4, 2), x)[1], fullgraph=True, **AOT)
    found = [torch.autograd.grad(f(x).sum(), list(module.parameters()))
             for f in (compiled, lambda x: plain(module, starts(4, 2), x)[1])]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
