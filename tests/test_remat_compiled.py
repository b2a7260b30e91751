"""remat inside of compiled loops: the engine captures through it, and cuts its graphs as the regions say."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from ways import AOT

import torchlift
from torchlift import checkpoint_policies as CP
from torchlift import is_recomputing, remat, remat_scan, scan, scan_layers
from torchlift.engine.run import last_report
from torchlift.errors import TorchliftCompileWarning

pytestmark = pytest.mark.usefixtures("float64")
DEPTH, WIDTH = 4, 6


class Block(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(rate)

    def forward(self, x):
        return x + self.drop(self.b(self.a(self.norm(x)).tanh().sin()))


class Step(Block):
    def forward(self, x):
        return super().forward(x), x.sum()


def inner(policy, part):
    class Outer(Block):
        def forward(self, x):
            return remat(part, policy=policy)(self, x), x.sum()

    return Outer


REMATS = {
    "class": lambda policy: remat(Step, policy=policy),
    "function": lambda policy: inner(policy, Block.forward),
    "nested": lambda policy: inner(policy, remat(Block.forward)),
    "two in a row": lambda policy: inner(policy, lambda m, x: remat(Block.forward)(m, m.b(m.a(x).sin()))),
    "policy inside": lambda policy: inner(policy, remat(Block.forward, policy=CP.dots_saveable)),
}
KEEP = {"params": 0, "batch_stats": 0}


def outcome(module, x):
    """Values, gradients, state and draws of one step."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    carry, ys = module(x)
    (carry.square().sum() + ys.sum()).backward()
    grads = [p.grad for p in module.parameters()]
    return [carry, ys, x.grad, *grads, *module.buffers(), torch.get_rng_state()]


def both(cls, compile, rate=0.0, **kw):
    made = []
    for how in (compile, False):
        torch.manual_seed(1)
        made.append(scan(cls, variable_axes=KEEP, length=DEPTH, compile=how, **kw)(rate))
    return made


@pytest.mark.parametrize("policy", [None, CP.dots_saveable, CP.everything_saveable], ids=lambda p: p and p.__name__)
@pytest.mark.parametrize("form", REMATS)
def test_a_scan_of_remat_is_compiled_and_equals_the_plain_loop(form, policy):
    compiled, plain = both(REMATS[form](policy), AOT, 0.5)
    x = torch.randn(3, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)
        got = outcome(compiled, x)
    assert last_report().path == "compiled", last_report()
    torch.testing.assert_close(got, outcome(plain, x), rtol=1e-12, atol=1e-12)


class Attention(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("given", [{"remat": True}, {"lengths": (2, 2)}], ids=str)
def test_views_that_are_computed_again_inside_a_graph_keep_their_gaps(given):
    """Backward takes q, k and v as forward lays them out, parts of one product, and not as copies of them."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float32, requires_grad=True)
    layers = scan_layers([Attention().float() for _ in range(4)], **given)
    results = []
    for run in (torch.compile(layers, fullgraph=True, **AOT), scan_layers(list(layers), compile=False)):
        out = run(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("policy", [None, CP.dots_saveable, CP.nothing_saveable], ids=lambda p: p and p.__name__)
@pytest.mark.parametrize("where", ["around the layers", "inside of a layer"])
def test_attention_without_dropout_is_computed_again(where, policy):
    """It bears the tag of operators that draw, and draws nothing."""
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    results = []
    for compile in (AOT, False):
        torch.manual_seed(1)
        if where == "around the layers":
            layers = scan_layers([Attention() for _ in range(DEPTH)], remat=True, policy=policy, compile=compile)
        else:
            layers = scan_layers([remat(Attention, policy=policy)() for _ in range(DEPTH)], compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TorchliftCompileWarning)
            out = layers(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])])
        if compile and policy is not None:
            assert last_report().path == "compiled" and last_report().recomputed > 0
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_scan_of_remat_is_compiled_by_inductor():
    compiled, plain = both(remat(Step), True, 0.5)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(outcome(compiled, x), outcome(plain, x), rtol=1e-12, atol=1e-12)
    assert last_report().path == "plain"  # of the plain one


def saved(run, x):
    run(x.clone().requires_grad_())
    assert last_report().path == "compiled"
    return last_report().saved_bytes, last_report().recomputed


def test_a_scan_of_remat_saves_as_little_as_scan_layers_with_remat():
    x = torch.randn(3, WIDTH)
    layers = [Block().eval() for _ in range(DEPTH)]
    bytes_of = {
        name: saved(scan(cls, variable_axes=KEEP, compile=AOT).from_modules([cls().eval() for _ in range(DEPTH)]), x)
        for name, cls in {"plain": Step, "remat": remat(Step), "dots": remat(Step, policy=CP.dots_saveable)}.items()
    }
    assert bytes_of["remat"][0] == saved(scan_layers(layers, remat=True, compile=AOT), x)[0] == 0
    assert bytes_of["plain"][0] == saved(scan_layers(layers, compile=AOT), x)[0]
    assert bytes_of["dots"][0] == saved(scan_layers(layers, policy=CP.dots_saveable, compile=AOT), x)[0]
    assert 0 < bytes_of["dots"][0] < bytes_of["plain"][0] and bytes_of["remat"][1] > bytes_of["plain"][1]


def test_between_two_regions_the_boundary_is_saved():
    def two(m, x):
        half = remat(lambda m, x: m(x).sin())
        return half(m, half(m, x)), None

    stack, x = nn.Linear(WIDTH, WIDTH), torch.randn(3, WIDTH)
    stack = partial(scan(two, length=DEPTH, compile=AOT), stack)
    assert saved(stack, x)[0] == x.nbytes


def test_masks_drawn_in_a_region_are_saved_not_drawn_again():
    compiled, _ = both(remat(Step), AOT, 0.5)
    x = torch.randn(3, WIDTH)
    states = []
    compiled(x.requires_grad_())[0].sum().backward()
    states.append(torch.get_rng_state())
    assert last_report().random and 0 < last_report().saved_bytes <= x.nbytes
    compiled.eval()(x)
    assert torch.equal(states[0], torch.get_rng_state())


def test_the_python_of_a_compiled_region_never_runs_in_backward():
    seen = []

    def body(m, c):
        seen.append(is_recomputing())
        return m(c).sin()

    module, x = nn.Linear(WIDTH, WIDTH), torch.randn(3, WIDTH, requires_grad=True)
    scan(lambda m, c: (remat(body)(m, c), None), length=3, compile=AOT)(module, x)[0].sum().backward()
    assert seen and not any(seen) and last_report().path == "compiled"


@pytest.mark.parametrize("outer", ["scan", "remat_scan", "scan_layers"])
def test_remat_in_a_loop_inside_torch_compile(outer):
    torch.manual_seed(1)
    cls = remat(Block)
    layers = [cls().eval() for _ in range(DEPTH)]
    make = {
        "scan": lambda how: scan(lambda m, c: (m(c), None), variable_axes={True: 0}, compile=how),
        "remat_scan": lambda how: remat_scan(lambda m, c: m(c), lengths=(DEPTH,), compile=how),
        "scan_layers": lambda how: (lambda layers: lambda _, x: layers(x))(scan_layers(layers, compile=how)),
    }[outer]
    stack, x = torchlift.stack_modules(layers), torch.randn(3, WIDTH)
    found = []
    for run in (torch.compile(make(AOT), backend="aot_eager", fullgraph=True), make(False)):
        given = x.clone().requires_grad_()
        out = run(stack, given)
        out = out[0] if outer == "scan" else out
        out.square().sum().backward()
        found.append((out, given.grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class Sowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        torchlift.sow(self, "intermediates", "hidden", self.linear(x))
        return self.linear(x).tanh()


def test_what_a_compiled_remat_sows_can_be_captured():
    module, x = Sowing(), torch.randn(3, WIDTH, requires_grad=True)
    run = lambda m, x: torchlift.apply(m, {}, x, method=remat(Sowing.forward), mutable=["intermediates"])
    expected = run(module, x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(module, x), expected, rtol=1e-12, atol=1e-12)
    called = torch.compile(remat(Sowing.forward), backend="aot_eager", fullgraph=True)
    with torchlift.capture("intermediates") as store:
        out = called(module, x)
    torch.testing.assert_close((out, store), expected, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert x.grad.any()


def test_a_capture_in_code_that_is_compiled_is_refused():
    def run(m, x):
        with torchlift.capture("intermediates"):
            return m(x)

    with pytest.raises(Exception, match="capture: opened in code that torch.compile traces, .*open it around"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(Sowing(), torch.randn(3, WIDTH))
