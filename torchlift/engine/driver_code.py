"""What stands before and after the C++ of a part's program; ``driver`` fills it in.

What only hands values on is optimised less than the kernels: it runs as fast, and compiles in 1.2 s instead of 1.5. The
flags of arithmetic that GCC drops with the attribute are of no concern there, but sums are kept out of it.
"""

# An exception must not leave a parallel region, and a thread of OpenMP's knows of no mode that its caller is in.
# Threads are as many as the caller may use now, which may be fewer than there are parts.
BEFORE = """
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

__attribute__((optimize("O1")))
static void compute_part("""
AFTER = """
#include <c10/core/InferenceMode.h>
#include <omp.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

namespace torchlift {
enum Kind { WHOLE, ROWS, OWN, PACKED, FLOAT_SUM, DOUBLE_SUM, NONE };
// How a value of one turn of a chain relates to that of the next. STACK: the rows behind. CARRIED: what the turn before
// gave, ``at`` bytes into a slot. STARTED: what forward started from, ``at`` numbers from the end of what the pack has
// of the turn.
enum Turn { SAME, STACK, CARRIED, STARTED };
struct Input {
    Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int64_t step; int32_t dtype;
    Turn turn; int64_t at;
};
struct Output {
    Kind kind; int64_t ndim; const int64_t* sizes; const int64_t* strides; int32_t dtype; int64_t blocks; int64_t bytes;
    Turn turn; int64_t at;
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

__attribute__((noinline)) static void sum_up(Kind kind, char* into, const char* from, int64_t lo, int64_t hi) {
    if (kind == FLOAT_SUM) add(reinterpret_cast<float*>(into), reinterpret_cast<const float*>(from), lo, hi);
    else add(reinterpret_cast<double*>(into), reinterpret_cast<const double*>(from), lo, hi);
}
}  // namespace torchlift

__attribute__((optimize("O1")))
void inductor_entry_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles) {
    using namespace torchlift;
    py::gil_scoped_release_simple release;
    constexpr int PARTS = %(parts)d, INPUTS = %(count)d, OUTPUTS = %(made)d, KEPT = %(kept)d;
    constexpr int HANDLES = %(handles)d, COUNTED = %(counted)d;
    constexpr bool TAKES_PACK = %(unpacked)s, GIVES_PACK = %(packed)s, BACKWARD = %(backward)s, REVERSE = %(reverse)s;
    constexpr int64_t PACK_STEP = %(step)d, SAVED_NUMBERS = %(saved)d, LENT_BYTES = %(lent)d, SUMMED_BYTES = %(summed)d;
    constexpr int64_t ROWS_A_TURN = %(rows)d, SLOT_BYTES = %(slot)d;
    // Of the numbers that a turn saves those from here on are what it started from, if that is saved.
    constexpr int64_t STARTS = %(starts)d;
    constexpr bool CHAINED = ROWS_A_TURN > 0;
%(tables)s
    const Handle pack = TAKES_PACK ? input_handles[HANDLES - 1] : nullptr;
    int64_t turns = 1;
    if (CHAINED && TAKES_PACK) {
        turns = numel(pack) / (PARTS * PACK_STEP);
    } else if (CHAINED) {
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(input_handles[COUNTED], 0, &turns));
        turns /= ROWS_A_TURN;
    }
    Handle given[PARTS][INPUTS], now[PARTS][OUTPUTS]{}, made[PARTS][OUTPUTS]{}, whole[OUTPUTS]{};
    for (int i = 0; i < OUTPUTS; i++) {
        const Output& output = outputs[i];
        if (output.kind != ROWS) continue;
        std::vector<int64_t> sizes(output.sizes, output.sizes + output.ndim);
        if (output.turn == STACK) sizes[0] *= turns;
        whole[i] = make(output.ndim, sizes.data(), output.strides, output.dtype);
    }
    // See NOTE [Shelves]. A compiler leaves out what it sees to be freed at once.
    static const bool grown = [] {
        void* volatile memory = std::malloc(31 << 20);
        std::free(memory);
        return true;
    }();
    (void)grown;
    Handle shelves[PARTS][KEPT + 1]{}, saved = nullptr, lent = nullptr;
    const int64_t numbers = PARTS * turns * SAVED_NUMBERS, step = 1;
    // Behind what the parts are lent are gradients to be added up: of the parts, then of the turns of each part.
    constexpr int64_t SUMMANDS = PARTS * LENT_BYTES, AGAIN = SUMMANDS + (PARTS - 1) * SUMMED_BYTES;
    constexpr int64_t SLOTS = AGAIN + (CHAINED ? PARTS * SUMMED_BYTES : 0);
    constexpr int64_t BYTES = SLOTS + (STARTS > 0 ? 0 : 2 * PARTS * SLOT_BYTES);
    if (SAVED_NUMBERS > 0) saved = make(1, &numbers, &step, aoti_torch_dtype_float32());
    static std::atomic<Handle> spare{nullptr};
    if (BYTES > 0 && BYTES <= SPARE) lent = spare.exchange(nullptr);
    if (BYTES > 0 && !lent) lent = make(1, &BYTES, &step, aoti_torch_dtype_uint8());
    const auto shelve = [&](int part, int64_t turn, bool first) {
        const int64_t entry = (part * turns + turn) * SAVED_NUMBERS;
        for (int i = 0; i < KEPT; i++) {
            const Buffer& buffer = buffers[i];
            Handle* into = &shelves[part][i];
            if (buffer.home == SAVED) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
                    saved, buffer.ndim, buffer.sizes, buffer.strides, entry + buffer.at, into));
                std::memset(data(*into) + buffer.used, 0, buffer.bytes - buffer.used);  // hooks may look at all of it
            } else if (buffer.home == LENT || (buffer.home == SUMMAND && (part > 0 || !first))) {
                const int64_t start = buffer.home == LENT ? part * LENT_BYTES
                    : first ? SUMMANDS + (part - 1) * SUMMED_BYTES : AGAIN + part * SUMMED_BYTES;
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
                    data(lent) + start + buffer.at, buffer.ndim, buffer.sizes, buffer.strides, 0,
                    buffer.dtype, aoti_torch_device_type_cpu(), 0, into));
            } else {
                *into = make(buffer.ndim, buffer.sizes, buffer.strides, buffer.dtype);
            }
        }
    };
    const int64_t start = BACKWARD ? turns - 1 : 0;
    for (int part = 0; part < PARTS; part++) shelve(part, start, true);
    // What a turn carries on; lent ones lie in two places in turn, as one value may come from another's.
    const auto slot = [&](int part, int64_t turn, int64_t at) {
        return STARTS > 0 ? data(saved) + 4 * ((part * turns + turn) * SAVED_NUMBERS + STARTS) + at
                          : data(lent) + SLOTS + (2 * part + (turn & 1)) * SLOT_BYTES + at;
    };
    if (STARTS > 0) {
        for (int part = 0; part < PARTS; part++) std::memset(slot(part, 0, 0), 0, SLOT_BYTES);
    }
    const bool inference = c10::InferenceMode::is_enabled();
    std::exception_ptr failure;
    const auto compute_turn = [&](int part, int64_t turn, bool first, bool last) {
        const int64_t row = REVERSE ? turns - 1 - turn : turn;
        Handle* next = input_handles;
        for (int i = 0; i < INPUTS; i++) {
            const Input& input = inputs[i];
            Handle* into = &given[part][i];
            const bool starts = input.turn == STARTED && turn > 0;
            if (input.kind == OWN && part == 0) {
                *into = *next;
                next += PARTS;
            } else if (input.kind == OWN) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(next[part], into));
                next += PARTS;
            } else if (input.kind == PACKED || starts) {
                const int64_t from = (part * turns + turn) * PACK_STEP + (starts ? PACK_STEP + input.at : input.step);
                AOTI_TORCH_ERROR_CODE_CHECK(
                    aoti_torch__reinterpret_tensor(pack, input.ndim, input.sizes, input.strides, from, into));
                if (starts) next++;
            } else if (input.turn == CARRIED && !first) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
                    slot(part, turn, input.at), input.ndim, input.sizes, input.strides, 0, input.dtype,
                    aoti_torch_device_type_cpu(), 0, into));
                next++;
            } else if (input.kind == WHOLE) {
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(*next++, into));
            } else {
                int64_t from = part * input.step, distance = 0;
                if (input.turn == STACK) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(*next, 0, &distance));
                from += row * ROWS_A_TURN * distance;
                AOTI_TORCH_ERROR_CODE_CHECK(
                    aoti_torch__reinterpret_tensor(*next++, input.ndim, input.sizes, input.strides, from, into));
            }
        }
        if (!first) shelve(part, turn, false);
        block = lent ? data(lent) + part * LENT_BYTES : nullptr;
        kept = shelves[part];
        Handle* gave = now[part];
        compute_part(given[part], gave);
        for (int i = 1; i < OUTPUTS; i++) {  // what is given twice comes as one handle
            const Handle handle = gave[i];
            if (handle && std::find(gave, gave + i, handle) != gave + i) {
                gave[i] = nullptr;
                AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &gave[i]));
            }
        }
        if (STARTS > 0 && !last) std::memset(slot(part, turn + 1, 0), 0, SLOT_BYTES);  // between the values as well
        for (int i = 0; i < OUTPUTS; i++) {
            const Output& output = outputs[i];
            const bool sum = output.kind == FLOAT_SUM || output.kind == DOUBLE_SUM;
            if (output.kind == PACKED) {
                const char* place = data(saved) + 4 * ((part * turns + turn) * SAVED_NUMBERS + output.at);
                if (data(gave[i]) != place) throw std::runtime_error("a saved value is not in its place");
                if (first) std::swap(made[part][i], gave[i]);  // this thread did not make it
            } else if (output.kind == ROWS && output.turn == CARRIED && !last) {
                std::memcpy(slot(part, turn + 1, output.at), data(gave[i]), output.blocks * output.bytes);
            } else if (output.kind == ROWS) {
                const char* from = data(gave[i]);
                char* into = data(whole[i]) + part * output.bytes;
                if (output.turn == STACK) into += row * PARTS * output.blocks * output.bytes;
                for (int64_t share = 0; share < output.blocks; share++) {
                    std::memcpy(into + share * PARTS * output.bytes, from + share * output.bytes, output.bytes);
                }
            } else if (sum && !first) {
                sum_up(output.kind, data(made[part][i]), data(gave[i]), 0, numel(gave[i]));
            } else {
                std::swap(made[part][i], gave[i]);
            }
            if (gave[i]) aoti_torch_delete_tensor_object(gave[i]);
            gave[i] = nullptr;
        }
    };
    #pragma omp parallel num_threads(std::min(PARTS, omp_get_max_threads()))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const c10::InferenceMode guard(inference);
        aoti_torch_grad_mode_set_enabled(false);
        for (int part = thread; part < PARTS; part += threads) {
            try {
                for (int64_t i = 0; i < turns; i++) {
                    compute_turn(part, BACKWARD ? turns - 1 - i : i, i == 0, i == turns - 1);
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
            for (int part = 1; part < PARTS; part++) sum_up(kind, data(made[0][i]), data(made[part][i]), lo, hi);
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
            if (now[part][i]) aoti_torch_delete_tensor_object(now[part][i]);
        }
        if (!failure && kind == ROWS) *output_handles++ = whole[i];
    }
    if (BYTES <= SPARE) lent = spare.exchange(lent);
    if (lent) aoti_torch_delete_tensor_object(lent);
    if (saved && !failure && GIVES_PACK) *output_handles++ = saved;
    else if (saved) aoti_torch_delete_tensor_object(saved);
    if (failure) std::rethrow_exception(failure);
}
"""
