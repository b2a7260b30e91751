"""scan: axes, lengths, direction, carries, state in the loop, and the compiled loop equal to the plain one."""

import collections
import dataclasses
import pickle
import warnings
from array import array
from typing import Any

import pytest
import torch
from torch import nn

import torchlift
from torchlift import apply, broadcast, capture, remat_scan, scan, sow, stack_modules, unstack_modules, variable
from torchlift.engine.run import last_report
from torchlift.errors import AxisError, CarryError, ModifyCollectionError, TorchliftCompileWarning, TransformTargetError

pytestmark = pytest.mark.usefixtures("float64")

AOT = {"backend": "aot_eager"}
PATHS = pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "aot_eager"])
T, SIZE = 5, 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, carry, x):
        carry = torch.tanh(self.x(x) + self.h(carry))
        return carry, 2 * carry


def loop(body, carry, xs, reverse=False):
    """The plain loop over the rows of ``xs``."""
    ys = [None] * len(xs)
    for i in reversed(range(len(xs))) if reverse else range(len(xs)):
        carry, ys[i] = body(carry, xs[i])
    return carry, torch.stack(ys)


def backward(carry, ys, *leaves):
    (carry.square().sum() + ys.sin().sum()).backward()
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


# Over time -----------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("unroll", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_over_time(reverse, unroll, compile):
    cell, carry, xs = Cell(), torch.randn(SIZE, requires_grad=True), torch.randn(T, SIZE, requires_grad=True)
    lifted = scan(Cell.forward, reverse=reverse, unroll=unroll, compile=compile)
    got, expected = lifted(cell, carry, xs), loop(cell, carry, xs, reverse)
    close(got, expected)
    leaves = (carry, xs, *cell.parameters())
    close(backward(*got, *leaves), backward(*expected, *leaves))
    assert last_report().path == ("compiled" if compile else "plain")


@PATHS
@pytest.mark.parametrize("length", [0, 1])
def test_lengths_0_and_1(length, compile):
    cell, carry, xs = Cell(), torch.randn(SIZE, requires_grad=True), torch.randn(length, SIZE)
    out, ys = scan(Cell.forward, compile=compile)(cell, carry, xs)
    assert ys.shape == (length, SIZE)
    if length:
        close((out, ys), loop(cell, carry, xs))
    else:
        assert torch.equal(out, carry)
        out.sum().backward()
        assert torch.equal(carry.grad, torch.ones(SIZE))


def test_no_length_keeps_state_and_the_generator_as_they_are():
    state = torch.get_rng_state()

    def body(m, carry, x):
        return carry, (nn.functional.dropout(m(x), 0.5), {"k": x.sum()})

    lifted = scan(body, variable_carry="batch_stats", split_rngs={"dropout": True}, compile=False)
    norm = nn.BatchNorm1d(SIZE)
    _, (y, rest) = lifted(norm, 0.0, torch.ones(0, 4, SIZE))
    assert y.shape == (0, 4, SIZE) and rest["k"].shape == (0,)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any() and torch.equal(torch.get_rng_state(), state)


# Axes ----------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_in_and_out_axes(axis, compile):
    xs = torch.randn(T, 2, SIZE)
    body = lambda m, carry, x: (carry + x.sum(), {"a": x, "b": (2 * x, x.sum())})
    lifted = scan(body, in_axes=axis, out_axes={"a": axis, "b": (-axis - 1 if axis >= 0 else 0, 0)}, compile=compile)
    carry, ys = lifted(nn.Identity(), torch.zeros(()), xs.movedim(0, axis))
    close(carry, xs.sum())
    close(ys["a"], xs.movedim(0, axis))
    close(ys["b"][0], (2 * xs).movedim(0, {0: -1, 1: -2, -1: 0}[axis]))


@PATHS
def test_broadcast_in_out_and_keywords(compile):
    def body(m, carry, x, whole, *, scale, flag=True):
        assert whole["w"].shape == (T, 2) and scale.shape == (T,)
        return carry + x * scale.sum(), (x, whole["w"].sum())

    x, w, scale = torch.randn(T), torch.randn(T, 2), torch.randn(T)
    lifted = scan(body, in_axes=(0, broadcast), out_axes=(0, broadcast), compile=compile)
    carry, (ys, total) = lifted(nn.Identity(), torch.zeros(()), x, {"w": w}, scale=scale, flag=False)
    close(carry, (x * scale.sum()).sum())
    close(ys, x)
    close(total, w.sum())
    assert repr(broadcast) == "broadcast" and pickle.loads(pickle.dumps(broadcast)) is broadcast


@PATHS
def test_a_broadcast_output_is_checked(compile):
    lifted = scan(lambda m, c, x: (c, {"k": [x]}), out_axes=broadcast, compile=compile)
    with pytest.raises(
        AxisError, match=r"ys\['k'\]\[0\] differs between iterations, but its out axis is broadcast; give"
    ):
        lifted(nn.Identity(), torch.zeros(()), torch.arange(3.0))


def test_no_ys_and_no_xs():
    carry, ys = scan(lambda m, c: (2 * c, None), length=4, compile=False)(nn.Identity(), torch.ones(()))
    assert carry == 16 and ys is None
    carry, (a, b) = scan(lambda m, c, x: (c, (x, None)), in_axes=1, compile=False)(
        nn.Identity(), None, torch.ones(2, 3)
    )
    assert carry is None and a.shape == (3, 2) and b is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: scan(Cell.forward)(Cell(), 0, torch.ones(2, 3), torch.ones(4)),
            "the lengths disagree, expected one: ",
        ),
        (lambda: scan(lambda m, c: (c, None))(Cell(), 0), "nothing is scanned over, so the length is not known; pass"),
        (
            lambda: scan(lambda m, c, x: (c, x), length=4)(Cell(), 0, torch.ones(2)),
            r"expected one: length: 4, args\[1\] \(axis 0\): 2",
        ),
        (
            lambda: scan(lambda m, c: (c, None), variable_axes={"params": 0}, length=12)(nn.Linear(2, 8), 0),
            r"scan\(<lambda>, .*length=12\): 'weight' in 'params' has 8 on axis 0, expected 12",
        ),
        (
            lambda: scan(lambda m, c: (c, None), variable_axes={"params": 1})(nn.Linear(2, 8), 0),
            r"'bias' in 'params' has shape \(8,\), which has no axis 1 to scan over",
        ),
        (
            lambda: scan(lambda m, c, x: (c, x), in_axes=2)(Cell(), 0, torch.ones(2)),
            r"args\[1\] has shape \(2,\), which has no axis 2",
        ),
        (
            lambda: scan(lambda m, c, x: (c, x), in_axes="0")(Cell(), 0, torch.ones(2)),
            "in_axes has '0', expected ints and broadcast and None",
        ),
        (
            lambda: scan(lambda m, c, x: (c, x), in_axes=(0, 0))(Cell(), 0, torch.ones(2)),
            r"in_axes: axes \(0, 0\) do not fit a value with 1 elements",
        ),
        (
            lambda: scan(lambda m, c, x: (c, x), out_axes=2, compile=False)(Cell(), 0, torch.ones(2)),
            "out axis 2 does not exist in a value of 1 dimensions, the scanned one included",
        ),
        (lambda: remat_scan(nn.Linear), r"remat_scan: lengths is empty, expected .*, as in \(4, 6\)"),
    ],
)
def test_axes_and_lengths_that_do_not_fit(call, match):
    with pytest.raises(AxisError, match=match):
        call()


def test_calls_of_another_form():
    with pytest.raises(
        TransformTargetError, match=r"scan\(.*\): got no carry, expected a call \(carry, \*xs\), with None"
    ):
        scan(lambda m: None)(Cell())
    with pytest.raises(TransformTargetError, match=r"remat_scan\(.*\): got 2 arguments, expected one, the carry"):
        remat_scan(lambda m, c: c, lengths=(2,))(Cell(), 1, 2)


# Carry ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    h: Any
    rest: Any = None


Pair = collections.namedtuple("Pair", "a b")


@PATHS
@pytest.mark.parametrize("wrap", [lambda x: {"h": x}, lambda x: Pair(x, ()), State, lambda x: (State([x]), None), list])
def test_carries_of_any_structure(wrap, compile):
    carry = wrap([torch.zeros(2)]) if wrap is list else wrap(torch.zeros(2))
    body = lambda m, c, x: (torchlift._tree.map_leaves(lambda t: t if t is None else t + x, c), x)
    got, _ = scan(body, compile=compile)(nn.Identity(), carry, torch.ones(3))
    assert type(got) is type(carry)
    leaves = [leaf for leaf in torchlift._tree.flatten(got)[0] if leaf is not None]
    assert len(leaves) == 1 and torch.equal(leaves[0], torch.full((2,), 3.0))


@PATHS
def test_numbers_in_the_carry_come_back_as_tensors(compile):
    carry, _ = scan(lambda m, c, x: ((c[0] + 1, c[1] * x), None), compile=compile)(
        nn.Identity(), (0, 1.0), 2 * torch.ones(3)
    )
    assert carry[0].dtype == torch.int64 and carry[0] == 3 and carry[1].item() == 8.0


CARRIES = {
    "structure": (
        lambda m, c, x: ((c["h"], x), x),
        r"structure: got tuple with leaves \['\[0\]', '\[1\]'\], expected dict",
    ),
    "a leaf more": (
        lambda m, c, x: ({**c, "new": x}, x),
        r"got dict with leaves \[.*'new'.*\], expected dict with leaves",
    ),
    "shape": (
        lambda m, c, x: ({"h": c["h"], "s": [c["s"][0][None]]}, x),
        r"carry\['s'\]\[0\] changed: got torch.float64 \[1, 2\], expected torch.float64 \[2\]",
    ),
    "dtype": (
        lambda m, c, x: ({"h": c["h"].float(), "s": c["s"]}, x),
        r"carry\['h'\] changed: got torch.float32 \[\], expected torch.float64 \[\]",
    ),
    "no pair": (lambda m, c, x: c, r"the body returned dict, expected a pair \(carry, ys\), with None for no ys"),
    "three": (lambda m, c, x: (c, x, x), r"the body returned tuple, expected a pair \(carry, ys\)"),
    "None": (
        lambda m, c, x: ({"h": None, "s": c["s"]}, x),
        r"carry\['h'\] changed: got None, expected torch.float64 \[\]",
    ),
}


@PATHS
@pytest.mark.parametrize("name", CARRIES)
def test_a_carry_that_changes_is_refused(name, compile):
    body, match = CARRIES[name]
    module = nn.BatchNorm1d(1)

    def counting(m, c, x):
        m.num_batches_tracked.add_(1)
        return body(m, c, x)

    lifted = scan(counting, variable_carry="batch_stats", compile=compile)
    with pytest.raises(CarryError, match=r"scan\(.*\): .*" + match):
        lifted(module, {"h": torch.zeros(()), "s": [torch.zeros(2)]}, torch.ones(3))
    assert module.num_batches_tracked == 0


# State ---------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer with parameters, statistics, and a count that layers share."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE)
        variable(self, "shared", "count", torch.zeros, ())
        variable(self, "fixed", "gain", torch.ones, ())

    def forward(self, carry):
        self.count = self.count + 1
        sow(self, "intermediates", "count", self.count)
        return carry + self.gain * self.count * self.norm(self.linear(carry)).tanh(), None


@PATHS
@pytest.mark.parametrize("unroll", [1, 3])
def test_a_stack_of_layers(compile, unroll):
    layers = [Layer() for _ in range(4)]
    Stack = scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        variable_carry="shared",
        variable_broadcast="fixed",
        compile=compile,
        unroll=unroll,
    )
    stack = Stack.from_modules(layers)
    x = torch.randn(6, SIZE)
    held = stack.norm.running_mean
    with capture("intermediates") as store:
        out, _ = stack(x)
    expected, count = x, torch.zeros(())
    for layer in layers:
        layer.count = count
        expected, _ = layer(expected)
        count = layer.count
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for p, *each in zip(stack.parameters(), *(layer.parameters() for layer in layers)):
        close(p.grad, torch.stack([q.grad for q in each]))
    close(stack.norm.running_mean, torch.stack([layer.norm.running_mean for layer in layers]))
    assert stack.norm.running_mean is held and stack.norm.num_batches_tracked.tolist() == [1] * 4
    assert stack.count == 4 and stack.gain == 1
    assert torch.equal(store["intermediates"]["count"][0], torch.arange(1.0, 5.0))


@PATHS
def test_read_only_state_that_changes_is_refused(compile):
    layer = Layer()
    for axes, name in (({}, "count"), ({"variable_carry": "shared"}, "running_mean|num_batches")):
        with pytest.raises(ModifyCollectionError, match=rf"{name}.*variable_axes=.*variable_carry="):
            scan(Layer.forward, length=2, compile=compile, **axes)(layer, torch.randn(4, SIZE))
    assert layer.count == 0 and layer.norm.num_batches_tracked == 0


@PATHS
def test_state_of_apply_keeps_its_graph(compile):
    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            variable(self, "ema", "m", torch.zeros, 2)

        def forward(self, c, x):
            self.m = 0.5 * self.m + x * self.w
            return c, self.m

    def run(m, xs):
        return scan(Ema.forward, variable_carry="ema", compile=compile)(m, None, xs)[1]

    module, xs = Ema(), torch.randn(3, 2)
    ys, updated = apply(module, {}, xs, method=run, mutable="ema")
    assert not module.m.any()
    updated["ema"]["m"].sum().backward()
    close(module.w.grad, 0.25 * xs[0] + 0.5 * xs[1] + xs[2])
    run(module, xs)
    assert torch.equal(module.m, updated["ema"]["m"]) and not module.m.requires_grad


@PATHS
def test_data_transform(compile):
    seen = []

    def halve(variable_groups, rng_groups):
        seen.append([{c: sorted(names) for c, names in group.items()} for group in variable_groups])
        shared, carried, scanned = variable_groups
        return ({}, {}, {"params": {name: 0.5 * t for name, t in scanned["params"].items()}}), rng_groups

    stack = stack_modules([nn.Linear(SIZE, SIZE) for _ in range(3)])
    lifted = scan(lambda m, c: (m(c), None), variable_axes={"params": 0}, data_transform=halve, compile=compile)
    x = expected = torch.randn(SIZE)
    for layer in unstack_modules(stack):
        expected = 0.5 * layer(expected)
    close(lifted(stack, x)[0], expected)
    assert seen[0] == [{}, {}, {"params": ["bias", "weight"]}]


# Compiled ------------------------------------------------------------------------------------------------------------


def test_inductor_is_the_default_and_equals_the_loop():
    cell, carry, xs = Cell(), torch.randn(SIZE), torch.randn(T, SIZE)
    got, expected = scan(Cell.forward)(cell, carry, xs), loop(cell, carry, xs)
    assert last_report().path == "compiled"
    close(got, expected)
    close(backward(*got, *cell.parameters()), backward(*expected, *cell.parameters()))


def test_set_stance_is_honoured():
    cell, carry, xs = Cell(), torch.randn(SIZE), torch.randn(T, SIZE)
    lifted = scan(lambda m, c, x: m(c, x), compile=AOT)
    with torch.compiler.set_stance("force_eager"), pytest.warns(TorchliftCompileWarning, match="force_eager"):
        got = lifted(cell, carry, xs)
    assert last_report().path == "plain"
    close(got, loop(cell, carry, xs))
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("error")
        lifted(cell, carry, xs)  # warned once
    close(lifted(cell, carry, xs), loop(cell, carry, xs))
    assert last_report().path == "compiled"


def test_a_body_whose_content_cannot_be_told_runs_as_the_plain_loop():
    cell, carry, xs = Cell(), torch.randn(SIZE), torch.randn(T, SIZE)
    cell.extra = array("d", [1.0])
    lifted = scan(Cell.forward, compile={**AOT, "options": {"array": 1}})
    with pytest.warns(TorchliftCompileWarning, match=r"scan\(Cell.forward, .*\) runs as a plain Python loop: a plain"):
        close(lifted(cell, carry, xs), loop(cell, carry, xs))


@PATHS
def test_a_second_call_with_another_batch_size(compile):
    cell, lifted = Cell(), scan(Cell.forward, compile=compile)
    for batch, length in ((2, 4), (7, 4), (7, 3)):
        carry, xs = torch.randn(batch, SIZE), torch.randn(length, batch, SIZE)
        close(lifted(cell, carry, xs), loop(cell, carry, xs))


@PATHS
def test_non_contiguous_and_expanded_inputs(compile):
    cell = Cell()
    carry, xs = torch.zeros(1, SIZE).expand(2, SIZE), torch.randn(SIZE, 2, T).permute(2, 1, 0)
    close(scan(Cell.forward, compile=compile)(cell, carry, xs), loop(cell, carry, xs))


def test_a_body_that_fails_leaves_the_module_as_it_was():
    module, calls = nn.BatchNorm1d(SIZE), []

    def body(m, c, x):
        m(x)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return c, None

    with pytest.raises(KeyboardInterrupt):
        scan(body, variable_carry="batch_stats", compile=False)(module, 0, torch.randn(4, 2, SIZE))
    assert module.num_batches_tracked == 0 and not module.running_mean.any()
