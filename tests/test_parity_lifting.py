"""vmap, scan, remat and remat_scan compute what Flax computes: outputs, gradients and state, to 1e-12."""

import pytest
from parity import twins_remat, twins_scan, twins_vmap
from parity.store import load
from parity.torch_side import check, find_twins

EXPECTED = load("expected_lifting.npz")
TWINS = find_twins(EXPECTED, twins_vmap, twins_scan, twins_remat)
SCANS = set(find_twins(EXPECTED, twins_scan))
CAPTURED = [
    "scan_layers",
    "scan_layers_batch_stats",
    "scan_layers_reverse",
    "scan_time",
    "scan_time_unroll_remainder",
    "scan_carried_state",
    "scan_broadcast_input",
    "scan_layers_counter",
]


def test_every_scenario_has_a_twin():
    assert set(TWINS) == set(EXPECTED)


@pytest.mark.parametrize("name", TWINS)
def test_equals_flax(name):
    check(EXPECTED[name], TWINS[name], *([False] if name in SCANS else []))


@pytest.mark.filterwarnings("error::torchlift.errors.TorchliftCompileWarning")  # no silent plain loop
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_scan_equals_flax(name):
    check(EXPECTED[name], TWINS[name], {"backend": "aot_eager"})
