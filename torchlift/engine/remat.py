"""Rematerialisation of functions of pytrees: keep the arguments, compute the rest again in backward.

NOTE [Three ways]. No single mechanism of torch is right everywhere.

* Ordinary autograd: ``torch.utils.checkpoint`` (saved-tensor hooks). Closures keep their gradients, policies work.
* Inside a reverse-mode transform of ``torch.func``, where hooks are refused: :class:`_Remat`, an autograd function
  that computes its gradient by running the function again under ``torch.func.vjp``.
* With a forward-mode level active: neither; the function runs as it is. Hooks would lose the tangents, and a custom
  ``jvp`` is skipped silently in nested forward mode.

``vmap`` alone is taken off first: the mapped function is rematerialised by what stands around the ``vmap``. Under
Dynamo the first becomes the operator that tags nodes for the partitioner. An autograd function would be traced and
its recomputation merged with the forward by AOT's common-subexpression elimination, so the second runs as it is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from torchlift import _compat
from torchlift._compat import pytree
from torchlift.engine.closures import Closures, ForeignTensor, find_closures
from torchlift.engine.draws import States, devices_of, read_states, write_states
from torchlift.engine.policies import Policy, checkpoint_policies, graph_contexts
from torchlift.engine.selective import Recorder, Replayer, Tape

Tensors = tuple[torch.Tensor, ...]
Annotate = Callable[[Policy | None], AbstractContextManager[Any]]


class _State(threading.local):
    def __init__(self) -> None:  # in the instance: Dynamo's guards take a class attribute that is set for a new one
        self.recomputing = False
        self.inline: Annotate | None = None  # set inside inline_remat


_state = _State()


def is_recomputing() -> bool:
    """Whether this code runs again, in a backward, because of :func:`torchlift.remat`.

    A body that counts its calls, logs, or updates something outside of torchlift's variables asks this to do so once
    a call. In compiled code Python runs once whatever is recomputed, and the answer is that of the surroundings.

    Returns:
        True inside a recomputation in this thread.

    Example:
        >>> torchlift.is_recomputing()
        False
    """
    return _state.recomputing


@contextmanager
def inline_remat(annotate: Annotate | None = None) -> Iterator[None]:
    """In this block and thread, checkpointed functions run as they are, each inside ``annotate(its policy)`` if given.

    For an engine that captures a graph and decides about recomputation in it.
    """
    before = _state.inline
    _state.inline = annotate or (lambda policy: nullcontext())
    try:
        yield
    finally:
        _state.inline = before


def captures_body() -> bool:
    """Whether this thread is in a block of :func:`inline_remat`: it captures the body of a loop."""
    return _state.inline is not None


def checkpointed(fn: Callable[..., Any], policy: Policy | None = None, *, name: str = "remat") -> Callable[..., Any]:
    """``fn``, keeping its arguments and what ``policy`` says, and computing the rest again in backward.

    Args:
        fn: Takes and returns pytrees of tensors and static leaves; pure but for draws from torch's default
            generators, which are repeated. It may use tensors that are not arguments.
        policy: See :class:`checkpoint_policies`; None keeps nothing.
        name: Of the transform, for messages.

    Returns:
        A function of the same arguments, with equal values and gradients.
    """
    if policy is checkpoint_policies.nothing_saveable:
        policy = None
    keeps_all = policy is checkpoint_policies.everything_saveable
    context_fn = None if policy is None else functools.partial(graph_contexts, policy)

    @functools.wraps(fn)
    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        # An exported program is one of values: it has no backward to compute anything again in.
        if _compat.is_exporting():
            return fn(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            if keeps_all or _compat.functorch_active() or _compat.forward_ad_active():
                return fn(*args, **kwargs)
            return _tagged(fn, context_fn, args, kwargs)
        if _state.inline is not None:
            with _state.inline(policy):
                return fn(*args, **kwargs)
        # Nor is a recording (``make_fx``) more than the operators, but inside transforms, whose own are among them.
        recorded = _compat.is_recording() and not _compat.functorch_active()
        if keeps_all or recorded or not torch.is_grad_enabled() or _compat.forward_ad_active():
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return _Region(fn, policy, name, leaves, spec).run(tensors)

    return rematerialised


def _tagged(fn: Callable[..., Any], context_fn: Any, args: Any, kwargs: Any) -> Any:
    """The operator that marks the region for the partitioner; traced by Dynamo."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def body(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        )
        return fn(*args, **kwargs)

    if context_fn is None:
        return checkpoint(body, *tensors, use_reentrant=False)
    return checkpoint(body, *tensors, use_reentrant=False, context_fn=context_fn)


# --- one call -----------------------------------------------------------------------------------------------------


class _Region:
    """One call of a checkpointed function: what it takes to run it again.

    An operand list is: the tensors among the arguments, closure tensors, the marker (see :meth:`run_functional`).
    """

    def __init__(self, fn: Callable[..., Any], policy: Policy | None, name: str, leaves: list[Any], spec: Any) -> None:
        self.fn, self.policy, self.name, self.spec = fn, policy, name, spec
        self.at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        # Not the tensors: autograd holds those, and knows when to let go of them.
        self.static = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.devices = devices_of(leaves[i] for i in self.at)
        self.draws = _draws(self.devices)
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({device.type for device in self.devices})
            if torch.amp.is_autocast_available(kind)
        ]
        self.cache_casts = torch.is_autocast_cache_enabled()
        self.hooks = True
        self.watch = True
        self.outer: list[torch.Tensor] = []  # the arguments as the caller holds them, where they are wrapped
        self.foreign: list[torch.Tensor] = []  # closure tensors that were made operands
        self.out_spec: Any = None
        self.out_static: list[Any] = []
        self.out_at: list[int] = []

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        leaves = list(self.static)
        for i, tensor in zip(self.at, tensors):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.fn(*args, **kwargs)

    def hooked(self, *operands: torch.Tensor) -> Tensors:
        """A run under saved-tensor hooks."""
        return self.split(self.call(operands[: len(self.at)]))

    def first(self, *operands: torch.Tensor) -> Tensors:
        """The forward of :class:`_Remat`: without graph, outside of the transforms around the call."""
        tensors, rest = operands[: len(self.at)], operands[len(self.at) :]
        with Closures(tensors, self.foreign, rest, watch=self.watch, outer=self.outer) as closures:
            return self.split(pytree.tree_map(closures.returned, self.call(tensors)))

    def again(self, *operands: torch.Tensor) -> Tensors:
        """The recomputation of :class:`_Remat`."""
        tensors, rest = operands[: len(self.at)], operands[len(self.at) :]
        with ExitStack() as stack:
            stack.callback(write_states, _draws(self.devices))
            write_states(self.draws)
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.cache_casts))
            stack.enter_context(Recomputing())
            if not self.foreign:
                return self.split(self.call(tensors))
            closures = stack.enter_context(Closures(tensors, self.foreign, rest))
            return self.split(pytree.tree_map(closures.replace, self.call(tensors)))

    def split(self, out: Any) -> Tensors:
        leaves, self.out_spec = pytree.tree_flatten(out)
        self.out_at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.out_static = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return tuple(leaves[i] for i in self.out_at)

    def join(self, tensors: Tensors) -> Any:
        leaves = list(self.out_static)
        for i, tensor in zip(self.out_at, tensors):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.out_spec)

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        try:
            return self.join(self.run_operands(tensors))
        except RuntimeError as error:
            # NOTE [Transforms in the body]. torch.func.grad and vjp refuse to run under saved-tensor hooks.
            if not self.hooks or "saved tensor hooks" not in str(error):
                raise
        self.hooks = False
        write_states(self.draws)
        return self.join(self.run_operands(tensors))

    def run_operands(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """The tensors of the result.

        NOTE [Closures]. Operands of an autograd function get gradients; tensors that its code meets otherwise do not,
        silently. So the first run watches for tensors from outside that need one or belong to a transform around the
        call. Most bodies have none. Where one turns up, the function runs once more, without graph and with those
        transforms in effect, to find all of them, and then with them as operands.

        NOTE [Marker]. An operator under ``vmap`` draws for every index, whether its operands are mapped or not. A level
        of ``vmap`` runs an autograd function outside of itself if no operand is mapped there, so one always is.
        """
        marker = _compat.batched_marker()
        markers = () if marker is None else (marker,)
        call = _Call(self, self.first, self.again, self.hooked)
        self.outer = [tensor for tensor in tensors if _compat.is_wrapped(tensor)]
        try:
            return _apply(call, *tensors, *markers)
        except ForeignTensor:
            pass
        except RuntimeError as error:
            # A transform in the body that is given such a tensor trips over it before an operator does.
            if "INTERNAL ASSERT FAILED" not in str(error) or not self.watch:
                raise
        finally:
            self.outer = []
        self.watch = False
        write_states(self.draws)
        with torch.no_grad(), inline_remat(), Recomputing():
            # Aliases, so that an argument that the body also meets by a closure is told apart.
            given = [tensor.view_as(tensor) for tensor in tensors]
            self.foreign = find_closures(self.name, self.fn, self.call, given)
        write_states(self.draws)
        return _apply(call, *tensors, *self.foreign, *markers)


def _draws(devices: tuple[torch.device, ...]) -> States:
    # Inside a transform even a generator's state comes wrapped.
    return tuple((device, _compat.plain(state)) for device, state in read_states(devices))


class Recomputing:
    """Marks a recomputation; with a replayer, hands back what the policy kept. Entered anew by each backward.

    With ``draws`` it starts from those states, and puts the generators back where they stood (NOTE [Mutex]).
    """

    def __init__(self, replayer: Replayer | None = None, draws: States = ()) -> None:
        self.replayer, self.draws = replayer, draws

    def __enter__(self) -> None:
        self.stood = _draws(tuple(device for device, _ in self.draws))
        write_states(self.draws)
        self.before = _state.recomputing
        _state.recomputing = True
        if self.replayer is not None:
            self.replayer.__enter__()

    def __exit__(self, *error: Any) -> None:
        _state.recomputing = self.before
        try:
            if self.replayer is not None:
                self.replayer.__exit__(*error)
        finally:
            write_states(self.stood)


# --- ordinary autograd --------------------------------------------------------------------------------------------


@torch.compiler.disable(recursive=False)  # after a graph break Dynamo would trace this frame, and cannot
def _with_hooks(call: _Call, operands: Tensors) -> Tensors:
    failure: BaseException | None = None
    ran = False
    run = call.hooked or call.first
    draws = _draws(devices_of(operands))  # closures may lie elsewhere than arguments

    def body(*operands: torch.Tensor) -> Any:
        nonlocal failure, ran
        if ran:
            return run(*operands)
        ran = True
        try:
            return run(*operands)
        except BaseException as error:
            # NOTE [Failing body]. Up to torch 2.12 an exception leaves the hooks of the checkpoint in place for as long
            # as someone holds on to its traceback; so it passes by after the checkpoint has cleaned up.
            failure = error

    def contexts() -> tuple[Any, Any]:
        if call.region.policy is None:
            return nullcontext(), Recomputing(draws=draws)
        tape = Tape()
        return Recorder(tape, call.region.policy), Recomputing(Replayer(tape), draws)

    try:
        out = checkpoint(body, *operands, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
        if failure is not None:
            raise failure
        return out
    finally:
        failure = None  # its traceback holds this frame


# --- inside of transforms -----------------------------------------------------------------------------------------


def _apply(call: _Call, *operands: torch.Tensor) -> Tensors:
    """``call`` in the way that fits what is in effect here; see NOTE [Three ways]."""
    if _compat.forward_ad_active():
        return call.first(*operands)
    if not _compat.functorch_active():
        if not torch.is_grad_enabled():
            return call.first(*operands)
        if call.hooked is not None and call.region.hooks:
            return _with_hooks(call, operands)
    return _Remat.apply(call, *operands)


@dataclass
class _Call:
    """A function of tensors that can be run again; closed under mapping and differentiation."""

    region: _Region
    first: Callable[..., Tensors]
    again: Callable[..., Tensors]
    hooked: Callable[..., Tensors] | None = None
    shared: list[bool] = field(default_factory=list)  # of a mapped call that ran: which results no index differs in

    def mapped(self, in_dims: tuple[int | None, ...], randomness: str) -> _Call:
        """NOTE [Shared results]. A result that does not depend on what is mapped comes out once, as it does without
        remat: state that all indices share can then be written."""
        shared: list[bool] = []

        def over(run: Callable[..., Tensors]) -> Callable[..., Tensors]:
            def one(*operands: torch.Tensor) -> Tensors:
                out = run(*operands)
                level = _compat.functorch_depth()
                shared[:] = [_compat.functorch_level(tensor) < level for tensor in out]
                return out

            def every(*operands: torch.Tensor) -> Tensors:
                out = torch.func.vmap(one, in_dims, 0, randomness)(*operands)
                shared[:] = [same and len(tensor) > 0 for same, tensor in zip(shared, out)]
                return tuple(tensor[0] if same else tensor for same, tensor in zip(shared, out))

            return every

        return _Call(self.region, over(self.first), over(self.again), self.hooked and over(self.hooked), shared)


class _Pullback(_Call):
    """From operands of ``call`` and cotangents of some of its outputs to cotangents of some of its operands."""

    def __init__(self, call: _Call, count: int, wanted: list[int], present: list[int]) -> None:
        def linearise(operands: Tensors) -> Callable[..., Tensors]:
            def of_wanted(*some: torch.Tensor) -> Tensors:
                primals = list(operands[:count])
                for i, tensor in zip(wanted, some):
                    primals[i] = tensor
                out = call.again(*primals)
                return tuple(out[i] for i in present)

            pull = torch.func.vjp(of_wanted, *(operands[i] for i in wanted))[1]
            return lambda *cotangents: pull(cotangents)

        def run(*operands: torch.Tensor) -> Tensors:
            return linearise(operands)(*operands[count:])

        super().__init__(call.region, run, run)
        self.linearise, self.count = linearise, count

    def mapped(self, in_dims: tuple[int | None, ...], randomness: str) -> _Call:
        if any(dim is not None for dim in in_dims[: self.count]):
            return super().mapped(in_dims, randomness)

        # NOTE [Mapped cotangents]. ``jacrev`` maps the pullback alone. The function itself must not be run inside of
        # that ``vmap``, where its draws would be others than in the forward, or refused.
        def run(*operands: torch.Tensor) -> Tensors:
            pull = torch.func.vmap(self.linearise(operands), in_dims[self.count :], 0, randomness)
            return pull(*operands[self.count :])

        return _Call(self.region, run, run)


class _Remat(torch.autograd.Function):
    """Runs a call and saves its operands. The gradient is a call as well: every derivative is rematerialised."""

    @staticmethod
    def forward(call: _Call, *operands: torch.Tensor) -> Tensors:
        return call.first(*(operand.detach() for operand in operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *operands = inputs
        ctx.save_for_backward(*operands)
        # A zero for an output that was not used would turn into nan where its derivative is infinite.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        operands = tuple(_compat.without_ended(t) for t in ctx.saved_tensors)
        gradients: list[torch.Tensor | None] = [None] * len(operands)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        present = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if present:
            call = _Pullback(ctx.call, len(operands), wanted, present)
            found = _apply(call, *operands, *(c for c in cotangents if c is not None))
            for i, gradient in zip(wanted, found):
                gradients[i] = gradient
        return (None, *gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *operands: torch.Tensor) -> tuple[Tensors, Any]:
        mapped = call.mapped(in_dims[1:], info.randomness)
        out = _apply(mapped, *operands)
        return out, tuple(None if same else 0 for same in mapped.shared or [False] * len(out))
