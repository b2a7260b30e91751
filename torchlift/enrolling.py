"""What a graph of torch.compile gets of layers that it runs but does not hold; see NOTE [Roster]."""

from __future__ import annotations

import types
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, fingerprint
from torchlift.engine.capture import stride_order
from torchlift.engine.compiled import tensor_key
from torchlift.engine.plain import is_plain
from torchlift.engine.roster import Roster, stand_ins, ticket_for
from torchlift.errors import UnsupportedError
from torchlift.pack import Packed
from torchlift.scanned import scanned_places
from torchlift.variables import AT


@dataclass
class _Known:
    """What was found of the layers at the last call, and what graphs get."""

    found: Any
    digest: str
    roster: Roster
    stand_ins: tuple[Tensor, ...]
    ticket: Tensor

    @property
    def enrolment(self) -> tuple[Any, ...]:
        # Kept until it is out of date or was written: Dynamo's guards tell tensors apart by their addresses, and one
        # that is gone leaves its own to that of other layers.
        if _compat.version(self.ticket) or self.ticket.tolist()[1:] != self.roster.versions:
            self.ticket = ticket_for(self.roster)
        return (self.digest, self.ticket, *self.stand_ins)


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_NONE: tuple[Any, ...] = ("",)


def enrolment(
    holder: nn.Module, layers: Sequence[nn.Module], call: Callable[..., Any], skip: Sequence[str]
) -> tuple[Any, ...]:
    """What a graph reads of layers: a digest of all that it depends on in them, a ticket, and stand-ins.

    A graph compares the digest before each run. It is empty, and alone, where the layers must be traced one by one:
    they have hooks, or differ, or hold what is no plain tensor, or modules elsewhere than in one another.
    """
    if not layers or _compat.functorch_active() or any(AT in layer.__dict__ for layer in layers):
        return _NONE
    try:
        first = Packed(call, layers[0], (), {}, "scan_layers")
        first.allow(lambda collection: True, str)
        packed = [first, *(first.beside(layer) for layer in layers[1:])]
        keys = [fingerprint.of_packed(first, skip), *(fingerprint.of_modules(each, skip) for each in packed)]
    except UnsupportedError:  # who traces the layers will say so
        return _NONE
    if not all(each.simple for each in packed) or any(each.has_hooks(skip_root=False) for each in packed):
        return _NONE
    rows = [each.tensors for each in packed]
    forms = [[(tensor.requires_grad, *tensor_key(tensor)) for tensor in row] for row in rows]
    # Of attributes that may differ the kinds: they decide whether a body can do without the values.
    kinds = [[type(each.nodes[at].module.__dict__[key]) for at, key in scanned_places(each, skip)] for each in packed]
    found = (keys, forms, kinds, [[id(tensor) for tensor in row] for row in rows], _stream(rows))
    known = _known.get(holder)
    if known is not None and known.found == found:
        return known.enrolment
    # First, for stand-ins hold the nodes that accumulate gradients, and these hold on to a stream.
    _known.pop(holder, None)
    known = None
    if not _are_alike(packed, keys[1:], forms):
        return _NONE
    try:
        digest = fingerprint.digest((keys[0], forms, kinds, sorted(shared_buffers(packed))), by_address=False)
    except UnsupportedError:
        return _NONE
    roster = Roster(rows, holder, _uncounted(first))
    known = _Known(found, digest, roster, stand_ins(roster), ticket_for(roster))
    if all(tensor.grad_fn is None for row in rows for tensor in row):  # what computed them shall not live that long
        _known[holder] = known
    return known.enrolment


def sees_attributes(modules: Sequence[nn.Module], value: Any, names: set[str]) -> bool:
    """Whether a write to ``names`` of ``value`` changes plain attributes of modules, what these hold, or a global read.

    A body that is captured from the real modules while Dynamo traces would see what was there before.
    """
    if isinstance(value, nn.Module):
        inside = any(value is inner for module in modules for inner in module.modules())
        return inside and not names <= {*value._parameters, *value._buffers}
    if value is None or isinstance(value, types.ModuleType):  # globals
        return fingerprint.reads_any(modules, names)
    return id(value) in fingerprint.held(modules)


def sees(holder: nn.Module, value: Any, names: set[str]) -> bool:
    """Whether a write, of which Dynamo only takes note, would change what a graph reads at its next call."""
    inner = list(holder.modules())
    own = [each.__dict__[store] for each in inner for store in ("_parameters", "_buffers", "_modules")]
    unknown = isinstance(value, types.CellType)  # the variable of a closure
    return unknown or any(value is each for each in (*inner, *own)) or sees_attributes([holder], value, names)


def _uncounted(packed: Packed) -> frozenset[int]:
    """Which buffers are written as batch_norm does it; see :meth:`Packed.publish`."""
    norms = [node for node in packed.nodes if isinstance(node.module, _compat.NormBase)]
    return frozenset(at for node in norms for store, _, at in node.tensors if store == "_buffers")


def shared_buffers(packed: Sequence[Packed]) -> frozenset[int]:
    """The buffers, by their number, whose memory is another's too: a layer sees what one before it wrote there."""
    buffers = [(at, each.tensors[at]) for each in packed for at in each.buffers]
    owners = Counter(id(tensor) for each in packed for tensor in {each.tensors[at] for at in each.buffers})
    found = {at for at, tensor in buffers if owners[id(tensor)] > 1}
    # In a trace it is not known; there those who hold the real layers ask.
    if not _compat.is_compiling() and len({_compat.memory_of(tensor) for _, tensor in buffers}) < len(owners):
        found.update(_overlapping([(at, tensor) for at, tensor in buffers if is_plain(tensor) and tensor.numel()]))
    return frozenset(found)


def _overlapping(buffers: Sequence[tuple[int, Tensor]]) -> set[int]:
    """Those in whose range of memory another tensor begins, or in whose range they begin themselves."""
    found: set[int] = set()
    stop, widest = 0, (0, 0)
    for begin, end, *each in sorted((*_range(tensor), id(tensor), at) for at, tensor in buffers):
        if begin < stop and each[0] != widest[0]:
            found.update((each[1], widest[1]))
        if end > stop:
            stop, widest = end, (each[0], each[1])
    return found


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte, and of what comes after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _stream(rows: Sequence[Sequence[Tensor]]) -> int | None:
    """The stream of a GPU on which gradients will be accumulated: a CUDA graph is captured on one of its own."""
    on = next((tensor.device for row in rows for tensor in row if tensor.is_cuda), None)
    return None if on is None else torch.cuda.current_stream(on).cuda_stream


def _are_alike(packed: Sequence[Packed], keys: Sequence[Hashable], forms: Sequence[list[Any]]) -> bool:
    """Whether layers are of one key and form, and hold nothing but plain tensors."""
    if any(key != keys[0] for key in keys) or any([f[1:] for f in form] != [f[1:] for f in forms[0]] for form in forms):
        return False
    return all(_is_plain(tensor) for each in packed for tensor in each.tensors)


def _is_plain(tensor: Tensor) -> bool:
    return is_plain(tensor) and not _compat.is_traced(tensor) and tensor.permute(stride_order(tensor)).is_contiguous()
