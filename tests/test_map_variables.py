"""map_variables: the body sees functions of the variables, optimizers the variables."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils._pytree import tree_map

import torchlift
from torchlift import apply, map_variables, remat, scan, sow, variable, vmap

pytestmark = pytest.mark.usefixtures("float64")


def each(fn):
    return lambda tree: tree_map(fn, tree)


double = each(lambda x: 2 * x)
halve = each(lambda x: x / 2)
sin = each(torch.sin)


def split(tree):
    """A matrix as a product of two."""
    u, s, v = torch.linalg.svd(tree["params"].pop("weight"), full_matrices=False)
    return {"params": {**tree["params"], "left": u * s[..., None, :], "right": v}}


def join(tree):
    left, right = tree["params"].pop("left"), tree["params"].pop("right")
    return {"params": {**tree["params"], "weight": left @ right}}


class Net(nn.Module):
    """A layer with state: one variable is rebound, one written in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        variable(self, "state", "count", torch.zeros, 1)
        variable(self, "state", "total", torch.zeros, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        self.count = self.count + 1
        self.total.add_(x.detach().mean(0))
        return self.layer(x) + self.shift

    def other(self, x):
        return self.layer(x) * self.shift


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def with_weights(m, fn, x):
    """What the body should compute: the plain module called with mapped parameters."""
    plain = Net()
    plain.load_state_dict(m.state_dict())
    return functional_call(plain, {name: fn(p) for name, p in m.named_parameters()}, (x,))


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


class Decorated(Net):
    @map_variables(mapped_collections="params", trans_in_fn=sin)
    def forward(self, x):
        return super().forward(x)


def as_class():
    return map_variables(Net, "params", sin)(), lambda m, x: m(x)


def as_partial():
    return map_variables(functools.partial(Net), "params", sin)(), lambda m, x: m(x)


def as_function():
    return Net(), map_variables(lambda m, x: m(x), "params", sin)


def as_method():
    m = Net()
    lifted = map_variables(m.forward, "params", sin)
    return m, lambda m, x: lifted(x)


def as_decorator():
    return Decorated(), lambda m, x: m(x)


@pytest.mark.parametrize("form", [as_class, as_partial, as_function, as_method, as_decorator])
def test_equals_the_call_with_mapped_parameters(form):
    m, call = form()
    x = X.clone().requires_grad_()
    expected = with_weights(m, torch.sin, x)
    out = call(m, x)
    assert torch.equal(out, expected)
    inputs = [x, *m.parameters()]
    found, wanted = (torch.autograd.grad(y.sum(), inputs) for y in (out, expected))
    assert_same(found, wanted)
    assert m.count == 1
    assert_same(m.total, X.mean(0))
    assert isinstance(m, Net)


def test_methods():
    m = map_variables(Net, "params", sin, methods={"forward": {}, "other": {"trans_in_fn": double}})()
    expected = with_weights(m, torch.sin, X)
    assert torch.equal(m(X), expected)
    assert torch.equal(m.other(X), nn.functional.linear(X, 2 * m.layer.weight, 2 * m.layer.bias))


def test_an_optimizer_trains_the_stored_variables():
    m = map_variables(nn.Linear, "params", sin)(3, 3)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    before = m.weight.detach().clone()
    m(X).square().sum().backward()
    expected = before - 0.1 * m.weight.grad
    optimizer.step()
    assert_same(m.weight.detach(), expected)
    assert set(m.state_dict()) == {"weight", "bias"}


def test_trans_in_gets_collections_by_dotted_name():
    seen = []
    m = map_variables(Net, torchlift.DenyList("state"), lambda tree: seen.append(tree) or tree)()
    m(X)
    assert {c: set(named) for c, named in seen[0].items()} == {
        "params": {"layer.weight", "layer.bias"}, "buffers": {"shift"}
    }  # fmt: skip


def test_a_tied_tensor_is_mapped_once_under_all_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            assert self.a.weight is self.b.weight
            return self.b(self.a(x))

    m = map_variables(Tied, "params", sin)()
    assert torch.equal(m(X), X @ m.a.weight.sin().T @ m.a.weight.sin().T)
    assert m.a.weight is m.b.weight


def test_plain_lists_of_tensors_follow():
    m = map_variables(nn.LSTM, "params", halve)(3, 4, batch_first=True)
    twin = nn.LSTM(3, 4, batch_first=True)
    twin.load_state_dict({name: p / 2 for name, p in m.state_dict().items()})
    assert_same(m(X[None])[0], twin(X[None])[0])


def test_each_module_among_the_arguments_is_mapped_by_itself():
    m, other = nn.Linear(3, 3), nn.Linear(3, 3)
    run = map_variables(lambda m, other, x: other(m(x)), "params", double)
    linear = lambda m, x: nn.functional.linear(x, 2 * m.weight, 2 * m.bias)
    assert torch.equal(run(m, other, X), linear(other, linear(m, X)))
    net = nn.Sequential(m, other)
    run = map_variables(lambda net, part, x: part(x), "params", double)
    assert torch.equal(run(net, other, X), linear(other, X))


def test_changed_variables_go_back_through_trans_out():
    m = map_variables(Net, "state", double, halve, mutable=True)()
    m.total.fill_(1.0)
    storage, count = m.total.data_ptr(), m.count
    m(X)
    m(X)
    assert m.count == 1 and m.count is not count
    assert_same(m.total, 1 + X.mean(0))
    assert m.total.data_ptr() == storage


def test_what_did_not_change_is_not_touched():
    """A way there and back would leave rounding errors."""
    m = map_variables(Net, "state", each(lambda x: x.exp()), each(lambda x: x.log()), mutable=True, methods=["other"])()
    m.total.copy_(torch.rand(3))
    before = m.total.clone()
    m.other(X)
    assert torch.equal(m.total, before)


def test_parameters_can_be_mutable():
    def body(m, x):
        torchlift.Variable(m, "params", "weight").value = torch.full((3, 3), 3.0)
        return x

    m = nn.Linear(3, 3)
    weight = m.weight
    map_variables(body, "params", double, halve, mutable=True)(m, X)
    assert m.weight is weight and torch.equal(weight, torch.full((3, 3), 1.5))


def test_other_names_and_new_variables():
    pair = lambda tree: {"state": {"both": torch.stack([tree["state"]["a"], tree["state"]["b"]])}}

    def apart(tree):
        new = {"made": tree["state"]["new"]} if "new" in tree["state"] else {}
        return {"state": dict(zip("ab", tree["state"]["both"].unbind())) | new}

    m = nn.Module()
    variable(m, "state", "a", torch.zeros, 2)
    variable(m, "state", "b", torch.ones, 2)

    def body(m, x):
        m.both = m.both + x
        return variable(m, "state", "new", torch.ones, 3).value

    map_variables(body, "state", pair, apart, mutable=True)(m, 5)
    assert torchlift.variables(m)["state"].keys() == {"a", "b", "made"}
    assert m.a.tolist() == [5, 5] and m.b.tolist() == [6, 6] and m.made.tolist() == [1, 1, 1]


def test_batch_statistics():
    m = map_variables(nn.BatchNorm1d, "batch_stats", each(lambda x: x), each(lambda x: x), mutable=True)(3)
    twin = nn.BatchNorm1d(3)
    assert_same(m(X), twin(X))
    assert_same(dict(m.named_buffers()), dict(twin.named_buffers()))


def low_rank(*args, **kwargs):
    return map_variables(nn.Linear, "params", join, split, init=True)(*args, **kwargs)


def test_init_stores_what_trans_out_makes():
    torch.manual_seed(1)
    m = low_rank(3, 4)
    torch.manual_seed(1)
    twin = nn.Linear(3, 4)
    assert {name: tuple(p.shape) for name, p in m.named_parameters()} == {"bias": (4,), "left": (4, 3), "right": (3, 3)}
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in m.parameters())
    assert_same(m(X), twin(X))
    m(X).sum().backward()
    assert m.left.grad is not None and m.right.grad is not None


def test_lifted_instances_copy_pickle_and_convert():
    m = low_rank(3, 4)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert type(other) is type(m) and torch.equal(other(X), m(X))
    again = low_rank(3, 4)
    again.load_state_dict(m.state_dict())
    assert torch.equal(again(X), m(X))
    assert m.to(torch.float32)(X.float()).dtype == torch.float32
    assert type(low_rank(3, 4)) is type(m) and type(m).__name__ == "MapVariablesLinear"


def test_init_keeps_what_is_frozen_frozen():
    class Frozen(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.requires_grad_(False)

    assert not any(p.requires_grad for p in map_variables(Frozen, "params", join, split, init=True)().parameters())


def test_reset_parameters_draws_as_the_class_does():
    m, twin = low_rank(3, 4), nn.Linear(3, 4)
    left = m.left
    for module in (m, twin):
        torch.manual_seed(2)
        module.reset_parameters()
    assert m.left is left
    assert_same(m(X), twin(X))


@pytest.mark.parametrize("order", ["map of vmap", "vmap of map"])
def test_init_of_a_stack(order):
    stacked = functools.partial(
        vmap, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2, in_axes=None
    )
    mapped = functools.partial(
        map_variables, mapped_collections="params", trans_in_fn=join, trans_out_fn=split, init=True
    )
    torch.manual_seed(0)
    m = (mapped(stacked(nn.Linear)) if order == "map of vmap" else stacked(mapped(nn.Linear)))(3, 4)
    torch.manual_seed(0)
    twins = [nn.Linear(3, 4) for _ in range(2)]
    assert m.left.shape == (2, 4, 3) and "weight" not in m.state_dict()
    assert_same(m(X), torch.stack([twin(X) for twin in twins]))
    modules = m.to_modules()
    assert_same(torch.stack([module(X) for module in modules]), m(X))
    again = type(m).from_modules(modules if order == "vmap of map" else twins)
    assert_same(again(X), m(X))


class Step(nn.Linear):
    def forward(self, carry):
        y = super().forward(carry)
        return y.tanh(), y


LAYERS = {"variable_axes": {"params": 0}, "length": 2, "compile": False}
NESTED = {
    "map of scan": lambda: map_variables(scan(Step, **LAYERS), "params", sin)(3, 3),
    "scan of map": lambda: scan(map_variables(Step, "params", sin), **LAYERS)(3, 3),
    "map of remat": lambda: map_variables(remat(scan(Step, **LAYERS)), "params", sin)(3, 3),
    "remat of map": lambda: remat(map_variables(scan(Step, **LAYERS), "params", sin))(3, 3),
    "map of map": lambda: map_variables(
        map_variables(scan(Step, **LAYERS), "params", lambda t: sin(halve(t))), "params", double
    )(3, 3),
    "map of vmap": lambda: map_variables(scan(vmap(Step, in_axes=0), **LAYERS), "params", sin)(3, 3),
    "vmap of map": lambda: scan(vmap(map_variables(Step, "params", sin)), **LAYERS)(3, 3),
    "scan of map, compiled": lambda: scan(
        map_variables(Step, "params", sin), **LAYERS | {"compile": {"backend": "aot_eager"}}
    )(3, 3),
}


@pytest.mark.parametrize("order", NESTED)
def test_nests(order):
    m = NESTED[order]()
    x = X.clone().requires_grad_()
    out, _ = m(x)
    expected = x
    for weight, bias in zip(m.weight, m.bias):
        expected = nn.functional.linear(expected, weight.sin(), bias.sin()).tanh()
    assert_same(out, expected)
    inputs = [x, m.weight, m.bias]
    assert_same(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_state_passes_through_the_nest():
    m = vmap(map_variables(Net, "state", double, halve, mutable=True), variable_axes={True: 0}, axis_size=2)()
    m(torch.stack([X, 2 * X]))
    assert m.count.tolist() == [[0.5], [0.5]]
    assert_same(m.total, torch.stack([X.mean(0), 2 * X.mean(0)]) / 2)


TRANSFORMS = {
    "grad": lambda f, w: grad(lambda w: f(w).square().sum())(w),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f, w: hessian(lambda w: f(w).square().sum())(w),
    "vmap": lambda f, w: torch.func.vmap(f)(torch.stack([w, 2 * w])),
    "vmap of grad": lambda f, w: torch.func.vmap(grad(lambda w: f(w).square().sum()))(torch.stack([w, 2 * w])),
    "jvp": lambda f, w: jvp(f, (w,), (w.cos(),)),
    "vjp": lambda f, w: vjp(f, w)[1](torch.ones(4, 3)),
}


@pytest.mark.parametrize("way", TRANSFORMS)
def test_under_torch_func(way):
    m = map_variables(nn.Linear, "params", sin)(3, 3, bias=False)
    transform = TRANSFORMS[way]
    if way in ("jacrev", "jacfwd"):
        transform = lambda f, w: TRANSFORMS[way](f)(w)
    f = lambda w: apply(m, {"params": {"weight": w}}, X)
    assert_same(transform(f, m.weight.detach()), transform(lambda w: X @ w.sin().T, m.weight.detach()))


@pytest.mark.parametrize("make", [low_rank, lambda *a: map_variables(nn.Linear, "params", sin)(*a)])
def test_compiled(make):
    m = make(3, 3)
    out = torch.compile(m, fullgraph=True, backend="aot_eager")(X)
    assert_same(out, m(X))
    assert_same(torch.autograd.grad(out.sum(), m.parameters()), torch.autograd.grad(m(X).sum(), m.parameters()))


def test_compiled_state():
    m, twin = (map_variables(Net, "state", double, halve, mutable=True)() for _ in range(2))
    twin.load_state_dict(m.state_dict())
    assert_same(torch.compile(m, fullgraph=True, backend="aot_eager")(X), twin(X))
    assert_same(m.state_dict(), twin.state_dict())


def test_sown_values_and_draws_pass():
    def body(m, x):
        sow(m, "intermediates", "w", m.weight)
        return x + torch.rand(())

    m = nn.Linear(3, 3)
    torch.manual_seed(0)
    with torchlift.capture("intermediates") as store:
        out = map_variables(body, "params", double)(m, X)
    torch.manual_seed(0)
    assert torch.equal(out, X + torch.rand(()))
    assert torch.equal(store["intermediates"]["w"][0], 2 * m.weight)


def test_an_exception_leaves_the_module_as_it_was():
    def fail(m, x):
        m.total.add_(1)
        m.layer.weight.mul_(0)
        raise KeyError("midway")

    m = Net()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(KeyError, match="midway"):
        map_variables(fail, True, double, halve, mutable=True)(m, X)
    assert_same(m.state_dict(), before)


def test_changes_that_are_not_allowed():
    m = Net()
    with pytest.raises(torchlift.ModifyCollectionError, match="'count' of collection 'state'.*pass mutable=True"):
        map_variables(Net.forward, "state", double)(m, X)
    with pytest.raises(torchlift.ModifyCollectionError, match="add 'state' to variables="):
        map_variables(Net.forward, "params", double, variables="buffers")(m, X)
    with pytest.raises(torchlift.RandomnessError, match="add 'dropout' to rngs="):
        map_variables(lambda m: torch.rand(()), "params", double, rngs=False)(m)
    assert m.count == 0 and m.total.count_nonzero() == 0


WRONG = {
    "no tree": (lambda tree: 3, "trans_in_fn returned 'int', expected {collection: {name: tensor}}"),
    "flat": (lambda tree: tree["params"], "trans_in_fn returned .*'Parameter'"),
    "place": (
        lambda tree: {"params": {"no.w": torch.ones(1)}},
        r"returned 'no.w' in 'params', expected .* \['layer'\]",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_functions_that_return_something_else(kind):
    fn, match = WRONG[kind]
    with pytest.raises(torchlift.VariableNameError, match=match):
        map_variables(Net, "params", fn)()(X)


def test_misuse():
    with pytest.raises(torchlift.UnsupportedError, match="init=True with a function"):
        map_variables(lambda m, x: m(x), "params", join, split, init=True)(nn.Linear(3, 3), X)
    lazy = map_variables(vmap(nn.Linear, variable_axes={"params": 0}), "params", join, split, init=True)
    with pytest.raises(torchlift.UnsupportedError, match="give its vmap or scan a size"):
        lazy(3, 3)
    with pytest.raises(torchlift.FilterError, match="mapped_collections"):
        map_variables(nn.Linear, 3)
    with pytest.raises(torchlift.TransformTargetError, match="got an instance of Linear"):
        map_variables(nn.Linear(3, 3))
    with pytest.raises(torchlift.TransformedMethodReturnValueError, match="returned a Linear"):
        map_variables(lambda m: m, "params")(nn.Linear(3, 3))
