"""cond and switch: what is only recorded is selected; switch clamps; what does not fit is refused."""

import pytest
import torch
from torch import nn
from torch.func import grad

import torchlift
from torchlift import apply, cond, switch, variable, variables, vmap

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


def state_of(m):
    return {name: value.clone() for name, value in variables(m, "state")["state"].items()}


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


ROWS = torch.tensor(
    [[1.0, 2.0, -0.5], [-1.0, 0.2, -0.7], [0.4, 0.4, 0.1], [-2.0, 0.1, 0.3], [3.0, -1.0, -1.0]], dtype=torch.float64
)


# Compiled ------------------------------------------------------------------------------------------------------------


def compiled(fn):
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("sign", [1, -1])
def test_compiled_equals_if_and_lets_no_nan_through(sign):
    m, twin = Net(), Net()
    twin.load_state_dict(m.state_dict())
    x = (sign * torch.rand(3)).requires_grad_()
    out, expected = compiled(choose)(m, x), by_python(twin, x)
    assert_same(out, expected)
    assert_same(state_of(m), state_of(twin))
    found = torch.autograd.grad(out.sum(), [x, *m.parameters()])
    wanted = torch.autograd.grad(expected.sum(), [x, *twin.parameters()], allow_unused=True)
    wanted = [torch.zeros_like(a) if b is None else b for a, b in zip(found, wanted, strict=True)]
    assert_same(found, tuple(wanted))


def test_compiled_rows_of_a_lifted_vmap():
    modules = [Net() for _ in ROWS]
    stack = torchlift.stack_modules(modules)
    out = compiled(vmap(choose, variable_axes={True: 0}))(stack, ROWS)
    assert_same(out, torch.stack([by_python(m, row) for m, row in zip(modules, ROWS)]))
    assert_same(state_of(stack), state_of(torchlift.stack_modules(modules)))


FUNC = {
    "vmap": lambda f, xs: torch.func.vmap(f)(xs),
    "grad of vmap": lambda f, xs: grad(lambda xs: torch.func.vmap(f)(xs).sum())(xs),
    "vmap of grad": lambda f, xs: torch.func.vmap(grad(lambda x: f(x).sum()))(xs),
}


@pytest.mark.parametrize("way", FUNC)
def test_compiled_inside_torch_func(way):
    m = Net()
    run = lambda xs: FUNC[way](lambda x: apply(m, {}, x, method=choose_pure, mutable="state")[0], xs)
    found = compiled(run)(ROWS)
    assert_same(found, run(ROWS))
    assert not found.isnan().any()


def test_compiled_branches_draw_both():
    """As documented."""
    draw = lambda m, x: x + torch.rand(3)
    torch.manual_seed(0)
    out = compiled(lambda p, x: cond(p, draw, draw, nn.Identity(), x))(torch.tensor(False), torch.zeros(3))
    torch.manual_seed(0)
    assert torch.equal(out, [torch.rand(3), torch.rand(3)][1])


def test_where_a_compiled_select_leaks_nan():
    """As documented: through a closure, and, under a transform of torch.func, through a parameter."""
    closure, x = torch.tensor(-1.0, requires_grad=True), torch.ones(1, requires_grad=True)
    fn = lambda x: cond(x.sum() > 0, lambda m, x: x.sum(), lambda m, x: closure.sqrt(), nn.Identity(), x)
    assert torch.autograd.grad(fn(x), closure, allow_unused=True) == (None,)
    assert torch.autograd.grad(compiled(fn)(x), closure)[0].isnan()

    layer = nn.Linear(1, 1, bias=False)
    row = lambda m, x: cond(x > 0, lambda m, x: x, lambda m, x: (x * m.weight.sum()).sqrt(), m, x)
    loss = lambda w: apply(layer, {"params": {"weight": w}}, torch.tensor([2.0, 1.0]), method=vmap(row)).sum()
    negative = -torch.ones(1, 1)
    assert grad(loss)(negative) == 0
    assert compiled(grad(loss))(negative).isnan()


def test_compiled_switch():
    branches = [lambda m, x: m.a(x), lambda m, x: m.b(x), lambda m, x: -x]
    m, x = Net(), torch.randn(3)
    run = compiled(lambda m, i, x: switch(i, branches, m, x))
    for i in (-2, 0, 1, 2, 9):
        assert_same(run(m, torch.tensor(i), x), branches[min(max(i, 0), 2)](m, x))


# Switch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index, expected", [(0, 1), (1, 2), (2, 3), (7, 3), (-1, 1), (True, 2)])
def test_switch_clamps(index, expected):
    branches = [lambda m, x, n=n: x * n for n in (1, 2, 3)]
    for i in (index, torch.tensor(index), torch.tensor([index])):
        assert switch(i, branches, nn.Identity(), torch.ones(())) == expected


def test_switch_of_rows():
    m = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    branches = [lambda m, x, n=n: m[n](x) for n in range(3)]
    index = torch.tensor([2, 0, 2, 9, -4])
    lifted = vmap(lambda m, i, x: switch(i, branches, m, x))
    found = lifted(m, index, ROWS)
    assert_same(found, torch.stack([m[min(max(i, 0), 2)](x) for i, x in zip(index.tolist(), ROWS)]))


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_publish_under_a_plain_vmap_is_refused():
    m = Net()
    with pytest.raises(torchlift.PublishError, match="apply"):
        torch.func.vmap(lambda x: choose_pure(m, x))(ROWS)
    assert_same(state_of(m), state_of(Net()))


def sown(name):
    def branch(m, x):
        torchlift.sow(m, "intermediates", name, x)
        return x

    return branch


def created(m, x):
    variable(m, "state", "new", torch.zeros, ())
    return x


def rebound(m, x):
    m.count = torch.zeros(2)
    return x


same = lambda m, x: x
DISAGREEING = {
    "dict": (
        lambda m, x: {"y": x},
        lambda m, x: {"z": x},
        r"cond\(Net\): the output is a tree with leaves \[.*z.*\] in false_fun",
    ),
    "shape": (
        lambda m, x: {"y": x},
        lambda m, x: {"y": x[:2]},
        r"output\['y'\] is torch.float64 \[2\] in false_fun, expected "
        r"torch.float64 \[3\], as in true_fun",
    ),  # fmt: skip
    "dtype": (same, lambda m, x: x.float(), r"output is torch.float32 \[3\] in false_fun"),
    "static": (lambda m, x: (x, "a"), lambda m, x: (x, "b"), r"output\[1\] is 'b' in false_fun, expected 'a'"),
    "state": (same, rebound, r"'count' in 'state' is torch.float64 \[2\] in false_fun, expected torch.float64 \[1\]"),
    "created": (same, created, r"'new' in 'state' is torch.float64 \[\] in false_fun, expected not there"),
    "sown": (sown("a"), sown("b"), r"what is sown is .*'b' in 'intermediates'.* in false_fun"),
}


@pytest.mark.parametrize("kind", DISAGREEING)
def test_branches_that_disagree_are_refused_by_leaf(kind):
    a, b, match = DISAGREEING[kind]
    stack = torchlift.stack_modules([Net() for _ in ROWS])
    before = state_of(stack)
    lifted = vmap(lambda m, x: cond(x.sum() > 0, a, b, m, x), variable_axes={True: 0})
    with torchlift.capture("intermediates"), pytest.raises(torchlift.BranchError, match=match):
        lifted(stack, ROWS)
    assert_same(state_of(stack), before)
    assert "new" not in dict(stack.named_buffers())


def test_what_cannot_choose_is_refused():
    m, x = nn.Identity(), torch.ones(3)
    with pytest.raises(torchlift.BranchError, match=r"cond\(Identity\): got a tensor of shape \(3,\)"):
        cond(x > 0, same, same, m, x)
    with pytest.raises(
        torchlift.BranchError, match=r"got branches of type int, expected a list of at least one function"
    ):
        torchlift.switch(0, 3, nn.Identity(), torch.ones(2))
    with pytest.raises(torchlift.BranchError, match=r"switch\(Identity\): got no branches"):
        switch(0, [], m, x)
    with pytest.raises(torchlift.BranchError, match="index is torch.float64, expected an integer"):
        switch(torch.tensor(1.0), [same], m, x)
    with pytest.raises(torchlift.BranchError, match="index is <class 'float'>"):
        switch(1.0, [same], m, x)
    with pytest.raises(torchlift.TransformTargetError, match="cond: got function as the module"):
        cond(True, same, same, same, x)
    with pytest.raises(torchlift.FilterError, match=r"cond\(Identity\): variables"):
        cond(True, same, same, m, x, variables=3)
    # Also those that would not have run.
    with pytest.raises(ValueError, match=r"cond\(Identity\): got a class, expected a function whose first argument"):
        cond(True, same, nn.Identity, m, x)
    with pytest.raises(torchlift.FunctionTargetError, match=r"switch\(Identity\): got an instance of Identity"):
        switch(0, [same, m], m, x)
    with pytest.raises(torchlift.FunctionTargetError, match=r"switch\(int\): got 3"):
        switch(0, [same, 3], m, x)


def test_functions_may_be_methods_of_the_module():
    class Two(nn.Module):
        def half(self, x):
            return x / 2

        def double(self, x):
            return x * 2

        def large(self, x):
            return x.sum() > 1

    m, x = Two(), torch.tensor([3.0, -3.0])
    assert torchlift.vmap(lambda m, x: cond(x > 0, m.half, m.double, m, x))(m, x).tolist() == [1.5, -6.0]
    assert switch(1, [m.half, m.double], m, x).tolist() == [6.0, -6.0]
    assert torchlift.while_loop(m.large, m.half, m, x[:1]).tolist() == [0.75]
    with pytest.raises(torchlift.FunctionTargetError, match="a method bound to another Two than the module after it"):
        cond(True, Two().half, m.double, m, x)


def test_filters():
    m, x = Net(), torch.ones(3)
    with pytest.raises(torchlift.ModifyCollectionError, match="add 'state' to variables="):
        cond(True, log_of, root_of, m, x, variables="params")
    with pytest.raises(torchlift.RandomnessError, match="add 'dropout' to rngs="):
        cond(True, lambda m, x: torch.rand(3), same, m, x, rngs=False)
    with torchlift.seed_rngs(noise=0), pytest.raises(torchlift.RandomnessError, match="add 'noise' to rngs="):
        cond(True, lambda m, x: torchlift.make_rng("noise") and x, same, m, x, rngs="dropout")


def test_returning_a_module_is_refused():
    with pytest.raises(torchlift.TransformedMethodReturnValueError, match="returned a Identity"):
        cond(True, lambda m: m, lambda m: m, nn.Identity())


@pytest.mark.parametrize("vjp", [lambda x: torchlift.vjp(lambda m, x: x.sin(), nn.Identity(), x)[1],
                                 lambda x: torch.func.vjp(torch.sin, x)[1]])  # fmt: skip
def test_a_graph_from_outside_is_refused(vjp):
    def row(x):
        pull = vjp(x)
        return cond(x > 0, lambda m, x: pull(x)[-1], lambda m, x: x, nn.Identity(), x)

    with pytest.raises(torchlift.ClosureError, match="pass the pull-back as an operand"):
        torch.func.vmap(row)(ROWS[:, 0])


def test_a_pull_back_can_be_an_operand():
    def row(x):
        _, pull = torchlift.vjp(lambda m, x: x.sin(), nn.Identity(), x)
        return cond(x > 0, lambda m, x, pull: pull(x)[1], lambda m, x, pull: x, nn.Identity(), x, pull)

    x = ROWS[:, 0]
    assert_same(torch.func.vmap(row)(x), torch.where(x > 0, x * x.cos(), x))


@pytest.mark.parametrize("value", [None, "a", [], (), {}])
def test_what_is_no_choice_is_refused(value):
    x, module = torch.ones(2), nn.Identity()
    with pytest.raises(torchlift.BranchError, match=r"cond\(Identity\): pred is .*, expected a number or a tensor"):
        torchlift.cond(value, lambda m, x: x, lambda m, x: -x, module, x)
    with pytest.raises(
        torchlift.BranchError, match=r"while_loop\(Identity\): what cond_fn returned is .*, expected a number"
    ):
        torchlift.while_loop(lambda m, x: value, lambda m, x: x - 1, module, x)
