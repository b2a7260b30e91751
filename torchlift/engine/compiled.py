"""Finding, or making, the compiled program for a body and its inputs. Bounded caches; one lock around compilation."""

from __future__ import annotations

import copy
import logging
import os
import textwrap
import threading
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine import capture, kept, spans
from torchlift.engine.capture import CaptureError, KeptTensorError, stride_order
from torchlift.engine.forms import Forms
from torchlift.engine.garbage import rarely_collected
from torchlift.engine.graphs import Backend, PartsError, compile_graphs, saved_bytes, surroundings
from torchlift.engine.inlining import inlining, noting_nested
from torchlift.engine.loop import Body
from torchlift.engine.plan import Program, orders_of
from torchlift.engine.signature import Signature, settings, unrolled
from torchlift.errors import TorchliftError

log = logging.getLogger(__name__)

SIGNATURES = 512  # exact signatures remembered
FAMILIES = 128  # bodies, up to sizes, whose programs are kept
PROGRAMS = 16  # programs of one family
CONSTANTS = 8  # sets of plain values among the arguments of one body; as many as torch.compile takes


@dataclass(frozen=True)
class Request:
    """A program wanted: iterations of ``body`` on tensors like ``tensors`` (consts, carry, xs)."""

    body: Body
    signature: Signature
    tensors: list[torch.Tensor]
    flags: tuple[bool, ...]  # which of them are to get gradients; the carry's may differ from what its tensors say
    train: bool
    backend: Backend
    policy: Callable[..., Any] | None
    inline: bool = False  # whether loops in the body are a part of the graph
    around: tuple[Hashable, ...] | None = None  # torch's settings, if they are known

    def common(self) -> tuple[Hashable, ...]:
        around = environment(self.body.key, self.around)
        key = (self.body.key, self.signature, self.train, self.backend, self.policy, around)
        try:
            hash(key)
        except TypeError as error:
            raise CaptureError(f"a value among the inputs is neither a tensor nor hashable ({error})") from None
        return key

    @property
    def loops_inline(self) -> bool:
        """A policy decides about what is in a loop of the body as well."""
        return self.inline or self.policy is not None

    def exact(self, common: tuple[Hashable, ...]) -> Hashable:
        return (common, self.flags, tuple(tensor_key(t) for t in self.tensors))

    def family(self, common: tuple[Hashable, ...]) -> Hashable:
        return (common, self.flags, tuple(_family_key(t) for t in self.tensors))


@dataclass
class Variant:
    """A program and the sizes it serves."""

    program: Program
    closure_likes: list[tuple[Any, ...]]
    mode: Any = None
    guards: str | None = None
    symbolic: bool = False

    def serves(self, tensors: list[torch.Tensor]) -> bool:
        return self.symbolic and _compat.guards_hold(self.mode, self.guards, tensors)


@dataclass
class _Family:
    """Requests that differ only in sizes: the sizes seen, and the programs made."""

    sizes: list[tuple[torch.Size, ...]] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)


_lock = threading.RLock()
_exact: OrderedDict[Hashable, Variant | str] = OrderedDict()  # a string: why it cannot be compiled
_last = Forms()  # programs that need nothing else, per kind of request: as _exact, which would find them, too
plain_ones = Forms()  # what the x of the first iteration was like, by the key of the body
_families: OrderedDict[Hashable, _Family] = OrderedDict()
compilations: Counter[Hashable] = Counter()  # captures per body key
_constants: OrderedDict[Hashable, set[Hashable]] = OrderedDict()  # the plain values seen, per body key


def clear_cache() -> None:
    """Forgets all compiled programs."""
    with _lock:
        _exact.clear()
        _last.clear()
        plain_ones.clear()
        _families.clear()
        compilations.clear()
        _constants.clear()
        spans.forget()
        kept.forget()


def environment(key: Hashable, around: tuple[Hashable, ...] | None = None) -> tuple[Hashable, ...]:
    """What a capture depends on besides the body, of that ``key``, and its inputs; ``around`` are the settings."""
    return (*(settings() if around is None else around), spans.wanted_by(key))


def tensor_key(t: torch.Tensor) -> tuple[Hashable, ...]:
    return (t.shape, t.stride(), t.dtype, t.device)


def _family_key(t: torch.Tensor) -> tuple[Hashable, ...]:
    return (t.ndim, tuple(stride_order(t)), t.is_contiguous(), t.dtype, t.device)


def find_program(request: Request) -> tuple[Program, list[torch.Tensor]]:
    """The program for ``request`` and the closed-over tensors to call it with; :class:`CaptureError` says why not."""
    common = request.common()
    kind = (common, request.flags)
    last = _last.find(kind, request.tensors)
    if last is not None:
        return last[1], []
    exact = request.exact(common)
    found = _exact.get(exact)
    if isinstance(found, Variant) and not found.closure_likes:
        _last.note(kind, request.tensors, found.program)
        return found.program, []
    # Fakes and graphs are made outside of the caller's inference mode: its tensors could not be traced.
    with _lock, torch.inference_mode(False), _compat.dynamo_off(), _compat.without_saved_tensor_hooks():
        found = _exact.get(exact)
        if isinstance(found, str):
            raise CaptureError(found)
        try:
            if isinstance(found, Variant) and (seen := _closures(request, found)) is not None:
                return found.program, seen
            with noting_nested() as nested:
                try:
                    variant, closures = _make(request)
                except (TorchliftError, KeptTensorError):
                    raise
                except Exception:
                    # The loops of the body as parts of its graph may do where operators do not.
                    if not nested:
                        raise
                    variant, closures = _make(replace(request, inline=True))
        except Exception as error:
            if isinstance(error, TorchliftError) and not isinstance(error, CaptureError):
                raise  # a carry that changes, and the like: what the plain loop would say
            reason = reason_of(error)
            if isinstance(error, KeptTensorError) and kept.is_first(exact):
                raise KeptTensorError(reason) from error
            _remember(exact, reason)
            raise CaptureError(reason) from error
        return variant.program, closures


ON_VALUES = "depends on the values of a tensor"  # says why no graph at all can hold a body
_READS = {"aten._local_scalar_dense.default": "if, bool(), float() or .item()"}
WITHOUT_VALUES = "torch.where, index_select and index_copy take choices and places as tensors"


def reason_of(error: Exception) -> str:
    """One line on why a body cannot be compiled."""
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        operator = _READS.get(str(error), error)
        reason = f"{_line_of(error)} {ON_VALUES} ({operator}); {WITHOUT_VALUES}"
    else:
        reason = str(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(reason.strip().split("\n")[0], 200)


def _line_of(error: Exception) -> str:
    """The line that raised an error, of the code that is neither torch's nor this package's."""
    others = os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "the body"


def locked() -> threading.RLock:
    """The lock under which bodies are captured and compiled."""
    return _lock


def _remember(exact: Hashable, what: Variant | str) -> None:
    _exact[exact] = what
    _exact.move_to_end(exact)
    while len(_exact) > SIGNATURES:
        _exact.popitem(last=False)


def _closures(request: Request, variant: Variant) -> list[torch.Tensor] | None:
    """The tensors that the body closes over now, if ``variant`` was made for such.

    NOTE [closures]: a closed-over tensor may be another one at the next call, which no key shows. So bodies that have
    any are run on fakes at each call to find them; bodies that take all their tensors as inputs pay nothing.
    """
    seen = settle(request)[1].closures
    return seen if [_closure_key(t, request) for t in seen] == variant.closure_likes else None


def _closure_key(t: torch.Tensor, request: Request) -> tuple[Hashable, ...]:
    return (*tensor_key(t), request.train and t.requires_grad)


def _fakes(request: Request, mode: Any, dims: list[frozenset[int]]) -> list[torch.Tensor]:
    return [
        _compat.to_fake(mode, t, d, f"t{i}").requires_grad_(flag)
        for i, (t, d, flag) in enumerate(zip(request.tensors, dims, request.flags))
    ]


def _static(request: Request) -> list[frozenset[int]]:
    return [frozenset()] * len(request.tensors)


def settle(request: Request) -> tuple[Request, capture.Probe]:
    """``request`` with the flags that its carry has after some iterations, and what its body was seen to do.

    A carry that starts without grad gets one from the first iteration; one program serves them all.
    """
    fn = unrolled(request.body, request.signature)
    a = request.signature.consts.tensors
    b = a + request.signature.carry.tensors
    while True:
        mode = _compat.new_fake_mode(symbolic=False)
        with spans.noting(request.body.key), inlining(request.loops_inline):
            seen = capture.probe(fn, _fakes(request, mode, _static(request)), mode, request.train)
        if any(seen.mutated[:a]) or any(seen.mutated[b:]):
            # A graph writes into copies. What a loop in Python changes so, a parameter say, stays changed.
            raise CaptureError(
                "the body writes in place into a tensor that is not its carry; compute a new one instead"
            )
        flags = list(request.flags)
        flags[a:b] = [flag or out for flag, out in zip(flags[a:b], seen.requires_grad)]
        if tuple(flags) == request.flags:
            return request, seen
        request = replace(request, flags=tuple(flags))


def _make(request: Request) -> tuple[Variant, list[torch.Tensor]]:
    """A program from the family of ``request``, symbolic where sizes differ from those seen before."""
    _count_constants(request)
    asked = request
    request, probe = settle(request)
    closures = probe.closures
    common = request.common()  # only now it is known whether the body has optional spans
    exact, key = request.exact(common), request.family(common)
    likes = [_closure_key(t, request) for t in closures]
    known = _exact.get(exact)
    if isinstance(known, Variant) and known.closure_likes == likes:
        _remember(asked.exact(common), known)
        return known, closures
    family = _families.setdefault(key, _Family())
    _families.move_to_end(key)
    while len(_families) > FAMILIES:
        _families.popitem(last=False)
    sizes = tuple(t.shape for t in request.tensors)
    variant = next((v for v in family.variants if v.closure_likes == likes and v.serves(request.tensors)), None)
    if variant is None:
        dims = _dynamic_dims(request, family, sizes)
        if any(dims):
            try:
                variant = capture_program(request, dims, closures)
            except TorchliftError:
                raise
            except Exception as error:  # symbolic sizes cannot always be had; one program a size can
                log.debug("%s: no symbolic sizes: %s", request.body.name, error)
        family.sizes.append(sizes)
        if variant is None:
            variant = capture_program(request, _static(request), closures)
        family.variants.append(variant)
        del family.variants[:-PROGRAMS], family.sizes[:-PROGRAMS]
    _remember(exact, variant)
    _remember(asked.exact(common), variant)
    return variant, closures


def _count_constants(request: Request) -> None:
    """Refuses to compile again and again for a number that is another in each call."""
    seen = _constants.setdefault(request.body.key, set())
    _constants.move_to_end(request.body.key)
    while len(_constants) > FAMILIES:
        _constants.popitem(last=False)
    values = request.signature.consts  # not its other leaves by themselves: of a slice it has a hash
    if values not in seen and len(seen) == CONSTANTS:
        got = ", ".join(repr(value) for *_, value in values.others)
        raise CaptureError(
            f"the plain values among the arguments, {got} now, were others in {CONSTANTS} calls before, and each takes "
            "a compilation; pass a number that changes as a tensor"
        )
    seen.add(values)


def _dynamic_dims(request: Request, family: _Family, sizes: tuple[torch.Size, ...]) -> list[frozenset[int]]:
    """Dimensions to make symbolic: those whose size was another before, and is not 0 or 1 now."""
    dynamic = request.backend.dynamic
    dims = []
    for i, size in enumerate(sizes):
        if dynamic is True:
            # Weights keep their size, and a pack the number of its rows.
            inputs = i - request.signature.consts.tensors
            first = int(request.signature.packed > 0 and inputs >= request.signature.carry.tensors)
            changing = set(range(first, len(size))) if inputs >= 0 else set()
        elif dynamic is False:
            changing = set()
        else:
            changing = {d for d in range(len(size)) if any(before[i][d] != size[d] for before in family.sizes)}
        dims.append(frozenset(d for d in changing if size[d] > 1))
    return dims


def capture_program(
    request: Request,
    dims: list[frozenset[int]],
    closures: list[torch.Tensor],
    shapes: bool = False,
    dense: bool = False,
) -> Variant:
    """A new program, with the dimensions ``dims`` symbolic; ``shapes`` keeps a graph to infer shapes with.

    ``dense``: what backward is given as saved is a copy; not so where it is computed again.
    """
    undecided = request.backend.inductor and request.backend.native is None
    native = undecided and all(t.device.type == "cpu" for t in request.tensors)
    divided = native and not shapes  # what other graphs take up as saved is one value each
    while True:
        try:
            return _capture(request, dims, closures, shapes, dense, native, divided)
        except _NotBuilt as failure:
            if _compat.doubt_processor(failure.error):  # once
                continue
            if isinstance(failure.error, PartsError):
                log.debug("%s: no parts of the batch: %s", request.body.name, failure.error.__cause__)
                divided = False
                continue
            if not native:
                raise failure.error from None
            log.debug("%s: called from Python, not C++: %s", request.body.name, failure.error)
            native = False


class _NotBuilt(Exception):
    """Graphs could not be compiled."""

    def __init__(self, error: Exception):
        self.error = error


def _capture(
    request: Request,
    dims: list[frozenset[int]],
    closures: list[torch.Tensor],
    shapes: bool,
    dense: bool,
    native: bool,
    divided: bool,
) -> Variant:
    symbolic = any(dims)
    train, signature = request.train, request.signature
    mode = _compat.new_fake_mode(symbolic)
    fn = capture.substituted(unrolled(request.body, signature), closures)
    a = signature.consts.tensors
    fakes = _fakes(request, mode, dims) + capture.fake_closures(closures, mode, train)
    with inlining(request.loops_inline):
        seen = capture.probe(fn, fakes, mode, train)
    if seen.closures:
        raise CaptureError("the body hands a closed-over tensor to code that hides it; pass it as an argument")
    train = train and any(seen.requires_grad)
    collected = rarely_collected() if request.backend.inductor else nullcontext()
    with collected, surroundings(mode, request.backend, seen.random) as inductor, inlining(request.loops_inline):
        if inductor is not None and any(t.device.type == "cpu" for t in request.tensors):
            _compat.prepare_compiler(request.backend.native is not False)
        graphs = capture.trace(
            fn,
            seen,
            signature,
            fakes,
            train=train,
            inductor=request.backend.inductor,
            join=not request.backend.exact,
            policy=request.policy,
        )
        orders = orders_of(graphs.bw_inputs, graphs.feeds, "tangent")
        tangent_orders = {i: None if order == sorted(order) else order for i, order in orders.items()}
        saved = saved_bytes(graphs)
        # Compiling a graph rewrites it.
        kept = copy.deepcopy(graphs.fw) if shapes else None
        try:
            fw, bw = compile_graphs(
                graphs, mode, request.backend, inductor,
                dense=dense, native=native, signature=signature if divided else None,
            )  # fmt: skip
        except Exception as error:
            raise _NotBuilt(error) from error
        rowwise = graphs.chained and signature.rowwise
        if rowwise:  # gradients of ys come in stacks
            carries = signature.carry.tensors
            tangent_orders = {
                i: order if order is None or i < carries else [0, *(dim + 1 for dim in order)]
                for i, order in tangent_orders.items()
            }
        saved_orders = orders_of(graphs.bw_inputs, graphs.feeds, "saved")
    compilations[request.body.key] += 1
    program = Program(
        fw=fw,
        bw=bw,
        feeds=graphs.feeds,
        tangent_orders=tangent_orders,
        shared_grads=graphs.shared_grads,
        steps=signature.steps,
        packed=bool(signature.packed) or graphs.chained,
        chained=graphs.chained,
        rowwise=rowwise,
        consts=a,
        carries=signature.carry.tensors,
        ys=seen.ys,
        requires_grad=seen.requires_grad if train else [False] * len(seen.requires_grad),
        random=seen.random,
        saved_bytes=saved,
        operators=graphs.operators,
        recomputed=graphs.recomputed,
        closures=len(closures),
        shapes=kept,
        grads=graphs.grads,
        saved_orders=saved_orders,
        marks=graphs.marks,
    )
    guards = _compat.guards_of(mode, fakes) if symbolic else None
    likes = [_closure_key(t, request) for t in closures]
    return Variant(program, likes, mode if symbolic else None, guards, symbolic)
