"""What a graph of torch.compile gets of layers that it runs but does not hold; see NOTE [Roster]."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, fingerprint
from torchlift.engine.compiled import tensor_key
from torchlift.engine.roster import Roster
from torchlift.engine.run import is_plain
from torchlift.errors import UnsupportedError
from torchlift.pack import Packed
from torchlift.variables import AT

# For each holder of layers what was found at its last call, the digest of that, and what graphs get.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str, tuple[Tensor, ...]]] = weakref.WeakKeyDictionary()


def enrolment(
    holder: nn.Module, layers: Sequence[nn.Module], call: Callable[..., Any], skip: Sequence[str]
) -> tuple[Any, ...]:
    """A digest of all that compiled code depends on in the layers, and :meth:`Roster.inputs` of their tensors.

    A graph compares the digest before each run. It is empty, and alone, where the layers must be traced one by one:
    they have hooks, or differ, or hold what is no plain tensor, or modules elsewhere than in one another.
    """
    if not layers or any(AT in layer.__dict__ for layer in layers):
        return ("",)
    first = Packed(call, layers[0], (), {}, "scan_layers")
    first.allow(lambda collection: True, str)
    packed = [first, *(first.beside(layer) for layer in layers[1:])]
    if not all(each.simple for each in packed) or any(each.has_hooks(skip_root=False) for each in packed):
        return ("",)
    rows = [each.tensors for each in packed]
    try:
        keys = [fingerprint.of_packed(first, skip), *(fingerprint.of_modules(each, skip) for each in packed)]
    except UnsupportedError:
        return ("",)
    forms = [[(tensor.requires_grad, *tensor_key(tensor)) for tensor in row] for row in rows]
    found = (keys, forms, [[id(tensor) for tensor in row] for row in rows], _stream(rows))
    known = _known.get(holder)
    if known is not None and known[0] == found:
        return (known[1], *known[2])
    if not _are_alike(packed, keys[1:], forms):
        return ("",)
    digest = fingerprint.digest((keys[0], forms))
    # First, for stand-ins hold the nodes that accumulate gradients, and these hold on to a stream.
    _known.pop(holder, None)
    known = None
    inputs = Roster(rows).inputs()
    _known[holder] = found, digest, inputs
    return (digest, *inputs)


def sees_attributes(modules: Sequence[nn.Module], value: Any, names: set[str]) -> bool:
    """Whether a write to ``names`` of ``value`` changes plain attributes of modules, or what such attributes hold.

    A body that is captured from the real modules while Dynamo traces would see what was there before.
    """
    if isinstance(value, nn.Module):
        inside = any(value is inner for module in modules for inner in module.modules())
        return inside and not names <= {*value._parameters, *value._buffers}
    return id(value) in fingerprint.held(modules)


def sees(modules: Sequence[nn.Module], value: Any, names: set[str]) -> bool:
    """As :func:`sees_attributes`, of anything that a graph would read in the modules at its next call."""
    inner = [each for module in modules for each in module.modules()]
    own = [each.__dict__[store] for each in inner for store in ("_parameters", "_buffers", "_modules")]
    unknown = value is None or isinstance(value, types.CellType)  # a global; the variable of a closure
    return unknown or any(value is each for each in (*inner, *own)) or sees_attributes(modules, value, names)


def _stream(rows: Sequence[Sequence[Tensor]]) -> int | None:
    """The stream of a GPU on which gradients will be accumulated: a CUDA graph is captured on one of its own."""
    on = next((tensor.device for row in rows for tensor in row if tensor.is_cuda), None)
    return None if on is None else torch.cuda.current_stream(on).cuda_stream


def _are_alike(packed: Sequence[Packed], keys: Sequence[Hashable], forms: Sequence[list[Any]]) -> bool:
    """Whether layers are of one key and form, and hold nothing but plain tensors."""
    if any(key != keys[0] for key in keys) or any([f[1:] for f in form] != [f[1:] for f in forms[0]] for form in forms):
        return False
    return all(is_plain(tensor) and not _compat.is_traced(tensor) for each in packed for tensor in each.tensors)
