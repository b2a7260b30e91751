"""vmap: axes, sizes, In and Out, state for each index, and what torch cannot batch."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import torchlift
from torchlift import In, Out, stack_modules, unstack_modules, variable, variables, vmap
from torchlift.errors import AxisError, ModifyCollectionError, TorchliftWarning, UnsupportedError

pytestmark = pytest.mark.usefixtures("float64")

N = 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def loop(stack, *rows):
    """The plain loop: a stack's modules on the rows, outputs stacked; and the modules after it."""
    modules = unstack_modules(stack)
    return torch.stack([m(*row) for m, *row in zip(modules, *rows)]), modules


# Axes of arguments ---------------------------------------------------------------------------------------------------


def add(m, *args, **kwargs):
    """All that it is given, in one row."""
    leaves = pytree.tree_leaves((args, kwargs))
    return torch.cat([torch.as_tensor(leaf).flatten() for leaf in leaves if leaf is not None])


X, Y = torch.arange(12.0).reshape(3, 4), torch.arange(24.0).reshape(2, 4, 3)
AXES = {
    "int": (0, (X,)),
    "negative": (-1, (Y,)),
    "tuple": ((0, None), (X, Y)),
    "list": ([0, -1], (X, Y)),
    "int over a tree": (0, ({"a": X, "b": [X, None]},)),
    "prefix": (({"a": 0, "b": (None, 2)},), ({"a": X, "b": (X, Y)},)),
    "prefix over subtrees": (({"a": 0, "b": None},), ({"a": (X, X), "b": [X, Y, 3]},)),
    "None over a tree": ((0, None), (X, {"a": X, "b": None})),
    "numbers": (0, (X, 2.0)),
}


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("out_axes", [0, -1])
def test_in_axes_are_those_of_torch(name, out_axes):
    in_axes, args = AXES[name]
    theirs = {"int over a tree": ({"a": 0, "b": [0, None]},), "numbers": (0, None), "list": (0, -1)}
    torch_axes = theirs.get(name, in_axes)
    expected = torch.func.vmap(lambda *a: add(None, *a), torch_axes, out_axes)(*args)
    close(vmap(add, in_axes=in_axes, out_axes=out_axes)(nn.Identity(), *args), expected)


def test_keyword_arguments_are_mapped_on_axis_0():
    x, scale = torch.randn(2, N), torch.randn(N, 2)
    got = vmap(lambda m, x, *, scale, flag=None: x * scale, in_axes=1)(nn.Identity(), x, scale=scale)
    close(got, x.T * scale)


def test_out_axes_as_a_tree():
    out = vmap(lambda m, x: {"a": x, "b": (x, 2 * x)}, out_axes={"a": 0, "b": (1, -1)})(nn.Identity(), X)
    close(out["a"], X)
    close(out["b"][0], X.T)
    close(out["b"][1], 2 * X.T)


def test_out_axes_none_is_for_what_is_the_same_everywhere():
    lifted = vmap(lambda m, x: (x, m.weight.sum(), None), out_axes=(0, None, None))
    linear = nn.Linear(2, 2)
    x, total, none = lifted(linear, X)
    assert torch.equal(total, linear.weight.sum()) and x.shape == X.shape and none is None
    with pytest.raises(
        AxisError, match="the output differs from index to index, but its axis is None; give it an axis"
    ):
        vmap(lambda m, x: x, out_axes=None)(linear, X)
    for tree, path in ((lambda x: (x, x), r"\[1\]"), (lambda x: (x, {"a": (None, x)}), r"\[1\]\['a'\]\[1\]")):
        with pytest.raises(
            AxisError, match=rf"vmap\(.*\): output{path} differs from index to index, but its axis is None"
        ):
            vmap(lambda m, x, tree=tree: tree(x), out_axes=(0, None))(linear, X)


@pytest.mark.parametrize("in_axes", [None, 0, -1, (0, None)])
def test_gradients_are_those_of_the_loop(in_axes):
    stack = stack_modules([nn.Linear(3, 3) for _ in range(3)])
    x = torch.randn(3, 3, requires_grad=True)
    args = (x, torch.ones(())) if isinstance(in_axes, tuple) else (x,)
    out = vmap(lambda m, x, s=1.0: s * m(x).tanh(), variable_axes={"params": 0}, in_axes=in_axes)(stack, *args)
    out.square().sum().backward()
    got = [x.grad.clone(), stack.weight.grad.clone()]
    x.grad = None
    modules = unstack_modules(stack)
    rows = [x] * 3 if in_axes is None else x.unbind(-1 if in_axes == -1 else 0)
    expected = torch.stack([m(row).tanh() for m, row in zip(modules, rows)])
    expected.square().sum().backward()
    close(out, expected)
    close(got[0], x.grad)
    close(got[1], torch.stack([m.weight.grad for m in modules]))


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_the_size_is_read_off_whatever_has_the_axis():
    stack = stack_modules([nn.Linear(2, 2) for _ in range(N)])
    call = lambda m, *args: m(torch.ones(2))
    assert vmap(call, variable_axes={"params": 0})(stack).shape == (N, 2)
    assert vmap(call)(nn.Linear(2, 2), torch.ones(4)).shape == (4, 2)
    assert vmap(call, axis_size=5)(nn.Linear(2, 2)).shape == (5, 2)
    assert vmap(call, in_axes=None, axis_size=5)(nn.Linear(2, 2), torch.ones(4)).shape == (5, 2)


def test_a_disagreement_names_the_sizes():
    stack = stack_modules([nn.Linear(2, 2) for _ in range(N)])
    lifted = vmap(lambda m, *args: m(torch.ones(2)), variable_axes={"params": 0}, in_axes=1)
    match = (
        r"vmap\(<lambda>, .*\): the sizes of the mapped axis disagree, expected one: 'weight' in 'params' \(axis 0\) and 1 "
        r"more in the module: 3, args\[0\] \(axis 1\): 4$"
    )
    with pytest.raises(AxisError, match=match):
        lifted(stack, torch.ones(3, 4))
    with pytest.raises(AxisError, match=r"expected one: axis_size: 2, args\[0\]"):
        vmap(add, axis_size=2)(nn.Identity(), X)


def test_an_argument_that_disagrees_is_named_by_its_keyword():
    stack = stack_modules([nn.Linear(2, 2) for _ in range(N)])
    scaled = vmap(lambda m, x, scale: m(x) * scale["by"][0], variable_axes={"params": 0}, in_axes=None)
    match = (
        r"'weight' in 'params' \(axis 0\) and 1 more in the module: 3, keyword argument 'scale'\['by'\]\[0\] \(axis 0\):"
        " 2; keyword arguments are mapped on axis 0, pass by position what in_axes is to tell"
    )
    with pytest.raises(AxisError, match=match):
        scaled(stack, torch.ones(2), scale={"by": [torch.ones(2)]})
    with pytest.raises(
        AxisError, match=r"keyword argument 'scale'\['by'\]\[0\] has shape \(\), which has no axis 0; key"
    ):
        scaled(stack, torch.ones(2), scale={"by": [torch.ones(())]})
    assert scaled(stack, torch.ones(2), {"by": [torch.ones(())]}).shape == (N, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: vmap(add)(nn.Identity()), "nothing has a mapped axis, so the size is not known; pass axis_size="),
        (lambda: vmap(add, in_axes=None)(nn.Identity(), X), "the size is not known"),
        (lambda: vmap(add, in_axes=2)(nn.Identity(), X), r"args\[0\] has shape \(3, 4\), which has no axis 2"),
        (
            lambda: vmap(add, variable_axes={"params": 1})(nn.Linear(2, 2), X),
            r"'bias' in 'params' has shape \(2,\), which has no axis 1",
        ),
        (
            lambda: vmap(add, out_axes=3)(nn.Identity(), X),
            "the output has 2 dimensions, the mapped one included, so no",
        ),
        (lambda: vmap(add, in_axes="0")(nn.Identity(), X), "in_axes has '0', expected ints and None"),
        (lambda: vmap(add, in_axes=(0, True))(nn.Identity(), X, X), "in_axes has True, expected ints and None"),
        (
            lambda: vmap(add, in_axes=(0,))(nn.Identity(), X, X),
            r"in_axes: axes \(0,\) do not fit a value with 2 elements",
        ),
        (lambda: vmap(add, out_axes=(0, 0))(nn.Identity(), X), r"out_axes: axes \(0, 0\) do not fit a value with"),
    ],
)
def test_axes_that_do_not_fit(call, match):
    with pytest.raises(AxisError, match=match):
        call()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks(chunk_size):
    stack = stack_modules([nn.BatchNorm1d(2) for _ in range(5)])
    twin = stack_modules(unstack_modules(stack))
    x = torch.randn(5, 4, 2)
    run = lambda m, x: m(x)
    close(
        vmap(run, variable_axes={True: 0}, chunk_size=chunk_size)(stack, x), vmap(run, variable_axes={True: 0})(twin, x)
    )
    close(stack.running_mean, twin.running_mean)


def test_no_index_at_all():
    module = nn.Linear(2, 3)
    out = vmap(lambda m, x: (m(x), x.sum()), out_axes=(1, 0))(module, torch.ones(0, 4, 2))
    assert out[0].shape == (4, 0, 3) and out[1].shape == (0,)
    norm = vmap(nn.BatchNorm1d, variable_axes={"params": 0}, axis_size=0)(2)
    assert norm(torch.ones(0, 5, 2)).shape == (0, 5, 2) and norm.running_mean.shape == (0, 2)


# State ---------------------------------------------------------------------------------------------------------------


def test_the_users_own_line():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, x):
            return self.net(x)

    for kwargs in ({}, {"axis_size": N}):
        nets = vmap(Net, variable_axes={"params": 0}, **kwargs)()
        x = torch.randn(N, 8, 2)
        out = nets(x)
        assert out.shape == (N, 8, 4) and nets.net[1].num_batches_tracked.tolist() == [1] * N
        out.sum().backward()
        assert nets.net[0].weight.grad.shape == (N, 4, 2)
        expected = torch.stack([m(row) for m, row in zip((m.eval() for m in nets.to_modules()), x)])
        close(nets.eval()(x), expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_batch_norm_for_each_index(cls, axis):
    kwargs = {"affine": True, "track_running_stats": True}
    modules = [cls(2, **kwargs) for _ in range(N)]
    axes = {"params": 0, "batch_stats": 0} if axis == 0 else {"params": axis, "batch_stats": axis}
    if axis == 1:  # a counter has one axis only
        for module in modules:
            torchlift.set_collection(module, "counters", "num_batches_tracked")
        axes["counters"] = 0
    stack = vmap(cls, variable_axes=axes).from_modules(modules)
    x = torch.randn(N, 5, 2, 7)
    held = stack.running_mean
    for _ in range(2):
        close(stack(x), torch.stack([m(row) for m, row in zip(modules, x)]))
    close(stack.running_mean, torch.stack([m.running_mean for m in modules], axis))
    close(stack.running_var, torch.stack([m.running_var for m in modules], axis))
    assert torch.equal(stack.num_batches_tracked, torch.stack([m.num_batches_tracked for m in modules]))
    assert stack.running_mean is held


def test_shared_state_that_differs_from_index_to_index_is_refused():
    norm, x = nn.BatchNorm1d(2), torch.randn(N, 5, 2)
    match = r"vmap\(<lambda>\): .* share.*'running_mean'.*variable_axes=\{'batch_stats': 0\}"
    with pytest.raises(ModifyCollectionError, match=match):
        vmap(lambda m, x: m(x))(norm, x)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
    close(vmap(lambda m, x: m(x))(norm.eval(), x), norm(x.flatten(0, 1)).reshape(x.shape))


class Accumulator(nn.Module):
    def __init__(self, collection="state"):
        super().__init__()
        variable(self, collection, "total", torch.zeros, 2)

    def forward(self, x):
        before = self.total.clone()
        self.total += x
        return before


@pytest.mark.parametrize("size", [(), (2,)])
def test_a_write_into_shared_state_is_refused_whatever_torch_says_of_it(size):
    module = nn.Module()
    variable(module, "state", "total", torch.zeros, size)

    def add(m, x):
        m.total += x.sum()
        return x

    with pytest.raises(ModifyCollectionError, match=r"'total'.*variable_axes=\{'state': 0\}"):
        vmap(add)(module, torch.ones(N, 2))
    assert not module.total.any()


def test_in_is_read_only_and_out_is_created():
    module = Accumulator()
    stack = stack_modules([Accumulator() for _ in range(N)])
    x = torch.ones(N, 2)
    with pytest.raises(
        ModifyCollectionError, match="changed 'total' of collection 'state', which is read-only there; give"
    ):
        vmap(lambda m, x: m(x), variable_axes={"state": In(0)})(stack, x)
    assert not stack.total.any()
    seen = vmap(lambda m, x: m.total + x, variable_axes={"state": In(0)})(stack, x)
    assert torch.equal(seen, x)

    def create(m, x):
        assert not hasattr(m, "cache") and "found" not in dict(m.named_buffers())
        variable(m, "cache", "found", lambda: 3 * x).value += 1
        return x

    vmap(create, variable_axes={"cache": Out(1)})(module, x)
    assert torch.equal(module.found, torch.full((2, N), 4.0)) and set(variables(module)) == {"state", "cache"}
    vmap(create, variable_axes={"cache": Out(0)})(module, 2 * x)  # hidden from the body, then replaced
    assert torch.equal(module.found, torch.full((N, 2), 7.0))


def test_a_variable_without_an_axis_may_change_where_all_agree():
    module = Accumulator()
    vmap(lambda m, x: m.total.add_(1) * x, variable_axes={"state": None})(module, torch.ones(N, 2))
    assert torch.equal(module.total, torch.ones(2))
    with pytest.raises((AxisError, ModifyCollectionError), match="'?total'?"):
        vmap(lambda m, x: setattr(m, "total", m.total + x), variable_axes={"state": None})(module, torch.ones(N, 2))
    assert torch.equal(module.total, torch.ones(2))


def test_declared_in_the_body():
    class Counter(nn.Module):
        def forward(self, x):
            count = variable(self, "state", "count", torch.zeros, ())
            count.value = count.value + x.sum()
            return x

    counter = Counter()
    lifted = vmap(lambda m, x: m(x), variable_axes={"params": 0})
    for _ in range(2):
        lifted(counter, torch.arange(3.0))
    assert torch.equal(counter.count, 2 * torch.arange(3.0))
    with pytest.raises(
        ModifyCollectionError,
        match=r"created 'count' in collection 'state', .*variable_axes=\{'state': 0\}.*; or declare it before the call",
    ):
        vmap(lambda m, x: m(x))(Counter(), torch.arange(3.0))


# What torch cannot batch ---------------------------------------------------------------------------------------------


def test_lstm_runs_index_by_index_and_says_so():
    modules = [nn.LSTM(2, 4, num_layers=2, batch_first=True) for _ in range(N)]
    stack = vmap(nn.LSTM, variable_axes={"params": 0}).from_modules(modules)
    x = torch.randn(N, 5, 7, 2, requires_grad=True)
    with pytest.warns(TorchliftWarning, match=r"vmap\(LSTM, .*\): runs index by index, since torch says: "):
        out, (h, c) = stack(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftWarning)
        stack(x)  # once is enough
    expected = [m(row) for m, row in zip(modules, x)]
    close(out, torch.stack([o for o, _ in expected]))
    close(c, torch.stack([state[1] for _, state in expected]))
    out.sum().backward()
    sum(o.sum() for o, _ in expected).backward()
    close(stack.weight_hh_l1.grad, torch.stack([m.weight_hh_l1.grad for m in modules]))


def test_index_by_index_draws_and_shares_as_told():
    def body(m, x):
        return m(x)[0], F.dropout(torch.ones(32), 0.5)

    lstm, x = nn.LSTM(2, 2), torch.randn(1, 1, 2).expand(N, 4, 1, 2)
    for split in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchliftWarning)
            out, masks = vmap(body, split_rngs={"dropout": split})(lstm, x)
        assert len(masks.unique(dim=0)) == (N if split else 1)
        close(out[0], out[1])


def test_an_error_of_the_users_own_is_not_retried():
    calls = []

    def fails(m, x):
        calls.append(x)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        vmap(fails)(nn.Identity(), X)
    assert len(calls) == 1


def test_labels_name_the_use():
    lifted = vmap(lambda m, x: x, in_axes=None)
    with pytest.raises(AxisError, match=re.escape("vmap(<lambda>, in_axes=None): nothing has a mapped axis")):
        lifted(nn.Identity(), X)


def test_an_operator_without_a_batching_rule_beside_collectives_is_refused():
    cell, x = nn.LSTMCell(3, 3), torch.ones(2, 3)
    with pytest.raises(
        UnsupportedError, match=r"vmap\(.*\): torch cannot map an operator .*, or leave out axis_name=\. .*lstm_cell"
    ):
        vmap(lambda m, x: torchlift.psum(m(x)[0], "i"), axis_name="i")(cell, x)


def test_shapes_that_depend_on_values_run_index_by_index():
    def positive(m, x):
        kept = m(x)
        return kept[kept > 0]

    modules, x = [nn.Linear(4, 4) for _ in range(3)], torch.randn(5, 4)
    stack = stack_modules(modules)
    mapped = {"params": 0}
    with pytest.warns(
        TorchliftWarning, match="runs index by index, since torch says: vmap: We do not support batching"
    ):
        total = vmap(lambda m, x: positive(m, x).sum(), variable_axes=mapped, in_axes=None)(stack, x)
    torch.testing.assert_close(total, torch.stack([positive(m, x).sum() for m in modules]))
    with (
        pytest.warns(TorchliftWarning),
        pytest.raises(
            AxisError,
            match=r"vmap\(.*\): the output has shape \(\d+,\) at index \d, expected \(\d+,\) as at index 0; pad it",
        ),
    ):
        vmap(positive, variable_axes=mapped, in_axes=None)(stack, x)


def test_a_mapping_that_is_changed_after_lifting_counts_as_it_is():
    axes = {"params": 0}
    heads = vmap(lambda m, x: m(x), variable_axes=axes, in_axes=None)
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    first.weight, first.bias = nn.Parameter(torch.randn(5, 3, 4)), nn.Parameter(torch.randn(5, 3))
    second.weight, second.bias = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 5))
    assert heads(first, torch.ones(2, 4)).shape == (5, 2, 3)
    axes["params"] = 1
    assert heads(second, torch.ones(2, 4)).shape == (5, 2, 3)
