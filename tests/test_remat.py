"""remat of modules: state once, draws and gradients as without it, what is kept and what is computed again."""

import pytest
import torch
import torch.nn.functional as F
from measure import Allocations, Operations, saved_bytes
from torch import func, nn

import torchlift
from torchlift import checkpoint_name, checkpoint_policies, is_recomputing, remat, remat_scan, scan, variable, vmap
from torchlift.errors import AxisError, ModifyCollectionError

pytestmark = pytest.mark.usefixtures("float64")

SIZE, BATCH = 16, 64


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """Two products with weights and one without, a norm, dropout, a count."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.norm, self.drop = nn.BatchNorm1d(size), nn.Dropout(0.25)
        variable(self, "state", "count", torch.zeros, ())

    def forward(self, x):
        self.count += 1
        h = checkpoint_name(self.up(self.norm(x)), "up").tanh()
        return x + self.drop(self.down(h)) + (x @ x.mT) @ x / x.shape[0]

    def ratio(self, x, scale):
        return scale * self.up(x).exp().mean(-1)


def run(forward, module, x):
    """Output, gradients, state, and the next draw."""
    torch.manual_seed(1)
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = forward(module, x)
    out.square().sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [out, x.grad, *grads, *(b.clone() for b in module.buffers()), torch.rand(2)]


# The same answers ----------------------------------------------------------------------------------------------------

CP = checkpoint_policies
POLICIES = {
    "none": None,
    "nothing": CP.nothing_saveable,
    "everything": CP.everything_saveable,
    "dots": CP.dots_saveable,
    "weights": CP.dots_with_no_batch_dims_saveable,
    "names": CP.save_only_these_names("up"),
    "other names": CP.save_any_names_but_these("up"),
    "both": CP.save_from_both_policies(CP.save_only_these_names("up"), CP.dots_saveable),
}
LIFTED = {
    "class": lambda policy: lambda m, x: _as(remat(Block, policy=policy), m)(x),
    "function": lambda policy: remat(lambda m, x: m(x), policy=policy),
    "method": lambda policy: remat(Block.forward, policy=policy),
    "nested": lambda policy: remat(remat(Block.forward, policy=policy), policy=policy),
    "of a part": lambda policy: lambda m, x: remat(lambda m, x: Block.forward(m, x), policy=policy)(m, x),
}


def _as(cls, module):
    """``module`` as an instance of ``cls``, sharing all that it has."""
    lifted = cls.__new__(cls)
    object.__setattr__(lifted, "__dict__", module.__dict__)
    return lifted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", LIFTED)
def test_values_gradients_state_and_draws(form, policy):
    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(BATCH, SIZE)
    for got, expected in zip(run(LIFTED[form](POLICIES[policy]), module, x), run(Block.forward, twin, x), strict=True):
        close(got, expected)
    assert module.norm.num_batches_tracked == 1 and module.count == 1


@pytest.mark.parametrize("policy", ["none", "dots"])
@pytest.mark.parametrize(
    "transform", ["grad", "vjp", "jvp", "jacrev", "vmap", "grad of grad", "vmap of grad", "hessian"]
)
def test_under_transforms_of_torch(transform, policy):
    module = Block(3).eval()
    lifted = remat(Block.forward, policy=POLICIES[policy])
    x, v = torch.randn(2, 4, 3).unbind(0)

    def measure(forward):
        f = lambda x: forward(module, x).square().sum()
        g = func.grad(f)
        return {
            "grad": lambda: g(x),
            "vjp": lambda: func.vjp(lambda x: forward(module, x), x)[1](v),
            "jvp": lambda: func.jvp(f, (x,), (v,)),
            "jacrev": lambda: func.jacrev(lambda x: forward(module, x))(x),
            "vmap": lambda: func.vmap(lambda x: forward(module, x))(torch.stack([x, v])),
            "grad of grad": lambda: func.grad(lambda x: g(x).square().sum())(x),
            "vmap of grad": lambda: func.vmap(g)(torch.stack([x, v])),
            "hessian": lambda: func.hessian(f)(x),
        }[transform]()

    module.forward = None  # only the given forward may run
    try:
        read_only = lambda forward: lambda m, x: torchlift.apply(m, {}, x, method=forward, mutable="state")[0]
        close(measure(read_only(lifted)), measure(read_only(Block.forward)))
    finally:
        del module.forward


def test_gradients_of_parameters_under_func_grad():
    module, x = Block(3).eval(), torch.randn(4, 3)
    params = torchlift.variables(module, "params")["params"]

    def loss(params, method):
        return torchlift.apply(module, {"params": params}, x, method=method, mutable="state")[0].square().sum()

    got, expected = (func.grad(loss)(params, f) for f in (remat(Block.forward), Block.forward))
    for name in params:
        close(got[name], expected[name])


def test_double_backward():
    module, x = Block(3).eval(), torch.randn(4, 3, requires_grad=True)
    results = []
    for forward in (Block.forward, remat(Block.forward)):
        (g,) = torch.autograd.grad(forward(module, x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [x, module.up.weight]))
    close(*results)


def test_backward_twice_and_after_the_module_changed():
    module, x = Block().eval(), torch.randn(BATCH, SIZE, requires_grad=True)
    expected = torch.autograd.grad(Block.forward(module, x).sum(), x)
    out = remat(Block.forward)(module, x).sum()
    module.train()
    module.norm.running_mean = module.norm.running_mean + 5
    module.eval()
    for _ in range(2):
        close(torch.autograd.grad(out, x, retain_graph=True), expected)


# What is kept, and what runs again -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kept", "again"),  # kept: in rows of SIZE numbers for each input; again: products that run twice
    [("none", 0, 2), ("names", 4, 1), ("weights", 5, 0), ("everything", 8, 0)],
)
def test_memory_and_operations(policy, kept, again):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(SIZE, 4 * SIZE), nn.Linear(4 * SIZE, SIZE)

        def forward(self, x):
            return self.down(checkpoint_name(self.up(x), "up").sin().exp()).tanh()

    module, x = Mlp(), torch.randn(BATCH, SIZE, requires_grad=True)
    lifted = remat(Mlp.forward, policy=POLICIES[policy])
    own, unit = (x, *module.parameters()), BATCH * SIZE * x.itemsize
    assert saved_bytes(lambda: Mlp.forward(module, x), *own) == 9 * unit
    counts = []
    for forward in (Mlp.forward, lifted):
        with Operations() as seen, Allocations(*own) as memory:
            out = forward(module, x)
            held = memory.alive - out.nbytes
            out.sum().backward()
        counts.append(seen.counts["addmm"] + seen.counts["mm"])
    assert held == kept * unit
    assert counts == [6, 6 + again]


def test_a_chain_of_blocks_keeps_only_their_inputs():
    blocks, x = [Block() for _ in range(5)], torch.randn(BATCH, SIZE, requires_grad=True)

    own = [t for block in blocks for t in (*block.parameters(), *block.buffers())]

    def held(forward):
        with Allocations(x, *own) as memory:
            y = x
            for block in blocks:
                y = forward(block, y)
        return memory.alive

    state = sum(b.nbytes for block in blocks for b in block.buffers())
    assert held(remat(Block.forward)) <= len(blocks) * x.nbytes + 3 * state
    assert held(Block.forward) > 10 * len(blocks) * x.nbytes


def test_is_recomputing_tells():
    seen = []

    def body(m, x):
        seen.append(is_recomputing())
        return m.up(x).tanh()

    x = torch.randn(2, SIZE, requires_grad=True)
    remat(body)(Block(), x).sum().backward()
    assert seen == [False, True] and not is_recomputing()


def test_hooks_of_the_root_run_once_and_those_inside_again():
    calls = []

    class Top(nn.Sequential):
        pass

    top = remat(Top)(nn.Linear(2, 2), nn.Tanh())
    top.register_forward_hook(lambda *_: calls.append("root"))
    top[0].register_forward_hook(lambda *_: calls.append("again" if is_recomputing() else "inner"))
    top(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert calls == ["inner", "root", "again"]


# State and streams ---------------------------------------------------------------------------------------------------


def test_variables_says_what_may_change():
    module, x = Block(), torch.randn(4, SIZE)
    match = (
        r"remat\(.*variables='state'\): changed 'norm.\w+' of collection 'batch_stats', .*; add 'batch_stats' to var"
    )
    with pytest.raises(ModifyCollectionError, match=match):
        remat(Block.forward, variables="state")(module, x)
    assert module.count == 0 and module.norm.num_batches_tracked == 0
    remat(Block.forward, variables=["state", "batch_stats"])(module, x)
    remat(Block.forward, variables="state")(module.eval(), x)
    assert module.count == 2 and module.norm.num_batches_tracked == 1


def test_methods_on_a_class():
    cls = remat(Block, methods={"forward": {"static_argnums": 1}, "ratio": {"policy": CP.dots_saveable}})
    module, x = cls(), torch.randn(4, SIZE)
    close(module.ratio(x, scale=2), Block.ratio(module, x, 2))
    only = remat(Block, methods=["ratio"])()
    assert only.forward.__func__ is Block.forward
    only.ratio(x, 3).sum().backward()
    assert only.up.weight.grad is not None


def test_arguments_without_a_meaning_in_torch_are_accepted():
    lifted = remat(Block.ratio, concrete=True, prevent_cse=False, static_argnums=(2,), static_argnames="scale")
    module, x = Block(), torch.randn(4, SIZE)
    close(lifted(module, x, 2), module.ratio(x, 2))
    assert torchlift.checkpoint is torchlift.remat


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_special(context):
    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(4, SIZE)
    with context():
        outs = []
        for forward, m in ((remat(Block.forward), module), (Block.forward, twin)):
            torch.manual_seed(0)
            outs.append(forward(m, x))
    close(*outs)
    assert torch.equal(module.norm.running_mean, twin.norm.running_mean) and module.count == 1


def test_autocast():
    module, x = Block().float(), torch.randn(4, SIZE, dtype=torch.float32)
    grads = []
    for forward in (Block.forward, remat(Block.forward)):
        module.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(module.eval(), x)
        out.sum().backward()
        grads.append(module.up.weight.grad.clone())
    assert torch.equal(*grads)


# With the other transforms -------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE)

    def forward(self, x):
        return x + F.dropout(self.norm(self.linear(x)), 0.5), None


@pytest.mark.parametrize("order", ["remat of scan", "scan of remat", "remat of vmap", "vmap of remat"])
def test_nested(order):
    n, (outer, inner) = 3, order.split(" of ")
    make = {
        "remat": remat,
        "scan": lambda c: scan(c, variable_axes={"params": 0}, length=n, compile=False),
        "vmap": lambda c: vmap(c, variable_axes={"params": 0}, in_axes=None, axis_size=n),
    }
    torch.manual_seed(0)
    lifted = make[outer](make[inner](Layer))()
    torch.manual_seed(0)
    plain = make[inner if outer == "remat" else outer](Layer)()
    x = torch.randn(BATCH, SIZE)
    forward = lambda m, x: m(x)[0]
    for got, expected in zip(run(forward, lifted, x), run(forward, plain, x), strict=True):
        close(got, expected)
    assert lifted.norm.num_batches_tracked.tolist() == [1] * n


def test_remat_scan_keeps_a_root_of_the_depth():
    class Step(nn.Linear):
        def forward(self, x):
            return super().forward(x).sin().exp().tanh()

    n, x, peaks = 64, torch.randn(256, 8, requires_grad=True), {}
    for lengths in ((n,), (4, 4, 4)):
        deep = remat_scan(Step, lengths=lengths, compile=False)(8, 8)
        with Allocations(x, deep.weight, deep.bias) as memory:
            deep(x).sum().backward()
        peaks[lengths] = memory.peak / x.nbytes
        assert deep.weight.grad.shape == (*lengths, 8, 8)
    extra = 12  # one step's own values and gradients, and the stacked weights'
    assert n <= peaks[n,] <= n + extra
    assert peaks[4, 4, 4] <= 4 + 4 + 4 + extra


# remat_scan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "aot_eager"])
@pytest.mark.parametrize("lengths", [(6,), (2, 3), (3, 1, 2), (1, 6)])
def test_remat_scan(lengths, compile):
    layers = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()) for _ in range(6)]
    stack = remat_scan(nn.Sequential, lengths=lengths, compile=compile).from_modules(layers)
    assert stack[0].weight.shape == (*lengths, SIZE, SIZE)
    x = expected = torch.randn(2, SIZE)
    for layer in layers:
        expected = layer(expected)
    out = stack(x)
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    grads = torch.stack([layer[0].weight.grad for layer in layers])
    close(stack[0].weight.grad, grads.unflatten(0, lengths))


def test_remat_scan_refuses_other_lengths():
    with pytest.raises(AxisError, match=r"'weight' in 'params' has \(2, 8\) on axis 0, expected \(2, 3\)"):
        remat_scan(lambda m, c: m(c), lengths=(2, 3), compile=False)(nn.Bilinear(8, 4, 2), torch.ones(8))
