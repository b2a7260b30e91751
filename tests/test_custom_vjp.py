"""custom_vjp equals what its backward function says, at every order, in eager, mapped, recomputed and compiled."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from torchlift import custom_vjp, grad, remat, scan, vjp, vmap

F = torch.func
FLAGS = dict(fullgraph=True, backend="aot_eager")
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::torchlift.errors.TorchliftCompileWarning"),
]


def call(m, *args):
    return m(*args)


def data(*shape):
    return torch.linspace(-1, 1, torch.Size(shape or (5, 3)).numel()).reshape(shape or (5, 3)).cos()


def same(found, expected, tolerance=1e-12):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Functions whose backward function is the true one, with residuals of every kind -------------------------------------


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def forward(self, x):
        return torch.sin(x * self.w)


def wave_forward(m, x):
    return m(x), {"cos": torch.cos(x * m.w), "inputs": (x, m.w), "name": "wave"}


def wave_backward(residuals, cotangent):
    x, w = residuals["inputs"]
    both = cotangent * residuals["cos"]
    return {"params": {"w": (both * x).reshape(-1, 3).sum(0)}}, both * w


class Growth(Wave):
    def forward(self, x):
        return torch.exp(x * self.w)


def growth_forward(m, x):
    y = m(x)
    return y, (y, x, m.w, y)


def growth_backward(residuals, cotangent):
    y, x, w, _ = residuals
    return {"params": {"w": (cotangent * y * x).reshape(-1, 3).sum(0)}}, cotangent * y * w


def mlp():
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def pulled(fn=call, backward=lambda vjp_fn, cotangent: vjp_fn(cotangent), **rngs):
    """``fn`` with a backward function of its own, which is given the true one."""
    return custom_vjp(fn, lambda m, *args: vjp(fn, m, *args, **rngs), backward)


def true_forward(m, x):
    return vjp(call, m, x, rngs=False)


def true_backward(vjp_fn, cotangent):
    return vjp_fn(cotangent)


RULES = {
    "tensors": (Wave, custom_vjp(call, wave_forward, wave_backward)),
    "outputs": (Growth, custom_vjp(call, growth_forward, growth_backward)),
    "a vjp function": (mlp, custom_vjp(call, true_forward, true_backward)),
}


@pytest.fixture(params=RULES)
def rule(request):
    cls, fn = RULES[request.param]
    return cls(), fn


def loss(fn, x):
    return fn(x).pow(2).sum()


def derivatives(fn, m, order, x=None):
    """The gradients in the input and all parameters, of a function of those of the order before."""
    x = data().requires_grad_() if x is None else x
    inputs = [x, *m.parameters()]
    value = loss(fn, x)
    for step in range(order):
        grads = torch.autograd.grad(value, inputs, create_graph=step < order - 1, materialize_grads=True)
        value = sum(g.pow(2).sum() for g in grads)
    return grads


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_order(rule, order):
    m, fn = rule
    same(derivatives(lambda x: fn(m, x), m, order), derivatives(m, m, order))


WAYS = {
    "vmap": lambda fn: lambda m, x: F.vmap(lambda x: fn(m, x))(x),
    "vmap of vmap": lambda fn: lambda m, x: F.vmap(F.vmap(lambda x: fn(m, x)))(x[:, None])[:, 0],
    "torchlift.vmap": lambda fn: lambda m, x: vmap(fn)(m, x),
    "remat": lambda fn: lambda m, x: remat(fn)(m, x),
    "remat of vmap": lambda fn: lambda m, x: remat(vmap(fn))(m, x),
    "custom_vjp": lambda fn: lambda m, x: pulled(fn)(m, x),
    "vjp": lambda fn: lambda m, x: x + vjp(fn, m, x)[1](x)[1],
    "grad": lambda fn: lambda m, x: x + grad(lambda m, x: fn(m, x).pow(2).sum(), m, x)[0],
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_inside_of_transforms(rule, way, order):
    m, fn = rule
    found = derivatives(lambda x: WAYS[way](fn)(m, x), m, order)
    same(found, derivatives(lambda x: WAYS[way](call)(m, x), m, order))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "aot_eager"])
@pytest.mark.parametrize("order", [1, 2])
def test_inside_of_scan(rule, compile, order):
    m, fn = rule
    over = lambda fn: lambda x: scan(
        lambda m, h, _: (fn(m, h), None), variable_broadcast="params", length=3, compile=compile
    )(m, x / 2, None)[0]  # fmt: skip
    same(derivatives(over(fn), m, order), derivatives(lambda x: m(m(m(x / 2))), m, order))


AROUND = {
    "grad": lambda f: F.grad(lambda x: loss(f, x)),
    "grad of grad": lambda f: F.grad(lambda x: F.grad(lambda x: loss(f, x))(x).pow(2).sum()),
    "vjp": lambda f: lambda x: F.vjp(f, x)[1](x),
    "jacrev": F.jacrev,
    "jacrev of jacrev": lambda f: F.jacrev(F.jacrev(f)),
    "vmap of grad": lambda f: F.vmap(F.grad(lambda x: loss(f, x))),
    "grad of vmap": lambda f: F.grad(lambda x: F.vmap(f)(x).pow(2).sum()),
    "vmap": F.vmap,
}


@pytest.mark.parametrize("around", AROUND)
def test_under_torchs_transforms(rule, around):
    m, fn = rule
    same(AROUND[around](lambda x: fn(m, x))(data()), AROUND[around](m)(data()))


def test_compiled(rule):
    m, fn = rule
    compiled = torch.compile(lambda x: fn(m, x), **FLAGS)
    same(compiled(data()), m(data()))
    same(derivatives(compiled, m, 1), derivatives(m, m, 1))


def test_compiled_inside_of_scan(rule):
    m, fn = rule

    def body(m, h, _):
        return fn(m, h), h

    lifted = scan(body, variable_broadcast="params", length=2)
    found = derivatives(torch.compile(lambda x: lifted(m, x, None)[0], **FLAGS), m, 1)
    same(found, derivatives(lambda x: m(m(x)), m, 1))


@pytest.mark.parametrize("name", ["tensors", "outputs"])
def test_compiled_inside_of_remat(name):
    m, fn = RULES[name][0](), remat(RULES[name][1])
    same(derivatives(torch.compile(lambda x: fn(m, x), **FLAGS), m, 1), derivatives(m, m, 1))


def test_retain_graph(rule):
    m, fn = rule
    x = data().requires_grad_()
    value = loss(lambda x: fn(m, x), x)
    first = torch.autograd.grad(value, [x, *m.parameters()], retain_graph=True)
    same(torch.autograd.grad(value, [x, *m.parameters()]), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, [x])


# What makes it custom ------------------------------------------------------------------------------------------------


def straight_through(m, x):
    return torch.round(x)


STRAIGHT = custom_vjp(straight_through, lambda m, x: (torch.round(x), None), lambda _, cotangent: ({}, cotangent))


def test_a_straight_through_estimator():
    m, x = nn.Identity(), (3 * data()).requires_grad_()
    w = torch.arange(15.0).reshape(5, 3)
    for run in (STRAIGHT, vmap(STRAIGHT), remat(STRAIGHT), torch.compile(STRAIGHT, **FLAGS)):
        y = run(m, x)
        same(y, x.round())
        same(torch.autograd.grad((w * y).sum(), x), [w])
    # As torch does, and unlike JAX, second derivatives take the output's derivative from backward_fn too.
    (g,) = torch.autograd.grad(STRAIGHT(m, x).pow(3).sum(), x, create_graph=True)
    same(torch.autograd.grad(g.sum(), x), [6 * x.round()])


@pytest.mark.parametrize("way", ["eager", "vmap", "remat", "scan", "compile", "grad"])
def test_sign_and_clipped_gradients(way):
    def backward(vjp_fn, cotangent):
        variables, x = vjp_fn(cotangent)
        return tree_map(torch.sign, variables), x.clamp(-0.1, 0.1)

    m, x = mlp(), data().requires_grad_()
    fn = custom_vjp(call, true_forward, backward)
    out, true = F.vjp(lambda p, x: F.functional_call(m, p, (x,)), dict(m.named_parameters()), x)
    expected = true(2 * out)
    if way == "grad":
        same(F.grad(lambda x: loss(lambda x: fn(m, x), x))(x.detach()), expected[1].clamp(-0.1, 0.1))
        return
    run = {
        "eager": fn,
        "remat": remat(fn),
        "scan": lambda m, x: scan(lambda m, c, x: (c, fn(m, x)), variable_broadcast="params")(m, None, x[None])[1][0],
        "compile": torch.compile(fn, **FLAGS),
        "vmap": lambda m, x: vmap(fn)(m, x[None])[0],
    }[way]
    x_grad, *grads = torch.autograd.grad(loss(lambda x: run(m, x), x), [x, *m.parameters()])
    same(x_grad, expected[1].clamp(-0.1, 0.1))
    same(grads, [expected[0][name].sign() for name, _ in m.named_parameters()])


def test_fn_runs_where_no_gradient_is_asked_for():
    ran = []
    fn = custom_vjp(
        lambda m, x: ran.append("fn") or x, lambda m, x: (ran.append("forward_fn") or x, None), lambda _, c: ({}, c)
    )
    m, x = nn.Identity(), data().requires_grad_()
    fn(m, data()), F.vmap(lambda x: fn(m, x))(data())
    with torch.no_grad():
        fn(m, x)
    assert ran == ["fn"] * 3
    fn(m, x), F.grad(lambda x: fn(m, x).sum())(data()), F.vmap(lambda x: fn(m, x))(x)
    assert ran == ["fn"] * 3 + ["forward_fn"] * 3


def test_outputs_may_be_written_in_place():
    identity = custom_vjp(lambda m, x: x, lambda m, x: (x, None), lambda _, c: ({}, -c))
    x = data().requires_grad_()
    y = identity(nn.Identity(), x)
    y.mul_(2)
    same(torch.autograd.grad(y.sum(), x), [torch.full_like(x, -2)])
    same(x, data())
