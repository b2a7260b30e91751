"""cond and switch: one branch runs, each row of a vmap runs its own, and what is only recorded is selected."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

import torchlift
from torchlift import apply, cond, remat, scan, switch, variable, variables, vmap

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Two layers, a counter that is rebound and a total that is written in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        variable(self, "state", "count", torch.zeros, 1)
        variable(self, "state", "total", torch.zeros, 3)


def log_of(m, x):
    """Not a number, as is its gradient, where x is negative."""
    m.count = m.count + 1
    return m.a(x.sum().log() * torch.sin(x))


def root_of(m, x):
    m.total.add_(x.detach())
    return m.b((-x.sum()).sqrt() * x)


def choose(m, x):
    return cond(x.sum() > 0, log_of, root_of, m, x)


def by_python(m, x):
    return log_of(m, x) if x.sum() > 0 else root_of(m, x)


def without_writes(m, x):
    """Under a plain vmap, state that all rows share cannot be written in place."""
    m.total = m.total + x
    return m.b((-x.sum()).sqrt() * x)


def choose_pure(m, x):
    return cond(x.sum() > 0, log_of, without_writes, m, x)


def positive(m, x):
    return cond(x > 0, lambda m, x: x.sqrt() * m.a.weight.sum(), lambda m, x: (-x).sqrt() * m.b.weight.sum(), m, x)


def state_of(m):
    return {name: value.clone() for name, value in variables(m, "state")["state"].items()}


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def stop(m, x):
    raise AssertionError("the branch not taken ran")


# One branch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [True, 1, 0.5, torch.tensor(True), torch.tensor([2.0]), torch.tensor(0.5)])
def test_a_predicate_that_python_can_look_into_runs_one_branch(true):
    x = torch.randn(3)
    assert torch.equal(cond(true, lambda m, x: x + 1, stop, nn.Identity(), x), x + 1)


@pytest.mark.parametrize("false", [False, 0, torch.tensor(0), torch.tensor([False])])
def test_a_false_one_runs_the_other(false):
    x = torch.randn(3)
    assert cond(false, stop, lambda m, x: {"x": x, "n": 2}, nn.Identity(), x)["n"] == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_equals_if(sign):
    m, twin = Net(), Net()
    twin.load_state_dict(m.state_dict())
    storage = m.total.data_ptr()
    x = (sign * torch.rand(3)).requires_grad_()
    out, expected = choose(m, x), by_python(twin, x)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out.sum(), [x, *m.parameters()], allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), [x, *twin.parameters()], allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert_same(state_of(m), state_of(twin))
    assert m.total.data_ptr() == storage


def test_modules_and_variables_are_operands():
    m, other = Net(), Net()

    def add(m, other, count, x):
        other.count = other.count + 1
        count.value = count.value + 1
        return other.a(x)

    count = torchlift.Variable(m, "state", "count")
    out = cond(True, add, stop, m, other, count, torch.ones(3))
    assert torch.equal(out, other.a(torch.ones(3)))
    assert m.count == other.count == 1


def test_an_exception_leaves_the_module_as_it_was():
    m = Net()

    def fail(m, x):
        m.count = m.count + 1
        m.total.add_(x)
        raise KeyError("midway")

    with pytest.raises(KeyError, match="midway"):
        cond(True, fail, fail, m, torch.ones(3))
    assert_same(state_of(m), state_of(Net()))


def test_only_the_branch_taken_draws():
    m, x = nn.Identity(), torch.ones(3)
    draw = lambda m, x: x * torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(cond(False, draw, lambda m, x: x, m, x), x)
    out = cond(True, draw, lambda m, x: x, m, x)
    torch.manual_seed(1)
    assert torch.equal(out, torch.rand(3))


# Rows ----------------------------------------------------------------------------------------------------------------

ROWS = torch.tensor(
    [[1.0, 2.0, -0.5], [-1.0, 0.2, -0.7], [0.4, 0.4, 0.1], [-2.0, 0.1, 0.3], [3.0, -1.0, -1.0]], dtype=torch.float64
)


def test_rows_of_a_lifted_vmap_have_their_own_branch_and_state():
    modules = [Net() for _ in ROWS]
    stack = torchlift.stack_modules(modules)
    x = ROWS.clone().requires_grad_()
    out = vmap(choose, variable_axes={True: 0})(stack, x)
    expected = torch.stack([by_python(m, row) for m, row in zip(modules, x)])
    assert_same(out, expected)
    assert_same(state_of(stack), state_of(torchlift.stack_modules(modules)))
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad((out * cotangent).sum(), [x, *stack.parameters()])
    wanted = torch.autograd.grad((expected * cotangent).sum(), [x, *[p for m in modules for p in m.parameters()]],
                                 allow_unused=True)  # fmt: skip
    assert_same(found[0], wanted[0])
    for at, whole in enumerate(found[1:]):
        columns = wanted[1 + at :: 4]
        assert_same(whole, torch.stack([torch.zeros_like(whole[0]) if g is None else g for g in columns]))
    assert not torch.isnan(torch.cat([g.flatten() for g in found])).any()


def test_a_stack_with_in_place_state_keeps_its_storage():
    stack = torchlift.stack_modules([Net() for _ in ROWS])
    storage = stack.total.data_ptr()
    vmap(choose, variable_axes={True: 0})(stack, ROWS)
    assert stack.total.data_ptr() == storage and stack.total.abs().sum() > 0


TRANSFORMS = {
    "vmap": lambda f, xs: torch.func.vmap(f)(xs),
    "grad of vmap": lambda f, xs: grad(lambda xs: torch.func.vmap(f)(xs).sum())(xs),
    "vmap of grad": lambda f, xs: torch.func.vmap(grad(lambda x: f(x).sum()))(xs),
    "jacrev of vmap": lambda f, xs: jacrev(lambda xs: torch.func.vmap(f)(xs))(xs),
    "vmap of jacfwd": lambda f, xs: torch.func.vmap(jacfwd(f))(xs),
    "hessian of vmap": lambda f, xs: hessian(lambda xs: torch.func.vmap(f)(xs).sum())(xs),
    "vmap of hessian": lambda f, xs: torch.func.vmap(hessian(lambda x: f(x).sum()))(xs),
    "vmap of jacfwd of jacfwd": lambda f, xs: torch.func.vmap(jacfwd(jacfwd(lambda x: f(x.sin()).sum())))(xs),
    "vmap of jacrev of jacrev": lambda f, xs: torch.func.vmap(jacrev(jacrev(lambda x: f(x.sin()).sum())))(xs),
    "jvp of vmap": lambda f, xs: jvp(lambda xs: torch.func.vmap(f)(xs), (xs,), (xs.cos(),)),
    "jvp of vmap of grad": lambda f, xs: jvp(torch.func.vmap(grad(lambda x: f(x).sum())), (xs,), (xs.cos(),)),
    "vjp of vmap": lambda f, xs: vjp(lambda xs: torch.func.vmap(f)(xs), xs)[1](xs.cos()),
    "vmap of vmap": lambda f, xs: torch.func.vmap(torch.func.vmap(f))(torch.stack([xs, -xs])),
    "vmap of vmap of grad": lambda f, xs: torch.func.vmap(torch.func.vmap(grad(lambda x: f(x).sum())))(
        torch.stack([xs, -xs])
    ),
    "vmap of grad of vmap": lambda f, xs: torch.func.vmap(grad(lambda xs: torch.func.vmap(f)(xs).sum()))(
        torch.stack([xs, -xs])
    ),
    "chunked vmap": lambda f, xs: torch.func.vmap(f, chunk_size=2)(xs),
}


@pytest.mark.parametrize("way", TRANSFORMS)
def test_equals_its_rows_under(way):
    m = Net()

    def rows(f, in_dims=0, **_):
        """``torch.func.vmap`` as a loop."""
        return lambda xs: torch.stack([f(x) for x in xs])

    expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "vmap", rows)
        pure = lambda x: apply(m, {}, x, method=by_python, mutable="state")[0]
        expected = TRANSFORMS[way](pure, ROWS)
    found = TRANSFORMS[way](lambda x: apply(m, {}, x, method=choose_pure, mutable="state")[0], ROWS)
    assert_same(found, expected)


def test_per_sample_gradients_of_parameters():
    m = Net()
    params = {name: p.detach() for name, p in m.named_parameters()}

    def loss(params, x):
        return apply(m, {"params": params}, x, method=choose_pure, mutable="state")[0].square().sum()

    found = torch.func.vmap(grad(loss), in_dims=(None, 0))(params, ROWS)
    wanted = [grad(loss)(params, row) for row in ROWS]
    for name, value in found.items():
        assert_same(value, torch.stack([g[name] for g in wanted]))


def test_closures_are_narrowed_to_the_rows_and_keep_their_gradient():
    scale = torch.randn(5, 3, requires_grad=True)
    shared = torch.randn(3, requires_grad=True)

    def row(x, scale):
        inside = lambda m, x: grad(lambda x: (x * scale).sin().sum())(x) * shared
        return cond(x.sum() > 0, inside, lambda m, x: scale, nn.Identity(), x)

    out = torch.func.vmap(row)(ROWS, scale)
    expected = torch.stack([row(x, s) for x, s in zip(ROWS, scale)])
    assert_same(out, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), [scale, shared]) for y in (out, expected))
    assert_same(found, wanted)
    sample = lambda s, x: row(x, s).square().sum()
    assert_same(
        torch.func.vmap(grad(sample), in_dims=(None, 0))(scale[0], ROWS),
        torch.stack([grad(sample)(scale[0], x) for x in ROWS]),
    )


def test_numbers_and_none_in_outputs():
    row = lambda x: cond(x > 0, lambda m, x: (x, 1, None), lambda m, x: (-x, 2, None), nn.Identity(), x)
    x, n, none = torch.func.vmap(row, out_dims=(0, 0, None))(torch.tensor([1.0, -2.0, 3.0]))
    assert x.tolist() == [1, 2, 3] and n.tolist() == [1, 2, 1] and none is None


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_of_rows(randomness):
    row = lambda x: cond(
        x > 0,
        lambda m, x: x * torch.rand(4),
        lambda m, x: nn.functional.dropout(x + 1 + 0 * torch.rand(4)),
        nn.Identity(),
        x,
    )  # noqa: E501
    x = torch.tensor([1.0, -0.5, 1.0, -0.5, 1.0])
    out = torch.func.vmap(row, randomness=randomness)(x)
    equal = torch.equal(out[0], out[2]) and torch.equal(out[0], out[4])
    assert equal == (randomness == "same")
    torch.manual_seed(3)
    again = torch.func.vmap(row, randomness=randomness)(x)
    torch.manual_seed(3)
    assert torch.equal(again, torch.func.vmap(row, randomness=randomness)(x))
    if randomness == "same":
        torch.manual_seed(3)
        assert_same(again[0], torch.rand(4))
        torch.manual_seed(3)
        assert_same(again[1], row(x[1]))


def test_rows_that_do_not_agree_about_randomness_are_selected():
    row = lambda x: cond(x > 0, lambda m, x: x.sqrt(), lambda m, x: (-x).sqrt(), nn.Identity(), x)
    inner = torch.func.vmap(lambda x: row(x) + 0 * torch.rand(()), randomness="different")
    x = torch.randn(2, 5)
    assert_same(torch.func.vmap(inner, randomness="same")(x), x.abs().sqrt())
    found = grad(lambda x: torch.func.vmap(inner, randomness="same")(x).sum())(x)
    assert_same(found, grad(lambda x: x.abs().sqrt().sum())(x))


def test_streams_go_on_behind_the_branch_that_took_most():
    def row(x):
        two = lambda m, x: x + sum(torch.rand((), generator=torchlift.make_rng("noise")) for _ in range(2))
        y = cond(x > 0, two, lambda m, x: x, nn.Identity(), x)
        return y, torch.rand((), generator=torchlift.make_rng("noise"))

    with torchlift.seed_rngs(noise=0):
        _, after = torch.func.vmap(row, randomness="same")(torch.tensor([1.0, -1.0]))
    with torchlift.seed_rngs(noise=0):
        [torchlift.make_rng("noise") for _ in range(2)]
        expected = torch.rand((), generator=torchlift.make_rng("noise"))
    assert torch.equal(after, expected.expand(2))


def test_sown_values_are_put_together():
    def both(value):
        def branch(m, x):
            torchlift.sow(m, "intermediates", "h", x * value)
            return x

        return branch

    lifted = vmap(lambda m, x: cond(x > 0, both(2), both(3), m, x))
    with torchlift.capture("intermediates") as store:
        lifted(nn.Identity(), torch.tensor([1.0, -1.0]))
    assert store["intermediates"]["h"][0].tolist() == [2, -3]


def test_branches_nest():
    def inner(m, x):
        return cond(x > 2, lambda m, x: x * 10, positive, m, x)

    m = Net()
    rest = [lambda m, x: x * 0, positive, positive]
    row = lambda x: cond(x > 0, inner, lambda m, x: switch(x.long() + 3, rest, m, x), m, x)
    x = torch.tensor([3.0, 1.0, -1.0, -3.0, 5.0])
    assert_same(torch.func.vmap(row)(x), torch.stack([row(v) for v in x]))
    assert_same(grad(lambda x: torch.func.vmap(row)(x).sum())(x), grad(lambda x: sum(row(v) for v in x))(x))


# Inside and around other transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["remat", "scan", "vmap of remat", "remat of vmap", "scan of vmap", "vmap of scan"])
def test_inside_lifted_transforms(outer):
    m = Net()
    x = torch.randn(4, 5, requires_grad=True)

    def run(choose):
        step = lambda m, carry, x: (choose(m, carry - x), x)
        mapped = vmap(choose)
        looped = scan(step, length=4, compile=False)
        lifted = {
            "remat": lambda x: torch.stack([remat(choose)(m, v) for v in x.flatten()]),
            "scan": lambda x: looped(m, x[0, 0], x[:, 1])[0],
            "vmap of remat": lambda x: vmap(remat(choose))(m, x[0]),
            "remat of vmap": lambda x: remat(mapped)(m, x[0]),
            "scan of vmap": lambda x: scan(vmap(step), length=4, compile=False)(m, 0.3 * x[0], x)[0],
            "vmap of scan": lambda x: vmap(looped, in_axes=(0, 1))(m, 0.3 * x[0], x)[0],
        }
        out = lifted[outer](x)
        return out, torch.autograd.grad(out.square().sum(), [x, m.a.weight])

    def by_where(m, x):
        """Where no vmap runs rows apart, Python's if would do; here nothing is NaN, so neither is a select."""
        return (x.abs() * 1.0).sqrt() * torch.where(x > 0, m.a.weight.sum(), m.b.weight.sum())

    assert_same(run(positive), run(by_where))


def test_in_a_compiled_scan_it_is_selected():
    m = Net()
    x = torch.rand(4, requires_grad=True)
    run = scan(lambda m, carry, x: (positive(m, carry - x), None), compile={"backend": "aot_eager"})
    plain = scan(lambda m, carry, x: (positive(m, carry - x), None), compile=False)
    found, wanted = (f(m, torch.tensor(0.5), x)[0] for f in (run, plain))
    assert_same(found, wanted)
    assert_same(torch.autograd.grad(found, [x, m.a.weight]), torch.autograd.grad(wanted, [x, m.a.weight]))


def test_in_a_compiled_scan_a_branch_that_draws_makes_the_loop_plain():
    step = lambda m, c, x: (cond(x > 0, lambda m, c: c + torch.rand(()), lambda m, c: c, m, c), None)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0])
    outs = []
    for compile in ({"backend": "aot_eager"}, False):
        torch.manual_seed(0)
        run = scan(step, split_rngs={"dropout": True}, compile=compile)
        if compile:
            with pytest.warns(torchlift.TorchliftCompileWarning, match="a branch draws random numbers"):
                outs.append(run(nn.Identity(), torch.zeros(()), x)[0])
        else:
            outs.append(run(nn.Identity(), torch.zeros(()), x)[0])
    assert torch.equal(*outs)
