"""The C++ that runs a program of one part of a batch for every part, each on a thread; see NOTE [Parts]."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlift.engine.capture import stride_order
from torchlift.engine.driver_code import AFTER, BEFORE
from torchlift.engine.placements import SUM, Placement, Rows
from torchlift.engine.shelf import Buffer, shelve

OWN = "own"  # a value that stays in parts
SAME, STACK = ("SAME", 0), ("STACK", 0)  # in all turns of a chain; the next rows in each
_LOCK, _TIMES = threading.Lock(), Counter[str]()
SUMMED = {torch.float32: "float", torch.float64: "double"}


@dataclass(frozen=True)
class Chain:
    """How the turns of a chain hang together, one program after the other; see ``chains``.

    ``inputs`` and ``outputs`` have for each a ``Turn`` of the C++, and where in a slot or in the pack it lies.
    """

    inputs: list[tuple[str, int]]
    outputs: list[tuple[str, int]]
    rows: int = 0  # of the stacks that a turn takes
    rowwise: bool = False  # as a value each, not as a stack of so many
    reverse: bool = False
    backward: bool = False
    trains: bool = False  # what each turn starts from is saved
    counted: int = 0  # the input that tells how many turns there are
    slot_bytes: int = 0  # for what a turn carries on

    def whole(self, output: tuple[Any, Placement], turn: tuple[str, int]) -> tuple[Any, Placement]:
        """``output``, for all rows of a turn."""
        value, place = output
        if not self.rowwise or turn != STACK or not isinstance(place, Rows):
            return output
        stack = value.as_strided((1, *value.shape), (value.numel(), *value.stride()))
        return stack, Rows(place.dim + 1, place.blocks)


@dataclass
class Driver:
    """How the program of a part becomes one of all parts.

    ``inputs``, those of a part, and ``outputs`` are on fakes, with their placements.
    """

    parts: int
    inputs: Sequence[tuple[torch.Tensor, Placement]]
    outputs: Sequence[tuple[torch.Tensor | None, Placement]]  # of the whole
    unpacked: Sequence[int | None] = ()  # per input that is in the pack, the last one: its first number
    step: int = 0  # from what is in the pack of one part, or of a turn, to that of the next
    chain: Chain | None = None

    def __post_init__(self) -> None:
        self.called = False
        self.packed: dict[int, int] = {}  # of outputs that are in the pack, the last one: the first number
        self.pack_step = 0
        values = [*self.inputs, *self.outputs]
        facts = [v if v is None else (v.dtype, [*v.shape], [*v.stride()]) for v, _ in values], [p for _, p in values]
        # Inductor finds graphs that it has compiled by their code, names included. One that this process has loaded it
        # would not write again, and what is in the pack would stay unknown: so each has another number.
        known = repr((self.parts, facts, self.unpacked, self.step, self.chain))
        digest = hashlib.sha256(known.encode()).hexdigest()[:16]
        with _LOCK:
            _TIMES[digest] += 1
            self.name = f"part_{digest}_{_TIMES[digest]}_"

    @property
    def count(self) -> int:
        """How many outputs there are then."""
        apart = [place for i, (_, place) in enumerate(self.outputs) if i not in self.packed]
        return len(apart) + (self.parts - 1) * apart.count(OWN) + bool(self.packed)

    def __call__(self, program: str) -> str:
        """The C++ that Inductor wrote for a part, as a function, and behind it the entry that calls it."""
        entry, end = "void inductor_entry_impl(", "} // inductor_entry_"
        release = "py::gil_scoped_release_simple release;"
        if any(program.count(text) != 1 for text in (entry, release, end)):
            raise RuntimeError("Inductor writes its C++ otherwise")
        head, rest = program.split(entry)
        signature, rest = rest.split(release)
        body, rest = rest.split(end)
        shelf = shelve(body)
        if shelf is None:
            raise RuntimeError("Inductor writes more than one statement after the other")
        tables: list[str] = []
        homes = [self._home(buffer) for buffer in shelf.kept]
        sizes, at = {"SAVED": 0, "LENT": shelf.bytes, "SUMMAND": 0, "RESULT": 0}, []
        for buffer, home in zip(shelf.kept, homes):
            at.append(sizes[home])
            sizes[home] += buffer.bytes // (4 if home == "SAVED" else 1)
        for i, (buffer, first) in shelf.views.items():
            value, place = self.outputs[i]
            if value is None or place != OWN or value.dtype is not torch.float32:
                continue
            if homes[shelf.kept.index(buffer)] == "SAVED":
                self.packed[i] = at[shelf.kept.index(buffer)] + first
        apart = any(place == OWN and i not in self.packed for i, (_, place) in enumerate(self.outputs))
        if self.chain is not None and (apart or (self.chain.trains and not self.packed)):
            self.chain = None
        chain = self.chain or Chain([SAME] * len(self.inputs), [SAME] * len(self.outputs))
        starts = sizes["SAVED"] if chain.trains else 0
        if chain.trains:
            sizes["SAVED"] += chain.slot_bytes // 4
        self.called, self.pack_step = True, sizes["SAVED"]
        rows = [
            f"{{{home}, {len(buffer.sizes)}, {_numbers(f'buffer{i}', buffer.sizes, buffer.strides, tables)}, "
            f"aoti_torch_dtype_{buffer.dtype}(), {at[i]}, {buffer.used}, {buffer.bytes}}}"
            for i, (buffer, home) in enumerate(zip(shelf.kept, homes))
        ]
        takes = [
            _input(value, place, i, self._slot(i), chain.inputs[i], tables)
            for i, (value, place) in enumerate(self.inputs)
        ]
        gives = [
            _output(value, place, self.parts, i, self.packed.get(i), chain.outputs[i], tables)
            for i, (value, place) in enumerate(map(chain.whole, self.outputs, chain.outputs))
        ]
        for name, entries in (("Input inputs", takes), ("Output outputs", gives), ("Buffer buffers", rows)):
            tables.append(f"static const {name}[] = {{{', '.join(entries) or '{}'}}};")
        unpacked = sum(self._slot(i) is not None for i in range(len(takes)))
        numbers = {
            "parts": self.parts,
            "count": len(takes),
            "made": len(gives),
            "kept": len(rows),
            "handles": len(takes) + (self.parts - 1) * takes.count("{OWN}") - unpacked + (unpacked > 0),
            "unpacked": str(unpacked > 0).lower(),
            "packed": str(bool(self.packed)).lower(),
            "step": self.step,
            "saved": sizes["SAVED"],
            "lent": sizes["LENT"],
            "summed": sizes["SUMMAND"],
            "backward": str(chain.backward).lower(),
            "reverse": str(chain.reverse).lower(),
            "counted": chain.counted,
            "rows": chain.rows,
            "slot": chain.slot_bytes,
            "starts": starts,
        }
        after = AFTER % (numbers | {"tables": "\n".join("    " + table for table in tables)})
        return "".join([head, BEFORE, signature, shelf.code, end, rest, after])

    def _slot(self, i: int) -> int | None:
        return self.unpacked[i] if self.unpacked else None

    def _home(self, buffer: Buffer) -> str:
        """Where a buffer that leaves the program of a part lies: by itself, with what is saved, or lent."""
        places = [self.outputs[i][1] for i in buffer.outputs]
        if OWN in places and buffer.dtype == "float32" and all(p == OWN or isinstance(p, Rows) for p in places):
            return "SAVED"
        if all(isinstance(place, Rows) for place in places):
            return "LENT"
        if SUM in places and len(places) > 1:
            raise RuntimeError("Inductor gives one buffer as a sum and as another output")
        return "SUMMAND" if SUM in places else "RESULT"


def _input(
    value: torch.Tensor, place: Placement, i: int, slot: int | None, turn: tuple[str, int], tables: list[str]
) -> str:
    if slot is None and turn != STACK and not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    shape = f"{value.ndim}, {_numbers(f'input{i}', value.shape, value.stride(), tables)}"
    if slot is not None:
        return f"{{PACKED, {shape}, {slot}}}"
    step = value.stride(place.dim) * value.shape[place.dim] if isinstance(place, Rows) else 0
    return f"{{ROWS, {shape}, {step}, {_dtype(value)}, {turn[0]}, {turn[1]}}}"


def _output(
    value: torch.Tensor | None,
    place: Placement,
    parts: int,
    i: int,
    packed: int | None,
    turn: tuple[str, int],
    tables: list[str],
) -> str:
    if value is None:
        return "{NONE}"
    if packed is not None:
        return f"{{PACKED, 0, nullptr, nullptr, 0, 0, 0, SAME, {packed}}}"
    if place == SUM:
        return f"{{{SUMMED[value.dtype].upper()}_SUM}}"
    if not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    order = stride_order(value)
    blocks = math.prod(value.shape[d] for d in order[: order.index(place.dim)]) * place.blocks
    names = _numbers(f"output{i}", value.shape, value.stride(), tables)
    size = value.numel() // (blocks * parts) * value.element_size()
    return f"{{ROWS, {value.ndim}, {names}, {_dtype(value)}, {blocks}, {size}, {turn[0]}, {turn[1]}}}"


def _dtype(value: torch.Tensor) -> str:
    return f"aoti_torch_dtype_{str(value.dtype).removeprefix('torch.')}()"


def _numbers(name: str, sizes: Sequence[Any], strides: Sequence[Any], tables: list[str]) -> str:
    for kind, numbers in (("sizes", sizes), ("strides", strides)):
        some = ", ".join(map(str, numbers)) or "0"  # C++ has no arrays of nothing
        tables.append(f"static const int64_t {name}_{kind}[] = {{{some}}};")
    return f"{name}_sizes, {name}_strides"
