"""State, arguments and named axes of vjp, jvp, grad and value_and_grad."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import torchlift
from torchlift import grad, jvp, remat, sow, value_and_grad, variable, vjp, vmap
from torchlift._context import entered
from torchlift.axes import NamedAxis
from torchlift.errors import (
    AxisNameError,
    DifferentiationError,
    UnsupportedError,
)

F = torch.func
FLAGS = dict(fullgraph=True, backend="aot_eager")
pytestmark = pytest.mark.usefixtures("float64")


def call(m, *args):
    return m(*args)


def total(m, x):
    return m(x).pow(2).sum()


def mlp():
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def data(*shape):
    return torch.linspace(-1, 1, torch.Size(shape or (5, 3)).numel()).reshape(shape or (5, 3)).sin()


def same(found, expected, tolerance=1e-12):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        if a is None or b is None:  # no gradient, as autograd says, or zeros
            assert not any(t.any() for t in (a, b) if t is not None)
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def lifted_vjp(m, x):
    out, vjp_fn = vjp(call, m, x)
    variables, x_grad = vjp_fn(out.cos())
    return out, x_grad, variables["params"]["0.weight"]


def plain_vjp(m, x):
    params = dict(m.named_parameters())
    out, pull = F.vjp(lambda p, x: F.functional_call(m, p, (x,)), params, x)
    variables, x_grad = pull(out.cos())
    return out, x_grad, variables["0.weight"]


def plain_grad(m, x):
    return (F.grad(lambda x: total(m, x))(x),)


# State ---------------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        variable(self, "state", "count", torch.zeros, ())

    def forward(self, x):
        self.count = self.count + 1
        sow(self, "intermediates", "x", x)
        return self.norm(x).tanh()


DERIVATIVES = {
    "vjp": lambda m, x: vjp(call, m, x)[1](x),
    "grad": lambda m, x: grad(total, m, x),
    "value_and_grad": lambda m, x: value_and_grad(total, m, x),
    "jvp": lambda m, x: jvp(call, m, (x,), (x,), {}),
    "jvp without tangents": lambda m, x: jvp(call, m, (x,), (None,), {}),
}


# Not the forward mode of batch_norm under Dynamo: torch fails an assertion of its own, and later compilations with it.
WAYS = [(name, compiled) for name in DERIVATIVES for compiled in (False, True) if not (compiled and name == "jvp")]


@pytest.mark.parametrize(("name", "compiled"), WAYS)
def test_state_is_published_once(name, compiled):
    m, twin, x = Counter(), Counter(), data()
    running_mean = m.norm.running_mean
    if compiled:
        torch.compile(DERIVATIVES[name], **FLAGS)(m, x)
    else:
        with torchlift.capture("intermediates") as sown:
            DERIVATIVES[name](m, x)
        same(sown, {"intermediates": {"x": (x,)}})
    twin(x)
    same(m.state_dict(), twin.state_dict())
    assert m.norm.num_batches_tracked == 1 and m.norm.running_mean is running_mean
    assert not any(tensor.requires_grad for tensor in m.buffers())


@pytest.mark.parametrize("name", DERIVATIVES)
def test_an_exception_leaves_the_module_as_it_was(name):
    m, x = Counter(), data()
    before = tree_map(torch.clone, m.state_dict())
    m.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DERIVATIVES[name](m, x)
    same(m.state_dict(), before)


def test_vjp_fn_is_called_several_times_and_later():
    m, x = Counter(), data()
    out, vjp_fn = vjp(call, m, x)
    first = vjp_fn(out)
    m(x), m(3 * x)
    same(vjp_fn(out), first)
    same(vjp_fn(2 * out), tree_map(lambda t: 2 * t, first))
    assert m.count == 3


def test_in_threads():
    m, x = mlp(), data()
    expected, found = plain_vjp(m, x), []
    threads = [threading.Thread(target=lambda: found.extend(lifted_vjp(m, x) for _ in range(20))) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 40
    for result in found:
        same(result, expected)


def test_draws_are_made_once():
    m, x = nn.Dropout(0.5), data(50, 3)
    torch.manual_seed(1)
    out, vjp_fn = vjp(call, m, x)
    after = torch.get_rng_state()
    _, x_grad = vjp_fn(torch.ones_like(out))
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(x_grad != 0, out != 0)
    torch.manual_seed(1)
    assert torch.equal(m(x), out) and torch.equal(torch.get_rng_state(), after)


# Arguments -----------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        variable(self, "const", "shift", torch.ones, 3)
        variable(self, "const", "step", lambda: torch.tensor(2))

    def forward(self, x):
        return self.w * (x + self.shift) * self.step / self.step


def test_variable_cotangents_are_those_of_the_collections_asked_for():
    m, x = Shift(), data()
    out, vjp_fn = vjp(call, m, x, vjp_variables=["params", "const"])
    variables, _ = vjp_fn(out)
    assert {c: set(names) for c, names in variables.items()} == {"params": {"w"}, "const": {"shift", "step"}}
    assert variables["const"]["step"] is None
    same(variables["const"]["shift"], (out * m.w).sum(0))
    assert vjp(call, m, x, vjp_variables=False)[1](out)[0] == {}


def test_a_tied_parameter_has_one_cotangent():
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    m[1].weight = m[0].weight
    x = data()
    out, vjp_fn = vjp(call, m, x)
    variables, _ = vjp_fn(out.detach())
    assert set(variables["params"]) == {"0.weight", "0.bias", "1.bias"}
    same(variables["params"]["0.weight"], torch.autograd.grad(m(x), m[0].weight, out.detach())[0])


def test_trees_numbers_and_integers_pass():
    def fn(m, batch, power):
        return {"y": m(batch["x"]) ** power, "n": batch["n"] + 1, "name": "y"}

    m, batch = mlp(), {"x": data(), "n": torch.tensor(1)}
    out, vjp_fn = vjp(fn, m, batch, 2)
    assert out["n"] == 2 and out["name"] == "y"
    _, batch_grad, power_grad = vjp_fn({"y": out["y"], "n": None, "name": None})
    assert batch_grad["n"] is None and power_grad is None
    same(batch_grad["x"], F.vjp(lambda x: m(x) ** 2, batch["x"])[1](out["y"])[0])
    _, tangent = jvp(fn, m, (batch, 2), ({"x": batch["x"], "n": None}, None), {})
    assert tangent["n"] is None and tangent["name"] is None
    same(tangent["y"], F.jvp(lambda x: m(x) ** 2, (batch["x"],), (batch["x"],))[1])


def test_a_cotangent_may_be_none_or_a_number():
    m, x = mlp(), data()
    out, vjp_fn = vjp(lambda m, x: (m(x), total(m, x)), m, x)
    same(vjp_fn((None, 2.0))[1], 2 * plain_grad(m, x)[0])
    same(vjp_fn((None, None))[1], torch.zeros_like(x))


def test_aux_is_not_differentiated():
    m, x = mlp(), data().requires_grad_()
    out, vjp_fn, aux = vjp(lambda m, x: (m(x), {"x": 3 * x, "k": 1}), m, x, has_aux=True)
    assert aux["k"] == 1 and aux["x"].requires_grad
    same(vjp_fn(out)[1], F.vjp(m, x)[1](out)[0])
    grads, aux = grad(lambda m, x: (total(m, x), {"k": 1}), m, x, has_aux=True)
    assert isinstance(grads, tuple) and aux == {"k": 1}


def test_grad_is_a_tuple():
    m, x = mlp(), data()
    assert [type(grad(total, m, x)), type(value_and_grad(total, m, x)[1])] == [tuple, tuple]
    x_grad, y_grad = grad(lambda m, x, y: (m(x) * y).sum(), m, x, x)
    same(y_grad, m(x))


def test_a_closure_keeps_its_gradient():
    m, x, w = mlp(), data(), torch.tensor(2.0, requires_grad=True)
    (x_grad,) = grad(lambda m, x: w * total(m, x), m, x)
    same(torch.autograd.grad(x_grad.sum(), w), (plain_grad(m, x)[0].sum(),))


def test_without_grad_mode():
    m, x = mlp(), data()
    with torch.no_grad():
        found = lifted_vjp(m, x)
    same(found, plain_vjp(m, x))
    assert not any(tensor.requires_grad for tensor in found)


def test_bound_methods_and_lifted_methods():
    class Block(nn.Linear):
        def twice(self, x):
            return 2 * self(x)

    for m in (Block(3, 3), remat(Block, methods=["twice"])(3, 3)):
        x = data()
        same(vjp(m.twice, m, x)[1](x), vjp(lambda m, x: 2 * m(x), m, x)[1](x))
        same(vjp(Block.twice, m, x)[1](x), vjp(lambda m, x: 2 * m(x), m, x)[1](x))


def test_several_modules():
    a, b, x = nn.Linear(3, 3), nn.Linear(3, 3), data()
    fn = lambda a, b, x: b(a(x))
    out, vjp_fn = vjp(fn, a, b, x, multi_scope=True)
    (a_grads, b_grads), nothing, x_grad = vjp_fn(out)
    expected = torch.autograd.grad(out, [a.weight, b.weight], out.detach())
    same([a_grads["params"]["weight"], b_grads["params"]["weight"]], expected)
    assert nothing is None and x_grad.shape == x.shape
    with pytest.raises(
        DifferentiationError, match=r"second module, Linear, whose 'weight' of collection 'params'.*multi_scope"
    ):
        vjp(fn, a, b, x)
    relu = vjp(lambda a, b, x: b(a(x)), a, nn.ReLU(), x)[1](out)[0]
    assert set(relu["params"]) == {"weight", "bias"}
    same(grad(lambda a, b, x: b(a(x)).sum(), a, b, x)[1], torch.autograd.grad(b(a(x.requires_grad_())).sum(), x)[0])


def test_a_variable_as_argument():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return vjp(lambda m, s, x: s.value * x, self, torchlift.Variable(self, "params", "scale"), x)[1](x)

    m, x = Scale(), data()
    variables, nothing, x_grad = m(x)
    same(variables["params"]["scale"], (x * x).sum())
    assert nothing is None
    same(x_grad, 3 * x)


def test_jvp_in_directions_of_variables():
    m, x = Shift(), data()
    w, shift = torch.ones(3), torch.tensor([1.0, 0.0, 2.0])
    found = jvp(call, m, [x], [None], {"params": {"w": w}, "const": {"shift": shift, "step": None}})
    fn = lambda w, shift: F.functional_call(m, {"w": w, "shift": shift}, (x,))
    same(found, F.jvp(fn, (m.w, m.shift), (w, shift)))
    same(jvp(call, m, (x,), (None,), {})[1], torch.zeros_like(x))


# Named axes ----------------------------------------------------------------------------------------------------------


def per_example(reduce_axes):
    def body(m, x):
        out, vjp_fn = vjp(call, m, x, reduce_axes=reduce_axes)
        variables, x_grad = vjp_fn(out.cos())
        return variables["params"]["0.weight"], x_grad

    return body


@pytest.mark.parametrize("compiled", [False, True])
def test_reduce_axes_sums_what_is_shared(compiled):
    m, x = mlp(), data(4, 5, 3)
    wrap = functools.partial(torch.compile, **FLAGS) if compiled else lambda fn: fn
    each, x_grads = wrap(lambda x: vmap(per_example(()), axis_name="batch")(m, x))(x)
    summed, same_grads = wrap(lambda x: vmap(per_example("batch"), axis_name="batch")(m, x))(x)
    same(summed, each.sum(0).expand(4, 3, 3))
    same(same_grads, x_grads)


def test_reduce_axes_over_several_and_under_transforms():
    m, x = mlp(), data(4, 5, 3)
    nested = lambda names: vmap(vmap(per_example(names), axis_name="b"), axis_name="a")
    each = nested(())(m, x)[0]
    same(nested(("a", "b"))(m, x)[0], each.sum((0, 1)).expand(4, 5, 3, 3))
    same(nested("a")(m, x)[0], each.sum(0).expand(4, 5, 3, 3))
    same(F.vmap(lambda x: nested("a")(m, x)[0])(x[None])[0], nested("a")(m, x)[0])
    weight_grad = lambda names: lambda x: vmap(per_example(names), axis_name="a")(m, x)[0]
    weights = data(4, 3, 3)
    expected = F.grad(lambda x: (weight_grad(())(x).sum(0) * weights).sum())(x)
    same(F.grad(lambda x: (weight_grad("a")(x) * weights).sum())(x), expected)
    tangent = F.jvp(weight_grad(()), (x,), (x,))[1].sum(0)
    same(F.jvp(weight_grad("a"), (x,), (x,))[1], tangent.expand(4, 3, 3))


def test_reduce_axes_of_grad_and_inside_of_it():
    m, x, shared = mlp(), data(4, 3), data(3)

    def body(m, x, shared):
        return grad(lambda m, x, s: (m(x) * s).sum(), m, x, shared, reduce_axes=("batch",))

    x_grad, shared_grad = vmap(body, in_axes=(0, None), axis_name="batch")(m, x, shared)
    same(shared_grad, m(x).sum(0).expand(4, 3))
    inner = vmap(lambda m, x: grad(lambda m, x: per_example("batch")(m, x)[0].pow(2).sum(), m, x), axis_name="batch")
    assert inner(m, x)[0].shape == x.shape


def test_reduce_axes_where_nothing_is_mapped():
    m, x = mlp(), data()
    body = lambda m, x: vjp(call, m, data(), reduce_axes="batch")[1](data())[0]["params"]["0.weight"]
    found = vmap(body, axis_name="batch")(m, x)
    same(found[0], 5 * vjp(call, m, data())[1](data())[0]["params"]["0.weight"])


def test_reduce_axes_are_known_axes():
    m, x = mlp(), data()
    with pytest.raises(
        AxisNameError, match=r"vjp\(call\): reduce_axes: got the axis name 'other', expected one of \['batch'\]"
    ):
        vmap(per_example("other"), axis_name="batch")(m, x)


def test_reduce_axes_needs_its_map():
    m, x = mlp(), data()
    with entered(axes=(NamedAxis("batch", 5, torch.tensor(0)),)):  # what an operator that outlives its map would see
        with pytest.raises(UnsupportedError, match="vjp function was called outside of the vmap of that axis"):
            per_example("batch")(m, x)
