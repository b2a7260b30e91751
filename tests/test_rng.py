"""Randomness: one law for loops, split or shared draws, streams by name, and who may draw."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift import make_rng, seed_rngs
from torchlift.errors import RandomnessError
from torchlift.rng import fold

pytestmark = pytest.mark.usefixtures("float64")

N, SIZE = 6, 32
X = torch.ones(SIZE, dtype=torch.float64)


class Masked(nn.Module):
    """Adds a dropout mask to its carry; the sum of scaled masks tells every one of them apart."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, carry):
        return 3 * carry + F.dropout(torch.ones_like(carry), 0.5) * self.scale


class Noisy(nn.Module):
    def forward(self, carry):
        noise = torch.rand(SIZE, generator=make_rng("noise")) + 10 * torch.rand(SIZE, generator=make_rng("noise"))
        return 2 * carry + noise


def step(m, c):
    return m(c), None


def scan(m, c, **kwargs):
    kwargs = {"length": N, "compile": False, **kwargs}
    return torchlift.scan(step, **kwargs)(m, c)[0]


def plain(m, c):
    for _ in range(N):
        c = m(c)
    return c


def rematted(m, c):
    for _ in range(N):
        c = torchlift.remat(lambda m, c: m(c))(m, c)
    return c


def remat_scan(m, c, *lengths, **kwargs):
    kwargs = {"variable_axes": {}, "compile": False, **kwargs}
    return torchlift.remat_scan(lambda m, c: m(c), lengths, **kwargs)(m, c)


SPLIT = {"split_rngs": {True: True}}
LOOPS = {
    "plain": plain,
    "scan": lambda m, c: scan(m, c, **SPLIT),
    "unroll 4": lambda m, c: scan(m, c, unroll=4, **SPLIT),
    "scan aot": lambda m, c: scan(m, c, compile={"backend": "aot_eager"}, **SPLIT),
    "unroll 4 aot": lambda m, c: scan(m, c, unroll=4, compile={"backend": "aot_eager"}, **SPLIT),
    "remat": rematted,
    "remat of scan": lambda m, c: torchlift.remat(lambda m, c: scan(m, c, **SPLIT))(m, c),
    "scan of remat": lambda m, c: torchlift.scan(torchlift.remat(step), length=N, compile=False, **SPLIT)(m, c)[0],
    "remat_scan": lambda m, c: remat_scan(m, c, N),
    "remat_scan 2x3": lambda m, c: remat_scan(m, c, 2, 3),
    "remat_scan 2x3 aot": lambda m, c: remat_scan(m, c, 2, 3, compile={"backend": "aot_eager"}),
}
SHARED = {
    "scan": lambda m, c: scan(m, c, split_rngs={True: False}),
    "unroll 4": lambda m, c: scan(m, c, unroll=4, split_rngs={True: False}),
    "scan aot": lambda m, c: scan(m, c, compile={"backend": "aot_eager"}, split_rngs={True: False}),
    "unroll 4 aot": lambda m, c: scan(m, c, unroll=4, compile={"backend": "aot_eager"}, split_rngs={True: False}),
    "remat_scan": lambda m, c: remat_scan(m, c, N, split_rngs={True: False}),
    "remat_scan 2x3": lambda m, c: remat_scan(m, c, 2, 3, split_rngs={True: False}),
}


def result(loop, module, seed=7):
    """Output, gradients, and where the global generator stands after forward and after backward."""
    torch.manual_seed(seed)
    x = X.clone().requires_grad_()
    with seed_rngs(noise=seed):
        out = loop(module, x)
        after = torch.rand(3)
        out.square().sum().backward()
        grads = [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]
        module.zero_grad()
        return [out.detach(), *grads, after, torch.rand(3)]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOOPS)
def test_one_law_for_loops(name):
    assert_equal(result(LOOPS[name], Masked()), result(plain, Masked()))


@pytest.mark.parametrize("name", LOOPS)
def test_one_law_for_streams_in_loops(name):
    assert_equal(result(LOOPS[name], Noisy()), result(plain, Noisy()))


def test_layers_of_a_stack_draw_as_the_plain_loop_over_them():
    layers = [Masked() for _ in range(N)]

    class Layer(Masked):
        def forward(self, carry):
            return super().forward(carry), None

    for compile in (False, {"backend": "aot_eager"}):
        stacked = torchlift.scan(Layer, variable_axes={"params": 0}, length=N, compile=compile)()
        torch.manual_seed(3)
        c = X
        for layer in layers:
            c = layer(c)
        after = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(stacked(X)[0], c) and torch.equal(torch.rand(1), after)


def shared_plain(module, c):
    """The same draws in every iteration; the generator ends where one iteration leaves it."""
    state = torch.get_rng_state()
    for _ in range(N):
        torch.set_rng_state(state)
        c = module(c)
    return c


@pytest.mark.parametrize("name", SHARED)
def test_without_split_every_iteration_draws_the_same(name):
    assert_equal(result(SHARED[name], Masked()), result(shared_plain, Masked()))


@pytest.mark.parametrize("name", SHARED)
def test_without_split_every_iteration_has_the_same_stream(name):
    torch.manual_seed(0)
    with seed_rngs(noise=1):
        got = SHARED[name](Noisy(), torch.zeros(SIZE))
    with seed_rngs(noise=1):
        one = Noisy()(torch.zeros(SIZE))
    torch.testing.assert_close(got, one * (2**N - 1), rtol=1e-12, atol=0)


# vmap ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["dropout", "noise"])
@pytest.mark.parametrize("split", [True, False])
def test_vmap_rows(split, draw):
    module = Masked() if draw == "dropout" else Noisy()
    lifted = torchlift.vmap(lambda m, x: m(x), split_rngs={True: split})
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        with seed_rngs(noise=0):
            outs.append(lifted(module, torch.zeros(4, SIZE)))
    rows = {tuple(row.tolist()) for row in outs[0]}
    assert torch.equal(*outs) and len(rows) == (4 if split else 1)


def test_vmap_splits_each_stream_by_itself():
    def body(m, x):
        return F.dropout(x, 0.5), torch.rand(SIZE, generator=make_rng("noise")) + 0 * x

    for dropout, noise in ((True, False), (False, True)):
        lifted = torchlift.vmap(body, split_rngs={"dropout": dropout, "noise": noise})
        with seed_rngs(noise=0, dropout=0):
            a, b = lifted(nn.Identity(), torch.ones(4, SIZE))
        assert len(a.unique(dim=0)) == (4 if dropout else 1) and len(b.unique(dim=0)) == (4 if noise else 1)


def test_a_stack_with_dropout_splits_without_another_word():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(2, SIZE), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.linear(x))

    stack = torchlift.vmap(Layer, variable_axes={"params": 0}, in_axes=None, axis_size=3)()
    masks = stack(torch.ones(2)) == 0
    assert len(masks.unique(dim=0)) == 3


# Who may draw --------------------------------------------------------------------------------------------------------

UNTOLD = {
    "vmap": lambda m, x: torchlift.vmap(lambda m, x: m(x))(m, x[None]),
    "scan": lambda m, x: scan(m, x),
    "scan aot": lambda m, x: scan(m, x, compile={"backend": "aot_eager"}),
    "remat_scan": lambda m, x: remat_scan(m, x, N, split_rngs={}),
    "vmap in vmap": lambda m, x: torchlift.vmap(
        torchlift.vmap(lambda m, x: m(x), split_rngs={"dropout": True, "noise": True})
    )(m, x[None, None]),
}


@pytest.mark.parametrize("module", [Masked(), Noisy()], ids=["dropout", "noise"])
@pytest.mark.parametrize("name", UNTOLD)
def test_an_untold_stream_refuses(name, module):
    stream = "dropout" if isinstance(module, Masked) else "noise"
    state = torch.get_rng_state()
    match = rf"\w+\(.*\): drew from the random stream '{stream}'; .*add split_rngs=\{{'{stream}': True\}}"
    with seed_rngs(noise=0), pytest.raises(RandomnessError, match=match):
        UNTOLD[name](module, X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("module", [Masked(), Noisy()], ids=["dropout", "noise"])
def test_remat_names_the_stream_to_add(module):
    stream = "dropout" if isinstance(module, Masked) else "noise"
    with seed_rngs(noise=0), pytest.raises(RandomnessError, match=rf"remat.*'{stream}'; add '{stream}' to rngs="):
        torchlift.remat(lambda m, x: m(x), rngs="params")(module, X)
    with seed_rngs(noise=0):
        torchlift.remat(lambda m, x: m(x), rngs=["dropout", "noise"])(module, X)


# Streams -------------------------------------------------------------------------------------------------------------


def test_every_call_gives_a_fresh_generator_and_seeds_repeat():
    def draws():
        return [torch.rand(2, generator=make_rng("a")).tolist() for _ in range(3)]

    with seed_rngs(a=0, b=0):
        first = draws()
        with seed_rngs(a=1):
            inner = draws()
            torch.rand(1, generator=make_rng("b"))
        after = draws()
    with seed_rngs(a=0):
        again, more = draws(), draws()
    assert first == again and after == more
    assert len({tuple(row) for row in first + inner + after}) == 9


def test_seed_rngs_restores_the_global_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with seed_rngs(dropout=0):
        a = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with seed_rngs(params=0):
        b = torch.rand(3)
    with pytest.raises(ZeroDivisionError), seed_rngs(dropout=1):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(a, b)
    with seed_rngs(noise=1):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_streams_are_told_apart_and_counted():
    assert len({fold(seed, count) for seed in range(-20, 20) for count in range(20)}) == 800
    assert all(0 <= fold(seed, 0) < 2**63 for seed in (-1, 2**70, 0))


def test_dropout_without_a_seed_is_the_default_generator():
    assert make_rng("dropout") is torch.default_generator


@pytest.mark.parametrize("seed", ["0", 1.0, True, None])
def test_a_seed_is_an_int(seed):
    with pytest.raises(RandomnessError, match=r"seed_rngs\(noise=\): got .* of type \w+, expected an int"):
        with seed_rngs(noise=seed):
            pass


def test_a_stream_without_a_seed():
    match = r"make_rng\('noise'\): the stream has no seed, expected one of \['a'\]; seed it: with torchlift.seed_rngs"
    with seed_rngs(a=0), pytest.raises(RandomnessError, match=match):
        make_rng("noise")


def test_streams_end_with_an_error_in_a_body():
    def fails(m, x):
        make_rng("noise")
        raise ZeroDivisionError

    with seed_rngs(noise=0):
        for transform in (torchlift.remat, torchlift.vmap(split_rngs={True: True})):
            with pytest.raises(ZeroDivisionError):
                transform(fails)(nn.Identity(), torch.ones(1))
    with pytest.raises(RandomnessError, match="has no seed"):
        make_rng("noise")


@pytest.mark.parametrize("split", [True, False])
def test_a_seeded_stream_may_be_drawn_from_where_dropout_is_refused(split):
    noise = lambda m, x: x + torch.rand(SIZE, generator=make_rng("noise"))
    with seed_rngs(noise=0):
        rows = torchlift.vmap(noise, split_rngs={"noise": split})(nn.Identity(), torch.zeros(4, SIZE))
    assert len(rows.unique(dim=0)) == (4 if split else 1)
    state, both = torch.get_rng_state(), lambda m, x: F.dropout(noise(m, x))
    with seed_rngs(noise=0), pytest.raises(RandomnessError, match="drew from the random stream 'dropout'"):
        torchlift.vmap(both, split_rngs={"noise": split})(nn.Identity(), torch.zeros(4, SIZE))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["scan", "scan_layers", "remat_scan"])
def test_a_loop_whose_body_makes_generators_runs_in_python(name):
    module, x = Noisy(), torch.randn(SIZE)
    loop = {
        "scan": lambda compile: scan(module, x, split_rngs={"noise": True}, compile=compile),
        "scan_layers": lambda compile: torchlift.scan_layers([module] * N, compile=compile)(x),
        "remat_scan": lambda compile: remat_scan(module, x, N, split_rngs={"noise": True}, compile=compile),
    }[name]
    with seed_rngs(noise=0):
        expected = loop(False)
    for _ in range(2):
        with seed_rngs(noise=0), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            got = loop({"backend": "aot_eager"})
        assert torch.equal(got, expected)
    assert all("generator cannot be part of a compiled graph" in str(w.message) for w in found)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "compiled"])
def test_no_iteration_draws_nothing_from_a_stream(compile):
    body = lambda m, c, x: (c, m(x))
    with seed_rngs(noise=0):
        _, ys = torchlift.scan(body, split_rngs={True: True}, compile=compile)(Noisy(), 0, torch.ones(0, SIZE))
        assert ys.shape == (0, SIZE)
        assert torchlift.vmap(Noisy, split_rngs={True: True})()(torch.ones(0, SIZE)).shape == (0, SIZE)
        first = torch.rand(3, generator=make_rng("noise"))
    with seed_rngs(noise=0):
        assert torch.equal(first, torch.rand(3, generator=make_rng("noise")))


_TWO_THREADS = """
import threading, torch
from torchlift.engine.draws import read_states, write_states

class Cycle:
    pass

def work(call):
    for _ in range(60_000):
        cycle = Cycle()
        cycle.me, cycle.tensor = cycle, torch.empty(1)  # what the collector frees while a state is read
        call()

cpu = (torch.device("cpu"),)
states = read_states(cpu)
threads = [threading.Thread(target=work, args=(call,)) for call in (lambda: read_states(cpu), lambda: write_states(states))]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""


def test_threads_that_read_and_write_the_generator_do_not_wait_for_each_other_for_good():
    """NOTE [Mutex]; in a process of its own, since such a wait cannot be ended from within."""
    subprocess.run([sys.executable, "-c", _TWO_THREADS], check=True, timeout=120)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "compiled"])
def test_no_state_is_read_under_the_mutex(compile, monkeypatch):
    class Layer(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(SIZE, SIZE), nn.Dropout(0.5))

    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=compile, remat=True)
    block, x = torchlift.remat(Layer)(), torch.ones(2, SIZE)

    def gradients():
        torch.manual_seed(0)
        found = torch.autograd.grad(block(layers(x)).sum(), [*layers.parameters(), *block.parameters()])
        return [*found, torch.rand(1)]

    expected = gradients()

    def refuse(*args, **kwargs):
        raise AssertionError("the state of the generator was read under its mutex")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    for got, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(got, wanted)
