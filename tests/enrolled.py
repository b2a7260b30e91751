"""A model with layers that a graph around them does not hold, and its plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlift

AOT = {"backend": "aot_eager"}


class Block(nn.Module):
    scale = 1.0

    def __init__(self, width: int = 4, p: float = 0.25):
        super().__init__()
        self.norm, self.linear, self.p = nn.LayerNorm(width), nn.Linear(width, width), p
        self.register_buffer("shift", torch.linspace(-1, 1, width))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        y = F.dropout(torch.tanh(self.linear(self.norm(x)) + self.shift), self.p, self.training) * self.scale
        y = y[..., :]
        return x + y if gain is None else x + y * gain


class Model(nn.Module):
    def __init__(self, n: int = 5, **options: Any):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = torchlift.scan_layers([Block() for _ in range(n)], **{"compile": AOT, **options})

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(self.blocks(self.embed(x), *args))

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, *args)
        return self.head(x)


class Graphs:
    """A backend that counts its graphs and their inputs."""

    def __init__(self, backend: str = "aot_eager"):
        self.inputs: list[int] = []
        self.compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.inputs.append(len(inputs))
        return self.compile(graph, inputs)


def results(call: Callable[..., Tensor], model: nn.Module, x: Tensor, *args: Any) -> list[Tensor]:
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = call(x, *args)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), [x, *trained]), torch.get_rng_state()]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def compiled(model: nn.Module, graphs: Any = "aot_eager") -> Callable[..., Tensor]:
    return torch.compile(model, fullgraph=True, backend=graphs)


def check(call: Callable[..., Tensor], model: Model, *args: Any, batch: int = 3) -> None:
    x = torch.randn(batch, 4)
    assert_equal(results(call, model, x, *args), results(model.loop, model, x, *args))
