"""What a rematerialised region keeps for its backward: policies, and names for them to look at.

NOTE [Policies]. A policy is ``policy(ctx, op, *args, **kwargs)``: ``op`` is an ATen operator and the arguments are
those it was called with, or ``op`` is ``torch.ops.torchlift.checkpoint_name.default`` and the arguments are a tensor
and the name that :func:`checkpoint_name` gave it. ``ctx`` is torch's ``SelectiveCheckpointContext``; where
a graph is cut nothing runs, and the arguments are fake tensors. It returns a
``torch.utils.checkpoint.CheckpointPolicy``, or a bool: whether to save. Policies that need arguments of their own are
``functools.partial``s of plain functions: of all callables with state, these are what Dynamo accepts for a constant
when a region is made inside compiled code.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torchlift import _compat
from torchlift._compat import pytree
from torchlift.errors import OptionError, UnsupportedError

Policy = Callable[..., CheckpointPolicy | bool]
T = TypeVar("T")

OFFLOADS = (CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD)
SAVES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def verdict_of(policy: Policy, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What ``policy`` says of this call, booleans translated."""
    verdict = policy(ctx, op, *args, **kwargs)
    if isinstance(verdict, CheckpointPolicy):
        return verdict
    if not isinstance(verdict, bool):
        raise OptionError(
            f"policy={getattr(policy, '__name__', policy)!s} returned a {type(verdict).__name__}, expected a bool or a "
            "CheckpointPolicy; one that is made of names is called with them: save_only_these_names('name')"
        )
    return CheckpointPolicy.MUST_SAVE if verdict else CheckpointPolicy.PREFER_RECOMPUTE


class _Listeners(threading.local):
    """Whom :func:`checkpoint_name` tells in this thread: the regions that record, innermost last."""

    stack: tuple[Callable[[torch.Tensor, str], None], ...] = ()


listeners = _Listeners()


# --- names --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("torchlift::checkpoint_name", mutates_args=())
def _name(x: torch.Tensor, name: str) -> torch.Tensor:
    # NOTE [Name]. An operator may not return its input, so the operator copies. It exists in graphs only: there it
    # marks a node for the partitioner, and Inductor takes it for a copy, which fuses into its neighbours. When
    # operators run one by one, `checkpoint_name` tells the region that records instead and costs nothing. Inside of
    # torch.func transforms no policy looks at names, and torch's custom operators are not for them: `grad` refuses
    # one, `jvp` gives a tangent of zero. (And `torchlift::name` cannot be: `torch.ops.torchlift.name` is a string.)
    return x.clone()


_name.register_fake(lambda x, name: torch.empty_like(x))
_name.register_autograd(lambda ctx, grad: (grad, None))
NAME = torch.ops.torchlift.checkpoint_name.default


def checkpoint_name(x: T, name: str) -> T:
    """Names an intermediate value, for the policies of :func:`torchlift.remat` that save by name.

    The identity, wherever it stands; ``torchlift.checkpoint_policies`` lists the policies that look at names.

    Args:
        x: A tensor, or a pytree of them.
        name: Any string. Several values may have the same name.

    Returns:
        ``x``.

    Example:
        >>> def mlp(x, w):
        ...     return torchlift.checkpoint_name(x @ w, "hidden").sin()
        >>> keep = torchlift.checkpoint_policies.save_only_these_names("hidden")
        >>> x, w = torch.ones(2, 3), torch.ones(3, 3)
        >>> torch.equal(mlp(x, w), (x @ w).sin())
        True
    """
    if torch.compiler.is_dynamo_compiling() or _compat.is_tracing():
        if _compat.functorch_active() or _compat.forward_ad_active():
            return x
        return pytree.tree_map_only(torch.Tensor, lambda t: NAME(t, name), x)
    for on_name in listeners.stack:
        for leaf in pytree.tree_leaves(x):
            if isinstance(leaf, torch.Tensor):
                on_name(leaf, name)
    return x


# --- policies -----------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_DOTS = frozenset(
    {
        *(_aten.mm.default, _aten.mm.dtype, _aten.addmm.default, _aten.addmm.dtype, _aten._addmm_activation.default),
        *(_aten.mv.default, _aten.addmv.default, _aten.dot.default, _aten.vdot.default, _aten.linear.default),
        *(_aten._scaled_mm.default, _aten._int_mm.default),
    }
)
_BATCHED_DOTS = frozenset({_aten.bmm.default, _aten.bmm.dtype, _aten.baddbmm.default, _aten.baddbmm.dtype})


def _is_dot_without_batch(op: Any, args: tuple[Any, ...]) -> bool:
    if op in _BATCHED_DOTS:  # einsum and matmul make one with a batch of 1 out of a plain product
        size = args[0 if op in (_aten.bmm.default, _aten.bmm.dtype) else 1].shape[0]
        return isinstance(size, int) and size == 1
    return op in _DOTS


def _by_name(
    saved: tuple[str, ...] | None, offloaded: tuple[str, ...], excluded: tuple[str, ...], others: bool,
    ctx: Any, op: Any, *args: Any, **kwargs: Any,
) -> CheckpointPolicy:  # fmt: skip
    """``saved`` None: every name that is not excluded; ``others``: also what has no name."""
    if op != NAME:
        return CheckpointPolicy.PREFER_SAVE if others else CheckpointPolicy.PREFER_RECOMPUTE
    name = args[1]
    if name in offloaded:
        return CheckpointPolicy.MUST_CPU_OFFLOAD
    if name in excluded:
        return CheckpointPolicy.MUST_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if saved is None or name in saved else CheckpointPolicy.PREFER_RECOMPUTE


def _either(one: Policy, other: Policy, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    verdicts = [verdict_of(policy, ctx, op, *args, **kwargs) for policy in (one, other)]
    for kind in (SAVES, OFFLOADS, (CheckpointPolicy.MUST_RECOMPUTE,)):
        for verdict in verdicts:
            if verdict in kind:
                return verdict
    return CheckpointPolicy.PREFER_RECOMPUTE


def _offload_dots(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    offload = _is_dot_without_batch(op, args)
    return CheckpointPolicy.MUST_CPU_OFFLOAD if offload else CheckpointPolicy.PREFER_RECOMPUTE


def _check_route(policy: str, offload_src: str, offload_dst: str) -> None:
    if (offload_src, offload_dst) != ("device", "pinned_host"):
        raise UnsupportedError(
            f"checkpoint_policies.{policy}: offload from {offload_src!r} to {offload_dst!r}, expected "
            "offload_src='device', offload_dst='pinned_host': tensors are offloaded to page-locked memory of the CPU"
        )


class checkpoint_policies:
    """What :func:`torchlift.remat` keeps of a region for its backward; the rest is computed again.

    Pass one as ``policy=``, or a function of your own: ``policy(ctx, op, *args, **kwargs)`` gets each operator
    (``torch.ops.aten.mm.default``, ...) with its arguments, ``torch.ops.torchlift.checkpoint_name.default`` with a
    tensor and its name, and returns whether to save the result (a bool, or a
    ``torch.utils.checkpoint.CheckpointPolicy``).

    Without an operator graph, what lies between two saved values is computed again even if it served only to make
    the second one; views, operators that write in place and random draws are always repeated. Under ``torch.func``
    transforms of reverse mode (``grad``, ``vjp``, ``jacrev``) everything is recomputed whatever the policy, except
    with ``everything_saveable``.

    Example:
        >>> policies = torchlift.checkpoint_policies
        >>> policies.dots_saveable(None, torch.ops.aten.mm.default, torch.ones(2, 2), torch.ones(2, 2))
        True
        >>> both = policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("a"))
        >>> both(None, torch.ops.torchlift.checkpoint_name.default, torch.ones(2), "a")
        <CheckpointPolicy.MUST_SAVE: 0>
    """

    @staticmethod
    def everything_saveable(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Keeps all that ordinary autograd keeps: nothing is recomputed.

        Example:
            >>> torchlift.checkpoint_policies.everything_saveable(None, torch.ops.aten.sin.default, torch.ones(2))
            True
        """
        return True

    @staticmethod
    def nothing_saveable(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Keeps the arguments of the region only; the same as no policy.

        Example:
            >>> torchlift.checkpoint_policies.nothing_saveable(None, torch.ops.aten.sin.default, torch.ones(2))
            False
        """
        return False

    @staticmethod
    def offload_carries(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Keeps nothing of an iteration but its carry, and that in the CPU's memory until backward needs it.

        For loops (``scan_layers``, ``remat_scan``, ``while_loop``): on the device a single carry is left, whatever the
        depth. It is copied away while the next iteration computes, and back while the one after it is differentiated.
        In a graph of ``torch.compile`` around the loop, or under a transform of ``torch.func``, all stay there.

        Example:
            >>> keep = torchlift.checkpoint_policies.offload_carries
            >>> blocks = torchlift.scan_layers([torch.nn.Linear(4, 4) for _ in range(6)], policy=keep, compile=False)
            >>> blocks(torch.ones(2, 4)).sum().backward()
        """
        return False

    @staticmethod
    def dots_saveable(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Keeps the results of matrix products (``mm``, ``addmm``, ``bmm``, ``mv``, ``dot``, ...), not of convolutions.

        Fused attention is no product of this list: name its result and save that name.

        Example:
            >>> a = torch.ones(4, 2, 2)
            >>> torchlift.checkpoint_policies.dots_saveable(None, torch.ops.aten.bmm.default, a, a)
            True
        """
        return op in _DOTS or op in _BATCHED_DOTS

    checkpoint_dots = dots_saveable

    @staticmethod
    def dots_with_no_batch_dims_saveable(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        """Keeps the results of matrix products without a batch axis: those with weights, not those of attention.

        Example:
            >>> a = torch.ones(4, 2, 2)
            >>> torchlift.checkpoint_policies.dots_with_no_batch_dims_saveable(None, torch.ops.aten.bmm.default, a, a)
            False
        """
        return _is_dot_without_batch(op, args)

    checkpoint_dots_with_no_batch_dims = dots_with_no_batch_dims_saveable

    @staticmethod
    def save_only_these_names(*names: str) -> Policy:
        """Keeps what :func:`torchlift.checkpoint_name` gave one of these names.

        Example:
            >>> keep = torchlift.checkpoint_policies.save_only_these_names("a", "b")
            >>> keep(None, torch.ops.torchlift.checkpoint_name.default, torch.ones(2), "c")
            <CheckpointPolicy.PREFER_RECOMPUTE: 3>
        """
        return functools.partial(_by_name, names, (), (), False)

    @staticmethod
    def save_any_names_but_these(*names: str) -> Policy:
        """Keeps what has a name, but for these; nothing without a name.

        Example:
            >>> keep = torchlift.checkpoint_policies.save_any_names_but_these("a")
            >>> keep(None, torch.ops.torchlift.checkpoint_name.default, torch.ones(2), "b")
            <CheckpointPolicy.MUST_SAVE: 0>
        """
        return functools.partial(_by_name, None, (), names, False)

    @staticmethod
    def save_anything_except_these_names(*names: str) -> Policy:
        """Keeps every result, named or not, but for those with one of these names.

        Example:
            >>> keep = torchlift.checkpoint_policies.save_anything_except_these_names("a")
            >>> keep(None, torch.ops.aten.sin.default, torch.ones(2))
            <CheckpointPolicy.PREFER_SAVE: 1>
        """
        return functools.partial(_by_name, None, (), names, True)

    @staticmethod
    def save_from_both_policies(policy_1: Policy, policy_2: Policy) -> Policy:
        """Keeps what either policy keeps.

        Example:
            >>> policies = torchlift.checkpoint_policies
            >>> keep = policies.save_from_both_policies(policies.nothing_saveable, policies.dots_saveable)
            >>> keep(None, torch.ops.aten.mm.default, torch.ones(2, 2), torch.ones(2, 2))
            <CheckpointPolicy.MUST_SAVE: 0>
        """
        return functools.partial(_either, policy_1, policy_2)

    @staticmethod
    def save_and_offload_only_these_names(
        *, names_which_can_be_saved: Any, names_which_can_be_offloaded: Any, offload_src: str, offload_dst: str
    ) -> Policy:
        """Keeps some names where they are and others in the CPU's memory until backward needs them.

        In compiled code the offloaded ones are saved where they are.

        Args:
            names_which_can_be_saved: Names to keep on the device.
            names_which_can_be_offloaded: Names to copy away.
            offload_src: ``"device"``.
            offload_dst: ``"pinned_host"``.

        Example:
            >>> keep = torchlift.checkpoint_policies.save_and_offload_only_these_names(
            ...     names_which_can_be_saved=["a"], names_which_can_be_offloaded=["b"],
            ...     offload_src="device", offload_dst="pinned_host")
            >>> keep(None, torch.ops.torchlift.checkpoint_name.default, torch.ones(2), "b")
            <CheckpointPolicy.MUST_CPU_OFFLOAD: 4>
        """
        saved, offloaded = tuple(names_which_can_be_saved), tuple(names_which_can_be_offloaded)
        _check_route("save_and_offload_only_these_names", offload_src, offload_dst)
        if both := sorted(set(saved) & set(offloaded)):
            raise UnsupportedError(
                f"checkpoint_policies.save_and_offload_only_these_names: {both} are in names_which_can_be_saved and in "
                "names_which_can_be_offloaded, expected each name in one of them"
            )
        return functools.partial(_by_name, saved, offloaded, (), False)

    @staticmethod
    def offload_dot_with_no_batch_dims(offload_src: str, offload_dst: str) -> Policy:
        """Keeps the results of matrix products without a batch axis in the CPU's memory until backward needs them.

        Args:
            offload_src: ``"device"``.
            offload_dst: ``"pinned_host"``.

        Example:
            >>> keep = torchlift.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
            >>> keep(None, torch.ops.aten.mm.default, torch.ones(2, 2), torch.ones(2, 2))
            <CheckpointPolicy.MUST_CPU_OFFLOAD: 4>
        """
        _check_route("offload_dot_with_no_batch_dims", offload_src, offload_dst)
        return _offload_dots


def _graph_policy(policy: Policy, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    verdict = verdict_of(policy, ctx, op, *args, **kwargs)
    # The partitioner would take an offload for "decide yourself".
    return CheckpointPolicy.MUST_SAVE if verdict in OFFLOADS else verdict


def graph_contexts(policy: Policy) -> Any:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint`` in compiled code, given as a partial of this function."""
    _compat.inductor_copies(NAME)
    return create_selective_checkpoint_contexts(functools.partial(_graph_policy, policy))
