"""Two ranks: gradients are averaged, and layer by layer."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from enrolled import Graphs, Model
from torch import nn

from torchlift import _compat
from torchlift.engine.loop import Body
from torchlift.engine.run import last_report, run


class Layers(nn.Module):
    def __init__(self, n: int, compile):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(n))
        self.compile = compile

    def forward(self, x):
        body = Body(lambda c, h, p: (torch.tanh(nn.functional.linear(h, p["weight"], p["bias"])), None), "ddp", "scan")
        xs = [dict(layer.named_parameters()) for layer in self.layers]
        return run(body, None, x, xs, len(xs), compile=self.compile)[0]


def work(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    grads = []
    for compile in ({"backend": "aot_eager"}, False):
        torch.manual_seed(0)
        model = Layers(6, compile)
        # One bucket for each layer: its reduction starts when the layer's backward is done, not at the end.
        ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4)
        events: list[str] = []
        for i, layer in enumerate(model.layers):
            layer.weight.register_post_accumulate_grad_hook(lambda p, i=i, events=events: events.append(f"layer {i}"))

        def reduce(state, bucket, events=events):
            events.append("reduce")
            tensor = bucket.buffer() / 2
            return dist.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])

        ddp.register_comm_hook(None, reduce)
        for step in range(3):  # the buckets are rebuilt after the first
            events.clear()
            model.zero_grad()
            ddp(torch.full((4, 8), float(rank + step + 1))).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        if compile:
            assert last_report().nodes == 6
            assert [e for e in events if e != "reduce"] == [f"layer {i}" for i in reversed(range(6))]
            assert "reduce" in events[: events.index("layer 0")], events
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    dist.barrier()
    # Without cleaning up: DDP's destructor waits for gloo's thread, which may wait for the interpreter that it holds.
    os._exit(0)


def work_inside_compile(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, xs = Model(5).eval(), torch.randn(2, 3, 4)
    sum(model.loop(x).square().mean() for x in xs).div(2).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    graphs = Graphs()
    around = torch.compile(nn.parallel.DistributedDataParallel(model), backend=graphs)
    within = nn.parallel.DistributedDataParallel(torch.compile(model, backend=graphs, fullgraph=True))
    for call in (around, around, within, within):
        model.zero_grad()
        call(xs[rank]).square().mean().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-12, atol=1e-12)
    assert all(count < 16 for count in graphs.inputs)
    dist.barrier()
    os._exit(0)  # see above


NEEDS_GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.slow
@NEEDS_GLOO
@pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED)
def test_gradients_of_layers_that_no_graph_holds_are_reduced(tmp_path):
    torch.multiprocessing.spawn(work_inside_compile, args=(str(tmp_path / "store"),), nprocs=2)


@pytest.mark.slow
@NEEDS_GLOO
def test_gradients_are_reduced_layer_by_layer(tmp_path):
    torch.multiprocessing.spawn(work, args=(str(tmp_path / "store"),), nprocs=2)
