"""In what a layer differs from another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import fingerprint
from torchlift.errors import LayerMismatchError, UnsupportedError, likely
from torchlift.nodes import ATOMS, SCRIPTED, STORES
from torchlift.variables import class_of, own_tensors


def check_alike(label: str, layers: Sequence[nn.Module], scanned: Sequence[str]) -> None:
    """Refuses layers that differ in more than their tensors' values and the attributes in ``scanned``."""
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedError(f"{label}: layer {index}: {path or 'it'} {SCRIPTED}")
    for index, layer in enumerate(layers):
        try:
            found = _difference(layers[0], layer, scanned)
        except UnsupportedError:  # it cannot be told; they are called one by one
            continue
        if found is not None:
            raise LayerMismatchError(
                f"{label}: layer {index}: {found}; layers that run as one are equal but for their tensors' values, "
                f"requires_grad, and the names in scanned_attributes={_unmatched(layers, scanned)}"
            )


def _difference(first: nn.Module, layer: nn.Module, scanned: Sequence[str]) -> str | None:
    """The first difference of a layer from layer 0, in words; None if there is none that matters."""
    others = dict(layer.named_modules())
    modules = dict(first.named_modules())
    for path, module in modules.items():  # first, for others have other submodules
        if path in others and class_of(others[path]) is not class_of(module):
            name = type(others[path]).__name__
            again = "; one was made anew for each: lift the class once" if type(module).__name__ == name else ""
            return f"{path or 'the layer'} is a {name}, but a {type(module).__name__} in layer 0{again}"
    if list(others) != list(modules):
        odd = sorted(set(others) ^ set(modules))
        return f"submodules {odd} are in one layer only" if odd else f"has submodules {list(others)} != {list(modules)}"
    for path, module in modules.items():
        other = others[path]
        where = f"{path}." if path else ""
        tensors = {key: (store, tensor) for store, key, tensor in own_tensors(module)}
        found = {key: (store, tensor) for store, key, tensor in own_tensors(other)}
        if list(tensors) != list(found):
            return f"{path or 'the layer'} has {list(found)} != {list(tensors)}"
        for key, (store, tensor) in tensors.items():
            got = found[key][1]
            if (found[key][0], got.shape, got.dtype) != (store, tensor.shape, tensor.dtype):
                return f"{where}{key} {tuple(got.shape)} {got.dtype} != {tuple(tensor.shape)} {tensor.dtype}"
        expected, attributes = fingerprint.of_module(module), fingerprint.of_module(other)
        for key in [*expected, *(key for key in attributes if key not in expected)]:
            if key in scanned or f"{where}{key}" in scanned or key == "training":
                continue
            if expected.get(key) != attributes.get(key):
                return f"{where}{key} {other.__dict__.get(key)!r} != {module.__dict__.get(key)!r}"
    return None


def _unmatched(layers: Sequence[nn.Module], scanned: Sequence[str]) -> str:
    """The scanned attributes that no layer has, in words, and what may be meant; empty if there are none."""
    inner = [(f"{path}." if path else "", module) for layer in layers for path, module in layer.named_modules()]
    names = {name for where, module in inner for key in module.__dict__ for name in (key, where + key)}
    meant = {name: likely(name, sorted(names)) for name in scanned if name not in names}
    found = [f"{name!r}" + (f" (did you mean {close!r}?)" if close else "") for name, close in meant.items()]
    return f"; no layer has a plain attribute {' or '.join(found)}, which scanned_attributes= names" if found else ""


def common_attribute(label: str, layers: Sequence[nn.Module], name: str) -> Any:
    """The plain attribute of that name, which all layers have alike.

    Raises:
        AttributeError: there is none.
    """
    found = [layer.__dict__[name] for layer in layers if name in layer.__dict__]
    if found and len(found) == len(layers):
        value = found[0]
        alike = all(other is value or (type(value) in ATOMS and _equal(other, value)) for other in found)
        if alike and not isinstance(value, (Tensor, nn.Module)):
            return value
    if any(_has(layer, name) for layer in layers):
        raise AttributeError(
            f"{label}: asked for {name!r}, an attribute of its layers, of which it has only those that are plain and "
            f"alike in all layers; read it from a layer: layers[0].{name}"
        )
    raise AttributeError(f"{label}: neither it nor its layers have an attribute {name!r}")


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has such an attribute, found without asking it: a property may compute."""
    stores = (layer.__dict__, *[layer.__dict__[store] for store in (*STORES, "_modules")])
    return any(name in store for store in stores) or hasattr(type(layer), name)
