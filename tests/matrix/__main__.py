"""``python -m tests.matrix``: how many cells are equal, how many refused, and the refused ones as a Markdown list."""

from .cells import CELLS
from .refusals import REFUSALS, refusal_of


def limits():
    """The refused cells, one line for each refusal."""
    lines = []
    for refusal in REFUSALS:
        count = sum(refusal_of(cell) is refusal for cell in CELLS)
        columns = (refusal.transforms, refusal.modules, refusal.contexts)
        where = " / ".join(", ".join(names) if names else "any" for names in columns)
        lines.append(f"- {where}: {refusal.reason} (`{refusal.error.__name__}`, {count} cells). Instead: {refusal.way}.")
    return lines


def main():
    refused = sum(refusal_of(cell) is not None for cell in CELLS)
    print(f"{len(CELLS) - refused} cells equal a plain loop, {refused} are refused by name:\n")
    print("\n".join(limits()))


if __name__ == "__main__":
    main()
