"""Attention over short sequences as products: the same to rounding, in the graphs of a compiled loop and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlift import _compat, scan_layers
from torchlift.engine import attention
from torchlift.engine.capture import stride_order

aten = torch.ops.aten
FLASH = (attention._FORWARD, attention._BACKWARD)


def traced(
    batch=2, rows=7, columns=5, width=8, dtype=torch.float32, key_heads=3, requires=(True, True, True), **options
):
    """The joint graph of attention on heads that lie as a projection leaves them, and inputs for it."""

    def attend(*tensors):
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return [F.scaled_dot_product_attention(q, k, v, enable_gqa=key_heads != 3, **options)]

    sizes = ((batch, rows, 3), (batch, columns, key_heads), (batch, columns, key_heads))
    inputs = [torch.randn(*size, width, dtype=dtype, requires_grad=grad) for size, grad in zip(sizes, requires)]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
        graph = _compat.joint_graph(attend, fakes, train=True, inductor=True)
    return graph, inputs


def calls(graph):
    return [node.target for node in graph.graph.nodes if node.target in FLASH]


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "rows": 3}, {"scale": 0.25}, {"rows": 1, "columns": 1}],
    ids=str,
)
def test_products_compute_what_attention_does(options):
    graph, inputs = traced(**options)
    tangent = torch.randn(2, 3, options.get("rows", 7), 8)
    expected = graph(inputs, [tangent])
    assert len(calls(graph)) == 2
    attention.use_products(graph)
    assert not calls(graph)
    graph.graph.lint()
    found = graph(inputs, [tangent])
    for got, wanted in zip(*map(_compat.pytree.tree_leaves, (found, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert stride_order(got) == stride_order(wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 97, "columns": 96}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"key_heads": 1},
        {"attn_mask": torch.ones(7, 5, dtype=torch.bool).tril()},
    ],
    ids=["long", "float64", "bfloat16", "fewer keys", "mask"],
)  # fmt: skip
def test_what_stays_as_it_is(options):
    graph, _ = traced(**options)
    before = str(graph.graph)
    attention.use_products(graph)
    assert str(graph.graph) == before


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.qkv, self.causal = nn.Linear(16, 48), causal

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"remat": True}], ids=str)
def test_compiled_layers_equal_the_plain_ones(options):
    def results(compile):
        torch.manual_seed(1)
        module = scan_layers([Attention(causal=True) for _ in range(3)], compile=compile, **options)
        x = torch.randn(2, 6, 16, requires_grad=True)
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    for got, wanted in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
