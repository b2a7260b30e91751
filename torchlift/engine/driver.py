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
from torchlift.engine.placements import SUM, Placement, Rows
from torchlift.engine.shelf import Buffer, shelve

OWN = "own"  # a value that stays in parts
_LOCK, _TIMES = threading.Lock(), Counter[str]()
SUMMED = {torch.float32: "float", torch.float64: "double"}

# An exception must not leave a parallel region, and a thread of OpenMP's knows of no mode that its caller is in.
# Threads are as many as the caller may use now, which may be fewer than there are parts.
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
#include <c10/core/InferenceMode.h>
#include <omp.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>

namespace torchlift {
enum Kind { WHOLE, ROWS, OWN, PACKED, FLOAT_SUM, DOUBLE_SUM, NONE };
struct Input { Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int64_t step; };
struct Output {
    Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int32_t dtype; int64_t blocks; int64_t bytes;
};
// A program keeps the block that it lends up to this size: memory it has just used is the fastest there is.
constexpr int64_t SPARE = 4 << 20;
enum Home { RESULT, SAVED, LENT, SUMMAND };
struct Buffer {
    Home home; int64_t ndim; const int64_t* sizes; const int64_t* strides; int32_t dtype;
    int64_t at; int64_t used; int64_t bytes;
};

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
    constexpr int HANDLES = %(handles)d;
    constexpr bool TAKES_PACK = %(unpacked)s, GIVES_PACK = %(packed)s;
    constexpr int64_t PACK_STEP = %(step)d, SAVED_NUMBERS = %(saved)d, LENT_BYTES = %(lent)d, SUMMED_BYTES = %(summed)d;
%(tables)s
    Handle given[PARTS][INPUTS], made[PARTS][OUTPUTS]{}, whole[OUTPUTS]{};
    for (int i = 0; i < OUTPUTS; i++) {
        const Output& output = outputs[i];
        if (output.kind == ROWS) whole[i] = make(output.ndim, output.sizes, output.strides, output.dtype);
    }
    // See NOTE [Shelves]. A compiler leaves out what it sees to be freed at once.
    static const bool grown = [] {
        void* volatile memory = std::malloc(31 << 20);
        std::free(memory);
        return true;
    }();
    (void)grown;
    Handle shelves[PARTS][KEPT + 1]{}, saved = nullptr, lent = nullptr;
    const int64_t numbers = PARTS * SAVED_NUMBERS, step = 1;
    const int64_t bytes = PARTS * LENT_BYTES + (PARTS - 1) * SUMMED_BYTES;
    if (SAVED_NUMBERS > 0) saved = make(1, &numbers, &step, aoti_torch_dtype_float32());
    static std::atomic<Handle> spare{nullptr};
    if (bytes > 0 && bytes <= SPARE) lent = spare.exchange(nullptr);
    if (bytes > 0 && !lent) lent = make(1, &bytes, &step, aoti_torch_dtype_uint8());
    for (int part = 0; part < PARTS; part++) {
        for (int i = 0; i < KEPT; i++) {
            const Buffer& buffer = buffers[i];
            Handle* made = &shelves[part][i];
            if (buffer.home == SAVED) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                    saved, buffer.ndim, buffer.sizes, buffer.strides, part * SAVED_NUMBERS + buffer.at, made));
                std::memset(data(*made) + buffer.used, 0, buffer.bytes - buffer.used);  // hooks may look at all of it
            } else if (buffer.home == LENT || (buffer.home == SUMMAND && part > 0)) {
                const int64_t start =
                    buffer.home == LENT ? part * LENT_BYTES : PARTS * LENT_BYTES + (part - 1) * SUMMED_BYTES;
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
                    data(lent) + start + buffer.at, buffer.ndim, buffer.sizes, buffer.strides, 0,
                    buffer.dtype, aoti_torch_device_type_cpu(), 0, made));
            } else {
                *made = make(buffer.ndim, buffer.sizes, buffer.strides, buffer.dtype);
            }
        }
    }
    const Handle pack = TAKES_PACK ? input_handles[HANDLES - 1] : nullptr;
    const bool inference = c10::InferenceMode::is_enabled();
    std::exception_ptr failure;
    #pragma omp parallel num_threads(std::min(PARTS, omp_get_max_threads()))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const c10::InferenceMode guard(inference);
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
                        const int64_t first = input.step + part * PACK_STEP;
                        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                            pack, input.ndim, input.sizes, input.strides, first, &given[part][i]));
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
                    if (output.kind == PACKED) {
                        const char* place = data(saved) + 4 * (part * SAVED_NUMBERS + output.bytes);
                        if (data(made[part][i]) != place) throw std::runtime_error("a saved value is not in its place");
                    }
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
            const int64_t all = numel(made[0][i]), lo = all * thread / threads, hi = all * (thread + 1) / threads;
            for (int part = 1; part < PARTS; part++) {
                char *into = data(made[0][i]), *from = data(made[part][i]);
                if (kind == FLOAT_SUM) add(reinterpret_cast<float*>(into), reinterpret_cast<float*>(from), lo, hi);
                else add(reinterpret_cast<double*>(into), reinterpret_cast<double*>(from), lo, hi);
            }
        }
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
    if (bytes <= SPARE) lent = spare.exchange(lent);
    if (lent) aoti_torch_delete_tensor_object(lent);
    if (saved && !failure && GIVES_PACK) *output_handles++ = saved;
    else if (saved) aoti_torch_delete_tensor_object(saved);
    if (failure) std::rethrow_exception(failure);
}
"""


@dataclass
class Driver:
    """How the program of a part becomes one of all parts.

    ``inputs``, those of a part, and ``outputs`` are on fakes, with their placements.
    """

    parts: int
    inputs: Sequence[tuple[torch.Tensor, Placement]]
    outputs: Sequence[tuple[torch.Tensor | None, Placement]]  # of the whole
    unpacked: Sequence[int | None] = ()  # per input that is in the pack, the last one: its first number
    step: int = 0  # from what is in the pack of one part to that of the next

    def __post_init__(self) -> None:
        self.called = False
        self.packed: dict[int, int] = {}  # of outputs that are in the pack, the last one: the first number
        self.pack_step = 0
        values = [*self.inputs, *self.outputs]
        facts = [v if v is None else (v.dtype, [*v.shape], [*v.stride()]) for v, _ in values], [p for _, p in values]
        # Inductor finds graphs that it has compiled by their code, names included. One that this process has loaded it
        # would not write again, and what is in the pack would stay unknown: so each has another number.
        digest = hashlib.sha256(repr((self.parts, facts, self.unpacked, self.step)).encode()).hexdigest()[:16]
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
        self.called, self.pack_step = True, sizes["SAVED"]
        rows = [
            f"{{{home}, {len(buffer.sizes)}, {_numbers(f'buffer{i}', buffer.sizes, buffer.strides, tables)}, "
            f"aoti_torch_dtype_{buffer.dtype}(), {at[i]}, {buffer.used}, {buffer.bytes}}}"
            for i, (buffer, home) in enumerate(zip(shelf.kept, homes))
        ]
        takes = [_input(value, place, i, self._slot(i), tables) for i, (value, place) in enumerate(self.inputs)]
        gives = [
            _output(value, place, self.parts, i, self.packed.get(i), tables)
            for i, (value, place) in enumerate(self.outputs)
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
        if SUM in places and len(places) > 1:
            raise RuntimeError("Inductor gives one buffer as a sum and as another output")
        return "SUMMAND" if SUM in places else "RESULT"


def _input(value: torch.Tensor, place: Placement, i: int, slot: int | None, tables: list[str]) -> str:
    if slot is None and not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    names = _numbers(f"input{i}", value.shape, value.stride(), tables)
    if slot is not None or not isinstance(place, Rows):
        return f"{{PACKED, {value.ndim}, {names}, {slot}}}"
    return f"{{ROWS, {value.ndim}, {names}, {value.stride(place.dim) * value.shape[place.dim]}}}"


def _output(
    value: torch.Tensor | None, place: Placement, parts: int, i: int, packed: int | None, tables: list[str]
) -> str:
    if value is None:
        return "{NONE}"
    if packed is not None:
        return f"{{PACKED, 0, nullptr, nullptr, 0, 0, {packed}}}"
    if place == SUM:
        return f"{{{SUMMED[value.dtype].upper()}_SUM}}"
    if not isinstance(place, Rows):
        return "{OWN}" if place == OWN else "{WHOLE}"
    order = stride_order(value)
    blocks = math.prod(value.shape[d] for d in order[: order.index(place.dim)]) * place.blocks
    names = _numbers(f"output{i}", value.shape, value.stride(), tables)
    dtype = f"aoti_torch_dtype_{str(value.dtype).removeprefix('torch.')}()"
    size = value.numel() // (blocks * parts) * value.element_size()
    return f"{{ROWS, {value.ndim}, {names}, {dtype}, {blocks}, {size}}}"


def _numbers(name: str, sizes: Sequence[Any], strides: Sequence[Any], tables: list[str]) -> str:
    for kind, numbers in (("sizes", sizes), ("strides", strides)):
        tables.append(f"static const int64_t {name}_{kind}[] = {{{', '.join(map(str, numbers))}}};")
    return f"{name}_sizes, {name}_strides"
