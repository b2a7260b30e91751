"""Carries a policy out where operators run one by one: keeps results in the forward, hands them back in the replay.

NOTE [Selective]. torch's own selective checkpointing serves compiled code (see :func:`graph_contexts`). In eager this
takes its place, because torch's refuses a second backward over one region, refuses regions that write in place into
what they keep (a linear layer and an in-place relu), knows no offload to the host, and skips a kept random draw
without advancing the generator, so that later draws differ. Here every kept result is optional: one that was used up
or written to is simply computed again, from inputs that are equal to the first ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from torchlift import _compat
from torchlift._compat import pytree
from torchlift.engine.draws import devices_of, read_states
from torchlift.engine.policies import NAME, OFFLOADS, SAVES, Policy, listeners, verdict_of

Key = tuple[Any, int]  # an operator, and which of its calls in the region

# Further results of an operator (the log-sum-exp of attention, the mean of a norm) are held while the region runs in
# case that the main one is given a name, if all of them together are at most this part of it.
_SMALL = 1 / 16


def _context(out: Any) -> Any:
    """What torch gives a checkpointing policy beside the operator and its arguments."""
    try:
        return SelectiveCheckpointContext(is_recompute=False, op_output=out)
    except TypeError:  # torch 2.11
        return SelectiveCheckpointContext(is_recompute=False)


class _Kept:
    """A result that is kept: where it is, or on the host."""

    def __init__(self, value: torch.Tensor, offload: bool) -> None:
        self.device = value.device
        self.offloaded = offload
        if offload:
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            value = host.copy_(value, non_blocking=True)
        self.value = value
        self.version = _compat.version(value)

    def valid(self) -> bool:
        return _compat.version(self.value) == self.version

    def get(self) -> torch.Tensor:
        # A fresh tensor each time: autograd makes it an output of the operator that was skipped.
        if self.offloaded:
            copy = self.value.is_cpu and self.device.type == "cpu"
            return self.value.clone() if copy else self.value.to(self.device, non_blocking=True)
        return self.value.detach()


@dataclass(frozen=True)
class _Place:
    """A result that was not kept, as it lay in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype


@dataclass
class _Candidate:
    """A call whose main result could still be given a name."""

    key: Key
    place: _Place
    main: int  # where the main result stands among the leaves
    leaves: list[Any]  # the others: small tensors, and what is no tensor
    spec: Any


class Tape:
    """What one region keeps: the results of the calls that its policy picked, as flat trees."""

    def __init__(self) -> None:
        self.kept: dict[Key, tuple[list[Any], Any]] = {}

    def keep(self, key: Key, leaves: list[Any], spec: Any, offload: bool) -> None:
        kept = [_Kept(_compat.tracked_alias(x), offload) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.kept[key] = kept, spec

    def take(self, key: Key) -> tuple[bool, Any]:
        """(whether the result of this call is kept, the result)."""
        entry = self.kept.get(key)
        if entry is None:
            return False, None
        # Under retain_graph=True the region is replayed again. Otherwise the tape lets go of what it hands out: the
        # replay keeps it as long as backward needs it.
        if not _compat.backward_keeps_graph():
            del self.kept[key]
        if not all(leaf.valid() for leaf in entry[0] if isinstance(leaf, _Kept)):
            return False, None
        leaves, spec = entry
        return True, pytree.tree_unflatten([x.get() if isinstance(x, _Kept) else x for x in leaves], spec)


class _RegionMode(_compat.TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled functions inside of a region stay compiled

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.calls: Counter[Any] = Counter()

    def next_key(self, op: Any) -> Key:
        self.calls[op] += 1
        return op, self.calls[op]


class Recorder(_RegionMode):
    """Runs the forward of a region and keeps what the policy says."""

    def __init__(self, tape: Tape, policy: Policy) -> None:
        super().__init__(tape)
        self.policy = policy
        self.candidates: dict[int, _Candidate] = {}  # by address of the storage that the main result lies in

    def __enter__(self) -> Recorder:
        listeners.stack = (*listeners.stack, self.on_name)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        listeners.stack = listeners.stack[:-1]
        self.candidates.clear()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, drew = _run_noting_draws(op, args, kwargs)
        if not _compat.makes_fresh_results(op):
            if _compat.writes_in_place(op):
                for leaf in pytree.tree_leaves((args, kwargs)):
                    if isinstance(leaf, torch.Tensor):
                        self.candidates.pop(_address(leaf), None)
            return out
        key = self.next_key(op)
        verdict = verdict_of(self.policy, _context(out), op, *args, **kwargs)
        if drew:
            return out
        leaves, spec = pytree.tree_flatten(out)
        if verdict in SAVES or verdict in OFFLOADS:
            self.tape.keep(key, leaves, spec, verdict in OFFLOADS)
        self.note_candidate(key, leaves, spec, args)
        return out

    def note_candidate(self, key: Key, leaves: list[Any], spec: Any, args: Any) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            return
        main = tensors[0] if len(tensors) == 1 else max(tensors, key=_bytes)
        address = _address(main)
        # `aten._unsafe_view` and the like hand their argument on without saying so: who made it stays the one to name.
        if address and any(isinstance(arg, torch.Tensor) and _address(arg) == address for arg in args):
            return
        others = sum(_bytes(t) for t in tensors if t is not main)
        if not address or others > _SMALL * _bytes(main):
            self.candidates.pop(address, None)
            return
        place = _Place(main.size(), main.stride(), main.storage_offset(), main.dtype)
        at = next(i for i, leaf in enumerate(leaves) if leaf is main)
        self.candidates[address] = _Candidate(key, place, at, [None if leaf is main else leaf for leaf in leaves], spec)

    def on_name(self, x: torch.Tensor, name: str) -> None:
        """``checkpoint_name`` was called: keeps, or no longer keeps, the result of the call that made ``x``.

        NOTE [Named producer]. A replay goes through the region in order, so keeping a named value spares nothing
        unless the call that computed it is skipped. Views between the two are repeated, on the kept result.
        """
        x = _compat.plain(x)
        with torch.no_grad(), _compat.no_dispatch_modes():
            verdict = verdict_of(self.policy, _context(x), NAME, x, name)
            made = self.candidates.get(_address(x))
            if made is None:
                return
            if verdict is CheckpointPolicy.MUST_RECOMPUTE:
                self.tape.kept.pop(made.key, None)
            elif (verdict in SAVES or verdict in OFFLOADS) and made.place.dtype == x.dtype:
                leaves = list(made.leaves)
                leaves[made.main] = x.as_strided(made.place.size, made.place.stride, made.place.offset)
                self.tape.keep(made.key, leaves, made.spec, verdict in OFFLOADS)


class Replayer(_RegionMode):
    """Runs the region again, skipping the calls whose results are kept."""

    def __enter__(self) -> Replayer:
        self.calls.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _compat.makes_fresh_results(op):
            found, out = self.tape.take(self.next_key(op))
            if found:
                return out
        return op(*args, **(kwargs or {}))


def _run_noting_draws(op: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """(result, whether it took random numbers). The tag of attention says that it may, for the sake of its dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return op(*args, **kwargs), False
    devices = devices_of(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    before = read_states(devices)
    out = op(*args, **kwargs)
    return out, any(not torch.equal(a, b) for (_, a), (_, b) in zip(before, read_states(devices)))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _address(tensor: torch.Tensor) -> int:
    """Where the data lie; 0 where that says nothing (an empty tensor, a subclass, a sparse layout)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0
