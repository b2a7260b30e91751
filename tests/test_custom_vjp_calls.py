"""State, randomness, arguments, closures and refusals of custom_vjp."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import torchlift
from torchlift import custom_vjp, jvp, remat, sow, variable, vjp
from torchlift.errors import (
    ClosureError,
    DifferentiationError,
    FilterError,
    FunctionTargetError,
    TransformedMethodReturnValueError,
    UnsupportedError,
)

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


def mlp():
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def pulled(fn=call, backward=lambda vjp_fn, cotangent: vjp_fn(cotangent), **rngs):
    """``fn`` with a backward function of its own, which is given the true one."""
    return custom_vjp(fn, lambda m, *args: vjp(fn, m, *args, **rngs), backward)


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


# State, randomness, memory -------------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        variable(self, "state", "count", torch.zeros, ())

    def forward(self, x):
        self.count = self.count + 1
        sow(self, "intermediates", "x", x)
        return self.norm(x).tanh()


@pytest.mark.parametrize("wrap", [lambda fn: fn, remat, lambda fn: torch.compile(fn, **FLAGS)])
def test_state_is_published_once(wrap):
    m, twin, x = Counter(), Counter(), data().requires_grad_()
    grads = torch.autograd.grad(loss(lambda x: wrap(pulled(rngs=False))(m, x), x), [x, *m.parameters()])
    same(grads, derivatives(twin, twin, 1, x))
    same(m.state_dict(), twin.state_dict())
    assert m.count == 1 and not any(tensor.requires_grad for tensor in m.buffers())


@pytest.mark.parametrize("order", [1, 2])
def test_batch_norm_at_every_order_and_under_transforms(order):
    m, twin = Counter(), Counter()
    same(derivatives(lambda x: pulled()(m, x), m, order), derivatives(twin, twin, order))
    same(m.state_dict(), twin.state_dict())

    def fn(x, method):
        out, updated = torchlift.apply(m, {}, x, method=method, mutable=True)
        return out.pow(3).sum(), updated

    found, expected = (F.grad(fn, has_aux=True)(data(), method) for method in (pulled(), call))
    same(found, expected)
    same(m.state_dict(), twin.state_dict())


def test_what_is_sown_comes_out():
    m, x = Counter(), data().requires_grad_()
    with torchlift.capture("intermediates") as sown:
        pulled()(m, x).sum().backward()
    same(sown, {"intermediates": {"x": (x,)}})


@pytest.mark.parametrize("name", ["forward_fn", "residuals"])
def test_an_exception_leaves_the_module_as_it_was(name):
    m, x = Counter(), data().requires_grad_()
    before = tree_map(torch.clone, m.state_dict())
    fails = lambda m, x: (m(x), 1 / 0) if name == "forward_fn" else m(x)
    with pytest.raises((ZeroDivisionError, DifferentiationError), match="division|expected a pair"):
        custom_vjp(call, fails, lambda _, c: ({}, c))(m, x)
    same(m.state_dict(), before)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "wrap", [lambda fn: fn, remat, lambda fn: lambda m, x: F.vmap(lambda x: fn(m, x), randomness="different")(x)]
)
def test_a_vjp_function_draws_the_same_again(wrap, order):
    m = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Tanh())
    found, ends = [], []
    for fn in (wrap(pulled()), wrap(call)):
        torch.manual_seed(1)
        found.append(derivatives(lambda x, fn=fn: fn(m, x), m, order))
        ends.append(torch.get_rng_state())
    same(*found)
    assert torch.equal(*ends)


def test_draws_in_the_map_of_an_operand_that_is_not_mapped():
    m, x = nn.Dropout(0.5), torch.ones(100, requires_grad=True)
    out = F.vmap(lambda _: pulled()(m, x), randomness="different")(torch.arange(3))
    assert not torch.equal(out[0], out[1])
    (x_grad,) = torch.autograd.grad(out.sum(), x)
    same(x_grad, out.sum(0))


def test_is_recomputing_tells():
    seen = []
    fn = pulled(lambda m, x: seen.append(torchlift.is_recomputing()) or m(x))
    m = Wave()
    derivatives(lambda x: fn(m, x), m, 1)
    assert seen == [False]  # the graph of the vjp function is still there
    F.grad(lambda x: fn(m, x).sum())(data())
    assert seen == [False, False, True]


def test_a_graph_is_freed_after_backward():
    held = []

    def forward(m, x):
        y = m(x)
        inner = x * 2
        held.append(weakref.ref(inner))
        return y, inner

    x = data().requires_grad_()
    y = custom_vjp(call, forward, lambda r, c: ({}, c * r))(Wave(), x)
    assert held[0]() is not None
    y.sum().backward()
    gc.collect()
    assert held[0]() is None


# Arguments -----------------------------------------------------------------------------------------------------------


def scaled(m, factor, x, power=1):
    return m(x) * factor**power


def scaled_forward(m, factor, x, power=1):
    y, vjp_fn = vjp(call, m, x)
    return y * factor**power, vjp_fn


def scaled_backward(factor, power, vjp_fn, cotangent):
    return vjp_fn(cotangent * factor**power * 10)


@pytest.mark.parametrize(
    "nondiff",
    [
        dict(nondiff_argnums=(1, 3)),
        dict(nondiff_argnums=[3, 1]),
        dict(nondiff_argnames=("power", "factor")),
        dict(nondiff_argnums=1, nondiff_argnames="power"),
    ],
)
@pytest.mark.parametrize("factor", [2.0, torch.tensor(2.0, requires_grad=True)])
def test_nondiff_arguments(nondiff, factor):
    fn = custom_vjp(scaled, scaled_forward, scaled_backward, **nondiff)
    m, x = mlp(), data().requires_grad_()
    expected = [10 * g for g in torch.autograd.grad(scaled(m, 2.0, x, 2).sum(), x)]
    for run in (
        lambda: fn(m, factor, x, 2),
        lambda: fn(m, factor, x=x, power=2),
        lambda: fn(m, power=2, x=x, factor=factor),
        lambda: F.vmap(lambda x: fn(m, factor, x, 2))(x),
    ):
        same(torch.autograd.grad(run().sum(), x), expected)
    same(torch.autograd.grad(fn(m, factor, x).sum(), x), [e / 2 for e in expected])
    if isinstance(factor, torch.Tensor):
        assert torch.autograd.grad(fn(m, factor, x, 2).sum(), factor, allow_unused=True) == (None,)


def test_a_position_that_no_argument_has():
    fn = custom_vjp(call, lambda m, x: (m(x), None), lambda k, residuals, cotangent: ({}, cotangent), nondiff_argnums=2)
    for x in (data(), data().requires_grad_()):
        with pytest.raises(torchlift.DifferentiationError, match="nondiff_argnums has 2, expected 1 to 1: the module"):
            fn(mlp(), x)


def test_a_mapped_argument_that_is_not_differentiated():
    fn = custom_vjp(scaled, scaled_forward, lambda f, v, c: v(c * f * 10), nondiff_argnums=1)
    m, x, factors = mlp(), data().requires_grad_(), torch.arange(1.0, 6.0)
    (found,) = torch.autograd.grad(F.vmap(lambda f, x: fn(m, f, x))(factors, x).sum(), x)
    same(found, 10 * factors[:, None] * torch.autograd.grad(m(x).sum(), x)[0])


def test_trees():
    def fn(m, batch, k):
        return {"y": m(batch["x"]) * k, "n": batch["n"] + 1, "none": None, "z": batch["x"].sum()}

    def backward(residuals, cotangent):
        assert cotangent["n"] is None and cotangent["none"] is None
        assert cotangent["y"].shape == (5, 3) and cotangent["z"].shape == ()
        return {}, {"x": residuals + cotangent["y"], "n": None}, None

    m, x, k = Wave(), data().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    wrapped = custom_vjp(fn, lambda m, b, k: (fn(m, b, k), b["x"]), backward)
    for run in (wrapped, torch.compile(wrapped, **FLAGS)):
        out = run(m, {"x": x, "n": torch.tensor(1)}, k)
        assert out["n"] == 2 and out["none"] is None
        grads = torch.autograd.grad(out["y"].sum(), [x, k, m.w], allow_unused=True, retain_graph=True)
        same(grads[0], x + 1)
        assert all(g is None or not g.any() for g in grads[1:])
        same(torch.autograd.grad(out["z"], x), [x])


def test_variables_of_other_collections_get_none():
    m, x = Wave(), data().requires_grad_()
    fn = custom_vjp(call, wave_forward, lambda r, c: ({}, wave_backward(r, c)[1]), grad_vars=False)
    x_grad, w_grad = torch.autograd.grad(fn(m, x).sum(), [x, m.w], allow_unused=True)
    same(x_grad, torch.autograd.grad(m(x).sum(), x)[0])
    assert w_grad is None


def test_methods():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def plain(self, x):
            return x * self.w

        def forward(self, x):
            return custom_vjp(self.plain, lambda m, x: vjp(Net.plain, m, x), lambda v, c: v(3 * c))(x)

    m, x = Net(), data().requires_grad_()
    same(torch.autograd.grad(m(x).sum(), [m.w, x]), [3 * x.sum(0), torch.full_like(x, 3)])
    fn = custom_vjp(m.plain, lambda m, k: vjp(Net.plain, m, k), lambda x, v, c: ({},), nondiff_argnames="x")
    assert fn(x).shape == x.shape


# Errors --------------------------------------------------------------------------------------------------------------


def test_functions_are_functions():
    with pytest.raises(FunctionTargetError, match=r"custom_vjp\(Linear\): got a class, expected a function"):
        custom_vjp(nn.Linear, call, call)
    with pytest.raises(ValueError, match=r"custom_vjp\(Wave\): got an instance of Wave"):
        custom_vjp(call, Wave(), call)
    with pytest.raises(FunctionTargetError, match=r"custom_vjp\(NoneType\): got None"):
        custom_vjp(call, call, None)
    with pytest.raises(FilterError, match=r"custom_vjp: grad_vars: got 3"):
        custom_vjp(call, call, call, grad_vars=3)
    for argnums in (0, "x", (1, None)):
        with pytest.raises(
            DifferentiationError, match="nondiff_argnums is .*, expected positions from 1: the module is 0"
        ):
            custom_vjp(call, call, call, nondiff_argnums=argnums)
    with pytest.raises(DifferentiationError, match=r"nondiff_argnames has 'y', expected some of \['m', 'x'\]"):
        custom_vjp(lambda m, x: x, call, call, nondiff_argnames="y")


def test_keyword_only_arguments_are_refused():
    fn = custom_vjp(lambda m, x, *, k: x, lambda m, x, k: (x, None), lambda r, c: ({}, c))
    with pytest.raises(
        DifferentiationError, match=r"\['k'\] can only be given by keyword, expected arguments that have a position"
    ):
        fn(Wave(), data(), k=1)


@pytest.mark.parametrize(
    "result, message",
    [
        (None, r"returned NoneType .*expected a tuple \(variable_cotangents, \*input_cotangents\) of 2"),
        (({},), r"returned tuple .*of 2"),
        ((None, None), r"expected a tuple \(variable_cotangents"),
        (
            ({"params": {"v": None}}, None),
            r"a cotangent for 'v' of collection 'params', expected some of \[\('params', 'w'\)\]",
        ),
        (
            ({"params": {"w": torch.ones(2)}}, None),
            r"for 'w' of collection 'params' float32\[2\], expected float64\[3\]",
        ),
        (({}, torch.ones(2)), r"for argument 1 float32\[2\], expected float64\[5, 3\]"),
        (({}, [torch.ones(2)]), r"for argument 1 a cotangent with leaves \['\[0\]'\], expected those of the argument"),
    ],
)
def test_what_backward_returns_is_checked(result, message):
    x = data().requires_grad_()
    out = custom_vjp(call, wave_forward, lambda r, c: result)(Wave(), x)
    with pytest.raises(DifferentiationError, match=r"custom_vjp\(call\): backward_fn .*" + message):
        out.sum().backward()


def test_what_forward_returns_is_checked():
    x = data().requires_grad_()
    with pytest.raises(
        DifferentiationError, match=r"custom_vjp\(call\): returned float64\[5, 3\], expected a pair \(out, residuals\)"
    ):
        custom_vjp(call, call, call)(Wave(), x)
    with pytest.raises(TransformedMethodReturnValueError, match="returned a Wave"):
        custom_vjp(call, lambda m, x: (x, m), call)(Wave(), x)


def test_a_second_module_with_parameters():
    fn = custom_vjp(lambda a, b, x: b(a(x)), lambda a, b, x: (b(a(x)), None), lambda r, c: ({}, None, c))
    with pytest.raises(DifferentiationError, match=r"second module, Wave, whose 'w' of .*make the one a submodule"):
        fn(Wave(), Wave(), data().requires_grad_())


@pytest.mark.parametrize("way", ["eager", "grad", "vmap"])
def test_a_closure_that_needs_a_gradient_is_refused(way):
    m, x, k = Wave(), data(), torch.tensor(2.0, requires_grad=True)
    fn = custom_vjp(call, lambda m, x: (m(x) * k, None), lambda r, c: ({}, c))
    run = {"eager": lambda f: f(x), "grad": lambda f: F.grad(lambda x: f(x).sum())(x), "vmap": lambda f: F.vmap(f)(x)}[
        way
    ]
    with pytest.raises(
        ClosureError, match=r"custom_vjp\(call\): forward_fn uses a tensor of shape \(\) that is no argument"
    ):
        run(lambda x: fn(m, x))
    other = Wave()
    with pytest.raises(ClosureError, match=r"forward_fn uses a tensor of shape \(3,\)"):
        run(lambda x: custom_vjp(call, lambda m, x: (m(x), other(x)), lambda r, c: ({}, c))(m, x))


def test_a_closure_that_needs_a_gradient_is_refused_compiled():
    m, x, k = Wave(), data(), torch.tensor(2.0, requires_grad=True)
    fn = custom_vjp(call, lambda m, x: (m(x) * k, None), lambda r, c: ({}, c))
    with pytest.raises(Exception, match="forward_fn uses a tensor that is no argument and needs a gradient"):
        torch.compile(fn, **FLAGS)(m, x)


@pytest.mark.parametrize("name", ["forward_fn", "backward_fn"])
def test_a_closure_of_a_transform_is_refused(name):
    m, x = Wave(), data()

    def fn(x, k):
        scale = lambda t: t * k
        forward = (lambda m, x: (scale(m(x)), None)) if name == "forward_fn" else (lambda m, x: (m(x), None))
        return custom_vjp(call, forward, lambda r, c: ({}, scale(c)))(m, x)

    with pytest.raises(
        ClosureError, match=rf"{name} uses a tensor of shape \(3,\) .*belongs to a torch.func transform"
    ):
        F.vmap(fn)(x.requires_grad_(), x)


def test_a_closure_of_backward_keeps_its_gradient():
    m, x, k = Wave(), data().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    fn = custom_vjp(call, lambda m, x: (m(x), None), lambda r, c: ({}, c * k))
    (x_grad,) = torch.autograd.grad(fn(m, x).sum(), x, create_graph=True)
    same(torch.autograd.grad(x_grad.sum(), k), [torch.tensor(15.0)])


@pytest.mark.parametrize(
    "run",
    [
        lambda f, m, x: F.jvp(lambda x: f(m, x), (x,), (x,)),
        lambda f, m, x: jvp(f, m, (x,), (x,), {}),
        lambda f, m, x: F.jacfwd(lambda x: f(m, x))(x),
        lambda f, m, x: F.hessian(lambda x: f(m, x).sum())(x),
    ],
)
def test_forward_mode_is_refused(run):
    m = Counter()
    with pytest.raises(
        UnsupportedError, match=r"custom_vjp\(call\): jvp over custom_vjp: .*reverse mode .*jacrev of jacrev"
    ):
        run(pulled(), m, data())
    assert m.count == 0


def test_transforms_inside_of_compile_are_refused():
    m = Wave()
    with pytest.raises(Exception, match="torch.compile of a torch.func transform of custom_vjp: Dynamo runs none over"):
        torch.compile(lambda x: F.vmap(lambda x: pulled(rngs=False)(m, x))(x), **FLAGS)(data())


def test_a_vjp_function_that_may_draw_is_refused_compiled():
    m = Wave()
    with pytest.raises(
        Exception, match=r"torch.compile of custom_vjp with a vjp function among the residuals: .*rngs=False"
    ):
        torch.compile(lambda x: pulled()(m, x), **FLAGS)(data())


def test_jacrev_of_draws_is_refused():
    m, x = nn.Dropout(0.5), data(3)
    with pytest.raises(UnsupportedError, match=r"jacrev over custom_vjp with a vjp function that draws.*chunk_size=1"):
        F.jacrev(lambda x: pulled()(m, x))(x)
    torch.manual_seed(0)
    jacobian = F.jacrev(lambda x: pulled()(m, x), chunk_size=1)(x)
    torch.manual_seed(0)
    same(jacobian, torch.diag(m(torch.ones(3))))
