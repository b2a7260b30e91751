"""What differs on a CUDA device: kernels, its generator, streams, graphs, and memory that can be measured."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift import apply, scan, scan_layers, vmap
from torchlift.engine.compiled import clear_cache
from torchlift.engine.run import last_report

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("error::torchlift.TorchliftCompileWarning")]
CP = torchlift.checkpoint_policies
WIDTH = 64


class Block(nn.Module):
    def __init__(self, width=WIDTH, p=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.p = p

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.p, self.training)


class Attention(nn.Module):
    def __init__(self, width=WIDTH, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(self.linear(x)).relu()


def stack(count=4, cls=Block, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    return scan_layers([cls().to("cuda", dtype) for _ in range(count)], **settings)


def outcome(module, x):
    """Output, gradients, state, and where the generators stand afterwards."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    return [out.detach(), x.grad, *grads, *module.buffers(), torch.get_rng_state(), torch.cuda.get_rng_state()]


def peak(step):
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


WAYS = {
    "compiled": {},
    "remat": {"remat": True},
    "policy": {"policy": CP.dots_saveable},
    "every": {"remat": True, "every": 2},
    "lengths": {"lengths": (2, 2)},
    "unrolled": {"unroll": 2},
    "carries on the host": {"policy": CP.offload_carries},
    "carries on the host, nested": {"policy": CP.offload_carries, "lengths": (2, 2)},
    "reduce-overhead": {"compile": {"mode": "reduce-overhead"}},
}


@pytest.mark.parametrize("cls", [Block, Attention, Normed], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_layers_equal_the_loop_in_float64(cls, way):
    x = torch.randn(4, 8, WIDTH, device="cuda", dtype=torch.float64)
    x = x.flatten(0, 1) if cls is Normed else x
    expected = outcome(stack(cls=cls, dtype=torch.float64, compile=False), x)
    module = stack(cls=cls, dtype=torch.float64, **WAYS[way])
    for _ in range(2):
        got = outcome(module, x)
        if cls is Normed:  # its state goes on from step to step
            module = stack(cls=cls, dtype=torch.float64, **WAYS[way])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert last_report().path == "compiled"


@pytest.mark.parametrize("way", WAYS)
def test_dropout_draws_as_the_loop_does(way):
    x = torch.randn(8, WIDTH, device="cuda", dtype=torch.float64)
    make = dict(cls=lambda: Block(p=0.5), dtype=torch.float64)
    expected = outcome(stack(**make, compile=False), x)
    torch.testing.assert_close(outcome(stack(**make, **WAYS[way]), x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offloaded", [CP.offload_carries, CP.offload_dot_with_no_batch_dims("device", "pinned_host")])
def test_a_plain_loop_offloads_too(offloaded):
    x = torch.randn(8, WIDTH, device="cuda", dtype=torch.float64)
    expected = outcome(stack(dtype=torch.float64, compile=False), x)
    got = outcome(stack(dtype=torch.float64, compile=False, policy=offloaded), x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "plain"])
def test_offloaded_carries_leave_the_device(compile):
    x = torch.randn(4096, WIDTH, device="cuda", requires_grad=True)
    carry = x.numel() * 4

    def of(count, **settings):
        module = stack(count, compile=compile, **settings).requires_grad_(False)
        return peak(lambda: torch.autograd.grad(module(x).sum(), x))

    few, many = 4, 36
    kept = of(many, remat=True) - of(few, remat=True)
    away = of(many, policy=CP.offload_carries) - of(few, policy=CP.offload_carries)
    assert kept >= (many - few - 1) * carry
    assert away <= 2 * carry


def test_offloaded_carries_serve_a_retained_graph_twice():
    x = torch.randn(64, WIDTH, device="cuda", dtype=torch.float64, requires_grad=True)
    total = stack(6, dtype=torch.float64, policy=CP.offload_carries)(x).square().sum()
    first = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, x), first, rtol=0, atol=0)


def test_offloaded_carries_on_a_stream_of_ones_own():
    x = torch.randn(512, WIDTH, device="cuda", dtype=torch.float64)
    expected = outcome(stack(dtype=torch.float64, compile=False), x)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = outcome(stack(dtype=torch.float64, policy=CP.offload_carries), x)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_reduce_overhead_keeps_what_earlier_calls_gave():
    module = stack(compile={"mode": "reduce-overhead"})
    xs = [torch.randn(8, WIDTH, device="cuda") for _ in range(4)]
    outs = [module(x) for x in xs]
    for x, out in zip(xs, outs):
        torch.testing.assert_close(out, stack(compile=False)(x), rtol=1e-4, atol=1e-4)
    sum(out.square().sum() for out in outs).backward()


def test_a_whole_step_can_be_captured_in_a_cuda_graph():
    module, static = stack(), torch.randn(8, WIDTH, device="cuda")

    def step():
        for p in module.parameters():
            p.grad = None
        out = module(static)
        out.square().sum().backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        x = torch.randn(8, WIDTH, device="cuda")
        static.copy_(x)
        graph.replay()
        twin = stack(compile=False)
        wanted = twin(x)
        wanted.square().sum().backward()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
        for p, q in zip(module.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_a_loop_inside_torch_compile():
    x = torch.randn(8, WIDTH, device="cuda", dtype=torch.float64)
    expected = outcome(stack(dtype=torch.float64, compile=False), x)
    inner = stack(dtype=torch.float64)
    outer = torch.compile(inner, fullgraph=True)
    outer.buffers, outer.parameters, outer.zero_grad = inner.buffers, inner.parameters, inner.zero_grad
    torch.testing.assert_close(outcome(outer, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("remat", [False, True])
def test_autocast(remat):
    x = torch.randn(8, WIDTH, device="cuda")
    results = []
    for compile in (True, False):
        with torch.autocast("cuda", torch.bfloat16):
            results.append(outcome(stack(remat=remat, compile=compile), x))
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)


class Cell(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.x, self.h = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h, x):
        h = torch.tanh(self.x(x) + self.h(h))
        return h, h


@pytest.mark.parametrize("unroll", [1, 4, "auto"])
def test_a_scan_over_time(unroll):
    x = torch.randn(3, 10, WIDTH, device="cuda", dtype=torch.float64)
    results = []
    for compile in (True, False):
        torch.manual_seed(1)
        over = scan(Cell, variable_broadcast="params", in_axes=1, out_axes=1, compile=compile, unroll=unroll)
        cell = over().to("cuda", torch.float64)
        h, y = cell(x.new_zeros(3, WIDTH), x)
        results.append([h, y, *torch.autograd.grad(h.sum() + y.square().sum(), list(cell.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_an_ensemble_built_on_the_device():
    with torch.device("cuda"):
        nets = vmap(Normed, variable_axes={"params": 0}, in_axes=None, axis_size=3)()
    x = torch.randn(16, WIDTH, device="cuda")
    out = nets(x)
    out.sum().backward()
    assert nets.linear.weight.is_cuda and nets.linear.weight.grad.shape == (3, WIDTH, WIDTH)
    torch.testing.assert_close(out, torch.stack([net(x) for net in nets.to_modules()]))


def test_dropout_of_an_ensemble_is_one_for_each():
    nets = vmap(nn.Dropout, variable_axes={"params": 0}, in_axes=None, axis_size=3)()
    rows = nets(torch.ones(1000, device="cuda"))
    assert not torch.equal(rows[0], rows[1])


def test_remat_under_a_transform_of_torch_func():
    block = torchlift.remat(Block)().to("cuda", torch.float64)
    params = {name: p.detach() for name, p in block.named_parameters()}
    x = torch.randn(8, WIDTH, device="cuda", dtype=torch.float64)

    def loss(params, row):
        return apply(block, {"params": params}, row).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    expected = [torch.func.grad(loss)(params, row) for row in x]
    for name in params:
        torch.testing.assert_close(got[name], torch.stack([g[name] for g in expected]))


def test_the_compilation_is_one_for_many_batch_sizes():
    clear_cache()
    module = stack()
    for size in (8, 16, 24, 40):
        module(torch.randn(size, WIDTH, device="cuda")).sum().backward()
    assert last_report().compilations <= 2


def test_a_step_in_mixed_precision_with_a_scaler():
    module = stack()
    optimizer, scaler = torch.optim.AdamW(module.parameters(), fused=True), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.float16):
            loss = module(torch.ones(8, WIDTH, device="cuda")).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
