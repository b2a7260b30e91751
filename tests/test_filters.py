"""Collection filters: set algebra, the first match wins, In and Out, and how a transform is told what to do."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchlift
from torchlift import DenyList, In, Out
from torchlift.errors import AxisError, FilterError
from torchlift.filters import check, first_match, listed, matches
from torchlift.groups import Groups, Role

NAMES = ["params", "batch_stats", "buffers", "state", "intermediates", "", "a b", "パラメタ"]
names = st.sampled_from(NAMES) | st.text(max_size=3)
listings = st.lists(names, max_size=4)
plain = st.booleans() | names | listings | listings.map(tuple) | st.sets(names) | st.frozensets(names)
filters = st.recursive(plain, lambda inner: inner.map(DenyList), max_leaves=4)


def selected(filter):
    return {name for name in NAMES if matches(filter, name)}


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (True, set(NAMES)),
        (False, set()),
        ("params", {"params"}),
        ("param", set()),
        (["params", "state"], {"params", "state"}),
        (("params",), {"params"}),
        ({"state"}, {"state"}),
        (frozenset(), set()),
        (DenyList("params"), set(NAMES) - {"params"}),
        (DenyList(["params", "state"]), set(NAMES) - {"params", "state"}),
        (DenyList(True), set()),
        (DenyList(False), set(NAMES)),
        (DenyList(DenyList("params")), {"params"}),
    ],
)
def test_what_a_filter_selects(filter, expected):
    check(filter, "here")
    assert selected(filter) == expected


@given(filters)
def test_denylist_is_the_complement(filter):
    check(filter, "here")
    assert selected(DenyList(filter)) == set(NAMES) - selected(filter)
    assert selected(DenyList(DenyList(filter))) == selected(filter)


@given(listings, listings)
def test_de_morgan(a, b):
    assert selected([*a, *b]) == selected(a) | selected(b)
    assert selected(DenyList([*a, *b])) == selected(DenyList(a)) & selected(DenyList(b))


@given(listings)
def test_the_kind_of_listing_and_its_order_do_not_matter(listing):
    wanted = selected(listing)
    assert all(selected(kind(listing)) == wanted for kind in (tuple, set, frozenset))
    assert selected(listing[::-1]) == wanted


@given(names, names)
def test_a_name_is_the_listing_of_that_name(filter, name):
    assert matches(filter, name) == matches([filter], name) == (filter == name)


@given(st.lists(st.tuples(st.booleans() | names | listings.map(tuple), st.integers())), names)
def test_the_first_match_wins(rows, name):
    mapping = dict(rows)
    hits = [value for filter, value in mapping.items() if matches(filter, name)]
    assert first_match(mapping, name, None) == (hits[0] if hits else None)
    assert listed(mapping, name) == bool(hits)


@pytest.mark.parametrize("marker", [DenyList("params"), DenyList(("a", "b")), In(0), In(None), Out(-1), Out(None)])
def test_markers_are_hashable_values(marker):
    assert pickle.loads(pickle.dumps(marker)) == marker
    assert {marker: 1}[pickle.loads(pickle.dumps(marker))] == 1
    assert eval(repr(marker), {"DenyList": DenyList, "In": In, "Out": Out}) == marker


@pytest.mark.parametrize("filter", [None, 3, 0.5, b"params", {"params": 0}, object(), DenyList(None), In(0)])
def test_what_is_no_filter_is_refused(filter):
    with pytest.raises(FilterError, match=r"here: got .* as a filter, expected True, False, a name"):
        check(filter, "here")


@pytest.mark.parametrize("filter", [["params", 3], (None,), {0}, DenyList(["params", b"x"])])
def test_what_is_no_name_in_a_filter_is_refused(filter):
    with pytest.raises(FilterError, match=r"here: a filter lists names, got .* of type \w+ in it"):
        check(filter, "here")


@pytest.mark.parametrize(
    "use",
    [
        lambda: torchlift.variables(nn.Linear(1, 1), 3),
        lambda: torchlift.apply(nn.Linear(1, 1), {}, torch.ones(1), mutable=3),
        lambda: torchlift.vmap(lambda m, x: m(x), variable_axes={3: 0})(nn.Linear(1, 1), torch.ones(1, 1)),
        lambda: torchlift.scan(lambda m, c: (c, None), variable_carry=3, length=1)(nn.Linear(1, 1), 0),
        lambda: torchlift.scan(lambda m, c: (c, None), variable_broadcast=3, length=1)(nn.Linear(1, 1), 0),
        lambda: torchlift.remat(lambda m, x: m(x), variables=3)(nn.Linear(1, 1), torch.ones(1)),
        lambda: torchlift.remat(lambda m, x: m(x), rngs=3)(nn.Linear(1, 1), torch.ones(1)),
        lambda: torchlift.vmap(nn.Linear, variable_axes={3: 0}),
        lambda: torchlift.capture(3).__enter__(),
    ],
)
def test_every_public_filter_is_checked(use):
    with pytest.raises(FilterError, match="filter"):
        use()


def roles(variable_axes, broadcast=False, carry=False, collections=("params", "batch_stats", "state")):
    groups = Groups("here", variable_axes, broadcast, carry)
    return [groups.role(collection) for collection in collections]


SHARED = Role(None, None)
STACKED = Role(0, 0, writable=True)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"variable_axes": {}}, [SHARED, SHARED, SHARED]),
        ({"variable_axes": {"params": 0}}, [STACKED, STACKED, STACKED]),
        ({"variable_axes": {"params": 0, "state": None}}, [STACKED, STACKED, Role(None, None, writable=True)]),
        ({"variable_axes": {"params": 1, True: 0}}, [Role(1, 1, writable=True), STACKED, STACKED]),
        ({"variable_axes": {"state": 0}}, [SHARED, SHARED, STACKED]),
        ({"variable_axes": {DenyList("params"): 0}}, [SHARED, STACKED, STACKED]),
        ({"variable_axes": {"params": 0, "state": In(1)}}, [STACKED, STACKED, Role(1, 1)]),
        ({"variable_axes": {"params": In(0)}}, [Role(0, 0), STACKED, STACKED]),
        ({"variable_axes": {"state": Out(0)}}, [SHARED, SHARED, Role(None, 0, writable=True, hidden=True)]),
        ({"variable_axes": {"params": 0}, "broadcast": "state"}, [STACKED, STACKED, SHARED]),
        (
            {"variable_axes": {"params": 0}, "carry": "state"},
            [STACKED, STACKED, Role(None, None, carried=True, writable=True)],
        ),
    ],
)
def test_the_role_of_each_collection(groups, expected):
    assert roles(**groups) == expected


def test_a_name_in_two_arguments_is_refused():
    with pytest.raises(FilterError, match="here: collection 'state' is in variable_axes and in variable_carry"):
        roles({"state": 0}, carry=["state"])
    with pytest.raises(FilterError, match="'params' is in variable_broadcast and in variable_carry"):
        roles({}, True, True)


def test_a_collection_that_nobody_has_is_no_error():
    lifted = torchlift.vmap(lambda m, x: m(x), variable_axes={"nobody": 0}, split_rngs={"nothing": True})
    assert lifted(nn.Linear(2, 3), torch.ones(4, 2)).shape == (4, 3)
    assert torchlift.variables(nn.Linear(2, 3), "nobody") == {}


@pytest.mark.parametrize("axis", ["0", 1.0, True, In("0"), Out(0.5), (0,)])
def test_an_axis_is_an_int(axis):
    with pytest.raises(AxisError, match=r"here: variable_axes\['params'\] is .* expected an int, None, In\(axis\) or"):
        Groups("here", {"params": axis})


@pytest.mark.parametrize("mapping", ["params", ["params"], None, 0])
def test_axes_and_splits_are_mappings(mapping):
    with pytest.raises(FilterError, match=r"here: variable_axes is .* expected a dict such as \{'params': 0\}"):
        Groups("here", mapping)
    with pytest.raises(FilterError, match=r"here: split_rngs is .* expected a dict such as \{'dropout': True\}"):
        Groups("here", {}, split_rngs=mapping)


@pytest.mark.parametrize("split", [0, 1, None, "dropout"])
def test_a_split_is_a_bool(split):
    with pytest.raises(FilterError, match=r"here: split_rngs\['dropout'\] is .* expected True or False"):
        Groups("here", {}, split_rngs={"dropout": split})


@pytest.mark.parametrize(
    ("axes", "splits", "expected"),
    [
        ({}, {}, None),
        ({"params": 0}, {}, True),
        ({"params": 0}, {"dropout": False}, False),
        ({}, {"dropout": True}, True),
        ({}, {True: False}, False),
        ({"state": 0}, {"noise": True}, None),
        ({}, {("noise", "dropout"): True}, True),
        ({}, {DenyList("params"): True}, True),
    ],
)
def test_streams_follow_params(axes, splits, expected):
    groups = Groups("here", axes, split_rngs=splits)
    assert groups.splits("dropout") is expected
    assert ("dropout" in groups.untold_streams([])) == (expected is None)


def test_a_deny_list_of_several_names_is_a_key():
    assert (
        {DenyList(["state", "buffers"]): 0}
        == {DenyList({"buffers", "state"}): 0}
        == {DenyList(["buffers", "state"]): 0}
    )
    stack = torchlift.vmap(nn.Linear, variable_axes={DenyList(["buffers", "state"]): 0}, axis_size=2)(3, 4)
    assert stack.weight.shape == (2, 4, 3)
