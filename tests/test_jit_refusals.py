"""jit: donated arguments, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import torchlift

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        torchlift.variable(self, "state", "total", torch.zeros, dim)

    def forward(self, x):
        y = self.norm(self.linear(x))
        self.total = self.total + y.sum(0)
        return x + y


# Donation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"donate_argnums": 1}, {"donate_argnames": "input"}])
def test_a_donated_tensor_is_freed_and_may_not_be_used(how):
    module = torchlift.jit(nn.Linear, backend="aot_eager", **how)(4, 4)
    x = torch.randn(1000, 4)
    expected = nn.functional.linear(x, module.weight, module.bias)
    storage = StorageWeakRef(x.untyped_storage())
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    assert storage.expired() and repr(x) == "<donated tensor>"
    for use in (
        lambda: x + 1,
        lambda: torch.ones(2).add_(x),
        lambda: x.shape,
        lambda: torch.stack([x]),
        lambda: module(x),
    ):
        with pytest.raises(torchlift.DonatedTensorError, match=r"had been donated to jit\(Linear.* as argument 1"):
            use()


def test_what_a_call_returns_or_keeps_of_a_donated_tensor_stays():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(3))

        def forward(self, tree):
            self.cache = tree["x"]
            return tree["x"], tree["y"][1:]

    x, y = torch.arange(3.0), torch.arange(4.0)
    module = torchlift.jit(Keeps, donate_argnums=1, backend="aot_eager")()
    a, b = module({"x": x, "y": y})
    assert a.tolist() == [0, 1, 2] and b.tolist() == [1, 2, 3] and module.cache.tolist() == [0, 1, 2]
    for tensor in (x, y):
        with pytest.raises(torchlift.DonatedTensorError, match="use what the call returned"):
            tensor.sum()


def test_donation_is_refused_where_autograd_needs_the_tensor():
    module = torchlift.jit(nn.Linear, donate_argnums=1, backend="aot_eager")(4, 4)
    x = torch.randn(2, 4)
    with pytest.raises(torchlift.DonatedTensorError, match=r"argument 1 is donated, .* torch.no_grad\(\)"):
        module(x)
    assert x.sum() == x.sum()  # refused before any work


# Errors --------------------------------------------------------------------------------------------------------------


class Prints(nn.Module):
    def forward(self, x):
        print(x.sum())
        return x + 1


def test_a_number_that_a_tensor_holds_is_no_choice():
    run = torchlift.jit(lambda module, x: module(x) if x.sum().item() > 0 else x, backend="eager")
    with pytest.raises(torchlift.UnsupportedError, match=r"(?s)jit\(<lambda>.*fullgraph=False.*data-dependent"):
        run(nn.Linear(3, 3), torch.ones(2, 3))


def test_a_body_that_cannot_be_captured_raises_with_torchs_reason():
    x = torch.ones(2)
    with pytest.raises(torchlift.UnsupportedError, match=r"(?s)jit\(Prints.*fullgraph=False.*print"):
        torchlift.jit(Prints, backend="aot_eager")()(x)
    assert torchlift.jit(Prints, backend="aot_eager", fullgraph=False)()(x).tolist() == [2, 2]


def test_one_compilation_too_many_is_refused():
    Powers, x = torchlift.jit(Block, backend="eager"), torch.randn(5, 4)
    with torch._dynamo.config.patch(accumulated_recompile_limit=3):
        with pytest.raises(torchlift.UnsupportedError, match=r"(?s)jit\(Block.*accumulated_recompile_limit"):
            for number in range(9):
                module = Powers()
                module.norm.momentum = 0.1 * number
                module(x)
    Powers()(x)


def test_collections_and_streams_that_are_not_lifted():
    class Both(Block):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x))

    x = torch.randn(5, 4)
    module = torchlift.jit(Block, variables="state", backend="aot_eager")()
    before = copy.deepcopy(module.state_dict())
    for run in (module, lambda x: torch.func.grad(lambda x: module(x).sum())(x)):  # compiled, and inlined
        with pytest.raises(
            torchlift.ModifyCollectionError,
            match=r"changed 'norm\..*' of collection 'batch_stats', .*add 'batch_stats' to variables=",
        ):
            run(x)
        torch.testing.assert_close(module.state_dict(), before)
    module = torchlift.jit(Both, rngs=False, backend="aot_eager")()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with pytest.raises(
        torchlift.RandomnessError, match="drew from the random stream 'dropout'; add 'dropout' to rngs="
    ):
        module(x)
    torch.testing.assert_close(module.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    torchlift.jit(Both, variables=["state", "batch_stats"], rngs="dropout", backend="aot_eager")()(x)


class Creates(nn.Module):
    def forward(self, x):
        count = torchlift.variable(self, "state", "count", torch.zeros, 2)
        count.value = count.value + 1
        return x * count.value


def test_a_variable_may_only_be_created_in_a_collection_that_is_lifted():
    module, x = torchlift.jit(Creates, variables="params", backend="aot_eager")(), torch.ones(2)
    with pytest.raises(
        torchlift.ModifyCollectionError, match="created 'count' of collection 'state', .*add 'state' to variables="
    ):
        module(x)
    assert not module.state_dict()
    assert torchlift.jit(Creates, variables="state", backend="aot_eager")()(x).tolist() == [1, 1]


def test_a_module_is_no_result():
    def step(module, x):
        module.count.add_(1)
        return x, module

    module = nn.Module()
    module.register_buffer("count", torch.zeros(1))
    with pytest.raises(torchlift.TransformedMethodReturnValueError, match=r"jit\(.*step.*\): returned a Module"):
        torchlift.jit(step, backend="aot_eager")(module, torch.ones(2))
    assert module.count == 0
    match = r"jit\(.*step.*\): returned a module or a Variable, expected tensors.*return its tensors"
    with pytest.raises(torchlift.TransformedMethodReturnValueError, match=match):
        torchlift.jit(step, backend="aot_eager", fullgraph=False)(module, torch.ones(2))
    assert module.count == 0


@pytest.mark.parametrize(
    "options, match",
    [
        ({"static_argnums": 0}, "static_argnums has 0, which is the module"),
        ({"donate_argnums": -2}, "donate_argnums has -2, which is the module"),
        ({"static_argnums": 2}, "static_argnums has 2, expected 1 to 1, the module being 0"),
        ({"static_argnames": "y"}, r"static_argnames has 'y', expected one of \['input'\]"),
        ({"donate_argnames": "y"}, r"donate_argnames has 'y'"),
        ({"static_argnums": 1}, None),
        ({"device": "meta"}, r"a tensor of shape \(4, 4\) is on cpu, expected meta"),
    ],
)
def test_arguments_that_do_not_fit(options, match):
    module = torchlift.jit(nn.Linear, backend="aot_eager", **options)(4, 4)
    if match is None:
        with pytest.raises(torchlift.ArgumentError, match="static argument 1 is a list, expected a hashable value"):
            module([1.0])
    else:
        with pytest.raises(torchlift.ArgumentError, match=match):
            module(torch.ones(2, 4))


def test_a_device_that_fits():
    torchlift.jit(nn.Linear, backend="aot_eager", device="cpu")(4, 4)(torch.ones(2, 4))


def test_no_instances():
    with pytest.raises(torchlift.TransformTargetError, match=r"jit: got an instance of Linear"):
        torchlift.jit(nn.Linear(2, 2))


# What a body leaves behind ---------------------------------------------------------------------------------------------


class Leaves(nn.Module):
    """Counts a call, then does something to itself."""

    def __init__(self, act):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))
        self.history, self.named, self.steps = [], {"kept": None}, 0
        self.act = act

    def forward(self, x):
        y = self.linear(x)
        self.count += 1
        self.act(self, y)
        return y


LEFT = {
    "attribute": (lambda m, y: setattr(m, "last", y), "assigned 'last' in the body, a tensor in a plain attribute"),
    "in a tuple": (lambda m, y: setattr(m, "last", (1, y)), "assigned 'last' in the body, a tensor in a plain attr"),
    "of a part": (lambda m, y: setattr(m.linear, "last", y), "assigned 'linear.last' in the body, a tensor in a pl"),
    "list": (lambda m, y: m.history.append(y), "put a tensor into 'history' in the body, a tensor in a plain list"),
    "dict": (lambda m, y: m.named.update(kept=y), "put a tensor into 'named' in the body, a tensor in a plain dict"),
}


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("how", LEFT)
def test_a_tensor_left_in_a_plain_attribute_is_refused_and_nothing_is_changed(how, fullgraph):
    act, match = LEFT[how]
    module = torchlift.jit(Leaves, backend="aot_eager", fullgraph=fullgraph)(act)
    for _ in range(2):  # in the call that compiles, and in one that would find a graph
        with pytest.raises(torchlift.PlainAttributeError, match=rf"jit\(Leaves.*{match}.*torchlift.variable\(self"):
            module(torch.ones(2, 4))
        assert module.count == 0 and module.history == [] and module.named == {"kept": None} and module.steps == 0
        assert not hasattr(module, "last") and not hasattr(module.linear, "last")


def test_a_first_call_that_fails_when_it_runs_is_looked_at_again():
    """What a graph leaves in attributes is looked at where it was traced, which that call did not live to see."""
    failures = [KeyboardInterrupt]

    def backend(graph, inputs):
        def run(*args):
            if failures:
                raise failures.pop()
            return graph(*args)

        return run

    def act(module, y):
        module.last = y * 2

    module = torchlift.jit(Leaves, backend=backend)(act)
    with pytest.raises(KeyboardInterrupt):
        module(torch.ones(2, 4))
    assert not hasattr(module, "last") and module.count == 0
    with pytest.raises(torchlift.PlainAttributeError, match=r"assigned 'last' in the body"):
        module(torch.ones(2, 4))


def test_what_is_no_news_may_be_set():
    module = nn.LSTM(4, 4)  # keeps its weights in a list, too
    jitted = torchlift.jit(lambda m, x: m(x)[0], backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(jitted(module, torch.ones(2, 4)), module(torch.ones(2, 4))[0])
    module = torchlift.jit(Leaves, backend="aot_eager")(lambda m, y: m.history.append("called"))
    module(torch.ones(2, 4))
    assert module.history == ["called"] and module.count == 1


def test_a_number_that_changes_is_kept_and_reported_once():
    def act(module, y):
        module.steps += 1

    module = torchlift.jit(Leaves, backend="aot_eager")(act)
    match = (
        r"jit\(Leaves.*\): assigned 'steps' in the body: 0 -> 1, a constant for what is compiled, .*torchlift.variable"
    )
    with pytest.warns(torchlift.TorchliftWarning, match=match) as found:
        for _ in range(3):
            module(torch.ones(2, 4))
    assert module.steps == 3 and module.count == 3
    assert len([warning for warning in found if "'steps'" in str(warning.message)]) == 1


def test_python_between_graphs_that_raises_leaves_the_module_as_it_was():
    def fails(module, y):
        module.steps, module.named["new"] = 1, "text"
        torch._dynamo.graph_break()
        module.register_buffer("late", torch.ones(1))
        raise KeyError("no")

    module = torchlift.jit(Leaves, backend="aot_eager", fullgraph=False)(fails)
    count = module.count
    with pytest.raises(KeyError, match="no"):
        module(torch.ones(2, 4))
    assert module.count is count and count == 0 and module.steps == 0
    assert module.named == {"kept": None} and "late" not in module.state_dict()


def test_a_stack_that_waits_for_its_size():
    waiting = torchlift.jit(torchlift.vmap(nn.Linear, {"params": 0}), backend="aot_eager")(4, 4)
    with pytest.raises(
        torchlift.UnsupportedError, match=r"'weight' is not initialised yet.*vmap\(\.\.\., axis_size=\)"
    ):
        waiting(torch.ones(3, 2, 4))
