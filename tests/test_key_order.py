"""Which key of a dict comes first is no structure: not of what is carried, chosen or differentiated."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import torchlift
from torchlift import _tree
from torchlift.errors import CarryError

EAGER_GRAPHS = {"backend": "aot_eager"}


class Both(NamedTuple):
    first: dict
    second: list


def module():
    return nn.Linear(2, 2)


def turned(m, s, x=0.1):
    return {"c": s["c"] + x, "h": m(s["h"])}


def start():
    return {"h": torch.ones(2, requires_grad=True), "c": torch.ones(2)}


def compiled(fn):
    return torch.compile(fn, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("around", [lambda fn: fn, compiled], ids=["called", "in a graph"])
@pytest.mark.parametrize("compile", [False, EAGER_GRAPHS], ids=["plain", "compiled"])
def test_a_carry_of_scan(around, compile):
    m, xs, s = module(), torch.rand(3, 2), start()
    found, _ = around(lambda s: torchlift.scan(lambda *a: (turned(*a), None), compile=compile)(m, s, xs))(s)
    expected = s
    for x in xs:
        expected = turned(m, expected, x)
    assert list(found) == ["h", "c"]
    torch.testing.assert_close(found, {"h": expected["h"], "c": expected["c"]})
    (grad,), (wanted,) = (torch.autograd.grad(out["h"].sum(), [s["h"]]) for out in (found, expected))
    torch.testing.assert_close(grad, wanted)


def test_another_leaf_is_still_refused():
    with pytest.raises(CarryError, match=r"got dict with leaves \[\"\['c'\]\", \"\['i'\]\"\], expected dict"):
        torchlift.scan(lambda m, s, x: ({"c": s["c"], "i": s["h"]}, None), compile=False)(
            module(), start(), torch.ones(2)
        )
    with pytest.raises(CarryError, match=r"carry\['h'\] changed: got torch.float32 \[1\]"):
        torchlift.scan(lambda m, s, x: ({"c": s["c"], "h": s["h"][:1]}, None), compile=False)(
            module(), start(), torch.ones(2)
        )


@pytest.mark.parametrize("bound", [None, 5])
def test_a_carry_of_while_loop(bound):
    m, s = module(), start()
    with torch.no_grad():
        found = torchlift.while_loop(lambda m, s: s["c"].sum() < 2.3, turned, m, s, max_steps=bound)
        torch.testing.assert_close(found, {"h": m(m(s["h"])), "c": torch.full((2,), 1.2)})
    with pytest.raises(CarryError, match=r"body_fn returned torch.float64 \[2\] as carry\['c'\]"):
        torchlift.while_loop(lambda m, s: True, lambda m, s: {"c": s["c"].double(), "h": s["h"]}, m, s)


@pytest.mark.parametrize("around", [lambda fn: fn, compiled], ids=["called", "in a graph"])
def test_what_branches_return(around):
    def row(m, x, p):
        return torchlift.cond(p, lambda m, x: {"a": x, "b": 2 * x}, lambda m, x: {"b": x, "a": -x}, m, x)

    m, x, p = module(), torch.ones(2), torch.tensor([True, False])
    found = around(lambda x, p: torchlift.vmap(row)(m, x, p))(x, p)
    torch.testing.assert_close(found, {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([2.0, 1.0])})


def test_cotangents_and_tangents():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    _, pull = torchlift.vjp(lambda m, x: {"a": x, "b": 2 * x}, module(), a)
    torch.testing.assert_close(pull({"b": b, "a": a})[1], a + 2 * b)
    tangents = ({"b": b, "a": a},)
    _, tangent = torchlift.jvp(lambda m, d: d["a"] + 2 * d["b"], module(), ({"a": a, "b": b},), tangents, {})
    torch.testing.assert_close(tangent, a + 2 * b)


def test_what_a_rule_returns():
    def forward(m, d):
        return d["a"] * 2 + d["b"] * 3

    rule = torchlift.custom_vjp(
        forward, lambda m, d: (forward(m, d), None), lambda _, ct: ({}, {"b": 3 * ct, "a": 2 * ct})
    )
    d = {key: torch.ones(2, requires_grad=True) for key in "ab"}
    rule(module(), d).sum().backward()
    assert d["a"].grad.tolist() == [2, 2] and d["b"].grad.tolist() == [3, 3]


def test_inside_of_other_containers():
    like = Both({"x": 1, "y": 2}, [{"p": 3, "q": (4,)}])
    _, spec = _tree.flatten(like)
    leaves, found = _tree.flatten_like(Both({"y": 2, "x": 1}, [{"q": (4,), "p": 3}]), spec)
    assert leaves == [1, 2, 3, 4] and found == spec
    for other in (
        Both({"y": 2, "z": 1}, [{"q": (4,), "p": 3}]),
        Both({"y": 2, "x": 1}, [{"q": [4], "p": 3}]),
        {"x": 1},
    ):
        assert _tree.flatten_like(other, spec)[1] != spec


class Made:
    """A node that cannot be made of anything."""

    def __init__(self, a):
        self.a = a + 0


torch.utils._pytree.register_pytree_node(Made, lambda made: ([made.a], None), lambda leaves, _: Made(*leaves))


def test_a_node_of_another_library_that_changes_is_refused():
    with pytest.raises(CarryError, match="the carry changed its structure"):
        torchlift.scan(lambda m, s, x: ([s.a], None), compile=False)(module(), Made(torch.ones(2)), torch.ones(2))
