"""What is refused by vjp, jvp, grad and value_and_grad."""

import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import torchlift
from torchlift import grad, jvp, sow, value_and_grad, variable, vjp
from torchlift.errors import (
    DifferentiationError,
    FilterError,
    FunctionTargetError,
    ModifyCollectionError,
    RandomnessError,
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
    "fn, got",
    [
        (call, r"float64\[5, 3\]"),
        (lambda m, x: (m(x).sum(), x), "tuple"),
        (lambda m, x: m(x).sum()[None], r"float64\[1\]"),
    ],
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
        with pytest.raises(
            DifferentiationError, match=r"returned \['int64\[5, 3\]'\], expected a floating-point tensor"
        ):
            run(nn.Identity(), torch.ones(5, 3, dtype=torch.int64))


def test_cotangents_are_like_the_output():
    m, x = mlp(), data()
    out, vjp_fn = vjp(lambda m, x: {"y": m(x)}, m, x)
    with pytest.raises(DifferentiationError, match=r"the cotangent\['y'\] is float64\[3\], expected float64\[5, 3\]"):
        vjp_fn({"y": x[0]})
    with pytest.raises(DifferentiationError, match=r"is float32\[5, 3\], expected float64\[5, 3\]"):
        vjp_fn({"y": x.float()})
    with pytest.raises(
        DifferentiationError, match=r"the cotangent has leaves \[''\], expected those of the output, \[\"\['y'\]\"\]"
    ):
        vjp_fn(x)


def test_has_aux_wants_a_pair():
    for run in (vjp, grad, value_and_grad):
        with pytest.raises(DifferentiationError, match=r"returned float64\[\], expected a pair \(out, aux\)"):
            run(total, mlp(), data(), has_aux=True)


def test_tangents_are_like_what_they_belong_to():
    m, x = mlp(), data()
    with pytest.raises(
        DifferentiationError, match=r"jvp\(call\): tangents\[0\] is float64\[3\], expected float64\[5, 3\]"
    ):
        jvp(call, m, (x,), (x[0],), {})
    with pytest.raises(
        DifferentiationError, match=r"tangents has leaves \['\[0\]', '\[1\]'\], expected those of primals, \['\[0\]'\]"
    ):
        jvp(call, m, (x,), (x, x), {})
    with pytest.raises(DifferentiationError, match=r"primals is float64\[5, 3\], expected a tuple"):
        jvp(call, m, x, (x,), {})
    with pytest.raises(DifferentiationError, match=r"tangents is float64\[5, 3\], expected a tuple"):
        jvp(call, m, (x,), x, {})
    with pytest.raises(DifferentiationError, match=r"tangents\[1\] is float64\[5, 3\], expected None, as for any int"):
        jvp(lambda m, x, k: m(x), m, (x, 1), (x, x), {})
    # A number is no tensor, and its tangent not to be lost.
    with pytest.raises(DifferentiationError, match=r"tangents\[1\] is float, expected None, as for any float"):
        jvp(lambda m, x, k: m(x) * k, m, (x, 2.0), (x, 1.0), {})
    for wrong, got in ((None, "NoneType"), (x, r"float64\[5, 3\]"), ({"params": x}, r"{'params': 'float64\[5, 3\]'}")):
        with pytest.raises(DifferentiationError, match=f"variable_tangents is {got}, expected {{collection"):
            jvp(call, m, (x,), (x,), wrong)
    with pytest.raises(
        DifferentiationError, match=r"the tangent of '0.bias' in 'params' is float64\[5, 3\], expected float64\[3\]"
    ):
        jvp(call, m, (x,), (x,), {"params": {"0.bias": x}})
    with pytest.raises(
        VariableNameError, match=r"variable_tangents has 'w' of collection 'params', expected one of \['0.bias'"
    ):
        jvp(call, m, (x,), (x,), {"params": {"w": x}})
    with pytest.raises(VariableNameError, match=r"'w' of collection 'other', expected one of \['params'\]"):
        jvp(call, m, (x,), (x,), {"other": {"w": x}})


def test_what_the_function_may_change_and_draw():
    x = data()
    with pytest.raises(
        ModifyCollectionError, match=r"vjp\(call\): changed 'count' of collection 'state'.*add 'state' to variables="
    ):
        vjp(call, Counter(), x, variables=["params", "batch_stats"])
    with pytest.raises(
        RandomnessError, match=r"grad\(total\): drew from the random stream 'dropout'; add 'dropout' to rngs="
    ):
        grad(total, nn.Dropout(), x, rngs=False)
    with torchlift.seed_rngs(noise=0), pytest.raises(RandomnessError, match="add 'noise' to rngs="):
        jvp(
            lambda m, x: x + torch.rand(3, generator=torchlift.make_rng("noise")), mlp(), (x,), (x,), {}, rngs="dropout"
        )
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
