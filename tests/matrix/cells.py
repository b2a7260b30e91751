"""All cells of the matrix."""

from .build import Cell
from .contexts import CONTEXTS
from .modules import MODULES
from .twins import TRANSFORMS


def fits(cell):
    """Whether there is such a cell: some transforms have one form, or no engine, or are called through apply alone."""
    t = cell.transform
    if cell.context == "engine" and not t.engine or cell.context == "func.vmap outside" and t.applied:
        return False
    # To compile takes a second or two: each pair of transform and module in one form, the forms in turn.
    turn = TRANSFORMS.index(t) + MODULES.index(cell.module)
    return cell.form in t.forms and (cell.context != "compiled" or cell.form == t.forms[turn % len(t.forms)])


CELLS = [
    cell
    for transform in TRANSFORMS
    for module in MODULES
    for form in ("class", "function")
    for context in CONTEXTS
    if fits(cell := Cell(transform, module, form, context))
]

# These cells are of one kind each; the others are marked as slow.
COMPILED = {"linear", "batch-norm", "dropout", "custom collections", "closure", "with hooks"}


def is_slow(cell):
    return cell.context == "compiled" and cell.module.name not in COMPILED
