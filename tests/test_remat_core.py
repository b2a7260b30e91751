"""The eager core of remat: equal values, gradients and draws wherever torch differentiates, and closures kept."""

import gc
import threading
import weakref

import pytest
import torch
from torch import func
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from torchlift.engine.policies import checkpoint_name, checkpoint_policies
from torchlift.engine.remat import checkpointed, is_recomputing
from torchlift.errors import ClosureError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def w_DD(float64):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x_BD(float64):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


# --- bodies x contexts --------------------------------------------------------------------------------------------


def mlp(w, x):
    return torch.tanh(checkpoint_name(x @ w, "hidden")) @ w.T


def dropout(w, x):
    return F.dropout(torch.sin(x @ w), 0.5) * F.dropout(x, 0.3)


def derivative(w, x):
    return func.grad(lambda x: mlp(w, x).sin().sum())(x)


def tree(w, x):
    out = _tree({"w": w, "x": (x, None, "label")})
    return out["y"] + out["n"]


def _tree(args):
    return {"y": args["x"][0] @ args["w"], "n": 3, "none": None}


BODIES = {"mlp": mlp, "dropout": dropout, "derivative": derivative, "tree": tree}
FORMS = {
    "remat": lambda body: checkpointed(body),
    "dots": lambda body: checkpointed(body, policy=checkpoint_policies.dots_saveable),
    "nested": lambda body: checkpointed(lambda w, x: checkpointed(body)(w, x)),
    "closure": lambda body: lambda w, x: checkpointed(lambda x: body(w, x))(x),
}


def loss(body):
    return lambda w, x: body(w, x).pow(2).sum()


def eager(body, w, x):
    w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
    out = body(w, x)
    out.pow(2).sum().backward()
    return out.detach(), w.grad, x.grad


def retained(body, w, x):
    w = w.clone().requires_grad_()
    out = loss(body)(w, x)
    out.backward(retain_graph=True)
    out.backward()
    return w.grad


def partial_gradients(body, w, x):
    w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
    out = loss(body)(w, x)
    return torch.autograd.grad(out, w, retain_graph=True) + torch.autograd.grad(out, x)


def double_backward(body, w, x):
    w = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(body)(w, x), w, create_graph=True)
    return grad.detach(), *torch.autograd.grad(grad.pow(2).sum(), w)


def dual(body, w, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(body(w, torch.autograd.forward_ad.make_dual(x, x)))


def autocast(body, w, x):
    w = w.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = body(w, x.float())
    return out.detach(), *torch.autograd.grad(out.float().pow(2).sum(), w)


def autograd_around(transform):
    def context(body, w, x):
        w = w.clone().requires_grad_()
        out = transform(body, w, x)
        return out.detach(), *torch.autograd.grad(out.pow(2).sum(), w)

    return context


def rows(randomness):
    return lambda body, w, x: func.vmap(body, (None, 0), randomness=randomness)(w, x)


def rows_unmapped(body, w, x):
    return func.vmap(lambda i: body(w, x) * i, randomness="different")(torch.arange(3.0))


def grad_of_rows(body, w, x):
    return func.grad(lambda w, x: rows("different")(body, w, x).pow(2).sum(), (0, 1))(w, x)


def rows_of_grad(body, w, x):
    return func.vmap(func.grad(loss(body)), (None, 0), randomness="different")(w, x)


FIRST_ORDER = {
    "eager": eager,
    "retained": retained,
    "partial": partial_gradients,
    "dual": dual,
    "autocast": autocast,
    "no_grad": lambda body, w, x: torch.no_grad()(body)(w, x),
    "inference_mode": lambda body, w, x: torch.inference_mode()(body)(w, x).clone(),
    "grad": lambda body, w, x: func.grad_and_value(loss(body), (0, 1))(w, x),
    "vjp": lambda body, w, x: func.vjp(body, w, x)[1](x),
    "jvp": lambda body, w, x: func.jvp(body, (w, x), (w, x)),
    "jacrev": lambda body, w, x: func.jacrev(body, (0, 1))(w, x),
    "jacfwd": lambda body, w, x: func.jacfwd(body, (0, 1), randomness="same")(w, x),
    "vmap": rows("different"),
    "vmap same": rows("same"),
    "vmap, nothing mapped": rows_unmapped,
    "vmap of vmap": lambda body, w, x: func.vmap(lambda w: rows("different")(body, w, x), randomness="different")(
        torch.stack([w, 2 * w])
    ),
    "vmap of grad": rows_of_grad,
    "grad of vmap": grad_of_rows,
    "grad of vmap, nothing mapped": lambda body, w, x: func.grad(lambda w: rows_unmapped(body, w, x).sum())(w),
    "vmap of grad of vmap": lambda body, w, x: func.vmap(
        lambda w: func.grad(lambda w: rows("different")(body, w, x).sum())(w), randomness="different"
    )(torch.stack([w, 2 * w])),
    "autograd of vmap": autograd_around(rows("different")),
}
SECOND_ORDER = {
    "double backward": double_backward,
    "grad of grad": lambda body, w, x: func.grad(lambda w: func.grad(loss(body), 1)(w, x).pow(2).sum())(w),
    "hessian": lambda body, w, x: func.hessian(loss(body))(w, x),
    "jacrev of jacrev": lambda body, w, x: func.jacrev(func.jacrev(loss(body)))(w, x),
    "jvp of pullback": lambda body, w, x: func.jvp(func.vjp(lambda w: body(w, x), w)[1], (x,), (x,)),
    "autograd of grad": autograd_around(lambda body, w, x: func.grad(loss(body), 1)(w, x)),
    "autograd of vmap of grad": autograd_around(rows_of_grad),
}
# torch itself: forward mode does not enter randomness="error" maps that draw.
REFUSED = {("dropout", "hessian")}


def outcome(context, body, w, x):
    torch.manual_seed(0)
    leaves = [leaf for leaf in tree_leaves(context(body, w, x)) if isinstance(leaf, torch.Tensor)]
    return leaves, torch.get_rng_state()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("context", FIRST_ORDER | SECOND_ORDER)
def test_equals_the_plain_call(context, body, form, w_DD, x_BD):
    run = (FIRST_ORDER | SECOND_ORDER)[context]
    if (body, context) in REFUSED:
        for fn in (BODIES[body], FORMS[form](BODIES[body])):
            with pytest.raises(RuntimeError, match="random"):
                outcome(run, fn, w_DD, x_BD)
        return
    expected, state = outcome(run, BODIES[body], w_DD, x_BD)
    got, end = outcome(run, FORMS[form](BODIES[body]), w_DD, x_BD)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if context in FIRST_ORDER:
            assert torch.equal(a, b)
        else:  # a second derivative adds up the same terms in another order
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(end, state), "the generator does not end where the plain call leaves it"


# --- closures -----------------------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


class Holder:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return (x @ self.w).sin()


CLOSURES = {
    "into a custom function": lambda R, w, x: R(lambda x: Product.apply(x, w).sin())(x).sum(),
    "attribute": lambda R, w, x: R(Holder(w))(x).sum(),
    "no arguments": lambda R, w, x: R(lambda: (x @ w).sin().sum())(),
    "returned": lambda R, w, x: (lambda v, x, y: (x @ v * y).sum())(*R(lambda x: [w, x, x.sin()])(x)),
    "in a nested region": lambda R, w, x: R(lambda x: R(lambda y: (y @ w).sin())(x) * w[0])(x).sum(),
    "inside a transform of the body": lambda R, w, x: R(lambda x: func.grad(lambda y: (y @ w).sin().sum())(x))(x).sum(),
    "under vmap": lambda R, w, x: func.vmap(lambda x: R(lambda s: (x @ w * s).sin())(torch.ones(())).sum())(x).sum(),
}


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("context", ["grad", "jacrev of grad", "vmap of grad", "autograd", "autograd of grad"])
def test_closures_keep_their_gradient(closure, context, w_DD, x_BD):
    def run(R):
        def of_w(w, x=x_BD):
            return CLOSURES[closure](R, w, x)

        if context == "grad":
            return func.grad(of_w)(w_DD)
        if context == "jacrev of grad":
            return func.jacrev(func.grad(of_w))(w_DD)
        if context == "vmap of grad":
            return func.vmap(func.grad(of_w))(torch.stack([w_DD, 2 * w_DD]))
        w = w_DD.clone().requires_grad_()
        out = of_w(w) if context == "autograd" else func.grad(of_w, 1)(w, x_BD).sum()
        return torch.autograd.grad(out, w)[0]

    assert torch.allclose(run(checkpointed), run(lambda body: body), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [func.grad, func.vmap])
def test_a_closure_given_to_an_inner_transform_is_refused(inner, w_DD, x_BD):
    def of_w(w):
        return checkpointed(lambda x: inner(lambda v: (v * x[0]).sin().sum())(w))(x_BD).sum()

    with pytest.raises(ClosureError, match=r"remat\(<lambda>\): 'w' of shape \(4, 4\) .* pass it as an argument"):
        func.grad(of_w)(w_DD)
    w = w_DD.clone().requires_grad_()
    if inner is func.vmap:  # keeps what ordinary autograd keeps
        assert torch.equal(torch.autograd.grad(of_w(w), w)[0], func.grad(lambda w: (w * x_BD[0]).sin().sum())(w_DD))
    else:
        with pytest.raises(ClosureError, match="'w' of shape"):
            of_w(w)


def test_a_returned_buffer_stays_a_buffer(x_BD):
    buffer = torch.zeros(4)

    def body(x):
        y = x.sin()
        return y, buffer, y

    func.grad(lambda x: sum(t.sum() for t in checkpointed(body)(x)))(x_BD)
    assert buffer.is_leaf and not buffer.requires_grad


def test_results_may_be_written_to(x_BD):
    def run(R):
        def of_x(x):
            y = R(lambda x: x.view(-1))(x * 1)
            y += 1
            return y.relu_().sum()

        return func.grad(of_x)(x_BD)

    assert torch.equal(run(checkpointed), run(lambda body: body))


def test_an_unused_result_gives_no_nan():
    grad = func.grad(lambda x: checkpointed(lambda x: (x.sin(), x.log()))(x)[0].sum())(torch.zeros(3))
    assert torch.equal(grad, torch.ones(3))


# --- recomputation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [lambda f, x: f(x).backward(), lambda f, x: func.grad(f)(x)])
def test_is_recomputing(inside):
    seen = []

    def body(x):
        seen.append(is_recomputing())
        return x.sin().sum()

    x = torch.ones(2, requires_grad=True)
    inside(checkpointed(body), x)
    assert seen == [False, True]
    seen.clear()
    inside(checkpointed(lambda x: checkpointed(body)(x)), x)
    assert seen[0] is False and all(seen[1:]) and not is_recomputing()


def test_it_lets_go_of_everything():
    alive = []

    def body(x):
        y = x.sin()
        alive.append(weakref.ref(y))
        return y.cos().sum()

    x = torch.ones(2, requires_grad=True)
    for run in (checkpointed(body), checkpointed(body, checkpoint_policies.save_anything_except_these_names())):
        out = run(x)
        out.backward()
        grad = func.grad(run)(x.detach())
        del out, grad
    gc.collect()
    assert not any(ref() is not None for ref in alive)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("policy", [None, checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("transform", [False, True])
def test_an_exception_leaves_nothing_behind(error, policy, when, transform):
    def body(x):
        torch.rand(2)
        y = x.sin().exp()
        if when == ("backward" if is_recomputing() else "forward"):
            raise error("boom")
        return y.cos()

    def run():
        x = torch.ones(2, requires_grad=True)
        call = checkpointed(body, policy)
        func.grad(lambda x: call(x).sum())(x) if transform else call(x).sum().backward()

    torch.manual_seed(0)
    torch.rand(2)
    drawn_once = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(error, match="boom") as held:  # whoever holds on to the traceback holds on to its frames
        run()
    assert not is_recomputing()
    assert torch.equal(torch.get_rng_state(), drawn_once)
    saved = torch.ones(2, requires_grad=True).sin()
    assert saved.grad_fn._saved_self.equal(torch.ones(2))  # no hook of the checkpoint packs it
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    checkpoint_name(saved, "a")
    del held


def test_two_threads(w_DD, x_BD):
    expected = eager(mlp, w_DD, x_BD)
    failures = []

    def work(body, context):
        for _ in range(20):
            for a, b in zip(tree_leaves(context(body, w_DD, x_BD)), expected):
                if not torch.equal(a, b):
                    failures.append(context)

    def transformed(body, w, x):
        out, pull = func.vjp(body, w, x)
        return out, *pull(2 * out)

    bodies = [checkpointed(mlp), checkpointed(mlp, checkpoint_policies.dots_saveable)]
    threads = [threading.Thread(target=work, args=(b, c)) for b in bodies for c in (eager, transformed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
