"""What a loop carries, kept in the host's memory from forward to backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

AHEAD = 2  # copies to the host that may be under way; more would be device memory that is still held


class _Away:
    """A tensor in page-locked memory of the host, and the one that went there before it.

    NOTE [Overlap]. Copies run on a stream of their own: out while the next iteration computes, and back one tensor
    ahead, while what follows in the forward (so precedes in the backward) is differentiated.
    """

    def __init__(self, tensor: torch.Tensor, stream: Any, before: _Away | None):
        self.device, self.stream, self.before = tensor.device, stream, before
        self.back: torch.Tensor | None = None
        self.copied: Any  # recorded behind the last copy, out or back
        runtime = torch.get_device_module(tensor.device)
        current = runtime.current_stream(tensor.device)
        late = self
        for _ in range(AHEAD):
            late = late.before or late
        if late is not self:
            current.wait_event(late.copied)
        stream.wait_stream(current)
        with runtime.stream(stream):
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.copied = stream.record_event()
        tensor.record_stream(stream)  # its memory is not given away before the copy is done

    def fetch(self) -> None:
        """Starts the copy back, if it is not under way."""
        if self.back is None:
            with torch.get_device_module(self.device).stream(self.stream):
                self.back = torch.empty_like(self.host, device=self.device)
                self.back.copy_(self.host, non_blocking=True)
                self.copied = self.stream.record_event()

    def take(self) -> torch.Tensor:
        """The tensor on its device; the one before it is fetched meanwhile."""
        self.fetch()
        back, self.back = self.back, None
        assert back is not None
        current = torch.get_device_module(self.device).current_stream(self.device)
        current.wait_event(self.copied)
        back.record_stream(current)
        if self.before is not None:
            self.before.fetch()
        return back


@contextmanager
def carries_on_host(given: Iterable[torch.Tensor]) -> Iterator[None]:
    """A block in which what autograd saves goes to the host, but for what shares memory with the tensors ``given``.

    The inputs of a loop are held by its caller. In a loop that is recomputed all else that is saved is its carries.
    What lies on the CPU stays where it is.
    """
    held = {t.untyped_storage().data_ptr() for t in given}
    streams: dict[torch.device, Any] = {}
    last: _Away | None = None

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal last
        if tensor.device.type == "cpu" or tensor.untyped_storage().data_ptr() in held:
            return tensor
        if tensor.device not in streams:
            streams[tensor.device] = torch.get_device_module(tensor.device).Stream(tensor.device)
        last = _Away(tensor, streams[tensor.device], last)
        return last

    def unpack(kept: Any) -> torch.Tensor:
        return kept.take() if isinstance(kept, _Away) else kept

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        last = None  # a loop keeps the hooks, which would keep the host's copies
