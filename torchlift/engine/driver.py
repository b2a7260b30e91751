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

from torchlift.engine.capture import inverse, stride_order
from torchlift.engine.placements import SUM, Placement, Rows
from torchlift.engine.shelf import Buffer, Shelf, shelve

OWN = "own"  # a value that stays in parts
_LOCK, _TIMES = threading.Lock(), Counter[str]()
SUMMED = {torch.float32: "float", torch.float64: "double"}

# An exception must not leave a parallel region, and a thread of OpenMP's starts with gradients enabled. Threads are as
# many as the caller may use now, which may be fewer than there are parts.
_BEFORE = """
namespace torchlift {
using Handle = AtenTensorHandle;

// Memory that is made for the part which this thread computes.
static thread_local char* block;
static thread_local Handle* kept;

static AOTITorchError take(int i, Handle* handle) {
    *handle = kept[i];
    kept[i] = nullptr;
    return AOTI_TORCH_SUCCESS;
}
}  // namespace torchlift

static void compute_part("""
_AFTER = """
#include <omp.h>
#include <algorithm>
#include <cstring>
#include <exception>

namespace torchlift {
enum Kind { WHOLE, ROWS, OWN, PACKED, FLOAT_SUM, DOUBLE_SUM, NONE };
struct Input { Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int64_t step; };
struct Output {
    Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int32_t dtype; int64_t blocks; int64_t bytes;
};
enum Home { RESULT, SAVED, LENT, SUMMAND };
struct Buffer { Home home; int64_t ndim; const int64_t* sizes; const int64_t* strides; int32_t dtype; int64_t at; };

static Handle make(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
    Handle made;
    AOTI_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(ndim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
    return made;
}

static char* data(Handle handle) {
    void* found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &found));
    return static_cast<char*>(found);
}

static int64_t numel(Handle handle) {
    int64_t found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &found));
    return found;
}

template <typename T>
static void add(T* into, const T* from, int64_t lo, int64_t hi) {
    #pragma omp simd
    for (int64_t i = lo; i < hi; i++) into[i] += from[i];
}
}  // namespace torchlift

void inductor_entry_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles) {
    using namespace torchlift;
    py::gil_scoped_release_simple release;
    constexpr int PARTS = %(parts)d, INPUTS = %(count)d, OUTPUTS = %(made)d, KEPT = %(kept)d;
    constexpr int HANDLES = %(handles)d, PACKED_INPUTS = %(unpacked)d, PACKED_OUTPUTS = %(packed)d;
    constexpr int64_t HEAD = %(head)d, SAVED_NUMBERS = %(saved)d, LENT_BYTES = %(lent)d;
%(tables)s
    Handle given[PARTS][INPUTS], made[PARTS][OUTPUTS]{}, whole[OUTPUTS]{};
    for (int i = 0; i < OUTPUTS; i++) {
        const Output& output = outputs[i];
        if (output.kind == ROWS) whole[i] = make(output.ndim, output.sizes, output.strides, output.dtype);
    }
    // See NOTE [Shelves]. A compiler leaves out what it sees to be freed at once.
    static void* volatile freed = nullptr;
    if (!freed) std::free(freed = std::malloc(31 << 20));
    Handle shelves[PARTS][KEPT + 1]{}, saved = nullptr, lent = nullptr;
    const int64_t numbers = HEAD + PARTS * SAVED_NUMBERS, bytes = PARTS * LENT_BYTES, step = 1;
    if (SAVED_NUMBERS > 0) saved = make(1, &numbers, &step, aoti_torch_dtype_float32());
    if (bytes > 0) lent = make(1, &bytes, &step, aoti_torch_dtype_uint8());
    for (int part = 0; part < PARTS; part++) {
        for (int i = 0; i < KEPT; i++) {
            const Buffer& buffer = buffers[i];
            Handle* made = &shelves[part][i];
            if (buffer.home == SAVED) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                    saved, buffer.ndim, buffer.sizes, buffer.strides, HEAD + part * SAVED_NUMBERS + buffer.at, made));
            } else if (buffer.home == LENT || (buffer.home == SUMMAND && part > 0)) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
                    data(lent) + part * LENT_BYTES + buffer.at, buffer.ndim, buffer.sizes, buffer.strides, 0,
                    buffer.dtype, aoti_torch_device_type_cpu(), 0, made));
            } else {
                *made = make(buffer.ndim, buffer.sizes, buffer.strides, buffer.dtype);
            }
        }
    }
    const Handle pack = PACKED_INPUTS > 0 ? input_handles[HANDLES - 1] : nullptr;
    const int64_t* places = pack ? reinterpret_cast<int64_t*>(data(pack)) : nullptr;
    std::exception_ptr failure;
    #pragma omp parallel num_threads(std::min(PARTS, omp_get_max_threads()))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const bool grad = aoti_torch_grad_mode_is_enabled();
        aoti_torch_grad_mode_set_enabled(false);
        for (int part = thread; part < PARTS; part += threads) {
            try {
                Handle* next = input_handles;
                for (int i = 0; i < INPUTS; i++) {
                    const Input& input = inputs[i];
                    if (input.kind == OWN && part == 0) {
                        given[part][i] = *next;
                        next += PARTS;
                    } else if (input.kind == OWN) {
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(next[part], &given[part][i]));
                        next += PARTS;
                    } else if (input.kind == PACKED) {
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                            pack, input.ndim, input.sizes, input.strides, places[part * PACKED_INPUTS + input.step],
                            &given[part][i]));
                    } else if (input.kind == WHOLE) {
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(*next++, &given[part][i]));
                    } else {
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                            *next++, input.ndim, input.sizes, input.strides, part * input.step, &given[part][i]));
                    }
                }
                block = lent ? data(lent) + part * LENT_BYTES : nullptr;
                kept = shelves[part];
                compute_part(given[part], made[part]);
                for (int i = 1; i < OUTPUTS; i++) {  // what is given twice comes as one handle
                    const Handle handle = made[part][i];
                    if (handle && std::find(made[part], made[part] + i, handle) != made[part] + i) {
                        made[part][i] = nullptr;
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &made[part][i]));
                    }
                }
                for (int i = 0; i < OUTPUTS; i++) {
                    const Output& output = outputs[i];
                    if (output.kind != ROWS) continue;
                    const char* from = data(made[part][i]);
                    char* into = data(whole[i]) + part * output.bytes;
                    for (int64_t block = 0; block < output.blocks; block++) {
                        std::memcpy(into + block * PARTS * output.bytes, from + block * output.bytes, output.bytes);
                    }
                    aoti_torch_delete_tensor_object(made[part][i]);
                    made[part][i] = nullptr;
                }
            } catch (...) {
                #pragma omp critical
                failure = std::current_exception();
            }
        }
        #pragma omp barrier
        for (int i = 0; i < OUTPUTS && !failure; i++) {
            const Kind kind = outputs[i].kind;
            if (kind != FLOAT_SUM && kind != DOUBLE_SUM) continue;
            bool added = false;  // as another output of the same memory
            for (int j = 0; j < i; j++) added |= outputs[j].kind == kind && data(made[0][j]) == data(made[0][i]);
            if (added) continue;
            const int64_t all = numel(made[0][i]), lo = all * thread / threads, hi = all * (thread + 1) / threads;
            for (int part = 1; part < PARTS; part++) {
                char *into = data(made[0][i]), *from = data(made[part][i]);
                if (kind == FLOAT_SUM) add(reinterpret_cast<float*>(into), reinterpret_cast<float*>(from), lo, hi);
                else add(reinterpret_cast<double*>(into), reinterpret_cast<double*>(from), lo, hi);
            }
        }
        aoti_torch_grad_mode_set_enabled(grad);
    }
    Handle* next = input_handles;
    for (int i = 0; i < INPUTS; i++) {
        if (inputs[i].kind == PACKED) continue;
        const int first = inputs[i].kind == OWN ? 1 : 0, handles = inputs[i].kind == OWN ? PARTS : 1;
        for (int part = first; part < handles; part++) aoti_torch_delete_tensor_object(next[part]);
        next += handles;
    }
    if (pack) aoti_torch_delete_tensor_object(pack);
    for (auto& shelf : shelves) {
        for (Handle left : shelf) {
            if (left) aoti_torch_delete_tensor_object(left);
        }
    }
    int packed = 0;
    for (int i = 0; i < OUTPUTS && !failure; i++) {
        if (outputs[i].kind != PACKED) continue;
        for (int part = 0; part < PARTS; part++) {
            char* start = data(saved);
            reinterpret_cast<int64_t*>(start)[part * PACKED_OUTPUTS + packed] = (data(made[part][i]) - start) / 4;
        }
        packed++;
    }
    for (int i = 0; i < OUTPUTS; i++) {
        const Kind kind = outputs[i].kind;
        if (failure && whole[i]) aoti_torch_delete_tensor_object(whole[i]);
        for (int part = 0; part < PARTS; part++) {
            const bool kept = kind == OWN || (kind != ROWS && kind != PACKED && part == 0);
            if (!failure && kept) *output_handles++ = made[part][i];
            else if (made[part][i]) aoti_torch_delete_tensor_object(made[part][i]);
        }
        if (!failure && kind == ROWS) *output_handles++ = whole[i];
    }
    if (lent) aoti_torch_delete_tensor_object(lent);
    if (saved && !failure && PACKED_OUTPUTS > 0) *output_handles++ = saved;
    else if (saved) aoti_torch_delete_tensor_object(saved);
    if (failure) std::rethrow_exception(failure);
}
"""


@dataclass
class Driver:
    """How the program of a part becomes one of all parts.

    ``inputs`` and ``outputs`` are those of a part on fakes, with their placements.
    """

    parts: int
    inputs: Sequence[tuple[torch.Tensor, Placement]]
    outputs: Sequence[tuple[torch.Tensor | None, Placement]]
    unpacked: Sequence[int | None] = ()  # per input: its number in the pack, which is the last input

    def __post_init__(self) -> None:
        self.packed: list[int] = []  # outputs that are in the pack, which is the last output
        values = [*self.inputs, *self.outputs]
        facts = [v if v is None else (v.dtype, [*v.shape], [*v.stride()]) for v, _ in values], [p for _, p in values]
        # Inductor finds graphs that it has compiled by their code, names included. One that this process has loaded it
        # would not write again, and what is in the pack would stay unknown: so each has another number.
        digest = hashlib.sha256(repr((self.parts, facts, self.unpacked)).encode()).hexdigest()[:16]
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
        shelf = shelve(body) or Shelf(body, [], 0)
        homes = [self._home(buffer) for buffer in shelf.kept]
        sources = [[home for home, b in zip(homes, shelf.kept) if i in b.outputs] for i in range(len(self.outputs))]
        floats = [value is not None and value.dtype is torch.float32 for value, _ in self.outputs]
        self.packed = [
            i for i, home in enumerate(sources) if home == ["SAVED"] and self.outputs[i][1] == OWN and floats[i]
        ]
        tables: list[str] = []
        saved, lent, rows = 0, shelf.bytes, []
        for i, (buffer, home) in enumerate(zip(shelf.kept, homes)):
            at = 0
            if home == "SAVED":
                at, saved = saved, saved + buffer.bytes // 4
            elif home != "RESULT":
                at, lent = lent, lent + buffer.bytes
            names = _numbers(f"buffer{i}", buffer.sizes, buffer.strides, tables)
            rows.append(f"{{{home}, {len(buffer.sizes)}, {names}, aoti_torch_dtype_{buffer.dtype}(), {at}}}")
        takes = [_input(value, place, i, self._slot(i), tables) for i, (value, place) in enumerate(self.inputs)]
        gives = [
            "{PACKED}" if i in self.packed else _output(value, place, self.parts, i, tables)
            for i, (value, place) in enumerate(self.outputs)
        ]
        for name, entries in (("Input inputs", takes), ("Output outputs", gives), ("Buffer buffers", rows)):
            tables.append(f"static const {name}[] = {{{', '.join(entries) or '{}'}}};")
        slots = [self._slot(i) for i in range(len(takes))]
        unpacked = sum(slot is not None for slot in slots)
        numbers = {
            "parts": self.parts,
            "count": len(takes),
            "made": len(gives),
            "kept": len(rows),
            "handles": len(takes) + (self.parts - 1) * takes.count("{OWN}") - unpacked + (unpacked > 0),
            "unpacked": unpacked,
            "packed": len(self.packed),
            "head": -(-2 * self.parts * len(self.packed) // 16) * 16,
            "saved": saved,
            "lent": lent,
        }
        after = _AFTER % (numbers | {"tables": "\n".join("    " + table for table in tables)})
        return "".join([head, _BEFORE, signature, shelf.code, end, rest, after])

    def _slot(self, i: int) -> int | None:
        return self.unpacked[i] if self.unpacked else None

    def _home(self, buffer: Buffer) -> str:
        """Where a buffer that leaves the program of a part lies: by itself, with what is saved, or lent."""
        places = [self.outputs[i][1] for i in buffer.outputs]
        if OWN in places and buffer.dtype == "float32" and all(p == OWN or isinstance(p, Rows) for p in places):
            return "SAVED"
        if all(isinstance(place, Rows) for place in places):
            return "LENT"
        return "SUMMAND" if all(place == SUM or isinstance(place, Rows) for place in places) else "RESULT"


def _input(value: torch.Tensor, place: Placement, i: int, slot: int | None, tables: list[str]) -> str:
    if slot is None and not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    names = _numbers(f"input{i}", value.shape, value.stride(), tables)
    if slot is not None or not isinstance(place, Rows):
        return f"{{PACKED, {value.ndim}, {names}, {slot}}}"
    return f"{{ROWS, {value.ndim}, {names}, {value.stride(place.dim) * value.shape[place.dim]}}}"


def _output(value: torch.Tensor | None, place: Placement, parts: int, i: int, tables: list[str]) -> str:
    if value is None:
        return "{NONE}"
    if place == SUM:
        return f"{{{SUMMED[value.dtype].upper()}_SUM}}"
    if not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    order = stride_order(value)
    sizes = [size * parts if d == place.dim else size for d, size in enumerate(value.shape)]
    laid = torch.empty([sizes[d] for d in order], device="meta").permute(inverse(order))
    blocks = math.prod(value.shape[d] for d in order[: order.index(place.dim)]) * place.blocks
    names = _numbers(f"output{i}", sizes, laid.stride(), tables)
    dtype = f"aoti_torch_dtype_{str(value.dtype).removeprefix('torch.')}()"
    size = value.numel() // max(blocks, 1) * value.element_size()
    return f"{{ROWS, {value.ndim}, {names}, {dtype}, {blocks}, {size}}}"


def _numbers(name: str, sizes: Sequence[Any], strides: Sequence[Any], tables: list[str]) -> str:
    for kind, numbers in (("sizes", sizes), ("strides", strides)):
        tables.append(f"static const int64_t {name}_{kind}[] = {{{', '.join(map(str, numbers))}}};")
    return f"{name}_sizes, {name}_strides"
