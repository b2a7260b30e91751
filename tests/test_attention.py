"""Attention over short sequences as products: the same to rounding, in the graphs of a compiled loop and nowhere else."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlift import _compat, scan_layers
from torchlift.engine import attention
from torchlift.engine.capture import CaptureError, stride_order

aten = torch.ops.aten
FLASH = (attention._FORWARD, attention._BACKWARD)


def traced(batch=2, rows=7, columns=5, width=8, dtype=torch.float32, key_heads=3, **options):
    """The joint graph of attention on heads that lie as a projection leaves them, and inputs for it."""

    def attend(*tensors):
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return [F.scaled_dot_product_attention(q, k, v, enable_gqa=key_heads != 3, **options)]

    sizes = ((batch, rows, 3), (batch, columns, key_heads), (batch, columns, key_heads))
    inputs = [torch.randn(*size, width, dtype=dtype, requires_grad=True) for size in sizes]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
        graph = _compat.joint_graph(attend, fakes, train=True, inductor=True)
        for node in graph.graph.nodes:
            if node.target is attention._FORWARD:  # as torch 2.13 declares it
                out, log_sums, *others = node.meta["val"]
                node.meta["val"] = (out, log_sums.to(torch.promote_types(dtype, torch.float32)), *others)
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
    attention.attend_by_products(graph)
    assert not calls(graph)
    graph.graph.lint()
    found = graph(inputs, [tangent])
    for got, wanted in zip(*map(_compat.pytree.tree_leaves, (found, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert stride_order(got) == stride_order(wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 97, "columns": 96}, {"batch": 2**14}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"key_heads": 1},
        {"attn_mask": torch.ones(7, 5, dtype=torch.bool).tril()},
    ],
    ids=["long", "many", "float64", "bfloat16", "fewer keys", "mask"],
)  # fmt: skip
def test_what_stays_as_it_is(options):
    graph, _ = traced(**options)
    before = str(graph.graph)
    attention.attend_by_products(graph)
    assert str(graph.graph) == before


def test_what_is_called_by_keywords_stays():
    """No capture writes it so; but ``is_causal`` would be passed over."""
    graph, _ = traced(is_causal=True)
    for node in graph.graph.nodes:
        if node.target in FLASH:
            node.args, node.kwargs = node.args[: 3 + 3 * (node.target is FLASH[1])], {"is_causal": True}
    before = str(graph.graph)
    attention.attend_by_products(graph)
    assert str(graph.graph) == before


def test_rows_whose_scores_are_all_minus_infinity_give_zeros():
    graph, inputs = traced(is_causal=True)
    with torch.no_grad():
        inputs[1][:, :3] = -torch.inf
        inputs[0].abs_()
    tangent = [torch.randn(2, 3, 7, 8)]
    expected = _compat.pytree.tree_leaves(graph(inputs, tangent))
    attention.attend_by_products(graph)
    out, *grads = _compat.pytree.tree_leaves(graph(inputs, tangent))
    assert not out[:, :, :3].any() and torch.isfinite(out).all()
    for got, wanted in zip([out, *grads], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_equal_calls_are_traced_once_and_stay_in_their_spans(monkeypatch):
    graph, _ = traced()
    node = next(node for node in graph.graph.nodes if node.target is FLASH[0])
    with graph.graph.inserting_after(node):
        again = graph.graph.node_copy(node)
    with graph.graph.inserting_after(again):
        graph.graph.call_function(operator.getitem, (again, 0)).meta = {"val": node.meta["val"][0]}
    node.meta["custom"] = {"span": "attend"}
    before, traces = set(graph.graph.nodes), []
    joint_graph = _compat.joint_graph
    monkeypatch.setattr(_compat, "joint_graph", lambda *args, **kw: traces.append(1) or joint_graph(*args, **kw))
    attention.attend_by_products(graph)
    assert len(traces) == 2  # of a forward and a backward
    new = [node for node in graph.graph.nodes if node not in before and node.target is aten.bmm.default]
    assert [node.meta.get("custom") for node in new][:2] == [{"span": "attend"}] * 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
            return x + self.out(out.transpose(1, 2).flatten(-2))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layers_equal_the_plain_ones(autocast):
    def results(compile):
        torch.manual_seed(1)
        module = scan_layers([Attention() for _ in range(3)], compile=compile, remat=autocast)
        x = torch.randn(2, 6, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    tolerance = 2e-2 if autocast else 1e-5
    for got, wanted in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_dtype_that_torch_declares_wrong_is_refused():
    """Torch before 2.13 takes what attention in float64 gives backward for float32, and so does what it compiles."""
    graph, _ = traced(dtype=torch.float64)
    forward = next(node for node in graph.graph.nodes if node.target is attention._FORWARD)
    out, log_sums, *others = forward.meta["val"]
    forward.meta["val"] = (out, log_sums.float(), *others)
    with pytest.raises(CaptureError, match="takes a result of attention in float64 for float32"):
        attention.attend_by_products(graph)
