"""The default generators' states: read, restored, and walked through a loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch

States = tuple[tuple[torch.device, torch.Tensor], ...]


def devices_of(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """The devices whose default generators a computation on ``tensors`` may draw from; the CPU is always one."""
    found = {torch.device("cpu")}
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            found.add(tensor.device)
    return tuple(sorted(found, key=str))


def read_states(devices: tuple[torch.device, ...]) -> States:
    """The states of the default generators of ``devices``."""
    return tuple(
        (d, torch.get_rng_state() if d.type == "cpu" else torch.get_device_module(d).get_rng_state(d)) for d in devices
    )


def write_states(states: States) -> None:
    """Puts the default generators back to ``states``."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
