"""Memory for a program of one part, planned from its C++.

NOTE [Shelves]. A thread's own heap is no place for what the threads of a program make. glibc gives a thread memory in
heaps of 64 MB and returns each to the system as soon as it is empty, to clear every page of it anew at the next call;
and what one thread made and another frees takes a lock that both then wait for. Either cost what the threads had won.
So the thread that calls a program makes all memory: a tensor for each result, one for all that is saved for backward,
and a block that is lent for the time of the call, and kept for the next if it is small. Where in it each buffer lies is
decided here. The C++ that Inductor writes for a graph is one statement after the other, so a buffer is in use from
where it is made to the last statement with a name of it, or of what was made of it. Of a program with a line that is
not understood no part is computed.

A block of half a megabyte would go back to the system at every call as well, until the process has freed something
larger; from then on glibc keeps so much (the dynamic threshold of mallopt(3)). So a program begins with freeing 31 MB,
which it never touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

_MADE = re.compile(
    r"aoti_torch_empty_strided\((\d+), (\w+), (\w+), cached_torch_dtype_(\w+), "
    r"cached_torch_device_type_cpu, +0, &(\w+)\)"
)
_ARRAY = re.compile(r"static constexpr int64_t (\w+)\[\] = \{([-\dL, ]*)\};")
_NEW = re.compile(r"\bauto[&*\s]+(\w+) =|&(\w+)|RAIIAtenTensorHandle (\w+)\(")
_OUTPUT = re.compile(r"output_handles\[(\d+)\]")
_AGAIN = re.compile(r"output_handles\[(\d+)\] = output_handles\[(\d+)\]")
_GIVEN = re.compile(r"output_handles\[(\d+)\] = (\w+)\.release\(\);")
_SAME = re.compile(r"auto (\w+) = std::move\((\w+)\);|RAIIAtenTensorHandle (\w+)\((\w+)\);")
_VIEW = re.compile(
    r"auto (\w+) = wrap_with_raii_handle_if_needed\(reinterpret_tensor_wrapper\((\w+), \d+, \w+, \w+, (\d+)L\)\);"
)


def aligned(size: int) -> int:
    """So many bytes that what comes next is aligned as torch aligns it."""
    return -(-size // 64) * 64


@dataclass
class Buffer:
    """One that a program makes: the arguments it is made with, and the lines it is in use in."""

    line: int
    call: str
    shape: str  # number of dimensions, and names of the arrays of sizes and strides
    sizes: list[int]
    strides: list[int]
    dtype: str
    handle: str
    last: int = 0
    outputs: list[int] = field(default_factory=list)
    at: int = 0  # its first byte in the block

    @property
    def used(self) -> int:
        """Bytes from its first number to its last."""
        last = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides))
        return (last + 1) * int(getattr(torch, self.dtype).itemsize)

    @property
    def bytes(self) -> int:
        """So many that what comes next is aligned."""
        return aligned(self.used)


@dataclass
class Shelf:
    """The program that takes its memory, and what it takes: kept buffers in their order, and the size of the block.

    ``views``: of outputs that are known to be views of one buffer, which one and their first number in it.
    """

    code: str
    kept: list[Buffer]
    bytes: int
    views: dict[int, tuple[Buffer, int]]


def shelve(code: str) -> Shelf | None:
    """Plans the memory of a program, the text of a function's body."""
    lines = code.split("\n")
    arrays = {name: [int(n.strip(" L")) for n in text.split(",") if n.strip()] for name, text in _ARRAY.findall(code)}
    buffers: list[Buffer] = []
    owners: dict[str, set[int]] = {}  # of a name: the buffers whose memory it may stand for
    places: dict[str, tuple[int, int]] = {}  # of a name: the buffer it is a view of, its first number there
    given: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(lines):
        statement = line.split("//")[0].strip()
        if not statement:
            continue
        if not statement.endswith(";") or re.search(r"\b(for|if|while|switch|goto|do)\b|\{", _ARRAY.sub("", statement)):
            return None
        words = set(re.findall(r"\w+", line))
        found = set().union(*(owners.get(word, set()) for word in words))
        made = _MADE.search(line)
        if made is not None:
            ndim, sizes, strides, dtype, handle = made.groups()
            shape = arrays.get(sizes, []), arrays.get(strides, [])
            if not all(shape) or min(shape[0]) < 1 or min(shape[1]) < 0:
                return None
            found.add(len(buffers))
            places[handle] = len(buffers), 0
            buffers.append(Buffer(number, made[0], f"{ndim}, {sizes}, {strides}", *shape, dtype, handle))
        for names in _SAME.findall(line):
            new, old = filter(None, names)
            if old in places:
                places[new] = places[old]
        for new, old, step in _VIEW.findall(line):
            if old in places:
                places[new] = places[old][0], places[old][1] + int(step)
        if (out := _GIVEN.search(line)) and out[2] in places:
            given[int(out[1])] = places[out[2]]
        if again := _AGAIN.search(line):
            if int(again[2]) in given:
                given[int(again[1])] = given[int(again[2])]
            found = {i for i, buffer in enumerate(buffers) if int(again[2]) in buffer.outputs}
        for names in _NEW.findall(line):
            owners.setdefault(next(filter(None, names)), set()).update(found)
        output = _OUTPUT.search(line)
        for i in found:
            buffers[i].last = number
            if output is not None:
                buffers[i].outputs.append(int(output[1]))
    kept = [buffer for buffer in buffers if buffer.outputs]
    total = _place([buffer for buffer in buffers if not buffer.outputs])
    for buffer in buffers:
        if buffer.outputs:
            new = f"torchlift::take({kept.index(buffer)}, &{buffer.handle})"
        else:
            dtype = f"cached_torch_dtype_{buffer.dtype}, cached_torch_device_type_cpu, 0"
            new = (
                f"aoti_torch_create_tensor_from_blob(torchlift::block + {buffer.at}, {buffer.shape}, 0, {dtype}, "
                f"&{buffer.handle})"
            )
        lines[buffer.line] = lines[buffer.line].replace(buffer.call, new)
    return Shelf("\n".join(lines), kept, total, {i: (buffers[at], step) for i, (at, step) in given.items()})


def _place(buffers: list[Buffer]) -> int:
    """Gives each a place in a block, the first where nothing is that is in use with it; returns the block's size."""
    total = 0
    for i, buffer in enumerate(buffers):
        beside = sorted((other for other in buffers[:i] if other.last >= buffer.line), key=lambda other: other.at)
        for other in beside:
            if other.at - buffer.at >= buffer.bytes:
                break
            buffer.at = max(buffer.at, other.at + other.bytes)
        total = max(total, buffer.at + buffer.bytes)
    return total
