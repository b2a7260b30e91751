"""What a computation costs: bytes alive, bytes saved for backward, operations run."""

import itertools
import json
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The bytes that are alive, and the most that were at once, of storages made inside; not those of ``own``."""

    def __init__(self, *own):
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._made(tensor.untyped_storage())
        return out

    def _made(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self.known.discard(key)
        self.alive -= size


class Operations(TorchDispatchMode):
    """How often each operator runs, by the name of its packet."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return op(*args, **(kwargs or {}))


def saved_bytes(fn, *own):
    """Bytes of the distinct storages that autograd saves while ``fn`` runs, but for those of the tensors ``own``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in found.values())


def peak_bytes(fn):
    """The most bytes that were allocated at once while ``fn`` ran, compiled graphs included, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))
