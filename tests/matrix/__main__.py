"""``python -m tests.matrix``: how many cells are equal, how many refused, and the refused ones as a Markdown list."""

from .cells import CELLS
from .refusals import limits, refusal_of

refused = sum(refusal_of(cell) is not None for cell in CELLS)
print(f"{len(CELLS) - refused} cells equal a plain loop, {refused} are refused by name:\n")
print("\n".join(limits(CELLS)))
