"""Every function in every other, and in what torch has, equals its twin in plain torch, or is refused by name."""

import functools
from pathlib import Path

import pytest
import torch
from composition import (
    AOT,
    COMPILED,
    EAGER,
    FUNCTIONS,
    OUTSIDE,
    REFUSALS,
    Plain,
    body,
    lifted,
    limits,
    plain,
    refusal_of,
    stateful,
)
from torch import nn

import torchlift
from torchlift import _compat

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::torchlift.TorchliftWarning")]
README = Path(__file__).parent.parent / "README.md"
X = torch.tensor([[0.9, -0.5, 0.4], [-0.3, 0.8, -0.6], [-1.2, 0.3, 2.0]], dtype=torch.float64)
# What chooses: the rows of a map choose otherwise.
CHOOSING = ["cond", "switch", "while_loop", "while_loop (bounded)"]
RAN = []


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def check(run, twin, x, m):
    """Values, gradients of x and of all parameters, and the new state."""
    x, p = x.clone().requires_grad_(), Plain.of(m)
    got, want = run(m, x), twin(p, x)
    same(got, want)
    same(Plain.of(m).states(), p.states())
    inputs = [x, *p.leaves()]
    got, want = (torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True) for out in (got, want))
    same(got, want)


def running(m, x):
    """The body, which notes that it ran, unless that was to record it."""
    if not _compat.is_tracing():
        RAN.append(x)
    return body(m, x)


def check_refused(refusal, error, run, m):
    RAN.clear()
    before = {name: p.clone() for name, p in m.state_dict().items()}
    with pytest.raises(error, match=refusal.match):
        run(m, X[0].clone().requires_grad_())
    assert not RAN
    same(dict(m.state_dict()), before)


def param(cell):
    outer, inner, compiled = cell
    marks = [pytest.mark.slow] if compiled and refusal_of(*cell) is None else []
    return pytest.param(outer, inner, compiled, marks=marks, id=f"{outer}-{inner}{'-compiled' * compiled}")


def around(outer, inner, body):
    """A module, the composition as a function of it, and its twin."""
    if outer in OUTSIDE:
        run, twin = OUTSIDE[outer]
        m, g = lifted((inner,), body)
        return m, functools.partial(run, g), functools.partial(twin, plain((inner,), body))
    return *lifted((outer, inner), body), plain((outer, inner), body)


@pytest.mark.parametrize(("outer", "inner", "compiled"), [param(cell) for cell in [*EAGER, *COMPILED]])
def test_a_pair_equals_its_twin_or_is_refused(outer, inner, compiled):
    refusal = refusal_of(outer, inner, compiled)
    # State that the indices of a map share cannot change; see the matrix and tests/nests.py for what each has of its own.
    shared = outer in OUTSIDE or "vmap" in (outer, inner)
    m, run, twin = around(outer, inner, running if refusal else body if shared else stateful)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    if refusal is None:
        check(run, twin, X[0], m)
    else:
        check_refused(refusal, RuntimeError if compiled else torchlift.UnsupportedError, run, m)


@pytest.mark.parametrize("inner", FUNCTIONS)
@pytest.mark.parametrize("outer", FUNCTIONS)
def test_a_map_of_a_pair_equals_its_rows(outer, inner):
    m, g = lifted((outer, inner), running if refusal_of(outer, inner) else body)
    if refusal_of(outer, inner) and outer != "jit":
        check_refused(
            refusal_of(outer, inner), torchlift.UnsupportedError, lambda m, x: torchlift.vmap(g)(m, x[None]), m
        )
    else:  # inside of a map jit compiles nothing
        rows = lambda p, xs: torch.stack([plain((outer, inner))(p, x) for x in xs])
        check(torchlift.vmap(g), rows, X, m)


@pytest.mark.parametrize("inner", CHOOSING)
@pytest.mark.parametrize("outer", FUNCTIONS)
def test_a_choice_in_rows_inside_of_everything(outer, inner):
    refusal = outer == "jit" and (refusal_of(outer, "vmap") or refusal_of(outer, inner))
    if refusal:
        m, g = lifted((outer, "vmap", inner), running)
        check_refused(refusal, torchlift.UnsupportedError, g, m)
    else:
        m, g = lifted((outer, "vmap", inner))
        check(g, plain((outer, "vmap", inner)), X[0], m)


def test_every_refusal_is_of_some_cell_and_in_the_readme():
    refusals = [refusal_of(*cell, traced=True) for cell in [*EAGER, *COMPILED]]
    assert set(refusals) == {None, *REFUSALS}
    equal = refusals.count(None)
    counts = f"{equal} pairs are equal, {len(refusals) - equal} are refused by name"
    missing = [line for line in [counts, *limits()] if line not in README.read_text()]
    assert not missing, "python -m tests.matrix prints what the README has to list:\n" + "\n".join(missing)


# What the table found ------------------------------------------------------------------------------------------------


def test_a_partial_of_a_function_is_lifted_in_compiled_code():
    m, x = nn.Linear(3, 3), torch.randn(2, 3)
    scaled = functools.partial(lambda scale, m, x: scale * m(x), 2.0)
    same(torch.compile(lambda x: torchlift.vmap(scaled)(m, x), fullgraph=True, backend="eager")(x), 2.0 * m(x))


def test_a_loop_whose_body_cannot_be_told_is_plain_in_compiled_code():
    class Setting:
        __slots__ = ()
        __hash__ = None

    setting, m, xs = Setting(), nn.Linear(3, 3), torch.randn(2, 3)

    def step(m, carry, x):
        return torch.tanh(m(carry)) + x, (None if setting else carry)

    loop = torchlift.scan(step, variable_broadcast="params", compile=AOT)
    with pytest.warns(torchlift.TorchliftCompileWarning, match="runs as a plain Python loop"):
        out, _ = torch.compile(lambda xs: loop(m, xs[0], xs), fullgraph=True, backend="aot_eager")(xs)
    want = xs[0]
    for x in xs:
        want = step(m, want, x)[0]
    same(out, want)


def test_a_loop_in_compiled_code_makes_a_tensor():
    m, xs = nn.Linear(3, 3), torch.randn(2, 3)
    step = lambda m, carry, x: (m(carry) * torch.tensor(2.0) + x, None)
    loop = torchlift.scan(step, variable_broadcast="params", compile=AOT)
    out, _ = torch.compile(lambda xs: loop(m, xs[0], xs), fullgraph=True, backend="aot_eager")(xs)
    want = xs[0]
    for x in xs:
        want = m(want) * 2.0 + x
    same(out, want)


def test_remat_compiles_after_a_vjp_function_ran_again_in_a_compiled_backward():
    x = X[0].clone().requires_grad_()
    for name in ("custom_vjp", "remat"):
        m, g = lifted((name,))
        run = torch.compile(g, fullgraph=True, backend="aot_eager")
        check(run, plain((name,)), x.detach(), m)


def test_filters_and_axes_of_a_loop_in_compiled_code():
    m, xs = lifted(())[0], X.clone()
    options = dict(variable_broadcast="params", variable_axes={torchlift.DenyList("params"): torchlift.In(0)})
    m.seen = torch.randn(3, 3)
    step = lambda m, carry, x: (body(m, carry) + x + m.seen, None)
    loop, plain_loop = (torchlift.scan(step, compile=compile, **options) for compile in (AOT, False))
    run = torch.compile(lambda xs: loop(m, xs[0], xs)[0], fullgraph=True, backend="aot_eager")
    same(run(xs), plain_loop(m, xs[0], xs)[0])


def test_state_that_is_not_written_is_no_change_in_compiled_code():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3).eval()
            self.register_buffer("scale", torch.ones(3))

    read = lambda m, x: m.norm(x) * m.scale
    choose = lambda m, x: torchlift.cond(x.sum() > 0, read, lambda m, x: -read(m, x), m, x)
    m = Net()
    x = torch.randn(2, 4, 3)
    for inner in (torchlift.remat(read), choose, torchlift.jit(read)):
        run = torchlift.vmap(inner)
        same(torch.compile(run, fullgraph=True, backend="aot_eager")(m, x), run(m, x))
