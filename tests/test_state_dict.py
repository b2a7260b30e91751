"""stack_state_dict and unstack_state_dict invert each other, and refuse what is not a stack of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlift
from torchlift import StateDictError, stack_state_dict, unstack_state_dict


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 12),
    prefix=st.sampled_from(["", "h.", "model.blocks.", "a[0]."]),
    axis=st.sampled_from([0, -1, 1]),
)
def test_unstack_undoes_stack(layers: int, prefix: str, axis: int) -> None:
    state = {f"{prefix}{i}.{name}": torch.randn(2, 3) for i in range(layers) for name in ("w", "sub.b")}
    others = {} if prefix == "" else {"embed": torch.randn(4)}
    stacked = stack_state_dict({**others, **state}, prefix, axis)
    assert set(stacked) == {*others, f"{prefix}w", f"{prefix}sub.b"}
    assert_same(unstack_state_dict(stacked, prefix, axis), {**others, **state})


def test_stacks_what_a_lifted_class_holds() -> None:
    layers = nn.ModuleList(nn.Linear(2, 3) for _ in range(4))
    stack = torchlift.vmap(nn.Linear, variable_axes={"params": 0}, axis_size=4)(2, 3)
    stack.load_state_dict(stack_state_dict(layers.state_dict(), ""))
    assert_same(unstack_state_dict(stack.state_dict(), ""), layers.state_dict())


def test_the_given_state_dict_is_not_changed_nor_shared() -> None:
    state = nn.ModuleList(nn.Linear(2, 2) for _ in range(2)).state_dict()
    keys = list(state)
    stacked = stack_state_dict(state, "")
    unstack_state_dict(stacked, "")["0.weight"].zero_()
    assert list(state) == keys and stacked["weight"].abs().sum() > 0


LAYERS = {f"h.{i}.w": torch.ones(2) for i in range(3)}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"w": torch.ones(1)}, "no key has the form h.0.name"),
        ({k: v for k, v in LAYERS.items() if k != "h.1.w"}, r"none with number \[1\]"),
        ({**LAYERS, "h.1.b": torch.ones(1)}, "layer 1 has .*'b'.*expected .*as in layer 0"),
        ({**LAYERS, "h.2.w": torch.ones(3)}, r"'w' of layer 2 is \(3,\).*expected \(2,\)"),
        ({**LAYERS, "h.2.w": torch.ones(2).double()}, "'w' of layer 2 .*float64, expected .*float32"),
        ({**LAYERS, "h.w": torch.ones(1)}, "'h.w' of the stacked entry is there already"),
    ],
)
def test_stack_refuses(state: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(StateDictError, match=match):
        stack_state_dict(state, "h.")


@pytest.mark.parametrize("axis", [2, -3])
def test_stack_refuses_an_axis_that_an_entry_cannot_have(axis: int) -> None:
    with pytest.raises(StateDictError, match=rf"'w' of each layer has 1 dim.*axes -2 to 1, got axis={axis}"):
        stack_state_dict(LAYERS, "h.", axis)


@pytest.mark.parametrize("state", [3, None, ["a"]])
def test_what_is_no_state_dict_is_refused(state: Any) -> None:
    expected = "got (int|NoneType|list), expected a state dict"
    with pytest.raises(StateDictError, match=rf"^stack_state_dict\(prefix='a\.'\): {expected}"):
        stack_state_dict(state, "a.")
    with pytest.raises(StateDictError, match=rf"^unstack_state_dict\(prefix='a\.', axis=0\): {expected}"):
        unstack_state_dict(state, "a.")


def test_a_number_is_written_in_one_way() -> None:
    stacked = stack_state_dict({**LAYERS, "h.00.w": torch.zeros(2)}, "h.")
    assert stacked["h.w"].tolist() == [[1, 1]] * 3 and set(stacked) == {"h.w", "h.00.w"}


@pytest.mark.parametrize(
    ("state", "axis", "match"),
    [
        ({"w": torch.ones(1)}, 0, "no key begins with 'h.'"),
        ({"h.w": torch.ones(2)}, 1, r"'w' has shape \(2,\), which has no axis 1"),
        ({"h.w": torch.ones(2), "h.b": torch.ones(3)}, 0, "different numbers of layers: {'w': 2, 'b': 3}"),
    ],
)
def test_unstack_refuses(state: dict[str, torch.Tensor], axis: int, match: str) -> None:
    with pytest.raises(StateDictError, match=match):
        unstack_state_dict(state, "h.", axis)
