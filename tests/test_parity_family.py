"""jit, map_variables, autodiff, control flow, collectives and axis metadata compute what Flax computes."""

import pytest
from parity import (
    twins_autodiff,
    twins_collectives,
    twins_control,
    twins_jit,
    twins_metadata,
    twins_variables,
)
from parity.store import load
from parity.torch_side import check, find_twins

EXPECTED = load("expected_family.npz")
TWINS = find_twins(
    EXPECTED,
    twins_jit,
    twins_variables,
    twins_autodiff,
    twins_control,
    twins_collectives,
    twins_metadata,
)
NAMED = find_twins(EXPECTED, twins_metadata)


def test_every_scenario_has_a_twin():
    assert set(TWINS) == set(EXPECTED)


@pytest.mark.parametrize("name", TWINS)
def test_equals_flax(name):
    check(EXPECTED[name], TWINS[name])


@pytest.mark.parametrize("name", NAMED)
def test_axis_names_equal_flax(name):
    built = NAMED[name]()
    module = built[0] if isinstance(built, tuple) else built
    assert twins_metadata.names_of(module) == EXPECTED[name]["names"]
