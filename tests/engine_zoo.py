"""Bodies for the tests of the engine, and how the compiled loop is compared with the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from torchlift import checkpoint_policies
from torchlift.engine import compiled
from torchlift.engine.graphs import Backend
from torchlift.engine.run import Body, Stacked, last_report, run

EAGER_GRAPHS = {"backend": "aot_eager"}
closed_over = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    compiled.clear_cache()
    closed_over.grad = None
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def packed(monkeypatch):
    """aot_eager gets its graphs as they were traced; here it gets what Inductor gets."""
    monkeypatch.setattr(Backend, "exact", property(lambda self: False))
    compiled.clear_cache()
    yield
    compiled.clear_cache()


def rand(*size: int, **kw: Any) -> torch.Tensor:
    return torch.randn(*size, requires_grad=True, **kw)


def tanh_linear(c, h, x):
    h = torch.tanh(F.linear(h, c["w"], c["b"]) + x)
    return h, {"h": h, "none": None}


def attention(c, h, x):
    q, k, v = h @ c["q"], h @ c["k"], h @ x
    return h + torch.softmax(q @ k.mT / 2, -1) @ v, None


def rms_norm(c, h, x):
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * x
    return h, h


def draws(c, h, x):
    h = F.dropout(F.dropout(h + x, 0.3), 0.5)
    return h + torch.rand_like(h) + torch.randn(2, 4), torch.randn(())


def lstm(c, state, x):
    h, cell = state
    i, f, g, o = (x @ c["w"] + h @ c["u"]).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(cell)
    return (h, cell), h


def in_place(c, h, x):
    h = h.clone()
    h.mul_(2)
    h[:, 0] = 0
    h += x
    y = torch.zeros_like(h)
    y[:, 1] = h[:, 0]
    return h, y


def identity(c, h, x):
    return h, h


def unused(c, h, x):
    return h * 2 + c["a"], None


def leaves_of_all_kinds(c, h, x):
    a, n, flag = h
    return (a * (x["f"] * n).sum() + c, n + 1, ~flag), (n, flag, x["n"], 3, x["s"])


def closure(c, h, x):
    return torch.tanh(h * closed_over + x), None


def complex_numbers(c, h, x):
    return h * x, h.real


def detached(c, h, x):
    a, b = h
    return (a * x, b.detach() + a.mean(0).detach()), (a, b)


def views(c, h, x):
    h = h * x
    return h, (h.T, h[0], h.T)


def weights_twice(c, h, x):
    return torch.tanh(h @ c @ c.T + x @ c), (c.sum(),)


def cplx(*size):
    return torch.randn(*size, dtype=torch.complex128, requires_grad=True)


ZOO = {
    "tanh_linear": (tanh_linear, lambda: ({"w": rand(4, 4), "b": rand(4)}, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "attention": (attention, lambda: ({"q": rand(4, 4), "k": rand(4, 4)}, rand(2, 3, 4), rand(5, 4, 4), 5)),
    "rms_norm": (rms_norm, lambda: (None, rand(2, 4), rand(5, 4), 5)),
    "draws": (draws, lambda: (None, rand(2, 4), rand(5, 2, 4), 5)),
    "lstm": (
        lstm,
        lambda: ({"w": rand(3, 16), "u": rand(4, 16)}, (torch.zeros(2, 4), torch.zeros(2, 4)), rand(7, 2, 3), 7),
    ),
    "in_place": (in_place, lambda: (None, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "identity": (identity, lambda: (None, rand(2, 4), {}, 3)),
    "unused": (unused, lambda: ({"a": rand(4), "b": rand(3)}, torch.randn(2, 4), {"z": rand(3, 2)}, 3)),
    "kinds": (
        leaves_of_all_kinds,
        lambda: (
            rand(2),
            (rand(2), torch.tensor(0), torch.tensor([True, False])),
            {"f": rand(4, 2, 3), "n": torch.arange(4), "s": "text"},
            4,
        ),
    ),
    "closure": (closure, lambda: (None, torch.randn(2, 4), rand(5, 2, 4), 5)),
    "complex": (complex_numbers, lambda: (None, cplx(3), cplx(4, 3), 4)),
    "detached": (detached, lambda: (None, (rand(2, 4), torch.zeros(4)), rand(5, 2, 4), 5)),
    "views": (views, lambda: (None, rand(2, 4), rand(5, 2, 4), 5)),
    "weights_twice": (weights_twice, lambda: (rand(4, 4), rand(2, 4), rand(5, 2, 4), 5)),
    "empty": (rms_norm, lambda: (None, rand(0, 4), rand(5, 4), 5)),
    "one": (tanh_linear, lambda: ({"w": rand(4, 4), "b": rand(4)}, torch.randn(2, 4), rand(1, 2, 4), 1)),
    "transposed": (rms_norm, lambda: (None, rand(4, 2).T, rand(2, 5, 4).transpose(0, 1), 5)),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "unroll": {"unroll": 3},
    "remat": {"remat": True},
    "every": {"remat": True, "every": 2},
    "host": {"remat": checkpoint_policies.offload_carries},
    "nested": {"lengths": "nested"},
    "shared": {"shared_draws": True, "unroll": 2},
    "shared_remat": {"shared_draws": True, "remat": True},
    "reverse_unroll": {"reverse": True, "unroll": 2},
}


def as_list(tree: Any, length: int) -> list[Any]:
    """The slices of a stacked tree as leaves of their own."""

    def cut(leaf: Any, i: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach()[i].clone().requires_grad_(leaf.requires_grad)

    return [pytree.tree_map(lambda leaf, i=i: cut(leaf, i), tree) for i in range(length)]


def tensors(*trees: Any) -> list[torch.Tensor]:
    trees = tuple(t.tree if isinstance(t, Stacked) else t for t in trees)
    return [t for t in pytree.tree_leaves(trees) if isinstance(t, torch.Tensor)]


def evaluate(fn, make, as_a_list: bool, way: dict[str, Any], compile: Any) -> tuple[Any, list, list, torch.Tensor]:
    """Outputs, their tensors, gradients of all inputs, and the generator's state afterwards."""
    torch.manual_seed(3)
    closed_over.grad = None
    consts, carry, xs, length = make()
    xs = as_list(xs, length) if as_a_list else Stacked(xs)
    way = dict(way)
    if "lengths" in way:
        way["lengths"] = (2, length // 2) if length % 2 == 0 else (1, length, 1)
    inputs = [t for t in tensors(consts, carry, xs) if t.requires_grad] + [closed_over]
    out = run(
        Body(fn, ("test", fn.__name__), f"scan({fn.__name__})"), consts, carry, xs, length, compile=compile, **way
    )
    state = torch.get_rng_state()
    outs = tensors(*out)
    loss = sum((t * torch.linspace(0.1, 2, t.numel()).view(t.shape)).sum().abs() for t in outs if t.requires_grad)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return out, outs, list(grads), state


def assert_equal(got: list, expected: list, exact: bool) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if a is None or b is None:
            assert a is b
        else:
            tight = dict(rtol=0, atol=0) if exact else dict(rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(a, b, **tight, check_stride=False)


def compare(name: str, as_a_list: bool, way: str, compile: dict[str, Any]) -> None:
    fn, make = ZOO[name]
    plain_way = {k: v for k, v in WAYS[way].items() if k in ("reverse", "shared_draws")}
    expected, outs_b, grads_b, state_b = evaluate(fn, make, as_a_list, plain_way, False)
    got, outs_a, grads_a, state_a = evaluate(fn, make, as_a_list, WAYS[way], compile)
    assert last_report().path == "compiled", last_report()
    assert pytree.tree_structure(got[0]) == pytree.tree_structure(expected[0])
    assert_equal(outs_a, outs_b, exact=compile is EAGER_GRAPHS)
    assert_equal(grads_a, grads_b, exact=False)
    assert torch.equal(state_a, state_b)
    for a, b in zip(outs_a, outs_b):
        assert a.requires_grad == b.requires_grad


def loop(compile: Any = EAGER_GRAPHS, fn=tanh_linear, length: int = 5, batch: int = 2, **kw: Any):
    """A small loop and its leaves."""
    torch.manual_seed(5)
    consts = {"w": rand(4, 4), "b": rand(4)}
    xs = Stacked(rand(length, batch, 4))
    carry = torch.zeros(batch, 4)
    out, ys = run(Body(fn, ("loop", fn.__name__), "scan(loop)"), consts, carry, xs, length, compile=compile, **kw)
    return out, ys, [consts["w"], consts["b"], xs.tree]
