"""while_loop runs as long as the condition holds; rows that are done are frozen; a bound makes it compile."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import torchlift
from torchlift import apply, cond, remat, scan, variable, variables, vmap, while_loop

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        variable(self, "state", "count", torch.zeros, 1)
        variable(self, "state", "total", torch.zeros, 3)


def large(m, carry):
    return carry["x"].abs().sum() > 1


def shrink(m, carry):
    m.count = m.count + 1
    m.total.add_(carry["x"].detach())
    return {"x": 0.5 * torch.tanh(m.layer(carry["x"])) * carry["x"], "n": carry["n"] + 1}


def run(m, x, **options):
    return while_loop(large, shrink, m, {"x": x, "n": 0}, carry_variables="state", **options)


def by_python(m, x, max_steps=100, **_):
    carry = {"x": x, "n": torch.tensor(0)}
    while large(m, carry) and max_steps > 0:
        carry, max_steps = shrink(m, carry), max_steps - 1
    return carry


def shrink_pure(m, carry):
    """Under a plain vmap, state that all rows share cannot be written in place."""
    m.count = m.count + 1
    m.total = m.total + carry["x"]
    return {"x": 0.5 * torch.tanh(m.layer(carry["x"])) * carry["x"], "n": carry["n"] + 1}


def run_pure(m, x, **options):
    return while_loop(large, shrink_pure, m, {"x": x, "n": 0}, carry_variables="state", **options)


def state_of(m):
    return {name: value.clone() for name, value in variables(m, "state")["state"].items()}


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def twins():
    m, twin = Net(), Net()
    twin.load_state_dict(m.state_dict())
    return m, twin


X = 8 * torch.tensor([[1.0, 2.0, -0.5], [-0.01, 0.02, -0.07], [0.4, 0.4, 0.1], [-2.0, 0.1, 0.3]], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "bounded": {"max_steps": 2},
    "bound not reached": {"max_steps": 50},
    "remat": {"remat": True},
    "policy": {"remat": torchlift.checkpoint_policies.dots_saveable, "max_steps": 50},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_while(options):
    m, twin = twins()
    storage = m.total.data_ptr()
    x = X[0].clone().requires_grad_()
    out, expected = run(m, x, **options), by_python(twin, x, **options)
    assert torch.equal(out["x"], expected["x"]) and out["n"] == expected["n"] > 0
    assert_same(state_of(m), state_of(twin))
    assert m.total.data_ptr() == storage
    found, wanted = (
        torch.autograd.grad(y["x"].sum(), [x, *net.parameters()]) for y, net in ((out, m), (expected, twin))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_remat_saves_less():
    def saved(**options):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(Net(), X[0].clone().requires_grad_(), **options)
        return sum(t.nbytes for t in {t.data_ptr(): t for t in kept}.values())

    torch.manual_seed(0)
    plain = saved()
    torch.manual_seed(0)
    assert saved(remat=True) < plain


def test_no_iteration_and_no_carry():
    m = Net()
    assert run(m, torch.zeros(3), max_steps=0)["n"] == 0
    assert while_loop(lambda m, c: False, lambda m, c: c, m, (X, "text", None))[1:] == ("text", None)
    while_loop(
        lambda m, c: m.count < 3, lambda m, c: setattr(m, "count", m.count + 1), m, None, carry_variables="state"
    )
    assert m.count == 3


def test_an_exception_leaves_the_module_as_it_was():
    m = Net()

    def fail(m, carry):
        m.count = m.count + 1
        m.total.add_(1)
        if m.count > 2:
            raise KeyError("midway")
        return carry

    with pytest.raises(KeyError, match="midway"):
        while_loop(lambda m, c: True, fail, m, X, carry_variables="state")
    assert_same(state_of(m), state_of(Net()))


def test_each_iteration_sows():
    def body(m, n):
        torchlift.sow(m, "intermediates", "n", n)
        return n + 1

    with torchlift.capture("intermediates") as store:
        while_loop(lambda m, n: n < 3, body, nn.Identity(), 0)
    assert [n.item() for n in store["intermediates"]["n"]] == [0, 1, 2]


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_of_a_lifted_vmap_stop_by_themselves():
    modules = [Net() for _ in X]
    stack = torchlift.stack_modules(modules)
    x = X.clone().requires_grad_()
    out = vmap(run, variable_axes={True: 0})(stack, x)
    expected = [by_python(m, row) for m, row in zip(modules, x)]
    assert_same(out["x"], torch.stack([e["x"] for e in expected]))
    assert out["n"].tolist() == [int(e["n"]) for e in expected]
    assert len(set(out["n"].tolist())) > 1
    assert_same(state_of(stack), state_of(torchlift.stack_modules(modules)))
    found = torch.autograd.grad(out["x"].square().sum(), [x, stack.layer.weight])
    loss = sum(e["x"].square().sum() for e in expected)
    wanted = torch.autograd.grad(loss, [x, *[m.layer.weight for m in modules]], materialize_grads=True)
    assert_same(found, (wanted[0], torch.stack(wanted[1:])))


TRANSFORMS = {
    "vmap": lambda f, xs: torch.func.vmap(f)(xs),
    "grad of vmap": lambda f, xs: grad(lambda xs: torch.func.vmap(f)(xs).sum())(xs),
    "vmap of grad": lambda f, xs: torch.func.vmap(grad(lambda x: f(x).sum()))(xs),
    "jacrev of vmap": lambda f, xs: jacrev(lambda xs: torch.func.vmap(f)(xs))(xs),
    "vmap of jacfwd": lambda f, xs: torch.func.vmap(jacfwd(f))(xs),
    "vmap of hessian": lambda f, xs: torch.func.vmap(hessian(lambda x: f(x).sum()))(xs),
    "jvp of vmap": lambda f, xs: jvp(lambda xs: torch.func.vmap(f)(xs), (xs,), (xs.cos(),)),
    "vmap of vmap": lambda f, xs: torch.func.vmap(torch.func.vmap(f))(torch.stack([xs, xs / 9])),
}


@pytest.mark.parametrize("options", [{}, {"remat": True, "max_steps": 30}], ids=["plain", "remat"])
@pytest.mark.parametrize("way", TRANSFORMS)
def test_equals_its_rows_under(way, options):
    m = Net()
    pure = lambda run: lambda x: apply(m, {}, x, method=lambda m, x: run(m, x, **options)["x"], mutable="state")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "vmap", lambda f: lambda xs: torch.stack([f(x) for x in xs]))
        expected = TRANSFORMS[way](pure(by_python), X)
    assert_same(TRANSFORMS[way](pure(run_pure), X), expected)


def test_a_row_that_is_done_gives_no_nan():
    halve = lambda m, x: torch.where(x < 1, torch.nan, x / 2) + 0 * (x - 0.5).sqrt()
    x = torch.tensor([0.5, 1.0, 3.0, 0.25], requires_grad=True)
    out = torch.func.vmap(lambda x: while_loop(lambda m, x: x >= 1, halve, nn.Identity(), x))(x)
    assert out.tolist() == [0.5, 0.5, 0.75, 0.25]
    assert not torch.autograd.grad(out.sum(), x)[0].isnan().any()


def test_a_condition_that_becomes_mapped_on_the_way():
    m = Net()
    lifted = vmap(
        lambda m, x: while_loop(lambda m, c: c[0].sum() < 4, lambda m, c: (c[0] + x, c[1] + 1), m, (torch.zeros(3), 0))
    )
    assert lifted(m, torch.tensor([0.5, 1.0, 2.0]))[1].tolist() == [3, 2, 1]


def test_rows_that_do_not_agree_about_randomness_are_selected():
    count = lambda x: while_loop(lambda m, c: c[0] > 1, lambda m, c: (c[0] / 2, c[1] + 1), nn.Identity(), (x, 0))[1]
    inner = torch.func.vmap(lambda x: count(x) + 0 * torch.rand(()).long(), randomness="different")
    assert torch.func.vmap(inner, randomness="same")(torch.tensor([[4.0, 1.0], [2.0, 9.0]])).tolist() == [
        [2, 0],
        [1, 4],
    ]


@pytest.mark.parametrize("outer", ["remat", "scan", "vmap of remat", "remat of vmap", "cond", "inside itself"])
def test_inside_lifted_transforms(outer):
    m = nn.Linear(3, 3)

    def loop(m, x):
        body = lambda m, x: torch.tanh(m(x)) * x * 0.5
        return while_loop(lambda m, x: x.abs().sum() > 1, body, m, x)

    def plain(m, x):
        while x.abs().sum() > 1:
            x = torch.tanh(m(x)) * x * 0.5
        return x

    rows = lambda f: lambda m, xs: torch.stack([f(m, x) for x in xs])
    step = lambda f: lambda m, carry, x: (f(m, carry + x), None)

    def nest(m, x):
        body = lambda m, c: (loop(m, c[0]) + 3, c[1] + 1)
        return while_loop(lambda m, c: c[1] < 3, body, m, (x, 0))[0]

    lifted = {
        "remat": remat(loop),
        "scan": lambda m, xs: scan(step(loop), compile=False)(m, xs[0], xs)[0],
        "vmap of remat": vmap(remat(loop)),
        "remat of vmap": remat(vmap(loop)),
        "cond": vmap(lambda m, x: cond(x[0] > 0, loop, lambda m, x: x, m, x)),
        "inside itself": vmap(nest),
    }[outer]

    def scanned(m, xs):
        carry = xs[0]
        for x in xs:
            carry = plain(m, carry + x)
        return carry

    def nested(m, x):
        for _ in range(3):
            x = plain(m, x) + 3
        return x

    twin = {
        "remat": plain,
        "scan": scanned,
        "vmap of remat": rows(plain),
        "remat of vmap": rows(plain),
        "cond": rows(lambda m, x: plain(m, x) if x[0] > 0 else x),
        "inside itself": rows(nested),
    }[outer]
    x = (X[0] if outer == "remat" else X).clone().requires_grad_()
    found, expected = lifted(m, x), twin(m, x)
    assert_same(found, expected)
    inputs = [x, m.weight]
    assert_same(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


# Draws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("split", [True, False])
def test_draws(split, remat):
    def body(m, c):
        noise = torch.rand((), generator=torchlift.make_rng("noise"))
        return (c[0] + noise * torch.rand(3) * m.weight.sum(), c[1] + 1)

    m = nn.Linear(1, 1)
    torch.manual_seed(5)
    with torchlift.seed_rngs(noise=1):
        out = while_loop(lambda m, c: c[1] < 3, body, m, (torch.zeros(3), 0), split_rngs={True: split}, remat=remat)[0]
        after = torch.rand(()), torch.rand((), generator=torchlift.make_rng("noise"))
    torch.manual_seed(5)
    with torchlift.seed_rngs(noise=1):
        expected = (torch.zeros(3), 0)
        start = torch.get_rng_state(), torchlift.rng.positions()
        for _ in range(3):
            if not split:
                torch.set_rng_state(start[0])
                torchlift.rng.rewind(start[1])
            expected = body(m, expected)
        ends = torch.rand(()), torch.rand((), generator=torchlift.make_rng("noise"))
    assert torch.equal(out, expected[0]) and torch.equal(torch.stack(after), torch.stack(ends))
    found, wanted = (torch.autograd.grad(y.sum(), m.weight)[0] for y in (out, expected[0]))
    assert torch.equal(found, wanted)


def test_a_stream_that_the_loop_was_not_told_about_is_refused():
    with pytest.raises(torchlift.RandomnessError, match=r"add split_rngs=\{'dropout': True\}"):
        while_loop(lambda m, n: n < 3, lambda m, n: n + torch.rand(()), nn.Identity(), 0.0)


# Compiled ------------------------------------------------------------------------------------------------------------


def compiled(fn):
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("remat", [False, True])
def test_a_bound_compiles_with_gradients_and_state(remat):
    m, twin = twins()
    x = X[0].clone().requires_grad_()
    out, expected = compiled(run)(m, x, max_steps=3, remat=remat), by_python(twin, x, max_steps=3)
    assert_same(out, expected)
    assert_same(state_of(m), state_of(twin))
    assert_same(
        torch.autograd.grad(out["x"].sum(), [x, *m.parameters()]),
        torch.autograd.grad(expected["x"].sum(), [x, *twin.parameters()]),
    )


def test_a_compiled_bound_gives_no_nan_from_iterations_past_the_end():
    step = lambda m, x: (x - 0.75).sqrt()
    run = lambda x: while_loop(lambda m, x: x > 0.8, step, nn.Identity(), x, max_steps=5)
    x = torch.tensor(1.0, requires_grad=True)
    found, expected = compiled(run)(x), run(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (found, expected)))


def test_a_compiled_bound_inside_transforms():
    m = Net()
    pure = lambda x: apply(m, {}, x, method=lambda m, x: run_pure(m, x, max_steps=2)["x"], mutable="state")[0]
    for way in ("vmap", "vmap of grad"):
        torch._dynamo.reset()
        assert_same(compiled(lambda xs: TRANSFORMS[way](pure, xs))(X), TRANSFORMS[way](pure, X))  # noqa: B023


def in_place(m, carry):
    m.total.add_(carry["x"])
    return {"x": carry["x"] / 2, "n": carry["n"] + 1}


def test_without_a_bound_compiled_code_has_values_and_state():
    m, twin = twins()
    loop = lambda m, x: while_loop(large, in_place, m, {"x": x, "n": 0}, carry_variables="state")
    with torch.no_grad():
        assert_same(compiled(loop)(m, X[0]), loop(twin, X[0]))
    assert_same(state_of(m), state_of(twin))


def test_without_a_bound_compiled_code_refuses_gradients():
    m = nn.Linear(3, 3)
    loop = lambda x: while_loop(lambda m, x: x.sum() > 1, lambda m, x: m(x) / 2, m, x)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="cannot differentiate a loop without bound; pass max_steps="
    ):
        compiled(loop)(X[0])
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="torch.func transform; pass max_steps="):
        compiled(torch.func.vmap(loop))(X)


def test_a_loop_in_a_compiled_scan():
    step = lambda bound: (
        lambda m, c, x: (while_loop(lambda m, y: y > 1, lambda m, y: y / 2, m, c + x, max_steps=bound), None)
    )
    x = 3 * torch.rand(4, requires_grad=True)
    outs = []
    for bound, compile in ((3, {"backend": "aot_eager"}), (3, False)):
        outs.append(scan(step(bound), compile=compile)(nn.Identity(), torch.zeros(()), x)[0])
    assert_same(*outs)
    assert_same(*(torch.autograd.grad(out, x)[0] for out in outs))
    with pytest.warns(torchlift.TorchliftCompileWarning, match="a loop without max_steps= cannot be recorded"):
        out = scan(step(None), compile={"backend": "aot_eager"})(nn.Identity(), torch.zeros(()), x)[0]
    assert_same(out, scan(step(None), compile=False)(nn.Identity(), torch.zeros(()), x)[0])


def test_compiled_code_cannot_repeat_its_draws():
    loop = lambda x: while_loop(lambda m, x: x > 1, lambda m, x: x / 2, nn.Identity(), x, split_rngs={"dropout": False})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compiled code cannot repeat its draws"):
        compiled(loop)(X[0, 0])


def test_no_rows_at_all():
    out = vmap(lambda m, x: while_loop(lambda m, x: x.sum() > 1, lambda m, x: x / 2, m, x))(
        nn.Identity(), torch.ones(0, 3)
    )
    assert out.shape == (0, 3)


# Refused -------------------------------------------------------------------------------------------------------------


def created(m, n):
    variable(m, "state", "new", torch.zeros, ())
    return n


def grown(m, n):
    m.count = torch.zeros(2)
    return n


REFUSED = {
    "structure": (lambda m, n: (n, n), torchlift.CarryError, r"body_fn returned tuple with leaves .* as in init"),
    "dtype": (
        lambda m, n: n.float(),
        torchlift.CarryError,
        r"returned torch.float32 \[\] as carry, expected torch.int64",
    ),
    "created": (created, torchlift.CarryError, "created 'new' in 'state'"),
    "state": (grown, torchlift.CarryError, r"'count' in 'state' is torch.float64 \[2\] after an iteration"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_stay_the_same_is_refused(kind):
    body, error, match = REFUSED[kind]
    m = Net()
    with pytest.raises(error, match=match):
        while_loop(lambda m, n: True, body, m, 0, carry_variables="state")
    assert_same(state_of(m), state_of(Net()))


def test_misuse_is_refused():
    m = Net()
    stop = lambda m, x: False
    with pytest.raises(torchlift.AxisError, match="max_steps is -1"):
        while_loop(stop, stop, m, 0, max_steps=-1)
    with pytest.raises(torchlift.AxisError, match="max_steps is True, expected None or an int"):
        while_loop(stop, stop, m, 0, max_steps=True)
    with pytest.raises(torchlift.FunctionTargetError, match=r"while_loop\(Net\): got a class"):
        while_loop(stop, Net, m, 0)
    with pytest.raises(torchlift.TransformTargetError, match="while_loop: got int as the module"):
        while_loop(stop, stop, 3, 0)
    with pytest.raises(torchlift.FilterError, match="broadcast_variables"):
        while_loop(stop, stop, m, 0, broadcast_variables=3)
    with pytest.raises(torchlift.BranchError, match=r"got a tensor of shape \(2,\)"):
        while_loop(lambda m, x: x > 0, stop, m, torch.ones(2))
    with pytest.raises(torchlift.ModifyCollectionError, match="add 'state' to carry_variables="):
        while_loop(lambda m, c: True, shrink, m, {"x": X[0], "n": 0})
    with pytest.raises(torchlift.ModifyCollectionError, match="change it in body_fn"):
        while_loop(lambda m, c: m.total.add_(1).sum() > 9, shrink, m, 0, carry_variables="state")

    def sows(m, x):
        torchlift.sow(m, "intermediates", "x", x)
        return x / 2

    with torchlift.capture("intermediates"):
        with pytest.raises(torchlift.UnsupportedError, match="cond_fn sows"):
            while_loop(lambda m, x: sows(m, x) > 1, sows, m, 3.0)
        with pytest.raises(torchlift.UnsupportedError, match="sowed 'x' in an iteration"):
            vmap(lambda m, x: while_loop(lambda m, x: x > 1, sows, m, x))(m, X[:, 0])
