"""Converting state dicts between one entry for each layer and one stacked entry for all."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from torchlift.errors import StateDictError


def stack_state_dict(state_dict: Mapping[str, Tensor], prefix: str, axis: int = 0) -> dict[str, Tensor]:
    """Stacks the entries of numbered layers: ``prefix0.w, prefix1.w, ...`` become ``prefix + w``.

    Args:
        state_dict: a state dict; it is not changed.
        prefix: what comes before the layers' numbers: ``"blocks."``, or ``""``.
        axis: where the axis of the layers goes.

    Returns:
        A new state dict with the stacked entries in the place of the layers' ones; other entries are the same tensors.

    Raises:
        StateDictError: it is no state dict, no layers have that prefix, a number is missing, layers differ in names,
            shapes or dtypes, or a stacked name is taken.

    Example:
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(2, 3) for _ in range(4))
        >>> {k: tuple(v.shape) for k, v in torchlift.stack_state_dict(layers.state_dict(), "").items()}
        {'weight': (4, 3, 2), 'bias': (4, 3)}
    """
    label = f"stack_state_dict(prefix={prefix!r})"
    _check_mapping(state_dict, label)
    pattern = re.compile(re.escape(prefix) + r"(0|[1-9][0-9]*)\.(.+)", re.DOTALL)
    layers: dict[int, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        found = pattern.fullmatch(key)
        if found is None:
            others[key] = tensor
        else:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
    if not layers:
        raise StateDictError(f"{label}: no key has the form {prefix}0.name; the keys are {_some(state_dict)}")
    missing = sorted(set(range(max(layers) + 1)) - set(layers))
    if missing:
        raise StateDictError(f"{label}: there are layers {sorted(layers)}, but none with number {missing}")
    for number, layer in layers.items():
        if set(layer) != set(layers[0]):
            raise StateDictError(
                f"{label}: layer {number} has {_some(layer)}, expected {_some(layers[0])} as in layer 0"
            )
    stacked: dict[str, Tensor] = {}
    for name, first in layers[0].items():
        tensors = [layers[number][name] for number in sorted(layers)]
        for number, tensor in enumerate(tensors):
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise StateDictError(
                    f"{label}: {name!r} of layer {number} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                    f"{tuple(first.shape)} {first.dtype} as in layer 0"
                )
        if not -first.ndim - 1 <= axis <= first.ndim:
            raise StateDictError(
                f"{label}: {name!r} of each layer has {first.ndim} dimensions, so its stack has axes "
                f"{-first.ndim - 1} to {first.ndim}, got axis={axis}"
            )
        if prefix + name in others:
            raise StateDictError(f"{label}: the key {prefix + name!r} of the stacked entry is there already")
        stacked[prefix + name] = torch.stack(tensors, axis)
    return _in_place_of(state_dict, pattern, stacked)


def _in_place_of(
    state_dict: Mapping[str, Tensor], pattern: re.Pattern[str], stacked: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict in its own order, with the stacked entries where the first layer's were."""
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if pattern.fullmatch(key):
            result.update(stacked)
        else:
            result[key] = tensor
    return result


def unstack_state_dict(state_dict: Mapping[str, Tensor], prefix: str, axis: int = 0) -> dict[str, Tensor]:
    """Inverts :func:`stack_state_dict`: every entry under ``prefix`` is cut into one for each layer.

    Args:
        state_dict: a state dict; it is not changed.
        prefix: what the stacked entries begin with: ``"blocks."``, or ``""`` for all.
        axis: the axis of the layers.

    Returns:
        A new state dict with ``prefix0.w, prefix1.w, ...`` in the place of ``prefix + w``, ordered by layer.

    Raises:
        StateDictError: it is no state dict, no entry has that prefix, or entries differ in size on ``axis``, or have no
            such axis.

    Example:
        >>> sorted(torchlift.unstack_state_dict({"h.w": torch.ones(2, 3), "e": torch.ones(1)}, "h."))
        ['e', 'h.0.w', 'h.1.w']
    """
    label = f"unstack_state_dict(prefix={prefix!r}, axis={axis})"
    _check_mapping(state_dict, label)
    entries = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not entries:
        raise StateDictError(f"{label}: no key begins with {prefix!r}; the keys are {_some(state_dict)}")
    sizes: dict[str, int] = {}
    for name, tensor in entries.items():
        if not -tensor.ndim <= axis < tensor.ndim:
            raise StateDictError(f"{label}: {name!r} has shape {tuple(tensor.shape)}, which has no axis {axis}")
        sizes[name] = tensor.shape[axis]
    if len(set(sizes.values())) > 1:
        raise StateDictError(f"{label}: entries have different numbers of layers: {sizes}")
    columns = {name: tensor.unbind(axis) for name, tensor in entries.items()}
    layers = {
        f"{prefix}{number}.{name}": columns[name][number].clone()
        for number in range(next(iter(sizes.values())))
        for name in entries
    }
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key.startswith(prefix):
            result.update(layers)
        else:
            result[key] = tensor
    return result


def _check_mapping(state_dict: object, label: str) -> None:
    if not isinstance(state_dict, Mapping):
        raise StateDictError(f"{label}: got {type(state_dict).__name__}, expected a state dict: module.state_dict()")


def _some(keys: Mapping[str, Tensor]) -> str:
    names = list(keys)
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
