"""What a body keeps of its run: in a capture a tensor without data, which must not stay where others find it."""

import collections
import functools
import gc
import warnings

import pytest
import torch
from torch import nn

import torchlift
from torchlift.engine import compiled
from torchlift.engine.run import Body, Stacked, last_report, run

AOT = {"backend": "aot_eager"}
TABLES, PAIRS, PLACES, QUEUE, SEEN, MAPS = {}, {}, [None] * 8, collections.deque(), set(), []
ONE = None


def made(n):
    return torch.ones(n, n).tril()


@functools.lru_cache
def by_lru(n):
    return made(n)


@functools.cache
def by_cache(n):
    return made(n), n


def by_dict(n):
    if n not in TABLES:
        TABLES[n] = made(n)
    return TABLES[n]


def by_pair(n):
    if n not in PAIRS:
        PAIRS[n] = (n, (made(n), made(n).sin()))
    return PAIRS[n][1][0]


def by_place(n):
    if PLACES[n] is None:
        PLACES[n] = made(n)
    return PLACES[n]


def by_queue(n):
    if not QUEUE:
        QUEUE.append(made(n))
    return QUEUE[0]


def by_set(n):
    if not SEEN:
        SEEN.add(made(n))
    return next(iter(SEEN))


def by_global(n):
    global ONE
    if ONE is None:
        ONE = made(n)
    return ONE


class Set:
    def __init__(self):
        self.table = None

    def __call__(self, n):
        if self.table is None:
            self.table = made(n)
        return self.table


class Found:
    def __call__(self, n):
        if not hasattr(self, "table"):
            self.table = made(n)
        return self.table


class Slotted:
    __slots__ = ("table",)

    def __init__(self):
        self.table = None

    __call__ = Set.__call__


class OfClass:
    table = None

    def __call__(self, n):
        if OfClass.table is None:
            OfClass.table = made(n)
        return OfClass.table


def enclosed():
    table = None

    def by_cell(n):
        nonlocal table
        if table is None:
            table = made(n)
        return table

    return by_cell


WAYS = {
    "lru": (by_lru, "the cache of by_lru"),
    "cache": (lambda n: by_cache(n)[0], "the cache of by_cache"),
    "dict": (by_dict, "a dict, TABLES of test_kept_tensors"),
    "pair": (by_pair, "a dict, PAIRS of test_kept_tensors"),
    "place": (by_place, "a list, PLACES of test_kept_tensors"),
    "queue": (by_queue, "a deque, QUEUE of test_kept_tensors"),
    "set": (by_set, "a set, SEEN of test_kept_tensors"),
    "global": (by_global, "the global ONE of test_kept_tensors"),
    "set attribute": (Set(), "the attribute table of a Set"),
    "found attribute": (Found(), "the attribute table of a Found"),
    "slot": (Slotted(), "the attribute table of a Slotted"),
    "class": (OfClass(), "the attribute table of a OfClass"),
    "cell": (enclosed(), "a variable of a function around it"),
}


@pytest.fixture(autouse=True)
def nothing_kept():
    TABLES.clear(), PAIRS.clear(), QUEUE.clear(), SEEN.clear(), MAPS.clear(), by_lru.cache_clear()
    compiled.clear_cache()


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_is_filled_by_the_plain_loop_and_the_next_call_is_compiled(way):
    table, where = WAYS[way]
    body = Body(lambda c, h, x: ((h @ table(4) + x).tanh(), None), f"table, {way}", "scan")
    h, x = torch.ones(4, requires_grad=True), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftWarning)
        outs, paths = [], []
        for _ in range(3):
            outs.append(run(body, None, h, Stacked(x), 3, compile=AOT)[0])
            paths.append(last_report().path)
            if len(outs) == 1:
                assert f"keeps a tensor that it made, in {where}" in last_report().reason
            assert type(table(4)) is torch.Tensor and torch.equal(table(4), made(4))
    assert paths == ["plain", "compiled", "compiled"]
    expected = run(body, None, h, Stacked(x), 3, compile=False)[0]
    for out in outs:
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), h), torch.autograd.grad(expected.sum(), h, retain_graph=True)
        )


def test_what_is_kept_in_each_call_is_captured_twice_and_no_more():
    def fn(c, h, x):
        calls.append(0)
        MAPS.append(h.detach())
        return h * x, None

    calls, body, x = [], Body(fn, "maps", "scan(maps)"), torch.rand(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftWarning)
        run(body, None, torch.ones(2), Stacked(x), 3, compile=AOT)
    with pytest.warns(torchlift.TorchliftCompileWarning, match=r"scan\(maps\) runs .* made, in a list, MAPS of test_k"):
        run(body, None, torch.ones(2), Stacked(x), 3, compile=AOT)
    calls.clear()
    run(body, None, torch.ones(2), Stacked(x), 3, compile=AOT)
    assert len(calls) == 3 and len(MAPS) == 9
    assert torch.equal(torch.stack(MAPS[:3]), torch.stack([torch.ones(2), x[0], x[0] * x[1]]))
    assert all(type(m) is torch.Tensor for m in MAPS) and torch.equal(torch.stack(MAPS[6:]), torch.stack(MAPS[:3]))


def test_a_body_that_cannot_be_captured_leaves_nothing_either():
    def fn(c, h, x):
        h = h @ by_lru(4) @ by_dict(4)
        return (h if h.sum() > 0 else -h), None

    with pytest.warns(torchlift.TorchliftCompileWarning, match="depends on the values of a tensor"):
        out, _ = run(Body(fn, "values", "scan"), None, torch.ones(4), Stacked({}), 2, compile=AOT)
    assert type(out) is type(by_lru(4)) is type(by_dict(4)) is torch.Tensor


def test_nothing_is_looked_for_where_nothing_is_kept(monkeypatch):
    def look(*args):
        raise AssertionError("looked")

    monkeypatch.setattr(gc, "collect", look)
    monkeypatch.setattr(gc, "get_referrers", look)
    body = Body(lambda c, h, x: (torch.nn.functional.dropout(h * c * x).sin(), h.detach()), "none kept", "scan")
    run(body, torch.ones(2, requires_grad=True), torch.ones(2), Stacked(torch.rand(3, 2)), 3, compile=AOT)
    assert last_report().path == "compiled"


def test_what_is_left_in_cycles_is_not_kept():
    def fn(c, h, x):
        cycle = [h * 2]
        cycle.append(cycle)
        return cycle[0] * x, None

    run(Body(fn, "cycles", "scan"), None, torch.ones(2), Stacked(torch.rand(3, 2)), 3, compile=AOT)
    assert last_report().path == "compiled"


class Layer(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.l, self.table = nn.Linear(4, 4), table

    def forward(self, x):
        h = self.l(x)
        return x + nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=self.table(x.shape[1]) > 0)


@pytest.mark.parametrize("table", [by_lru, by_dict])
def test_layers_that_keep_a_mask(table):
    stack = torchlift.scan_layers([Layer(table) for _ in range(3)], compile=AOT)
    for n in (5, 5, 6, 6):
        x = torch.randn(2, n, 4)
        out = stack(x)
        assert type(out) is torch.Tensor and type(table(n)) is torch.Tensor
        torch.testing.assert_close(out, nn.Sequential(*stack)(x))
        out.sum().backward()
    assert last_report().path == "compiled"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", [by_lru, by_dict])
def test_layers_that_keep_a_mask_inside_torch_compile(table):
    """They are traced one by one, as torch.compile alone does, which then fills the cache."""
    torch._dynamo.reset()
    stack = torchlift.scan_layers([Layer(table) for _ in range(3)], compile=AOT)
    call, x = torch.compile(stack, backend="aot_eager"), torch.randn(2, 5, 4)
    out = call(x)
    assert type(table(5)) is torch.Tensor
    torch.testing.assert_close(out, nn.Sequential(*stack)(x))
    if table is by_lru:  # that of a dict is one which the loop reads, and cannot see change: a ClosureError
        torch.testing.assert_close(call(x), out)


# What was there before -----------------------------------------------------------------------------------------------

TOTALS, TOTAL, LAST = {"sum": torch.tensor(100.0)}, torch.tensor(100.0), collections.deque([1.0, 2.0], maxlen=2)


class Rotary:
    """A table that grows, and how long it is: a plain object, as many models have one."""

    def __init__(self):
        self.length, self.table = 0, None

    def first(self, n):
        if n > self.length:
            self.length, self.table = n, torch.arange(float(n))
        return self.table[:n]


ROTARY = Rotary()


def counted_in_a_dict(x):
    TOTALS["sum"] = TOTALS["sum"] + x.detach().sum()
    TOTALS["calls"] = TOTALS.get("calls", 0) + torch.ones(())
    return x * 2


def counted_in_a_global(x):
    global TOTAL
    TOTAL = TOTAL + x.detach().sum()
    return x * 2


def queued(x):
    LAST.append(x.detach().sum())
    return x * 2


def with_a_table_that_grows(x):
    return x + ROTARY.first(x.shape[-1])


def depends_on_values(x):
    TOTALS["sum"] = TOTALS["sum"] + x.detach().sum()
    return x * 2 if x.sum() > 0 else x * 3


def reset():
    global TOTAL
    TOTALS.clear()
    TOTALS["sum"], TOTAL = torch.tensor(100.0), torch.tensor(100.0)
    LAST.clear()
    LAST.extend([1.0, 2.0])
    ROTARY.__init__()


@pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning")
@pytest.mark.parametrize(
    "body", [counted_in_a_dict, counted_in_a_global, queued, with_a_table_that_grows, depends_on_values]
)
def test_what_was_there_before_a_capture_is_there_after_it(body):
    class Layer(nn.Module):
        def forward(self, x):
            return body(x)

    found = []
    for compile in (False, AOT):
        reset()
        layers = torchlift.scan_layers([Layer() for _ in range(3)], compile=compile)
        outs = [layers(torch.ones(*size)) for size in ((2, 3), (2, 3), (4, 3), (2, 5), (2, 3))]
        found.append([*outs, *TOTALS.values(), TOTAL, *LAST])
    plain, compiled_ones = found
    assert len(plain) == len(compiled_ones)
    for got, wanted in zip(compiled_ones, plain):
        assert type(got) is type(wanted) and torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    assert ROTARY.table is None or type(ROTARY.table) is torch.Tensor


def test_a_private_slot_lets_go_of_it():
    class Slot:
        __slots__ = ("__table",)

        def table(self):
            if not hasattr(self, "_Slot__table"):
                self.__table = torch.ones(3)
            return self.__table

    slot = Slot()

    class Layer(nn.Module):
        def forward(self, x):
            return x + slot.table()

    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT)
    for _ in range(2):
        assert torch.equal(layers(torch.zeros(3)), torch.full((3,), 2.0))
        assert type(slot.table()) is torch.Tensor


@pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning")
def test_a_body_with_a_closure_that_keeps_at_last_is_not_captured_at_each_call(monkeypatch):
    weight, held, keeps = torch.ones(2), [], []

    def body(carry, x):
        out = carry + x * weight
        if keeps:
            held.append(out.detach())
        return out, None

    call = lambda: run(Body(lambda consts, c, x: body(c, x), "late", "late"), {}, torch.ones(2), [torch.ones(2)] * 2, 2)
    call()
    keeps.append(True)
    call(), call()
    probes = []
    probe = compiled.capture.probe
    monkeypatch.setattr(compiled.capture, "probe", lambda *args: probes.append(1) or probe(*args))
    call()
    assert not probes and len(held) == 6 and all(type(x) is torch.Tensor for x in held)
