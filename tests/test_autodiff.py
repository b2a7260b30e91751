"""vjp, jvp, grad and value_and_grad equal the plain definition, alone, in each other and under torch's transforms."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import torchlift
from torchlift import grad, jvp, remat, scan, sow, value_and_grad, variable, vjp, vmap
from torchlift._context import entered
from torchlift.axes import NamedAxis
from torchlift.errors import (
    AxisNameError,
    DifferentiationError,
    FilterError,
    FunctionTargetError,
    ModifyCollectionError,
    RandomnessError,
    UnsupportedError,
    VariableNameError,
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


def gradients(out, module, *inputs):
    loss = sum((leaf * leaf.detach().cos()).sum() for leaf in tree_leaves(out))
    return torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True)


# The definitions -----------------------------------------------------------------------------------------------------


def lifted_vjp(m, x):
    out, vjp_fn = vjp(call, m, x)
    variables, x_grad = vjp_fn(out.cos())
    return out, x_grad, variables["params"]["0.weight"]


def plain_vjp(m, x):
    params = dict(m.named_parameters())
    out, pull = F.vjp(lambda p, x: F.functional_call(m, p, (x,)), params, x)
    variables, x_grad = pull(out.cos())
    return out, x_grad, variables["0.weight"]


def lifted_grad(m, x):
    return grad(total, m, x)


def plain_grad(m, x):
    return (F.grad(lambda x: total(m, x))(x),)


def lifted_value_and_grad(m, x):
    (out, aux), (x_grad,) = value_and_grad(lambda m, x: (total(m, x), x * 2), m, x, has_aux=True)
    return out, aux, x_grad


def plain_value_and_grad(m, x):
    return total(m, x), x * 2, plain_grad(m, x)[0]


def lifted_jvp(m, x):
    return jvp(call, m, (x,), (x.cos(),), {"params": {"0.weight": m[0].weight.sin()}})


def plain_jvp(m, x):
    def fn(w, x):
        return F.functional_call(m, {"0.weight": w}, (x,))

    return F.jvp(fn, (m[0].weight, x), (m[0].weight.sin(), x.cos()))


def lifted_hvp(m, x):
    return jvp(lambda m, x: grad(total, m, x)[0], m, (x,), (x.cos(),), {})


def plain_hvp(m, x):
    return F.jvp(F.grad(lambda x: total(m, x)), (x,), (x.cos(),))


PAIRS = {
    "vjp": (lifted_vjp, plain_vjp),
    "grad": (lifted_grad, plain_grad),
    "value_and_grad": (lifted_value_and_grad, plain_value_and_grad),
    "jvp": (lifted_jvp, plain_jvp),
    "hvp": (lifted_hvp, plain_hvp),
}


def scalar(fn, m):
    return lambda x: sum(leaf.pow(2).sum() for leaf in tree_leaves(fn(m, x)))


AROUND = {
    "nothing": lambda fn, m: functools.partial(fn, m),
    "vmap": lambda fn, m: F.vmap(functools.partial(fn, m)),
    "grad": lambda fn, m: F.grad(scalar(fn, m)),
    "vjp": lambda fn, m: lambda x: F.vjp(scalar(fn, m), x)[1](torch.tensor(2.0)),
    "jvp": lambda fn, m: lambda x: F.jvp(scalar(fn, m), (x,), (x.exp(),)),
    "jacrev": lambda fn, m: F.jacrev(functools.partial(fn, m)),
    "jacfwd": lambda fn, m: F.jacfwd(functools.partial(fn, m)),
    "hessian": lambda fn, m: F.hessian(scalar(fn, m)),
    "vmap of grad": lambda fn, m: F.vmap(F.grad(scalar(fn, m))),
    "grad of vmap": lambda fn, m: F.grad(lambda x: sum(t.sum() for t in F.vmap(functools.partial(fn, m))(x))),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_plain_definition_under_torchs_transforms(name, around):
    m, x = mlp(), data()
    lifted, plain = (AROUND[around](fn, m)(x) for fn in PAIRS[name])
    same(lifted, plain)


@pytest.mark.parametrize("around", ["nothing", "vmap", "grad"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_plain_definition_compiled(name, around):
    m, x = mlp(), data().requires_grad_(around == "nothing")
    lifted, plain = (AROUND[around](fn, m) for fn in PAIRS[name])
    found, expected = torch.compile(lifted, **FLAGS)(x), plain(x)
    same(found, expected)
    if around == "nothing":
        same(gradients(found, m, x), gradients(expected, m, x))


@pytest.mark.parametrize("name", PAIRS)
def test_results_are_part_of_the_graph_outside(name):
    m, x = mlp(), data().requires_grad_()
    first, second = [], []
    for fn in PAIRS[name]:
        loss = scalar(fn, m)(x)
        grads = torch.autograd.grad(loss, [x, m[0].weight, m[2].weight], create_graph=True)
        first.append(grads)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), [x, m[0].weight]))
    same(*first)
    same(*second)


# Transforms in each other --------------------------------------------------------------------------------------------


def looped(m, x):
    return m(m(m(x)))


def in_scan(fn, compile):
    """``fn`` three times over its own output, in a scan."""
    return scan(lambda m, h, _: (fn(m, h), None), variable_broadcast="params", length=3, compile=compile)


INSIDE = {
    "vmap": (lambda m, x: vmap(call)(m, x), call),
    "scan": (lambda m, x: in_scan(call, False)(m, x, None)[0], looped),
    "compiled scan": (lambda m, x: in_scan(call, {"backend": "aot_eager"})(m, x, None)[0], looped),
    "remat": (lambda m, x: remat(call)(m, x), call),
    "grad": (lambda m, x: grad(total, m, x)[0], lambda m, x: F.grad(lambda x: total(m, x))(x)),
    "vjp": (lambda m, x: vjp(call, m, x)[1](x)[1], lambda m, x: F.vjp(m, x)[1](x)[0]),
    "jvp": (lambda m, x: jvp(call, m, (x,), (x,), {})[1], lambda m, x: F.jvp(m, (x,), (x,))[1]),
}
OUTSIDE = {
    "vjp": (lambda fn: lambda m, x: vjp(fn, m, x)[1](x)[1], lambda fn: lambda m, x: F.vjp(lambda x: fn(m, x), x)[1](x)[0]),
    "grad": (
        lambda fn: lambda m, x: grad(lambda m, x: fn(m, x).pow(2).sum(), m, x)[0],
        lambda fn: lambda m, x: F.grad(lambda x: fn(m, x).pow(2).sum())(x),
    ),
    "jvp": (
        lambda fn: lambda m, x: jvp(fn, m, (x,), (x,), {})[1],
        lambda fn: lambda m, x: F.jvp(lambda x: fn(m, x), (x,), (x,))[1],
    ),
}


@pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning")
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_transforms_inside_of_derivatives(outside, inside):
    m, x = mlp(), data().requires_grad_()
    lifted = OUTSIDE[outside][0](INSIDE[inside][0])(m, x)
    plain = OUTSIDE[outside][1](INSIDE[inside][1])(m, x)
    same(lifted, plain)
    same(gradients(lifted, m, x), gradients(plain, m, x))


@pytest.mark.parametrize("derivative", OUTSIDE)
@pytest.mark.parametrize("around", ["vmap", "scan", "compiled scan", "remat"])
@pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning")
def test_derivatives_inside_of_transforms(around, derivative):
    m, x = mlp(), data().requires_grad_()
    fn, plain = (wrap(call) for wrap in OUTSIDE[derivative])
    transformed = {
        "vmap": vmap(fn),
        "remat": remat(fn),
        "scan": lambda m, x: in_scan(fn, False)(m, x, None)[0],
        "compiled scan": lambda m, x: in_scan(fn, {"backend": "aot_eager"})(m, x, None)[0],
    }[around]
    found = transformed(m, x)
    expected = plain(m, plain(m, plain(m, x))) if "scan" in around else plain(m, x)
    same(found, expected)
    same(gradients(found, m, x), gradients(expected, m, x))


@pytest.mark.parametrize("derivative", ["vjp", "grad"])
def test_remat_over_a_derivative_is_refused_compiled(derivative):
    m, x = mlp(), data().requires_grad_()
    fn = remat(OUTSIDE[derivative][0](call))
    with pytest.raises(Exception, match="torch.compile of remat over a reverse-mode derivative.*put remat inside"):
        torch.compile(lambda x: fn(m, x), **FLAGS)(x)


COMPILED = ["vmap", "scan", "remat", "grad", "vjp", "jvp"]


@pytest.mark.parametrize("inside", COMPILED)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_transforms_inside_of_derivatives_compiled(outside, inside):
    m, x = mlp(), data().requires_grad_()
    lifted, plain = OUTSIDE[outside][0](INSIDE[inside][0]), OUTSIDE[outside][1](INSIDE[inside][1])
    found, expected = torch.compile(lambda x: lifted(m, x), **FLAGS)(x), plain(m, x)
    same(found, expected)
    same(gradients(found, m, x), gradients(expected, m, x))


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


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("compiled", [False, True])
def test_state_is_published_once(name, compiled):
    m, twin, x = Counter(), Counter(), data()
    running_mean = m.norm.running_mean
    if compiled and name == "jvp":
        pytest.skip("torch: forward mode of batch_norm fails under Dynamo")
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
    with pytest.raises(DifferentiationError, match=r"second module, Linear, whose 'weight' of collection 'params'.*multi_scope"):
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
    with pytest.raises(AxisNameError, match=r"vjp\(call\): reduce_axes: got the axis name 'other', expected one of \['batch'\]"):
        vmap(per_example("other"), axis_name="batch")(m, x)


def test_reduce_axes_needs_its_map():
    m, x = mlp(), data()
    with entered(axes=(NamedAxis("batch", 5, torch.tensor(0)),)):  # what an operator that outlives its map would see
        with pytest.raises(UnsupportedError, match="vjp function was called outside of the vmap of that axis"):
            per_example("batch")(m, x)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vjp", "grad", "value_and_grad"])
def test_a_class_or_a_module_is_no_function(name):
    transform, m, x = getattr(torchlift, name), mlp(), data()
    for fn, got in (
        (nn.Linear, "a class"),
        (functools.partial(nn.Linear, 3), "a class"),
        (m, "an instance of Sequential"),
        (3, "3"),
    ):
        with pytest.raises(FunctionTargetError, match=rf"{name}\(.*\): got {got}, expected a function whose first"):
            transform(fn, m, x)
    with pytest.raises(ValueError, match="got a class"):
        transform(nn.Linear, m, x)
    with pytest.raises(FunctionTargetError, match=rf"{name}\(call\): after fn got Tensor, expected the module"):
        transform(call, x)
    with pytest.raises(FunctionTargetError, match="bound to another Sequential.*write .*Sequential.forward, module"):
        transform(mlp().forward, m, x)


def test_jvp_of_a_class():
    with pytest.raises(FunctionTargetError, match=r"jvp\(Linear\): got a class"):
        jvp(nn.Linear, mlp(), (data(),), (data(),), {})


@pytest.mark.parametrize("transform", [grad, value_and_grad])
@pytest.mark.parametrize(
    "fn, got", [(call, r"float64\[5, 3\]"), (lambda m, x: (m(x).sum(), x), "tuple"), (lambda m, x: m(x).sum()[None], r"float64\[1\]")]
)
def test_only_scalars_have_a_gradient(transform, fn, got):
    m = Counter()
    with pytest.raises(DifferentiationError, match=rf"grad\(.*\): returned {got}, expected a scalar"):
        transform(fn, m, data())
    with pytest.raises(ValueError):
        transform(fn, m, data())
    assert m.count == 0


def test_integers_have_no_derivative():
    for run in (DERIVATIVES["vjp"], DERIVATIVES["jvp without tangents"]):
        with pytest.raises(DifferentiationError, match=r"returned \['int64\[5, 3\]'\], expected a floating-point tensor"):
            run(nn.Identity(), torch.ones(5, 3, dtype=torch.int64))


def test_cotangents_are_like_the_output():
    m, x = mlp(), data()
    out, vjp_fn = vjp(lambda m, x: {"y": m(x)}, m, x)
    with pytest.raises(DifferentiationError, match=r"the cotangent\['y'\] is float64\[3\], expected float64\[5, 3\]"):
        vjp_fn({"y": x[0]})
    with pytest.raises(DifferentiationError, match=r"is float32\[5, 3\], expected float64\[5, 3\]"):
        vjp_fn({"y": x.float()})
    with pytest.raises(DifferentiationError, match=r"the cotangent has leaves \[''\], expected those of the output, \[\"\['y'\]\"\]"):
        vjp_fn(x)


def test_has_aux_wants_a_pair():
    for run in (vjp, grad, value_and_grad):
        with pytest.raises(DifferentiationError, match=r"returned float64\[\], expected a pair \(out, aux\)"):
            run(total, mlp(), data(), has_aux=True)


def test_tangents_are_like_what_they_belong_to():
    m, x = mlp(), data()
    with pytest.raises(DifferentiationError, match=r"jvp\(call\): tangents\[0\] is float64\[3\], expected float64\[5, 3\]"):
        jvp(call, m, (x,), (x[0],), {})
    with pytest.raises(DifferentiationError, match=r"tangents has leaves \['\[0\]', '\[1\]'\], expected those of primals, \['\[0\]'\]"):
        jvp(call, m, (x,), (x, x), {})
    with pytest.raises(DifferentiationError, match=r"primals is float64\[5, 3\], expected a tuple"):
        jvp(call, m, x, (x,), {})
    with pytest.raises(DifferentiationError, match=r"tangents is float64\[5, 3\], expected a tuple"):
        jvp(call, m, (x,), x, {})
    with pytest.raises(DifferentiationError, match=r"tangents\[1\] is float64\[5, 3\], expected None, as for any int"):
        jvp(lambda m, x, k: m(x), m, (x, 1), (x, x), {})
    with pytest.raises(DifferentiationError, match=r"the tangent of '0.bias' in 'params' is float64\[5, 3\], expected float64\[3\]"):
        jvp(call, m, (x,), (x,), {"params": {"0.bias": x}})
    with pytest.raises(VariableNameError, match=r"variable_tangents has 'w' of collection 'params', expected one of \['0.bias'"):
        jvp(call, m, (x,), (x,), {"params": {"w": x}})
    with pytest.raises(VariableNameError, match=r"'w' of collection 'other', expected one of \['params'\]"):
        jvp(call, m, (x,), (x,), {"other": {"w": x}})


def test_what_the_function_may_change_and_draw():
    x = data()
    with pytest.raises(ModifyCollectionError, match=r"vjp\(call\): changed 'count' of collection 'state'.*add 'state' to variables="):
        vjp(call, Counter(), x, variables=["params", "batch_stats"])
    with pytest.raises(RandomnessError, match=r"grad\(total\): drew from the random stream 'dropout'; add 'dropout' to rngs="):
        grad(total, nn.Dropout(), x, rngs=False)
    with torchlift.seed_rngs(noise=0), pytest.raises(RandomnessError, match="add 'noise' to rngs="):
        jvp(lambda m, x: x + torch.rand(3, generator=torchlift.make_rng("noise")), mlp(), (x,), (x,), {}, rngs="dropout")
    for arguments in ({"variables": 3}, {"rngs": 3}, {"vjp_variables": 3}):
        with pytest.raises(FilterError, match=rf"vjp\(call\): {next(iter(arguments))}: got 3"):
            vjp(call, mlp(), x, **arguments)


def test_seeded_streams_run_on():
    x = data(3)
    noise = lambda m, x: x * torch.rand(3, generator=torchlift.make_rng("noise"))
    with torchlift.seed_rngs(noise=0):
        expected = [noise(None, x), noise(None, x)]
    with torchlift.seed_rngs(noise=0):
        found = [vjp(noise, mlp(), x)[0], noise(None, x)]
    same(found, expected)
