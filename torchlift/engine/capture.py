"""From a body to graphs: one or several iterations traced on fake tensors, forward and backward, and cut in two.

Tracing is not strict: the body's Python runs once, on tensors without data, and what operators it called is the
graph. So a body must not depend on values of tensors, and what it reads besides its inputs must be in its key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from torchlift import _compat
from torchlift._compat import TorchDispatchMode, pytree
from torchlift.engine.draws import (
    WHY_NOT_APART,
    draws,
    hide_undrawn,
    node_draws,
    noting_apart,
    show_undrawn,
)
from torchlift.engine.kept import KEEPS, Made
from torchlift.engine.packs import pack_saved, select_rows
from torchlift.engine.policies import Policy, checkpoint_policies, verdict_of
from torchlift.engine.products import join_products
from torchlift.engine.quiet import quiet
from torchlift.engine.reached import Reached
from torchlift.engine.remat import inline_remat
from torchlift.engine.signature import Graphs, Signature
from torchlift.engine.spans import Recorder
from torchlift.engine.trees import Template, Tree, split


class CaptureError(Exception):
    """A body cannot be captured; the message is the reason. Never leaves the engine: the plain loop runs."""


class KeptTensorError(CaptureError):
    """A body keeps a tensor of a capture, now taken out again; another capture may do. See NOTE [Kept tensors]."""


class NestedLoopError(Exception):
    """A loop in a body turns out to be none that can be an operator of its graph; it has to be a part of the graph."""


@dataclass
class Probe:
    """What one fake run of the iterations tells."""

    closures: list[torch.Tensor]  # tensors that the body reads and that are not among its inputs
    mutated: list[bool]  # per input: whether the body writes into it
    aliased: list[bool]  # per output: whether it shares memory with an input or an earlier output
    ys: tuple[Template, ...]
    carries: int
    requires_grad: list[bool]  # per output: carry, then the ys. None is here itself: nothing holds a run's tensors
    random: bool


class _Spy(TorchDispatchMode):
    """Notes the real tensors that operators are given, those that they make, and whether any operator draws."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, torch.Tensor] = {}
        self.made = Made()
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.random = self.random or draws(func, args, kwargs)
        # torch.tensor(3.0) in a body makes a real tensor and lifts it; that one is a constant of the graph.
        if func is not torch.ops.aten.lift_fresh.default:
            real = [t for t in pytree.tree_leaves((args, kwargs)) if _is_real(t)]
            for tensor in real:
                self.found.setdefault(id(tensor), tensor)
            if real and func._schema.is_mutable and _is_real(args[0]):
                raise CaptureError(f"the body writes into a tensor that is not among its inputs ({func})")
        out = func(*args, **kwargs)
        self.made.note(out)
        return out

    def leave_out_constants(self, again: _Spy) -> None:
        """Takes out what the body made itself, by what another run found.

        NOTE [Constants]. ``torch.tensor(2.0)`` in TorchScript makes a real tensor, unseen by any mode. In another run
        it is another tensor, of the same value, while one from outside is the same. Those of this run are alive, so no
        other has their addresses.
        """
        made = [t for at, t in self.found.items() if _may_be_constant(t) and at not in again.found]
        anew = [t for at, t in again.found.items() if _may_be_constant(t) and at not in self.found]
        apart = {t.untyped_storage()._cdata for t in made}.isdisjoint(t.untyped_storage()._cdata for t in anew)
        if apart and [(t.dtype, t.item()) for t in made] == [(t.dtype, t.item()) for t in anew]:
            for tensor in made:
                del self.found[id(tensor)]


def _may_be_constant(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 0 and tensor.device.type == "cpu" and not tensor.requires_grad


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not _compat.is_fake(leaf)


class _Substitute(TorchFunctionMode):
    """Puts one tensor in the place of another, above autograd, so that gradients reach the one put in."""

    def __init__(self, originals: Sequence[torch.Tensor], stand_ins: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.map = {id(a): b for a, b in zip(originals, stand_ins)}

    def swap(self, tree: Tree) -> Tree:
        return pytree.tree_map_only(torch.Tensor, lambda t: self.map.get(id(t), t), tree)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self.swap(args), **self.swap(kwargs or {}))


def substituted(fn: Callable[..., Any], originals: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """``fn`` with its closed-over ``originals`` as further arguments at the end."""
    if not originals:
        return fn

    def with_closures(*tensors: torch.Tensor) -> Any:
        inputs, stand_ins = tensors[: -len(originals)], tensors[-len(originals) :]
        with _Substitute(originals, stand_ins) as mode:
            return mode.swap(fn(*inputs))

    return with_closures


def probe(fn: Callable[..., Any], fakes: list[torch.Tensor], mode: Any, train: bool) -> Probe:
    """Runs the iterations on ``fakes`` and reports."""

    def once(spy: _Spy) -> Probe:
        with quiet(), inline_remat(), mode, torch.set_grad_enabled(train):
            # Clones, so that an in-place write into a leaf that requires grad is no error here.
            inputs = [fake.clone() for fake in fakes]
            spy.made.note(inputs)
            versions = [t._version for t in inputs]
            with spy:
                carry, ys = fn(*inputs)
        flat_ys = [split(y) for y in ys]
        outputs = split(carry)[0] + [t for tensors, _ in flat_ys for t in tensors]
        for out in outputs:
            if not _compat.is_fake(out):
                spy.found.setdefault(id(out), out)
        return Probe(
            closures=[],
            mutated=[t._version != v for t, v in zip(inputs, versions)],
            aliased=_aliased(outputs, inputs),
            ys=tuple(template for _, template in flat_ys),
            carries=len(outputs) - sum(len(tensors) for tensors, _ in flat_ys),
            requires_grad=[out.requires_grad for out in outputs],
            random=spy.random,
        )

    def run(again: bool = True) -> tuple[Probe, _Spy]:
        spy, reached = _Spy(), Reached(fn)
        try:
            with noting_apart() as drew:
                seen = once(spy)
        except BaseException:
            spy.made.take_out(reached, collect=False)  # what the error's frames hold is alive
            raise
        kept = spy.made.take_out(reached)
        if drew and again:  # it may have been another thread that drew
            return run(again=False)
        if drew:
            raise CaptureError(WHY_NOT_APART)
        if kept is not None:
            raise KeptTensorError(f"the body {KEEPS}, in {kept}; make it before the loop, or register it as a buffer")
        return seen, spy

    seen, spy = run()
    if any(map(_may_be_constant, spy.found.values())):
        spy.leave_out_constants(run()[1])
    return replace(seen, closures=list(spy.found.values()))


def _aliased(outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[bool]:
    """Per output: whether it shares memory with an input or an earlier output, or is a view of something inside."""
    used = {t.untyped_storage()._cdata for t in inputs}
    flags = []
    for out in outputs:
        cell = out.untyped_storage()._cdata
        flags.append(cell in used or out._is_view())
        used.add(cell)
    return flags


def fake_closures(closures: list[torch.Tensor], mode: Any, train: bool) -> list[torch.Tensor]:
    return [
        _compat.to_fake(mode, t, frozenset(), f"closure{i}").requires_grad_(train and t.requires_grad)
        for i, t in enumerate(closures)
    ]


def trace(
    fn: Callable[..., Any],
    seen: Probe,
    signature: Signature,
    fakes: list[torch.Tensor],
    *,
    train: bool,
    inductor: bool,
    join: bool,
    policy: Policy | None,
) -> Graphs:
    """Captures ``fn``, the iterations of ``signature``, on ``fakes`` and partitions them.

    With ``join``, what can be done for several of them at a time is.

    NOTE [fresh outputs]: no output shares memory with an input or with another output. An autograd node and a custom
    operator must not return their inputs, and a body that returns its carry as y would otherwise hand out two names of
    one memory. Compiled, the copy is one more store in a kernel that runs anyway.
    """
    carry_likes = fakes[signature.consts.tensors :][: seen.carries]
    several = signature.steps > 1

    spans = Recorder()

    def flat(*inputs: torch.Tensor) -> list[torch.Tensor]:
        with spans.recording():
            carry, ys = fn(*(t.clone() if mutated else t for t, mutated in zip(inputs, seen.mutated)))
        outputs = split(carry)[0] + [t for y in ys for t in split(y)[0]]
        laid = [like_strided(out, like) for out, like in zip(outputs, carry_likes)] + outputs[len(carry_likes) :]
        return [out.clone() if aliased or out._is_view() else out for out, aliased in zip(laid, seen.aliased)]

    regions = _Regions()
    marking = _compat.checkpoints_seen(regions.enter)
    with quiet(), marking, inline_remat(regions.enter), torch.set_grad_enabled(train):
        joint = _compat.joint_graph(flat, fakes, train, inductor)
    spans.tell(joint)
    _require_whole(joint)
    count = len(seen.requires_grad)
    select_rows(joint)
    if join and several and not seen.random:  # draws stay in their order, which a sorted graph may not keep
        join_products(joint, count)
    if not train:
        return Graphs(joint, None, list(fakes), [], count, marks=spans.marks)
    _tag(joint, policy, regions.policies)
    hide_undrawn(joint)
    holders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    names, vals = [node.name for node in holders], [node.meta["val"] for node in holders]
    carries = range(signature.consts.tensors, signature.consts.tensors + seen.carries)
    held = [i for i in range(len(fakes)) if i not in carries]  # by the node around the loop
    fw, bw = _compat.partition(joint, vals, count, inductor, held)
    for graph in (fw, bw):
        show_undrawn(graph)
    graphs = _wire(fw, bw, names[: len(fakes)], names[len(fakes) :], count, seen.requires_grad)
    if join and several:
        # Ys that come as stacks are copied into those of all iterations, and may be saved as well.
        pack_saved(graphs, seen.carries if signature.packed else count)
    return replace(graphs, marks=spans.marks, shared_grads=_shared(bw))


def like_strided(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``out`` with dimensions laid out in memory in the order of those of ``like``, copied only if they are not."""
    order = stride_order(like)
    back = inverse(order)
    return out.permute(order).contiguous().permute(back) if order != sorted(order) else out.contiguous()


def rows_of(stack: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """What takes so many rows of ``stack`` from a first one on: one after the other in memory, each laid out as it was.

    They are copied where there are gaps, so that what backward needs of a graph's input is the stack and not a copy.
    How is decided here, once for all of a loop's graphs: to find it out takes longer than to copy.
    """
    sizes, strides = ([_compat.size_hint(n) for n in numbers[1:]] for numbers in (stack.size(), stack.stride()))
    order = [0, *(d + 1 for d in order_of(sizes, strides))]
    if order == sorted(order):
        return lambda first, count: stack.narrow(0, first, count).contiguous()
    laid, back = stack.permute(order), inverse(order)
    return lambda first, count: laid.narrow(0, first, count).contiguous().permute(back)


def stride_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the one with the largest stride to the one with the smallest."""
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    return order_of(tensor.size(), tensor.stride())


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def order_of(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """That of a tensor of these sizes and strides."""
    order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] > 1 else 0)
    telling = [d for d in order if sizes[d] > 1]
    return sorted(order) if telling == sorted(telling) else order


def _require_whole(joint: torch.fx.GraphModule) -> None:
    for node in joint.graph.nodes:
        if str(node.target) == "with_effects":  # and its tokens among inputs and outputs: torch.linalg raising errors
            raise CaptureError(f"{node.args[1]} has an effect, which must come in order with those of other iterations")
        if node.op == "get_attr":
            value = getattr(joint, str(node.target), None)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise CaptureError("a closed-over tensor that requires grad would lose its gradient")


def _is_forward(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward"


class _Regions:
    """The checkpointed functions that a capture met, by number from 1 on, and their policies; the outermost counts."""

    def __init__(self) -> None:
        self.policies: list[Policy] = []
        self.inside = False

    @contextlib.contextmanager
    def enter(self, policy: Policy | None) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.policies.append(policy or checkpoint_policies.nothing_saveable)
        self.inside = True
        try:
            with _compat.marked(len(self.policies)):
                yield
        finally:
            self.inside = False


_FIRST = SelectiveCheckpointContext(is_recompute=False)  # for policies that ask: a graph is cut for the first run


def _tag(joint: torch.fx.GraphModule, policy: Policy | None, regions: list[Policy]) -> None:
    """Tells the partitioner what to save: by ``policy``, in ``regions`` by theirs.

    NOTE [random operators]: always saved, a second draw would differ.
    """
    for node in joint.graph.nodes:
        if not _is_forward(node) or not isinstance(node.target, _compat.OpOverload):
            continue
        # A policy for whole iterations holds in the regions of a body too, as that of an outer region does.
        region = 0 if policy is not None else _compat.mark_of(node) or 0
        own = regions[region - 1] if region else policy
        if node_draws(node):
            node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.MUST_SAVE, region
        elif own is not None:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            node.meta["recompute"] = verdict_of(own, _FIRST, node.target, *args, **kwargs)
            node.meta["ac_graph_id"] = region


def _wire(
    fw: torch.fx.GraphModule,
    bw: torch.fx.GraphModule,
    primals: list[str],
    tangents: list[str],
    count: int,
    requires_grad: list[bool],
) -> Graphs:
    """Leaves out of the forward's outputs what is one of its inputs, and says where backward gets everything."""
    output = next(iter(reversed(fw.graph.nodes)))
    outs = list(output.args[0])
    outs[count:] = [_view_in_backward(node, bw) for node in outs[count:]]
    saved = [node for node in outs[count:] if node.op != "placeholder"]
    output.args = (tuple(outs[:count] + saved),)
    fw.graph.lint()
    fw.recompile()
    source: dict[str, tuple[str, int]] = {name: ("input", i) for i, name in enumerate(primals)}
    source |= {node.name: ("saved", i) for i, node in enumerate(saved)}
    differentiable = [i for i, flag in enumerate(requires_grad) if flag]
    source |= {name: ("tangent", i) for name, i in zip(tangents, differentiable, strict=True)}
    holders = [node for node in bw.graph.nodes if node.op == "placeholder"]
    missing = [node.name for node in holders if node.name not in source]
    if missing:
        raise CaptureError(f"the backward needs {missing}, which nothing gives")
    forward_names = {node.name for node in fw.graph.nodes if node.op == "call_function"}
    fw_names = [node for node in fw.graph.nodes if node.op == "placeholder"]
    return Graphs(
        fw,
        bw,
        [node.meta["val"] for node in fw_names],
        [node.meta["val"] for node in holders],
        count,
        [source[node.name] for node in holders],
        operators=len(forward_names),
        recomputed=sum(node.op == "call_function" and node.name in forward_names for node in bw.graph.nodes),
        grads=[node is not None for node in next(iter(reversed(bw.graph.nodes))).args[0]],
    )


def _view_in_backward(saved: torch.fx.Node, bw: torch.fx.GraphModule) -> torch.fx.Node:
    """What to save for ``saved``: of a view of an input (a transposed weight) the input, which backward views."""
    chain = []
    node = saved
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        if any(isinstance(a, torch.fx.Node) for a in node.all_input_nodes[1:]):
            return saved
        chain.append(node)
        node = node.all_input_nodes[0]
    if not chain or node.op != "placeholder":
        return saved
    holders = {n.name: n for n in bw.graph.nodes if n.op == "placeholder"}
    if saved.name not in holders:
        return saved
    old, new = holders[saved.name], holders.get(node.name)
    if new is None:
        with bw.graph.inserting_before(old):
            new = bw.graph.placeholder(node.name)
        new.meta = dict(node.meta)
    with bw.graph.inserting_before(next(n for n in bw.graph.nodes if n.op != "placeholder")):
        env = {node: new}
        for view in reversed(chain):
            env[view] = bw.graph.node_copy(view, lambda n: env[n])
    old.replace_all_uses_with(env[saved])
    bw.graph.erase_node(old)
    bw.recompile()
    return node


def _shared(bw: torch.fx.GraphModule) -> list[bool]:
    """Per gradient: whether it shares memory with an input of the backward or with another gradient."""
    seen = {node.meta["val"].untyped_storage()._cdata for node in bw.graph.nodes if _is_tensor_input(node)}
    flags = []
    for node in next(iter(reversed(bw.graph.nodes))).args[0]:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        cell = value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
        flags.append(cell in seen)
        if cell is not None:
            seen.add(cell)
    return flags


def _is_tensor_input(node: torch.fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
