"""Each transform on each module, in each form and context, equals a plain loop or is refused by name."""

import pytest
import torch
from matrix.cells import CELLS, is_slow
from matrix.contexts import CONTEXTS
from matrix.refusals import REFUSALS, limits, refusal_of


@pytest.fixture(autouse=True)
def _one_thread():
    """These sizes are far too small to share out: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _param(cell):
    return pytest.param(cell, marks=[pytest.mark.slow] if is_slow(cell) else [], id=str(cell))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [_param(cell) for cell in CELLS])
def test_cell(cell, float64):
    run, refusal = CONTEXTS[cell.context], refusal_of(cell)
    if refusal is None:
        run(cell)
    else:
        with pytest.raises(refusal.error, match=refusal.match):
            run(cell)


def test_every_refusal_is_of_some_cell_and_in_the_list():
    refused = [refusal_of(cell, traced=True) for cell in CELLS]
    assert all(refusal in refused for refusal in REFUSALS)
    assert len(limits(CELLS)) == len(REFUSALS)
