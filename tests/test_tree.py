"""Pytrees: dataclasses are nodes without being registered, paths are readable, axes fit as prefixes."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import torchlift
from torchlift import _tree
from torchlift.errors import AxisError


@dataclasses.dataclass
class State:
    h: Any
    c: Any = None
    label: str = "s"


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Any


@dataclasses.dataclass
class Checked:
    x: Any

    def __post_init__(self):
        if not isinstance(self.x, torch.Tensor):
            raise ValueError("x must be a tensor")


Pair = collections.namedtuple("Pair", "a b")
ONE = torch.ones(1)

leaves = st.integers() | st.none() | st.text(max_size=2)
trees = st.recursive(
    leaves,
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), t)
        | st.builds(Pair, t, t)
        | st.builds(State, t, t)
        | st.builds(Frozen, t)
    ),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    found, spec = _tree.flatten(tree)
    assert _tree.unflatten(found, spec) == tree
    assert _tree.flatten(tree)[1] == spec
    assert _tree.map_leaves(lambda leaf: leaf, tree) == tree


@given(trees)
def test_one_path_for_each_leaf(tree):
    found = _tree.paths(tree)
    assert len(found) == len(_tree.flatten(tree)[0])
    assert len(set(found)) == len(found)


@given(trees)
def test_one_axis_covers_every_leaf(tree):
    assert _tree.broadcast_prefix(0, tree, "here") == [0] * len(_tree.flatten(tree)[0])
    assert _tree.broadcast_prefix(None, tree, "here") == [None] * len(_tree.flatten(tree)[0])


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (torch.ones(1), [""]),
        ((1, [2, 3]), ["[0]", "[1][0]", "[1][1]"]),
        ({"h": 1, "c": Pair(2, 3)}, ["['h']", "['c'].a", "['c'].b"]),
        ({"s": State(1, (2, 3))}, ["['s'].h", "['s'].c[0]", "['s'].c[1]", "['s'].label"]),
        (Frozen(State(1)), [".inner.h", ".inner.c", ".inner.label"]),
        ((), []),
    ],
)
def test_paths(tree, expected):
    assert _tree.paths(tree) == expected


def test_what_stands_beside_a_tuple_is_not_compared():
    array = np.array([1.0, 2.0])  # with a dict it compares element by element
    assert _tree.flatten(((torch.ones(1),), array))[0][1] is array


def test_modules_and_variables_are_leaves():
    module = nn.BatchNorm1d(1)
    variable = torchlift.Variable(module, "batch_stats", "running_mean")
    found, _ = _tree.flatten({"m": [module], "v": State(variable)})
    assert found[0] is module and found[1] is variable


def test_a_dataclass_is_rebuilt_without_its_checks():
    found, spec = _tree.flatten(Checked(torch.ones(1)))
    again = _tree.unflatten(["no tensor"], spec)
    assert type(again) is Checked and again.x == "no tensor"


def test_torch_is_told_nothing_of_the_users_class():
    _tree.flatten(State(1))
    assert State not in pytree.SUPPORTED_NODES and pytree.tree_leaves(State(1)) == [State(1)]


def test_specs_of_other_classes_or_structures_differ():
    specs = [_tree.flatten(tree)[1] for tree in (State(1), Frozen(1), State((1, 2)), [1, None, "s"], {"h": 1})]
    assert all((a == b) == (i == j) for i, a in enumerate(specs) for j, b in enumerate(specs))
    assert _tree.flatten(State(1))[1] == _tree.flatten(State(torch.ones(3), label="other"))[1]


@pytest.mark.parametrize(
    ("tensors", "others"),
    [(ONE, 0), ((ONE,), (0,)), ([ONE, ONE], [0, 1]), ((), ()), ([ONE] * 20, [0] * 20), (Pair(ONE, ONE), Pair(0, 1))],
)
def test_tensors_have_the_spec_of_other_leaves(tensors, others):
    leaves, spec = _tree.flatten(tensors)
    assert spec == _tree.flatten(others)[1]
    rebuilt = _tree.unflatten(leaves, spec)
    assert type(rebuilt) is type(tensors) and all(leaf is ONE for leaf in _tree.flatten(rebuilt)[0])


@pytest.mark.parametrize(
    ("prefix", "tree", "expected"),
    [
        ((0, None), (1, [2, 3]), [0, None, None]),
        ([0, 1], (1, (2, 3)), [0, 1, 1]),
        ((0, {"a": 1, "b": None}), (1, {"a": (2, 3), "b": 4}), [0, 1, 1, None]),
        ({"b": 0, "a": 1}, {"a": 1, "b": 2}, [1, 0]),
        ((0, -1), Pair(1, State(2)), [0, -1, -1, -1]),
        ((), (), []),
    ],
)
def test_axes_as_a_prefix(prefix, tree, expected):
    assert _tree.broadcast_prefix(prefix, tree, "here") == expected


@pytest.mark.parametrize(
    ("prefix", "tree", "got"),
    [
        ((0, 0), (1,), "1 elements"),
        ((0,), 1, "type int"),
        ({"a": 0}, {"a": 1, "b": 2}, "keys"),
        ({"a": 0}, [1], "1 elements"),
        ((0, (0, 0)), (1, {"b": 1}), "keys"),
    ],
)
def test_axes_that_do_not_fit(prefix, tree, got):
    with pytest.raises(AxisError, match=rf"here: axes .* do not fit a value with {got}"):
        _tree.broadcast_prefix(prefix, tree, "here")


@pytest.mark.parametrize("wrap", [State, Frozen, lambda x: Pair(x, x), lambda x: {"k": [x, None]}, Checked])
def test_trees_pass_through_every_transform(wrap):
    def body(module, tree):
        return _tree.map_leaves(lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf, tree)

    tree, module = wrap(torch.zeros(3)), nn.Identity()
    one = wrap(torch.ones(3))
    results = [
        torchlift.vmap(body)(module, tree),
        torchlift.remat(body)(module, tree),
        torchlift.scan(lambda m, c: (body(m, c), None), length=1, compile=False)(module, tree)[0],
        torchlift.scan(lambda m, c, x: (c, body(m, x)), compile=False)(module, 0, tree)[1],
        torchlift.apply(module, {}, tree, method=body),
    ]
    for result in results:
        assert type(result) is type(tree)
        got, spec = _tree.flatten(result)
        expected, expected_spec = _tree.flatten(one)
        assert spec == expected_spec
        for a, b in zip(got, expected):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


class Output(collections.OrderedDict):
    """As libraries of models make them: every field is an item too."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self[name] = value


@dataclasses.dataclass
class Logits(Output):
    logits: Any = None
    hidden: Any = None


@pytest.mark.parametrize("lifted", [torchlift.vmap, torchlift.remat])
def test_a_model_output_keeps_its_items_in_step(lifted):
    out = lifted(lambda m, x: Logits(2 * x))(nn.Identity(), torch.ones(3))
    assert type(out) is Logits and out["logits"] is out.logits and out.hidden is None
    assert torch.equal(out.logits, torch.full((3,), 2.0))
