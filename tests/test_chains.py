"""Loops over time whose programs of parts run many turns: as the plain loop has it. See NOTE [Chains]."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from torchlift.engine import compiled, graphs, parts
from torchlift.engine import run as engine
from torchlift.engine.chains import chains
from torchlift.engine.loop import Body, Stacked
from torchlift.engine.run import last_report, run

INDUCTOR = {"backend": "inductor"}
ROWS, TOGETHER = 4, 8
LENGTH = 2 * TOGETHER + 5  # two calls of all turns, one of fewer, and with several steps in one graph a step by itself


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(engine, "TOGETHER", TOGETHER)
    yield
    torch.set_num_threads(before)
    compiled.clear_cache()


@pytest.fixture
def chained(monkeypatch):
    """Of each pair of graphs whether they became programs that are chains, or no parts (None)."""
    found, compile_parts = [], graphs._compile_parts

    def compile_and_note(given, inductor, signature, *args):
        programs = compile_parts(given, inductor, signature, *args)
        found.append(programs and given.chained)
        return programs

    monkeypatch.setattr(graphs, "_compile_parts", compile_and_note)
    return found


@pytest.fixture
def chainable(monkeypatch):
    """Of each pair of graphs whether they could be chains; they run as they are."""
    found = []

    def boxed(graph):
        return lambda inputs: [graph(*inputs), inputs.clear()][0]

    def note(given, inductor, signature, forward, backward, count):
        found.append(chains(given, signature, forward, backward) is not None)
        return boxed(given.fw), None if given.bw is None else boxed(given.bw)

    monkeypatch.setattr(graphs, "_compile_parts", note)
    return found


def rand(*sizes, dtype=torch.float32):
    return (torch.randn(*sizes, dtype=dtype) / 2).requires_grad_()


def inputs(length, width=6, dtype=torch.float32):
    torch.manual_seed(0)
    consts = [rand(width, 4 * width, dtype=dtype), rand(width, 4 * width, dtype=dtype), rand(4 * width, dtype=dtype)]
    carry = rand(ROWS, width, dtype=dtype), rand(ROWS, width, dtype=dtype)
    return consts, carry, rand(length, ROWS, width, dtype=dtype)


def lstm(consts, carry, x):
    w, u, b = consts
    h, c = carry
    i, f, g, o = (x @ w + h @ u + b).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h, c), h


def crossing(consts, carry, x):
    """What was carried changes places."""
    w, u, b = consts
    h, c = carry
    return (c, (h + (x @ w + c @ u + b).chunk(4, -1)[0]).tanh()), c


def standing(consts, carry, x):
    """One carry stays as it is."""
    w, u, b = consts
    h, c = carry
    new = (x @ w + h @ u + b).chunk(4, -1)[0].tanh()
    return (new * c, c), (new, (new * c).exp())


def last(consts, carry, x):
    """Nothing but what is carried comes out."""
    return lstm(consts, carry, x)[0], None


def masked(consts, carry, x):
    """A number for each step, the same for the whole batch."""
    x, t = x
    (h, c), y = lstm(consts, carry, x)
    return (torch.where(t > 0, h, carry[0]), torch.where(t > 0, c, carry[1])), y * t


BODIES = {"lstm": lstm, "crossing": crossing, "standing": standing, "last": last, "masked": masked}


def evaluate(fn, given, length, compile, losses=(), **settings):
    """All that comes out, and for each of ``losses`` the gradients."""
    consts, carry, xs = given
    out, ys = run(
        Body(fn, ("chains", fn.__name__), "scan"), consts, carry, Stacked(xs), length,
        compile=compile, **settings,
    )  # fmt: skip
    leaves = [t for t in pytree.tree_leaves(given) if t.requires_grad]
    found = [t for t in pytree.tree_leaves((out, ys.tree)) if t is not None]
    for loss in losses:
        grads = torch.autograd.grad(loss(out, ys.tree), leaves, retain_graph=True, allow_unused=True)
        found += [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads)]
    return found


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def every(out, ys):
    return sum(t.square().sum() for t in pytree.tree_leaves((out, ys)) if t is not None)


def carry_only(out, ys):
    return (out[0] * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).sum()


WAYS = [
    ("lstm", 1, False),
    ("lstm", 2, True),
    ("crossing", 1, True),
    ("crossing", 2, False),
    ("standing", 1, False),
    ("last", 1, False),
    ("masked", 2, True),
]


@pytest.mark.parametrize(("name", "unroll", "reverse"), WAYS)
def test_many_turns_equal_the_plain_loop(chained, name, unroll, reverse):
    fn, given, settings = BODIES[name], inputs(LENGTH), {"unroll": unroll, "reverse": reverse}
    if fn is masked:
        given = (*given[:2], (given[2], torch.arange(LENGTH) % 3 - 1.0))
    losses = (every, carry_only, every)  # the graph is kept, and used again
    expected = evaluate(fn, given, LENGTH, False, losses, **settings)
    close(evaluate(fn, given, LENGTH, INDUCTOR, losses, **settings), expected)
    programs = [True] * unroll
    assert last_report().path == "compiled" and chained == programs
    modes = fn is lstm and unroll == 1
    if modes:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                close(evaluate(fn, given, LENGTH, INDUCTOR, **settings), expected[:3])
    shorter = (*given[:2], pytree.tree_map(lambda t: t[:7].detach().requires_grad_(t.requires_grad), given[2]))
    expected = evaluate(fn, shorter, 7, False, losses, **settings)
    close(evaluate(fn, shorter, 7, INDUCTOR, losses, **settings), expected)  # the same programs
    assert chained == programs * (1 + modes)


def test_rows_of_a_stack_are_read_where_they_lie(chained):
    """Time is the second axis: no row is one piece of memory."""
    consts, carry, x = inputs(LENGTH)
    given = consts, carry, x.detach().transpose(0, 1).contiguous().requires_grad_().transpose(0, 1)
    close(evaluate(lstm, given, LENGTH, INDUCTOR, [every]), evaluate(lstm, (consts, carry, x), LENGTH, False, [every]))
    assert chained == [True]


def summed(consts, carry, x):
    """What comes out is of the whole batch."""
    carry, y = lstm(consts, carry, x)
    return carry, y.sum(0)


def scaled(consts, carry, x):
    """A constant has rows of the batch."""
    carry, y = lstm(consts[:3], carry, x)
    return carry, y * consts[3]


def weighed(consts, carry, x):
    """What comes in at each step has a gradient, and is the same for the whole batch."""
    carry, y = lstm(consts, carry, carry[1])
    return carry, y * x


def mixing(consts, carry, x):
    """Members of the batch change places: a part leaves other rows than it took."""
    h, c = carry
    return ((h + x).tanh(), c.view(2, 2, -1).transpose(0, 1).reshape(ROWS, -1) + 1), h


def test_what_is_not_of_a_part_alone_is_called_turn_by_turn(chainable):
    consts, carry, x = inputs(8)
    cases = [
        (lstm, (consts, carry, x), True),
        (lstm, inputs(8, dtype=torch.float64), False),
        (summed, (consts, carry, x), False),
        (scaled, ([*consts, rand(ROWS, 6)], carry, x), False),
        (weighed, (consts, carry, rand(8, 6)), False),
    ]
    for fn, given, chain in cases:
        chainable.clear()
        close(evaluate(fn, given, 8, INDUCTOR, [every]), evaluate(fn, given, 8, False, [every]))
        assert chainable == [chain], fn
    chainable.clear()
    with torch.no_grad():  # no gradient of theirs goes the same way
        close(evaluate(mixing, (consts, carry, x), 8, INDUCTOR), evaluate(mixing, (consts, carry, x), 8, False))
    assert chainable == [False]


def picking(consts, carry, x):
    """Backward needs what is no number."""
    (h, c), y = lstm(consts, carry, x)
    return (h * (c.argmax(-1, keepdim=True) > 2), c), y


def test_what_is_saved_outside_of_the_pack_is_handed_on_by_python(chained, monkeypatch):
    given = inputs(9)
    close(evaluate(picking, given, 9, INDUCTOR, [every]), evaluate(picking, given, 9, False, [every]))
    assert chained == []  # more is to be done to compute it in parts than is won
    monkeypatch.setattr(parts, "LEAST", 0)
    compiled.clear_cache()
    close(evaluate(picking, given, 9, INDUCTOR, [every]), evaluate(picking, given, 9, False, [every]))
    assert chained == [False]


def test_all_that_hooks_are_given_was_saved(chained):
    """In a pack of values that are no multiples of 64 bytes there is nothing in between."""
    given, seen = inputs(LENGTH), []
    evaluate(lstm, given, LENGTH, INDUCTOR)
    junk = [torch.full((n,), torch.nan) for n in range(16, 20000, 16)]
    del junk  # what is allocated next has been used

    def half(t):
        seen.append(t)
        return t.half() if t.dtype is torch.float32 else t

    with torch.autograd.graph.saved_tensors_hooks(half, lambda t: t.float()):
        got = evaluate(lstm, given, LENGTH, INDUCTOR, [every])
    expected = evaluate(lstm, given, LENGTH, False, [every])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert chained == [True] and all(t.isfinite().all() for t in seen)


def test_threads_may_be_fewer_than_parts_and_some_gradients_not_wanted(chained):
    consts, carry, x = inputs(LENGTH)
    consts[1].requires_grad_(False)
    carry[1].requires_grad_(False)
    expected = evaluate(lstm, (consts, carry, x), LENGTH, False, [every])
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        close(evaluate(lstm, (consts, carry, x), LENGTH, INDUCTOR, [every]), expected)
    assert chained == [True]


def test_segments_that_are_recomputed_stay_as_short_as_they_are(chained):
    given = inputs(LENGTH)
    settings = {"remat": True, "reverse": True}
    got = evaluate(lstm, given, LENGTH, INDUCTOR, [every], **settings)
    close(got, evaluate(lstm, given, LENGTH, False, [every], **settings))
    assert chained == [True]
