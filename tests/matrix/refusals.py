"""The cells that are refused: what is raised, why, and the way round."""

from dataclasses import dataclass

from torchlift import _compat
from torchlift.errors import ModifyCollectionError, PublishError

from .build import Cell


@dataclass(frozen=True)
class Refusal:
    """Cells that have one of the given names in each column; None stands for all of them."""

    error: type
    match: str
    reason: str
    way: str
    transforms: tuple | None = None
    modules: tuple | None = None
    forms: tuple | None = None
    contexts: tuple | None = None

    def covers(self, cell: Cell):
        columns = (self.transforms, self.modules, self.forms, self.contexts)
        names = (cell.transform.name, cell.module.name, cell.form, cell.context)
        return all(told is None or name in told for told, name in zip(columns, names, strict=True))


STATEFUL = ("batch-norm", "custom collections")

SHARED = ("vmap (shared params)",)
REFUSALS = [
    Refusal(
        RuntimeError,
        "were not batched|read-only there; give it an axis",
        "as the next, but `torch.compile(fullgraph=True)` wraps the error in one of its own",
        "as the next",
        transforms=SHARED,
        modules=STATEFUL,
        contexts=("compiled",),
    ),
    Refusal(
        ModifyCollectionError,
        "give it(s collection)? an axis: variable_axes=",
        "the indices of a `vmap` have no order, so what all of them share and change has no last value",
        "give the state an axis of its own, `variable_axes={'params': None, True: 0}`",
        transforms=SHARED,
        modules=STATEFUL,
    ),
    Refusal(
        RuntimeError,
        "Batching rule not implemented for aten::lstm_cell",
        "torch has no batching rule for `nn.LSTMCell`, and what `torch.compile` traces cannot fall back to a loop",
        "call the mapped module outside of `torch.compile`",
        transforms=("vmap (own params)", "vmap (shared params)", "vmap (own state)"),
        modules=("LSTM cell",),
        contexts=("compiled",),
    ),
    Refusal(
        RuntimeError,
        "Batching rule not implemented for aten::lstm_cell",
        "torch has no batching rule for `nn.LSTMCell`, which `torch.func.vmap` needs",
        "map with `torchlift.vmap`, which then runs index by index",
        modules=("LSTM cell",),
        contexts=("func.vmap outside", "func.vmap outside, through apply"),
    ),
    Refusal(
        RuntimeError,
        "by a closure or an attribute, which a compiled graph around the loop would not see change",
        "inside `torch.compile` a loop is one operator, and a tensor that its body closes over is no input of it",
        "pass the tensor as an argument or make it a parameter or buffer; or compile the loop alone",
        transforms=("scan (layers)", "scan (time)", "remat_scan", "scan_layers"),
        modules=("closure",),
        contexts=("compiled",),
    ),
    Refusal(
        PublishError,
        r"torchlift.apply\(module, .*mutable=",
        "under `torch.func.vmap` every row has new state, and a module holds one",
        "take the new state as an output: `torchlift.apply(module, variables, x, mutable=[...])`",
        modules=STATEFUL,
        contexts=("func.vmap outside",),
    ),
]

# Before torch 2.13, beside those.
UNTRACED = Refusal(
    RuntimeError,
    "torch.compile before torch 2.13 cannot trace a lifted module",
    "",
    "",
    contexts=("compiled",),
)


def refusal_of(cell, traced=_compat.TRACES_MODULES):
    """The first refusal that covers a cell, or None."""
    refusals = REFUSALS if traced else [UNTRACED, *REFUSALS]
    return next((refusal for refusal in refusals if refusal.covers(cell)), None)


def limits(cells):
    """The refused cells as a Markdown list, one line for each refusal; before torch 2.13 there is one more."""
    lines = []
    for refusal in REFUSALS:
        count = sum(refusal_of(cell, traced=True) is refusal for cell in cells)
        columns = (refusal.transforms, refusal.modules, refusal.contexts)
        where = " / ".join(", ".join(names) if names else "any" for names in columns)
        lines.append(
            f"- {where}: {refusal.reason} (`{refusal.error.__name__}`, {count} cells). Instead: {refusal.way}."
        )
    return lines
