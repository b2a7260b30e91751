"""A loop that no graph of torch.compile can hold breaks it once, and runs in Python with one warning."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import torchlift
from torchlift import TorchliftCompileWarning, _compat


class Branch(nn.Linear):
    """What it does depends on the values of a tensor."""

    def forward(self, x, *_):
        y = super().forward(x)
        return y.relu() if y.sum() > 0 else y - 1


class Numbered(Branch):
    """Attributes in which layers differ: one that is read and one that is not."""

    def __init__(self, size, index):
        super().__init__(size, size)
        self.index, self.first = index, index == 0

    def forward(self, x, *_):
        return super().forward(x + 1 if self.first else x)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = Branch(4, 4)

    def forward(self, c, x):
        c = self.branch(c + x)
        return c, c


LOOPS = {
    "scan_layers": lambda: torchlift.scan_layers([Branch(4, 4) for _ in range(5)]),
    "numbered layers": lambda: torchlift.scan_layers(
        [Numbered(4, index) for index in range(5)], scanned_attributes=["index", "first"]
    ),
    "scan": lambda: torchlift.scan(Cell, variable_broadcast="params")(),
    "remat_scan": lambda: torchlift.remat_scan(Branch, lengths=(2, 2))(4, 4),
}


def around(name, loop):
    def call(x):
        if name != "scan":
            return loop(x * 2).sum() * 3
        c, ys = loop(x[0] * 2, x)
        return (c.sum() + ys.sum()) * 3

    return call


def results(call, loop, x):
    out = call(x)
    return [out, *torch.autograd.grad(out, list(loop.parameters()))]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_depends_on_values_breaks_the_graph_once_and_warns_once(name, backend):
    loop = LOOPS[name]()
    call = around(name, loop)
    compiled = torch.compile(call, backend=backend)
    xs = [torch.randn(3, 4) for _ in range(4)]
    counters.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [results(compiled, loop, x) for x in xs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, each in zip(xs, got, strict=True):
            torch.testing.assert_close(each, results(call, loop, x))
    if backend == "eager":  # said once of a body
        (warning,) = caught
        assert issubclass(warning.category, TorchliftCompileWarning) and warning.filename == __file__
        assert re.search(
            r"plain Python loop: test_broken_graphs.py:\d+ depends on the values of a", str(warning.message)
        )
    assert counters["stats"]["unique_graphs"] <= 4 and counters["frames"]["total"] <= 6


@pytest.mark.parametrize("name", LOOPS)
def test_a_graph_that_may_not_break_is_refused_with_the_reason(name):
    loop = LOOPS[name]()
    with pytest.raises(Exception, match="no graph can hold this loop: what it does depends on the values of a tensor"):
        torch.compile(around(name, loop), backend="eager", fullgraph=True)(torch.randn(3, 4))


def test_layers_that_change_state_run_once_in_a_graph_that_is_not_compiled_any_further():
    layers = [nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(3)]
    loop, x = torchlift.scan_layers(layers, compile={"backend": "eager"}), torch.randn(5, 4)
    found = []
    for call in (torch.compile(loop, backend="eager"), loop):
        torch.manual_seed(3)
        found.append((call(x), torch.get_rng_state()))
    torch.testing.assert_close(*found)
    assert all(layer[0].num_batches_tracked == 2 for layer in layers)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).relu()


def applied():
    net = nn.Sequential(*[Broken() for _ in range(3)])
    return net, lambda x: torchlift.apply(net, {}, x)


def lifted(transform, *args, **kwargs):
    net = transform(nn.Sequential, *args, **kwargs)(*[Broken() for _ in range(3)])
    return net, net


BODIES = {
    "apply": applied,
    "remat": lambda: lifted(torchlift.remat),
    "map_variables": lambda: lifted(torchlift.map_variables, "params"),
    "vmap": lambda: lifted(torchlift.vmap, {"params": None}, axis_size=2),
}


@pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED)
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_breaks_a_graph_is_not_followed_by_our_own_functions(name):
    """There were a hundred: Dynamo compiled each for each module, until its limit."""
    net, call = BODIES[name]()
    compiled = torch.compile(call, backend="eager")
    x = torch.randn(2, 4)
    counters.clear()
    torch.testing.assert_close(compiled(x), call(x))
    assert counters["frames"]["total"] <= 20


def test_a_while_loop_without_a_bound_runs_between_two_graphs_where_gradients_are_wanted():
    """It went on for ever: Dynamo compiled what looks at the condition by itself, where nothing can be seen."""
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    body = lambda m, c: (c[0] + 1, m(c[1]).tanh())
    loop = lambda x: torchlift.while_loop(lambda m, c: c[0] < 5, body, layer, (torch.tensor(0.0), x.sin()))[1].cos()
    expected, got = loop(x), torch.compile(loop, backend="aot_eager")(x)
    assert torch.equal(got, expected)
    for a, b in zip(
        *(torch.autograd.grad(out.sum(), list(layer.parameters())) for out in (got, expected)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_mapped_while_loop_without_a_bound_ends_where_a_graph_has_broken():
    layer, x = nn.Linear(3, 3), torch.rand(4, 3)
    loop = lambda x: torchlift.while_loop(lambda m, c: c.sum() < 5, lambda m, c: c + m(c) ** 2 + 1, layer, x)
    mapped = torch.func.vmap(loop)
    assert torch.equal(torch.compile(mapped, backend="eager")(x), mapped(x))
