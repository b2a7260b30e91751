"""Bodies that seed generators or set their states: the plain loop runs, since a graph has the draws alone."""

import pytest
import torch
from torch import manual_seed as aliased
from torch import nn

import torchlift
from torchlift.engine.run import last_report

AOT = {"backend": "aot_eager"}


def forks(x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.randn(4)


def only_forks(x):
    with torch.random.fork_rng(devices=[]):
        return torch.randn(4)


def sets(x):
    state = torch.get_rng_state()
    n = torch.randn(4)
    torch.set_rng_state(state)
    return n


def seeds(x):
    torch.manual_seed(3)
    return torch.randn(4)


def seeds_by_another_name(x):
    aliased(3)
    return torch.randn(4)


def by_stream(x):
    with torchlift.seed_rngs(dropout=3):
        return torch.randn(4)


def by_generator(x):
    return torch.randn(4, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.l, self.draw = nn.Linear(4, 4), draw

    def forward(self, x):
        return self.l(x).tanh() + self.noise(x)

    def noise(self, x):
        return self.draw(x)


def results(call, x):
    torch.manual_seed(1)
    return [call(x) for _ in range(3)], torch.get_rng_state()


WAYS = [forks, only_forks, sets, seeds, seeds_by_another_name, by_stream, by_generator]


@pytest.mark.parametrize("draw", WAYS)
def test_layers(draw):
    layers, x = [Layer(draw) for _ in range(3)], torch.randn(2, 4)
    stack = torchlift.scan_layers(layers, compile=AOT)
    with pytest.warns(torchlift.TorchliftCompileWarning, match="the body seeds a generator, or sets its state"):
        got, state = results(stack, x)
    expected, expected_state = results(nn.Sequential(*layers), x)
    torch.testing.assert_close(got, expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("draw", WAYS)
def test_scan(draw):
    def body(m, c, x):
        return m(c) + x, None

    body.__name__ = body.__qualname__ = f"body_{draw.__name__}"  # each is warned of once, by name
    module, start, xs = Layer(draw), torch.zeros(2, 4), torch.randn(3, 2, 4)
    options = {"variable_broadcast": "params", "split_rngs": {"dropout": True}}
    with pytest.warns(torchlift.TorchliftCompileWarning, match="a graph does not repeat; draw with generator="):
        got = results(lambda x: torchlift.scan(body, compile=AOT, **options)(module, start, x)[0], xs)
    expected = results(lambda x: torchlift.scan(body, compile=False, **options)(module, start, x)[0], xs)
    torch.testing.assert_close(got, expected)
    assert last_report().path == "plain"


def test_a_new_seed_of_torch():
    def anew(x):
        torch.seed()
        return torch.randn(4)

    stack = torchlift.scan_layers([Layer(anew) for _ in range(2)], compile=AOT)
    with pytest.warns(torchlift.TorchliftCompileWarning, match="the body seeds a generator"):
        (one, other, _), _ = results(stack, torch.zeros(2, 4))
    assert not torch.equal(one, other)


def test_a_number_called_seed_is_none():
    class Seeded(nn.Module):
        seed = 3

        def reset_parameters(self):
            torch.manual_seed(self.seed)  # nobody calls it

        def forward(self, x):
            return torch.tanh(x) * self.seed

    torchlift.scan_layers([Seeded(), Seeded()], compile=AOT)(torch.ones(2))
    assert last_report().path == "compiled"
