"""The data model: collections, variables, sown values, and running a module on given variables."""

import dataclasses
import threading
from functools import partial

import pytest
import torch
from torch import nn

import torchlift
from torchlift import DenyList, Variable, apply, capture, set_collection, sow, variable, variables
from torchlift.errors import ModifyCollectionError, VariableNameError

pytestmark = pytest.mark.usefixtures("float64")


class Counter(nn.Module):
    def forward(self, x):
        calls = variable(self, "state", "calls", lambda: torch.zeros(()))
        calls.value = calls.value + 1
        return x * calls.value


class Sower(nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.inner = Inner()

    def forward(self, x):
        x = self.linear(x)
        sow(self, "intermediates", "pre", x)
        x = self.inner(x)
        sow(self, "intermediates", "post", x)
        sow(self, "intermediates", "post", 2 * x)
        sow(self, "losses", "l2", x.square().sum())
        return x


class Inner(nn.Module):
    def forward(self, x):
        sow(self, "intermediates", "x", x)
        return x.tanh()


class Every(nn.Module):
    """One variable of every kind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
        self.register_buffer("table", torch.ones(2))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)
        variable(self, "state", "count", torch.zeros, ())
        self.tied = self.linear.weight


def shapes(found):
    return {collection: {name: tuple(t.shape) for name, t in named.items()} for collection, named in found.items()}


# Collections ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_has_its_collection():
    stats = {"running_mean": (3,), "running_var": (3,), "num_batches_tracked": ()}
    assert shapes(variables(Every())) == {
        "params": {
            "tied": (3, 2),
            "linear.bias": (3,),
            "norm.0.weight": (3,),
            "norm.0.bias": (3,),
        },
        "buffers": {"table": (2,), "scratch": (1,)},
        "state": {"count": ()},
        "batch_stats": {f"norm.{i}.{name}": shape for i in (0, 1) for name, shape in stats.items()},
    }


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (False, set()),
        ("state", {"state"}),
        (["params", "buffers"], {"params", "buffers"}),
        (DenyList(["params", "buffers"]), {"state", "batch_stats"}),
        ("nobody", set()),
    ],
)
def test_variables_are_filtered(filter, expected):
    assert set(variables(Every(), filter)) == expected


def test_variables_are_the_modules_own_tensors_by_the_names_of_named_parameters():
    module = Every()
    assert {n: id(t) for n, t in variables(module)["params"].items()} == {
        n: id(t) for n, t in module.named_parameters()
    }
    assert variables(module)["buffers"]["table"] is module.table


def test_set_collection():
    module = Every()
    assert set_collection(module, "ema", "table", "norm.0.running_mean") is module
    assert set(variables(module, "ema")["ema"]) == {"table", "norm.0.running_mean"}
    assert "norm.0.running_mean" not in variables(module)["batch_stats"]
    set_collection(module, "buffers", "table")
    assert set(variables(module, "ema")["ema"]) == {"norm.0.running_mean"}


@pytest.mark.parametrize("names", [["p"], ["inner.q"], ["p", "inner.q"]])
def test_set_collection_of_a_buffer_with_several_names(names):
    module = nn.Module()
    module.inner = nn.Module()
    module.register_buffer("p", torch.ones(2))
    module.inner.register_buffer("q", module.p)
    set_collection(module, "ema", *names)
    assert set(variables(module)) == {"ema" if "p" in names else "buffers"}
    assert set(variables(module.inner)) == {"ema" if "inner.q" in names else "buffers"}


@pytest.mark.parametrize(
    ("collection", "names", "match"),
    [
        ("ema", ["linear.weight"], r"set_collection\(Every, 'ema'\): 'linear.weight' is no buffer; the buffers are"),
        ("ema", ["table", "tabel"], "'tabel' is no buffer"),
        ("params", ["table"], "'params' holds parameters only; make it an nn.Parameter"),
    ],
)
def test_set_collection_refuses(collection, names, match):
    module = Every()
    with pytest.raises(VariableNameError, match=match):
        set_collection(module, collection, *names)
    assert "ema" not in variables(module) and "table" in variables(module)["buffers"]


# variable and Variable -----------------------------------------------------------------------------------------------


def test_variable_declares_once_and_fetches_after():
    module, made = nn.Module(), []

    def init(*shape):
        made.append(shape)
        return torch.ones(shape)

    first = variable(module, "state", "v", init, 2, 3)
    again = variable(module, "state", "v", init, 2, 3)
    assert made == [(2, 3)] and again.value is first.value is module.v
    assert "v" in module.state_dict() and variables(module) == {"state": {"v": module.v}}
    again.value = torch.zeros(1)
    assert first.value is module.v and module.v.shape == (1,)
    assert variable(module, "state", "n", lambda: 3).value.dtype == torch.int64


def test_a_variable_in_params_is_a_parameter_that_optimizers_keep():
    module = nn.Module()
    weight = variable(module, "params", "w", torch.ones, 2)
    held = next(module.parameters())
    weight.value = torch.zeros(2)
    assert isinstance(held, nn.Parameter) and module.w is held and not held.any()


def test_variables_move_and_load_with_the_module():
    a, b = Every(), Every()
    Variable(a, "state", "count").value = torch.tensor(7.0)
    b.load_state_dict(a.state_dict())
    assert Variable(b, "state", "count").value == 7
    assert Variable(b.half(), "state", "count").value.dtype == torch.float16
    assert repr(Variable(a, "state", "count")).startswith("Variable(collection='state', name='count', value=tensor(7.")


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda m: Variable(m, "state", "c"), r"Every has no variable 'c' in collection 'state', only \['count'\]"),
        (lambda m: Variable(m, "stat", "count"), r"no variable 'count' in collection 'stat', only \[\]"),
        (lambda m: variable(m, "state", "new"), "no variable 'new' in collection 'state': pass init_fn to declare it"),
        (
            lambda m: variable(m, "state", "a.b", torch.zeros, 1),
            "'a.b' .* cannot be declared: the name has a dot in it",
        ),
        (lambda m: variable(m, "state", "linear", torch.zeros, 1), "the name is taken by another attribute"),
        (lambda m: variable(m, "other", "count", torch.zeros, 1), "'count' of collection 'other' cannot be declared"),
    ],
)
def test_names_that_are_unknown_or_taken(use, match):
    with pytest.raises(VariableNameError, match=match):
        use(Every())
    with pytest.raises(KeyError):
        use(Every())


# Sow and capture -----------------------------------------------------------------------------------------------------


def test_sow_is_free_unless_captured():
    module = Sower()
    before = dict(module.__dict__)
    module(torch.ones(2))
    assert module.__dict__ == before and "pre" not in module.state_dict()
    with capture("other") as store:
        module(torch.ones(2))
    assert store == {}


def test_capture_names_and_appends():
    module, x = Sower(), torch.randn(2)
    with capture("intermediates") as store:
        y = module(x)
    assert set(store) == {"intermediates"}
    found = store["intermediates"]
    assert {name: len(values) for name, values in found.items()} == {"pre": 1, "inner.x": 1, "post": 2}
    assert torch.equal(found["post"][1], 2 * y) and torch.equal(found["inner.x"][0], module.linear(x))
    found["pre"][0].sum().backward()
    assert module.linear.weight.grad is not None  # with its graph


def test_captures_nest_and_end():
    module, x = Sower(), torch.randn(2)
    with capture() as outer:
        with capture("losses") as inner:
            module(x)
        nn.Sequential(module)(x)
    module(x)
    assert set(inner) == {"losses"} and set(outer) == {"losses", "intermediates"}
    assert set(outer["losses"]) == {"l2", "0.l2"} and len(inner["losses"]["l2"]) == 1


def test_a_capture_ends_with_an_error_and_belongs_to_its_thread():
    module = Sower()
    with pytest.raises(RuntimeError), capture() as store:
        module(torch.ones(7))
    with capture() as mine:
        thread = threading.Thread(target=lambda: module(torch.ones(2)))
        thread.start()
        thread.join()
        module(torch.ones(2))
    assert store == {} and len(mine["intermediates"]["pre"]) == 1


def body(m, x):
    return m(x)


STEP = {
    "plain": lambda m, x: m(x),
    "remat": torchlift.remat(body),
    "remat in remat": torchlift.remat(torchlift.remat(body)),
    "apply": lambda m, x: apply(m, {}, x),
    "scan of length 1": lambda m, x: torchlift.scan(lambda m, c: (m(c), None), length=1, compile=False)(m, x)[0],
}


@pytest.mark.parametrize("way", STEP)
def test_capture_through_transforms(way):
    module, x = Sower(), torch.randn(2, requires_grad=True)
    with capture("intermediates") as expected:
        module(x)
    with capture("intermediates") as store:
        out = STEP[way](module, x)
        out.sum().backward()  # a recomputation sows nothing
    assert set(store["intermediates"]) == set(expected["intermediates"])
    for name, values in expected["intermediates"].items():
        assert len(store["intermediates"][name]) == len(values), name
        for got, value in zip(store["intermediates"][name], values):
            assert torch.equal(got.reshape(value.shape), value), name


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("transform", ["vmap", "scan", "vmap in remat", "remat in vmap", "vmap in scan"])
def test_sown_values_are_stacked(transform, axis):
    module, x = Sower(), torch.randn(3, 2)
    axes = {"variable_axes": {"intermediates": axis}} if axis else {}
    mapped = {
        "vmap": lambda: torchlift.vmap(body, **axes)(module, x),
        "vmap in remat": lambda: torchlift.remat(torchlift.vmap(body, **axes))(module, x),
        "remat in vmap": lambda: torchlift.vmap(torchlift.remat(body), **axes)(module, x),
        "scan": lambda: torchlift.scan(lambda m, c, x: (c, m(x)), compile=False, **axes)(module, 0, x),
        "vmap in scan": lambda: torchlift.scan(
            lambda m, c, x: (c, torchlift.vmap(body)(m, x)), in_axes=torchlift.broadcast, length=1, compile=False
        )(module, 0, x),
    }[transform]
    with capture("intermediates") as store:
        mapped()
    rows = [module.linear(row) for row in x]
    leading = transform == "vmap in scan"
    expected = torch.stack(rows)[None] if leading else torch.stack(rows, axis)
    for name in ("pre", "inner.x"):
        (value,) = store["intermediates"][name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    post = torch.stack([row.tanh() for row in rows], 0 if leading else axis)
    assert [v.shape for v in store["intermediates"]["post"]] == [expected.shape] * 2
    torch.testing.assert_close(store["intermediates"]["post"][1], 2 * (post[None] if leading else post))


def test_sown_trees_and_modules_in_arguments():
    @dataclasses.dataclass
    class Both:
        a: torch.Tensor
        b: torch.Tensor

    class Tree(nn.Module):
        def forward(self, x):
            sow(self, "intermediates", "t", Both(x, {"b": 2 * x}))

    with capture() as store:
        torchlift.vmap(lambda m, other, x: other(x), in_axes=(None, 0))(nn.Linear(2, 2), Tree(), torch.ones(3, 2))
    (value,) = store["intermediates"]["t"]
    assert type(value) is Both and torch.equal(value.b["b"], torch.full((3, 2), 2.0))


# Apply ---------------------------------------------------------------------------------------------------------------


def test_apply_is_functional_call():
    module, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh()), torch.randn(4, 2)
    given = {"0.weight": torch.randn(3, 2)}
    expected = torch.func.functional_call(module, given, (x,))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    assert torch.equal(apply(module, {"params": given}, x), expected)
    assert torch.equal(apply(module, {}, input=x), module(x))
    assert all(torch.equal(module.state_dict()[n], t) for n, t in before.items())


def test_apply_returns_what_is_mutable_and_changes_nothing():
    module, x = nn.BatchNorm1d(2), torch.randn(5, 2)
    twin = nn.BatchNorm1d(2)
    expected = twin(x)
    out, updated = apply(module, {}, x, mutable=["batch_stats"])
    assert torch.equal(out, expected) and set(updated) == {"batch_stats"}
    for name, tensor in variables(twin)["batch_stats"].items():
        assert torch.equal(updated["batch_stats"][name], tensor), name
    assert module.num_batches_tracked == 0 and not module.running_mean.any()
    out, updated = apply(module.eval(), updated, x, mutable=True)
    assert torch.equal(out, twin.eval()(x)) and set(updated) == {"params", "batch_stats"}


def test_apply_methods():
    module = Every()
    module.scaled = None
    x = torch.ones(2)
    assert torch.equal(apply(module, {"buffers": {"table": 3 * x}}, method=lambda m: m.table), 3 * x)
    assert torch.equal(apply(nn.Linear(2, 2), {}, method=lambda m, x: x, x=x), x)
    linear = nn.Linear(2, 2)
    assert apply(linear, {}, method="extra_repr") == linear.extra_repr() == apply(linear, {}, method=linear.extra_repr)
    with pytest.raises(VariableNameError, match=r"apply\(Linear\): there is no method 'forwards'"):
        apply(linear, {}, x, method="forwards")


def test_apply_sown_and_declared():
    module, x = Sower(), torch.randn(2)
    out, updated = apply(module, {}, x, mutable=["intermediates", "losses"])
    assert set(updated) == {"intermediates", "losses"} and len(updated["intermediates"]["post"]) == 2
    with capture("losses") as store:
        out, updated = apply(module, {}, x, mutable="intermediates")
    assert set(updated) == {"intermediates"} and len(store["losses"]["l2"]) == 1
    counter = Counter()
    out, updated = apply(counter, {}, x, mutable="state")
    assert updated == {"state": {"calls": torch.ones(())}} and variables(counter) == {}


def test_apply_keeps_the_graph_of_state():
    module, x = nn.BatchNorm1d(2), torch.randn(5, 2)

    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            variable(self, "ema", "mean", torch.zeros, 2)

        def forward(self, x):
            self.mean = 0.5 * self.mean + self.weight
            return x

    module = Ema()
    _, updated = apply(module, {}, x, mutable="ema")
    updated["ema"]["mean"].sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(2)) and not module.mean.any()
    loss = torch.func.grad(lambda w: apply(module, {"params": {"weight": w}}, x, mutable="ema")[1]["ema"]["mean"].sum())
    assert torch.equal(loss(torch.ones(2)), torch.ones(2))


def test_apply_rngs():
    module, x = nn.Dropout(0.5), torch.ones(64)
    state = torch.get_rng_state()
    a, b = (apply(module, {}, x, rngs={"dropout": 3}) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, apply(module, {}, x, rngs={"dropout": 4}))
    assert torch.equal(state, torch.get_rng_state())
    draw = apply(module, {}, method=lambda m: torch.rand(3, generator=torchlift.make_rng("noise")), rngs={"noise": 0})
    with torchlift.seed_rngs(noise=0):
        assert torch.equal(draw, torch.rand(3, generator=torchlift.make_rng("noise")))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"params": {"weigth": 0}},
            r"apply\(Linear\): got a variable 'weigth' of collection 'params', expected one of",
        ),
        ({"param": {"weight": 0}}, r"'weight' of collection 'param', expected one of \['params'\]"),
    ],
)
def test_apply_refuses_unknown_names(given, match):
    with pytest.raises(VariableNameError, match=match):
        apply(nn.Linear(1, 1), given, torch.ones(1))


@pytest.mark.parametrize(("cls", "name"), [(partial(nn.BatchNorm1d, 2), "batch_stats"), (Counter, "state")])
def test_apply_refuses_what_is_not_mutable(cls, name):
    with pytest.raises(ModifyCollectionError, match=rf"apply\(\w+\): .*'{name}'.*mutable=\['{name}'\]"):
        apply(cls(), {}, torch.ones(3, 2))


def test_apply_shares_ties():
    module = Every()
    new = torch.zeros(3, 2)
    for name in ("tied", "linear.weight"):
        both = apply(module, {"params": {name: new}}, method=lambda m: (m.tied, m.linear.weight))
        assert both[0] is both[1] is new
