"""Spans of named calls in compiled loops: noted while a body is captured, operators in the graphs that run.

NOTE [Spans]. An operator that marks a place has none of its own in a graph: what returns nothing is dropped as dead
code, and what depends on nothing is moved. So none is recorded. While a body is captured each node is told how many
spans were entered and left before it. Once the forward graph is cut out, the operators go where that number changes.
Inductor gets them ahead of all nodes, and fuses and orders its kernels as if they were not there; then each is put
before the first kernel that comes after it in the body. So a label changes no kernel, and no bit of a result. A kernel
that does the work of several methods lies in the span of the last one.

Backward has no spans, as in eager; an iteration that is recomputed by running its forward graph again has them again.

A ``while_loop`` that torch runs, when Dynamo traces it, has operators of its own. Under ``torch.compile`` those above
are effects, and torch 2.13 takes the token that orders the effects of a loop's body for one of the graph around it: it
drops what comes before the loop, or fails. Those of loops are no effects, just not dead. A graph keeps them where they
are until Inductor moves its nodes; these are told their numbers at the end of Dynamo's trace. Inductor gets the
operators behind all others, and each is put in its place when the kernels have got theirs.

NOTE [Names]. One graph serves all layers and all instances of a class. So what a graph says is the path from the root
that was lifted, as in ``{0}.attention.forward``, and ``names(index)`` of the loop tells, while a profiler runs, what
the roots are called in iteration ``index``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.profiler import record_function

from torchlift import _compat

Names = Callable[[int], Sequence[str]]  # what the roots of an iteration are called


class _Local(threading.local):
    recorder: Recorder | None = None
    met_optional = False
    names: Names | None = None
    indices: Sequence[int] = ()  # of the iterations that the graph runs
    open: tuple[Any, ...] = ()
    iteration: int | None = 0


_local = _Local()


# Operators -----------------------------------------------------------------------------------------------------------

_library = torch.library.Library("torchlift", "FRAGMENT")
# ``step``: which iteration of its graph the name is one of; -1 for a name that is whole.
_library.define("enter_span(str name, int step=-1) -> ()")
_library.define("leave_span() -> ()")
# In a loop that torch runs: see NOTE [Spans].
_library.define("enter_looped_span(str name) -> ()")
_library.define("leave_looped_span() -> ()")


def _enter_span(name: str, step: int = -1) -> None:
    span = None
    if _compat.is_profiling():
        span = record_function(_full(name, step))
        span.__enter__()
    _local.open = (*_local.open, span)


def _leave_span() -> None:
    *rest, span = _local.open
    _local.open = tuple(rest)
    if span is not None:
        span.__exit__(None, None, None)


def _full(name: str, step: int) -> str:
    if not name.startswith("{") or _local.names is None:
        return name
    root, rest = name[1:].split("}", 1)
    return _local.names(_local.indices[step])[int(root)] + rest


for _kind in ("span", "looped_span"):
    _library.impl(f"enter_{_kind}", _enter_span, "CompositeExplicitAutograd")
    _library.impl(f"leave_{_kind}", _leave_span, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchlift::enter_{_kind}", lambda name, step=-1: None, lib=_library)
    torch.library.register_fake(f"torchlift::leave_{_kind}", lambda: None, lib=_library)
ENTER, LEAVE = torch.ops.torchlift.enter_span.default, torch.ops.torchlift.leave_span.default
LOOPED = torch.ops.torchlift.enter_looped_span.default, torch.ops.torchlift.leave_looped_span.default
MARKS = (ENTER, LEAVE, *LOOPED)
keep_in_order = _compat.kept_in_order(ENTER, LEAVE)


def traced() -> tuple[Callable[[str], None], Callable[[], None]]:
    """What enters and what leaves a span in the graph that Dynamo makes."""
    if keep_in_loops():
        return torch.ops.torchlift.enter_looped_span, torch.ops.torchlift.leave_looped_span
    keep_in_order()
    return torch.ops.torchlift.enter_span, torch.ops.torchlift.leave_span


class located:
    """A call of a graph with spans, which runs the iterations ``indices``. If it raises, no span stays open.

    A class: a quarter of what a generator costs, once in each iteration.
    """

    __slots__ = ("before", "names", "indices")

    def __init__(self, names: Names | None, indices: Sequence[int]):
        self.names, self.indices = names, indices

    def __enter__(self) -> None:
        self.before = _local.names, _local.indices, _local.open
        _local.names, _local.indices = self.names, self.indices

    def __exit__(self, *error: object) -> None:
        while len(_local.open) > len(self.before[2]):
            _leave_span()
        _local.names, _local.indices, _ = self.before


# Whether optional spans are there ------------------------------------------------------------------------------------

_enabled = False
_asking: set[Hashable] = set()  # keys of bodies that have optional spans


def enabled() -> bool:
    """Whether named calls that are optional have spans."""
    return _enabled


def enable(wanted: bool) -> None:
    global _enabled
    _enabled = wanted


def forget() -> None:
    """Forgets which bodies have optional spans."""
    _asking.clear()


def met_optional() -> None:
    """An optional named call was met."""
    _local.met_optional = True


@contextmanager
def noting(key: Hashable) -> Iterator[None]:
    """Notes whether the body of that key, which runs in the block, has optional spans."""
    _local.met_optional = False
    yield
    if _local.met_optional:
        _asking.add(key)


def wanted_by(key: Hashable) -> bool:
    """What the graphs of a body depend on: other ones are needed only where spans come or go in it."""
    return _enabled and key in _asking


# Capture -------------------------------------------------------------------------------------------------------------


class Recorder:
    """The spans that a capture meets, in order: a name and the number of an iteration, or None where one is left."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, int] | None] = []
        self.step = 0
        self.bound: tuple[Any, ...] = ()  # those that are open, for who makes names
        self.modules: tuple[Any, ...] = ()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records in the block; anew each time, for a body is run several times to capture it."""
        if self.marks:
            _number_nodes(0)
        self.marks, self.bound, self.modules = [], (), ()
        before, _local.recorder = _local.recorder, self
        try:
            yield
        finally:
            _local.recorder = before

    def enter(self, name: str) -> None:
        self._mark((name, self.step))

    def leave(self) -> None:
        self._mark(None)

    def _mark(self, mark: tuple[str, int] | None) -> None:
        self.marks.append(mark)
        _number_nodes(len(self.marks))

    def tell(self, joint: GraphModule) -> None:
        """Leaves on every forward node the number of marks before it, and on no other node.

        Where a block of the body restores what nodes are told, as a checkpointed one does, the number falls behind.
        """
        if not self.marks:
            return
        reached = 0
        for node in joint.graph.nodes:
            number = _number_of(node)
            if node.op != "call_function" or node.meta.get("partitioner_tag") == "is_backward":
                number = None
            elif number is not None:
                reached = max(reached, number)
                number = reached
            _renumber(node, number)


_NUMBER = "torchlift_spans"  # in what nodes are told


def _number_nodes(number: int) -> None:
    """Says what the nodes that are captured from here on are told."""
    meta = torch.fx.traceback.current_meta
    meta["custom"] = {**meta.get("custom", {}), _NUMBER: number}


def _number_of(node: Node) -> int | None:
    """What a node was told, or one that it was made of."""
    return node.meta.get("custom", {}).get(_NUMBER)


def _renumber(node: Node, number: int | None) -> None:
    others = {key: value for key, value in node.meta.get("custom", {}).items() if key != _NUMBER}
    node.meta["custom"] = others if number is None else {**others, _NUMBER: number}


def recorder() -> Recorder | None:
    """What records spans in this thread: a capture."""
    return _local.recorder


def at_step(step: int) -> None:
    """In a capture: the iteration of that number starts, which stands for any."""
    _local.iteration = None
    if _local.recorder is not None:
        _local.recorder.step = step


def at_iteration(index: int) -> None:
    """In a plain loop: the iteration of that index starts."""
    if not _compat.is_compiling():  # there a region that is checkpointed may set nothing
        _local.iteration = index


def iteration() -> int | None:
    """The index of the iteration that starts; None where it stands for any."""
    return 0 if _compat.is_compiling() else _local.iteration


# Graphs --------------------------------------------------------------------------------------------------------------


def place(graph: GraphModule, marks: Sequence[tuple[str, int] | None], ahead: bool) -> None:
    """Puts the operators of ``marks`` between the nodes of a forward graph; ``ahead`` of all, for :class:`Placed`.

    There they shift all kernels alike: which ones Inductor fuses depends on how far they are from each other.
    """
    keep_in_order()
    waiting = list(enumerate(marks))
    for node in list(graph.graph.nodes):
        number = len(marks) if node.op == "output" else _number_of(node)
        if ahead and node.op != "placeholder":
            number = len(marks)
        with graph.graph.inserting_before(node):
            while waiting and waiting[0][0] < (number or 0):
                at, mark = waiting.pop(0)
                new = graph.graph.call_function(LEAVE) if mark is None else graph.graph.call_function(ENTER, mark)
                new.meta["val"] = None
                _renumber(new, at)
    graph.recompile()


class Placed:
    """Puts the operators of :func:`place` between the kernels that Inductor made of a graph, in their order."""

    def __init__(self, graph: Graph):
        numbers = [(node.name, _number_of(node)) for node in graph.nodes]
        self.content = hashlib.sha256(repr(numbers).encode()).hexdigest()

    def __call__(self, kernels: list[Any]) -> list[Any]:
        return in_order(kernels)


def in_order(kernels: list[Any]) -> list[Any]:
    """Kernels of Inductor, with each mark before the first one of what comes after it."""
    # A kernel in the body of a loop has origins in the graph around the loop, too.
    graphs = {origin.graph for kernel in kernels for origin in _origins(kernel) if origin.target in MARKS}
    marks = {_reached(kernel, graphs): kernel for kernel in kernels if _is_mark(kernel)}
    kernels = [kernel for kernel in kernels if not _is_mark(kernel)]
    waiting = sorted(marks)
    found: list[Any] = []
    for kernel in kernels:
        reached = _reached(kernel, graphs)
        while waiting and waiting[0] < reached:
            found.append(_beside(kernel, marks[waiting.pop(0)]))
        found.append(kernel)
    return found + [_beside(kernels[-1], marks[number]) if kernels else marks[number] for number in waiting]


def _is_mark(kernel: Any) -> bool:
    return getattr(kernel.node, "op_overload", None) in MARKS


def _beside(kernel: Any, mark: Any) -> Any:
    """``mark`` on the device of ``kernel``: kernels of C++ are gathered until something else comes on their device."""
    mark.get_device = kernel.get_device
    return mark


def _origins(kernel: Any) -> list[Node]:
    return [origin for part in kernel.get_nodes() for origin in getattr(part.node, "origins", ())]


def _reached(kernel: Any, graphs: set[Graph]) -> int:
    """How many marks of ``graphs`` come before what a kernel computes."""
    numbers = [_number_of(origin) for origin in _origins(kernel) if origin.graph in graphs]
    return max((number for number in numbers if number is not None), default=0)


# Loops that torch runs -----------------------------------------------------------------------------------------------


def number_loops(graph: GraphModule) -> None:
    """Tells the nodes of the loops in a graph of Dynamo how many marks of their loop come before them."""
    marks = [mark.overloadpacket for mark in LOOPED]
    for module in graph.modules():
        nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
        if any(node.target in marks for node in nodes):
            reached = 0
            for node in nodes:
                _renumber(node, reached)
                reached += node.target in marks


keep_in_loops = _compat.kept_in_loops(LOOPED, number_loops, in_order)
