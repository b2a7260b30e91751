"""Two ranks: gradients are averaged, and layer by layer."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

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


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_gradients_are_reduced_layer_by_layer(tmp_path):
    torch.multiprocessing.spawn(work, args=(str(tmp_path / "store"),), nprocs=2)
