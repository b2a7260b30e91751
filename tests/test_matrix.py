"""Each transform on each module, in each form and context, equals a plain loop or is refused by name."""

import pytest
import torch
from matrix.build import Cell
from matrix.contexts import CONTEXTS, fits
from matrix.modules import MODULES
from matrix.refusals import refusal_of
from matrix.twins import TRANSFORMS

CELLS = [
    cell
    for transform in TRANSFORMS
    for module in MODULES
    for form in ("class", "function")
    for context in CONTEXTS
    if fits(cell := Cell(transform, module, form, context))
]


@pytest.fixture(autouse=True)
def _one_thread():
    """These sizes are far too small to share out: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell, float64):
    run, refusal = CONTEXTS[cell.context], refusal_of(cell)
    if refusal is None:
        run(cell)
    else:
        with pytest.raises(refusal.error, match=refusal.match):
            run(cell)
