"""cond, switch, while_loop and map_variables inside every other transform, and inside two of them."""

import functools

import pytest
import torch
from torch import nn

import torchlift
from torchlift import (
    apply,
    cond,
    custom_vjp,
    jit,
    jvp,
    map_variables,
    named_call,
    remat,
    scan,
    switch,
    vjp,
    vmap,
    while_loop,
)

pytestmark = pytest.mark.usefixtures("float64")
AOT = {"backend": "aot_eager"}


def positive(m, x):
    return torch.tanh(m(x))


def negative(m, x):
    return -x * m.weight.sum()


def shrink(m, x):
    return 0.3 * torch.tanh(m(x))  # at most 0.9 in sum, so the loop ends whatever the weights


def large(m, x):
    return x.abs().sum() > 1


def by_while(m, x, steps=100):
    while steps and large(m, x):
        x, steps = shrink(m, x), steps - 1
    return x


cosines = lambda tree: {c: {name: p.cos() for name, p in named.items()} for c, named in tree.items()}
INNER = {
    "cond": (
        lambda m, x: cond(x.sum() > 0, positive, negative, m, x),
        lambda m, x: positive(m, x) if x.sum() > 0 else negative(m, x),
    ),
    "switch": (
        lambda m, x: switch(x.sum().sign().long() + 1, [negative, negative, positive], m, x),
        lambda m, x: positive(m, x) if x.sum() > 0 else negative(m, x),
    ),
    "while_loop": (lambda m, x: while_loop(large, shrink, m, x), by_while),
    "bounded while_loop": (lambda m, x: while_loop(large, shrink, m, x, max_steps=3), lambda m, x: by_while(m, x, 3)),
    "map_variables": (
        map_variables(positive, "params", cosines),
        lambda m, x: torch.tanh(nn.functional.linear(x, m.weight.cos(), m.bias.cos())),
    ),
}

rows = lambda f: lambda m, xs: torch.stack([f(m, x) for x in xs])
step = lambda f: lambda m, carry, x: (f(m, carry) + x, None)
steps = lambda f: lambda m, xs: functools.reduce(lambda carry, x: f(m, carry) + x, xs, xs[0])
two_steps = lambda f: lambda m, xs: rows(f)(m, rows(f)(m, xs) + xs) - xs
square = lambda f: lambda m, x: f(m, x).square().sum()
gradient = lambda f: lambda m, x: torchlift.grad(square(f), m, x)[0]
tangent = lambda f: lambda m, x: jvp(f, m, (x,), (x.cos(),), {})[1]
own_gradient = lambda f: custom_vjp(f, lambda m, x: vjp(f, m, x), lambda pull, cotangent: pull(cotangent))
with_cosines = lambda f: lambda m, x: apply(m, cosines({"params": dict(m.named_parameters())}), x, method=f)


def of_weight(f):
    def pulled(m, x):
        out, pull = vjp(f, m, x)
        return pull(out)[0]["params"]["weight"]

    return pulled


# What is around it, the same for the plain function, and whether that gets all rows.
OUTER = {
    "remat": (remat, lambda f: f, False),
    "vmap": (vmap, rows, True),
    "vmap of vmap": (lambda f: lambda m, xs: vmap(vmap(f))(m, xs[None])[0], rows, True),
    "vmap of remat": (lambda f: vmap(remat(f)), rows, True),
    "remat of vmap": (lambda f: remat(vmap(f)), rows, True),
    "grad": (gradient, gradient, False),
    "vmap of grad": (lambda f: vmap(gradient(f)), lambda f: rows(gradient(f)), True),
    "grad of vmap": (lambda f: gradient(vmap(f)), lambda f: gradient(rows(f)), True),
    "vjp": (of_weight, of_weight, False),
    "vmap of vjp": (lambda f: vmap(of_weight(f)), lambda f: rows(of_weight(f)), True),
    "vjp of vmap": (lambda f: of_weight(vmap(f)), lambda f: of_weight(rows(f)), True),
    "jvp": (tangent, tangent, False),
    "vmap of jvp": (lambda f: vmap(tangent(f)), lambda f: rows(tangent(f)), True),
    "jvp of vmap": (lambda f: tangent(vmap(f)), lambda f: tangent(rows(f)), True),
    "custom_vjp": (own_gradient, lambda f: f, False),
    "vmap of custom_vjp": (lambda f: vmap(own_gradient(f)), rows, True),
    "custom_vjp of vmap": (lambda f: own_gradient(vmap(f)), rows, True),
    "scan": (lambda f: lambda m, xs: scan(step(f), compile=False)(m, xs[0], xs)[0], steps, True),
    "scan of vmap": (
        lambda f: lambda m, xs: scan(vmap(step(f)), compile=False)(m, xs, torch.stack([xs, -xs]))[0],
        two_steps,
        True,
    ),  # fmt: skip
    "vmap of scan": (
        lambda f: lambda m, xs: vmap(scan(step(f), compile=False), in_axes=(0, 1))(m, xs, torch.stack([xs, -xs]))[0],
        two_steps,
        True,
    ),  # fmt: skip
    "map_variables": (lambda f: map_variables(f, "params", cosines), with_cosines, False),
    "vmap of map_variables": (
        lambda f: vmap(map_variables(f, "params", cosines)),
        lambda f: rows(with_cosines(f)),
        True,
    ),
    "named_call": (named_call, lambda f: f, False),
}
COMPILED = {
    "jit": (lambda f: jit(f, **AOT), lambda f: f, False),
    "jit of vmap": (lambda f: jit(vmap(f), **AOT), rows, True),
    "compiled scan": (lambda f: lambda m, xs: scan(step(f), compile=AOT)(m, xs[0], xs)[0], steps, True),
}
X = torch.tensor([[2.0, 1.0, -0.5], [-1.0, 0.2, -0.7], [0.4, 0.4, 0.1], [-2.0, 0.1, 0.3]], dtype=torch.float64)


def check(outer, inner):
    lift, twin, whole = outer
    m = nn.Linear(3, 3)
    x = (X if whole else X[0]).clone().requires_grad_()
    outs = lift(inner[0])(m, x), twin(inner[1])(m, x)
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(out.square().sum(), [x, m.weight, m.bias], materialize_grads=True) for out in outs
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_nested_equals_the_plain_nest(outer, inner):
    check(OUTER[outer], INNER[inner])


@pytest.mark.filterwarnings("ignore::torchlift.TorchliftCompileWarning")
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", COMPILED)
def test_compiled_nested_equals_the_plain_nest(outer, inner):
    if inner == "while_loop" and outer != "compiled scan":
        with pytest.raises(torchlift.UnsupportedError, match="pass max_steps="):
            check(COMPILED[outer], INNER[inner])
    else:
        check(COMPILED[outer], INNER[inner])
