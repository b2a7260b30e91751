"""vjp, jvp, grad and value_and_grad equal the plain definition, alone, in each other and under torch's transforms."""

import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchlift import grad, jvp, remat, scan, value_and_grad, vjp, vmap

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
    "vjp": (
        lambda fn: lambda m, x: vjp(fn, m, x)[1](x)[1],
        lambda fn: lambda m, x: F.vjp(lambda x: fn(m, x), x)[1](x)[0],
    ),
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
