"""Compiling the graphs of a capture, by Inductor or another backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine.attention import attend_by_products
from torchlift.engine.capture import inverse, order_of, stride_order
from torchlift.engine.chains import chains
from torchlift.engine.gemm import is_for_onednn, tune_products
from torchlift.engine.native import CALLED, is_native
from torchlift.engine.parts import Part, divide, is_small
from torchlift.engine.signature import Graphs, Signature
from torchlift.engine.spans import Placed, place
from torchlift.errors import OptionError

Boxed = Callable[[list[Any]], Any]  # takes a list, which it empties


OPTIONS = ("backend", "mode", "options", "dynamic", "fullgraph")  # that a dict for ``compile=`` may have


@dataclass(frozen=True)
class Backend:
    """What the ``compile`` argument asks for; options of ``torch.compile``."""

    name: Any = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dynamic: bool | None = None

    @staticmethod
    def of(compile: bool | dict[str, Any]) -> Backend:
        """Reads ``compile=``; unknown keys are refused."""
        if not isinstance(compile, dict):
            return Backend()
        unknown = [key for key in compile if key not in OPTIONS]
        if unknown:
            raise OptionError(f"compile= has {unknown}, expected {', '.join(OPTIONS)}")
        options = tuple(sorted((compile.get("options") or {}).items()))
        # Nothing is made of `fullgraph`: a body is always captured whole.
        return Backend(compile.get("backend") or "inductor", compile.get("mode"), options, compile.get("dynamic"))

    @property
    def inductor(self) -> bool:
        return self.name == "inductor"

    @property
    def native(self) -> bool | None:
        """Whether C++ is to call the kernels; None: where that serves."""
        return dict(self.options).get("cpp_wrapper")

    @property
    def exact(self) -> bool:
        """Whether the graphs run as they were traced, bit by bit what the loop computes."""
        return self.name in ("eager", "aot_eager")


def surroundings(mode: Any, backend: Backend, random: bool) -> AbstractContextManager[Any]:
    """What tracing, partitioning and compiling happen in."""
    if not backend.inductor:
        return nullcontext()
    # A program is found by the very sizes and strides that its graphs would assert at each call.
    options = {"size_asserts": False} | _compat.inductor_mode_options(backend.mode) | dict(backend.options)
    # NOTE [cudagraphs]: a graph that is replayed overwrites what it gave before, and here one graph runs many times
    # while its earlier outputs live. Off until the whole loop is recorded as one.
    options["triton.cudagraphs"] = False
    if random:
        # NOTE [randomness]: the same draws as eager's, from the same generator, in the same order. Reordering for
        # memory could swap two draws, and the joint passes put in attention kernels that draw in their own way.
        options = {"fallback_random": True, "reorder_for_peak_memory": False, "use_joint_graph_passes": False} | options
    return _compat.Inductor(mode, options)


class PartsError(Exception):
    """Graphs could not be compiled in parts; as a whole they may be. Never leaves the engine."""


def compile_graphs(
    graphs: Graphs, mode: Any, backend: Backend, inductor: Any, dense: bool, native: bool, signature: Signature | None
) -> tuple[Boxed, Boxed | None]:
    """The forward and the backward of ``graphs``, ready to be called with a list of tensors.

    With ``dense`` backward takes saved values that were copied: without gaps, their dimensions in the order they had.
    With ``native`` C++ may call the kernels, where that is safe. Given the ``signature`` every thread may run a program
    of its own, for its part of a batch.
    """
    if graphs.marks:
        place(graphs.fw, graphs.marks, ahead=inductor is not None)
    if inductor is None:
        build = _runner(backend.name)
        with torch.no_grad():
            fw = build(graphs.fw, graphs.fw_inputs)
            if dense:
                _make_dense(graphs, mode)
            return fw, None if graphs.bw is None else build(graphs.bw, graphs.bw_inputs)
    with _compat.autocast_off():  # the graphs have its casts in them already
        both = [graph for graph in (graphs.fw, graphs.bw) if graph is not None]
        parts = dict(backend.options).get("cpp.threads", torch.get_num_threads())
        if native and signature is not None and parts > 1 and all(is_native(g) and not is_for_onednn(g) for g in both):
            try:
                a, carries = signature.consts.tensors, signature.carry.tensors
                divided = divide(graphs, range(a, a + carries), parts)
                programs = divided and _compile_parts(graphs, inductor, signature, *divided, parts)
                if programs is not None:
                    return programs
            except Exception as error:
                raise PartsError from error
        for graph in both:
            attend_by_products(graph)
            tune_products(graph)
    fw_native, bw_native = [
        CALLED if native and graph is not None and is_native(graph) else None for graph in (graphs.fw, graphs.bw)
    ]
    last = Placed(graphs.fw.graph) if graphs.marks else None
    train = graphs.bw is not None
    fw, strides = inductor.forward(graphs.fw, graphs.fw_inputs, graphs.outputs, train, last, fw_native)
    bw = None
    if graphs.bw is not None:
        if strides is not None:
            _restride(graphs, strides, mode)
        if dense:
            _make_dense(graphs, mode)
        bw = inductor.backward(graphs.bw, graphs.bw_inputs, bw_native)
    inductor.finish()
    return fw, bw


def _compile_parts(
    graphs: Graphs, inductor: Any, signature: Signature, forward: Part, backward: Part | None, parts: int
) -> tuple[Boxed, Boxed | None] | None:
    """The forward and the backward, each a program that every thread runs for its part, where that is worth it.

    See NOTE [Parts].
    """
    attend_by_products(forward.graph)
    train = backward is not None
    first, second = chains(graphs, signature, forward, backward) or (None, None)
    small = is_small(graphs.fw)
    if first is None and small:
        return None
    drivers = [forward.driver(parts, first)]
    with inductor.in_parts(drivers[0]):
        fw, strides = inductor.forward(forward.graph, forward.inputs, graphs.outputs, train, None, CALLED)
    bw = None
    if backward is not None:
        graphs.bw_inputs[:] = backward.inputs
        if strides is not None:
            _restride(graphs, strides, inductor.mode)
        backward.inputs = list(graphs.bw_inputs)
        attend_by_products(backward.graph)
        places = backward.spread(parts, graphs, drivers[0])
        second = None if drivers[0].chain is None else second
        drivers.append(backward.driver(parts, second, places, drivers[0].pack_step))
        with inductor.in_parts(drivers[1]):
            bw = inductor.backward(backward.graph, backward.inputs, CALLED)
    inductor.finish()
    if not all(driver.called for driver in drivers):
        raise RuntimeError("Inductor took a program of one part from elsewhere")
    graphs.chained = drivers[0].chain is not None
    if small and not graphs.chained:
        raise RuntimeError("the parts turn out to be too small")
    return fw, bw


def _restride(graphs: Graphs, strides: list[Any], mode: Any) -> None:
    """Saved values reach backward with the strides that Inductor chose in forward, not with those that were traced."""
    for at, (kind, i) in enumerate(graphs.feeds):
        if kind != "saved":
            continue
        stride, value = strides[graphs.outputs + i], graphs.bw_inputs[at]
        if stride is None or not isinstance(value, torch.Tensor):
            continue
        wanted = [int(s) for s in stride]
        if [_compat.size_hint(s) for s in value.stride()] == wanted:
            continue
        if not any(isinstance(s, torch.SymInt) for s in value.stride()):
            graphs.bw_inputs[at] = value.as_strided(value.size(), wanted)
            continue
        # The strides that are told are those of the sizes now. In what order dimensions lie, a convolution's say, holds
        # for all sizes.
        sizes = [_compat.size_hint(n) for n in value.size()]
        order = order_of(sizes, wanted)
        with mode:
            laid = value.new_empty([value.size(d) for d in order]).permute(inverse(order))
        told = [_compat.size_hint(s) for s in laid.stride()]
        if any(size > 1 and a != b for size, a, b in zip(sizes, told, wanted)):
            raise RuntimeError("Inductor leaves gaps in what is saved, which for other sizes may be others")
        graphs.bw_inputs[at] = laid


def _make_dense(graphs: Graphs, mode: Any) -> None:
    with mode:
        for at, (kind, _) in enumerate(graphs.feeds):
            value = graphs.bw_inputs[at]
            if kind == "saved" and isinstance(value, torch.Tensor):
                order = stride_order(value)
                back = inverse(order)
                graphs.bw_inputs[at] = value.new_empty([value.size(d) for d in order]).permute(back)


def _runner(name: Any) -> Callable[[torch.fx.GraphModule, list[Any]], Boxed]:
    if callable(name):
        build = name
    elif name in ("eager", "aot_eager"):
        return lambda graph, _: _unboxed(graph)
    else:
        build = _compat.registered_backend(name)
    return lambda graph, inputs: _unboxed(build(graph, inputs))


def _unboxed(fn: Callable[..., Any]) -> Boxed:
    if getattr(fn, "_boxed_call", False):
        return fn

    def call(inputs: list[Any]) -> Any:
        args = tuple(inputs)
        inputs.clear()
        return fn(*args)

    return call


def saved_bytes(graphs: Graphs) -> int:
    """Bytes that pass from forward to backward in one call, less those of its inputs."""
    total = 0
    for value, (kind, _) in zip(graphs.bw_inputs, graphs.feeds):
        if kind == "saved" and isinstance(value, torch.Tensor):
            total += _compat.size_hint(value.numel()) * value.element_size()
    return total
