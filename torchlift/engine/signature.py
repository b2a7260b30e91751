"""What a capture is of, some iterations of a body, and what comes of it, a pair of graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchlift._compat import pytree
from torchlift.engine.data import DataAsDetached
from torchlift.engine.loop import Body, check_carry, stack
from torchlift.engine.spans import at_step
from torchlift.engine.trees import Template, Tree


@dataclass(frozen=True)
class Signature:
    """What the non-tensor side of a capture depends on: the templates of consts, of the carry, and of each x.

    If ``packed``, the xs of so many iterations come as one tree of stacks, and the ys go as one; ``reverse`` then runs
    it from its end. ``rowwise``: the xs of one iteration are rows of stacks.
    """

    consts: Template
    carry: Template
    xs: tuple[Template, ...]
    packed: int = 0
    reverse: bool = False
    rowwise: bool = False

    @property
    def steps(self) -> int:
        return self.packed or len(self.xs)

    @property
    def tensors(self) -> int:
        return self.consts.tensors + self.carry.tensors + sum(x.tensors for x in self.xs)


@dataclass
class Graphs:
    """The forward and backward graph of some iterations, and how the values that backward needs reach it.

    The forward takes consts, carry, xs and closures, and returns carry, ys and saved values, xs and ys as the signature
    says. ``feeds`` says where each input of the backward comes from: ("saved", i), ("input", i), or ("tangent", i), i
    an output's number. The backward returns a gradient, or None, for every input of the forward.
    """

    fw: torch.fx.GraphModule
    bw: torch.fx.GraphModule | None
    fw_inputs: list[Any]
    bw_inputs: list[Any]
    outputs: int
    feeds: list[tuple[str, int]] = field(default_factory=list)
    shared_grads: list[bool] = field(default_factory=list)  # per input: its gradient may be another value's memory
    operators: int = 0  # of the forward
    recomputed: int = 0  # of these: what is in the backward again
    grads: list[bool] = field(default_factory=list)  # per input: whether it gets a gradient
    marks: list[tuple[str, int] | None] = field(default_factory=list)  # of the spans in the forward; see ``Recorder``
    chained: bool = False  # whether, compiled, they take any number of packs one behind the other


def unrolled(body: Body, signature: Signature) -> Callable[..., tuple[Tree, list[Tree]]]:
    """The iterations of ``signature`` as a function of flat tensors, in the order consts, carry, xs."""

    def fn(*tensors: torch.Tensor) -> tuple[Tree, list[Tree]]:
        a, b = signature.consts.tensors, signature.consts.tensors + signature.carry.tensors
        consts, carry = signature.consts.fill(tensors[:a]), signature.carry.fill(tensors[a:b])
        steps = signature.steps
        ys: list[Tree] = [None] * steps
        for step, x in enumerate(_xs(signature, tensors[b:])):
            at_step(step)
            old = carry
            expected, spec = pytree.tree_flatten(carry)
            with DataAsDetached():
                carry, y = body.fn(consts, carry, x)
            check_carry(body.name, old, expected, spec, carry)
            ys[steps - 1 - step if signature.reverse else step] = y
        return carry, [stack(body.name, ys).tree] if signature.packed else ys

    return fn


def _xs(signature: Signature, tensors: Sequence[torch.Tensor]) -> Iterator[Tree]:
    """The x of each iteration, in the order they run."""
    if signature.packed:
        # Turned as a whole: rows in the order they run are one matrix for the products of all iterations.
        stacks = [tensor.flip(0) if signature.reverse else tensor for tensor in tensors[: signature.xs[0].tensors]]
        columns = [tensor.unbind(0) for tensor in stacks]
        for i in range(signature.packed):
            yield signature.xs[0].fill([column[i] for column in columns])
        return
    at = 0
    for x in signature.xs:
        yield x.fill(tensors[at : at + x.tensors])
        at += x.tensors


def settings() -> tuple[Hashable, ...]:
    """Torch's settings that decide what a capture is; to ask for them takes 30 us."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    return (
        autocast,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
