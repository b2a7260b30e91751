"""``python -m tests.matrix``: how many cells are equal, how many refused, and the refused ones as a Markdown list.

Those of the transforms over kinds of modules, then those of the functions in one another.
"""

from .. import composition
from .cells import CELLS
from .refusals import limits, refusal_of

refused = sum(refusal_of(cell, traced=True) is not None for cell in CELLS)
print(f"{len(CELLS) - refused} cells equal a plain loop, {refused} are refused by name:\n")
print("\n".join(limits(CELLS)))

cells = [*composition.EAGER, *composition.COMPILED]
refused = sum(composition.refusal_of(*cell, traced=True) is not None for cell in cells)
print(f"\n{len(cells) - refused} pairs equal their definition in plain torch, {refused} are refused by name:\n")
print("\n".join(composition.limits()))
