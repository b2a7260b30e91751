"""The cells that are refused: what is raised, why, and the way round."""

from dataclasses import dataclass

from .build import Cell


@dataclass(frozen=True)
class Refusal:
    """Cells whose names contain one of the given ones, None for all of them."""

    transforms: tuple | None
    modules: tuple | None
    forms: tuple | None
    contexts: tuple | None
    error: type
    match: str
    reason: str
    way: str

    def covers(self, cell: Cell):
        pairs = (
            (self.transforms, cell.transform.name), (self.modules, cell.module.name),
            (self.forms, cell.form), (self.contexts, cell.context),
        )  # fmt: skip
        return all(names is None or name in names for names, name in pairs)


REFUSALS = []


def refusal_of(cell):
    """The first refusal that covers a cell, or None."""
    return next((refusal for refusal in REFUSALS if refusal.covers(cell)), None)
