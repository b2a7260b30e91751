"""Lifted remat: a module whose intermediate values are computed again in backward rather than kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchlift import _compat, _tree, fingerprint, rng
from torchlift._context import context, entered
from torchlift.changes import Meta, Update
from torchlift.contents import Contents
from torchlift.engine.remat import checkpointed, is_recomputing
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.transforms.options import check_policy


@dataclass(frozen=True, kw_only=True)
class _Remat(Transform):
    variables: Filter = True
    rngs: Filter = True
    policy: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check_policy(self.policy, "remat: policy")

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        check(self.variables, f"{label}: variables")
        check(self.rngs, f"{label}: rngs")
        packed = Packed(fn, module, args, kwargs, label, inside)
        packed.allow(lambda c: matches(self.variables, c), lambda c: f"add {c!r} to variables=")
        begin = rng.positions()
        packed.refuse(
            [stream for stream in (rng.DROPOUT, *begin) if not matches(self.rngs, stream)],
            lambda stream: f"add {stream!r} to rngs=",
        )

        objects = fingerprint.opaques(packed.leaves)
        own = packed.plain_containers
        notes = (objects or own) and torch.is_grad_enabled() and not _compat.is_compiling()
        contents = Contents([*objects, *own], label) if notes else None

        packed.fills = not _compat.is_compiling()  # Dynamo lets the body of a checkpoint return no more than it did

        def run(tensors: Any, leaves: Any) -> Any:
            again = is_recomputing()
            as_before = contents.again() if contents and again else nullcontext()
            with entered(streams=begin) if again else entered(), as_before:
                out, update = packed.pure(tensors, packed.with_tensors(leaves))
            flat, spec = _tree.flatten((out, update.changed, update.sown, packed.filled))
            return flat, _Static(spec, update.meta)

        leaves = [packed.leaves[at] for at in packed.tensor_leaves]
        # Dynamo lets the body of a checkpoint change nothing around it: while someone captures what is sown, compiled
        # code keeps the intermediate values; and where an object may be changed, which no graph can take back.
        once = _compat.is_compiling() and (context.captures or objects)
        body = run if once else checkpointed(run, self.policy, name=label)
        flat, static = body(packed.snapshot(), leaves)
        if contents:
            contents.ran()
        out, changed, sown, filled = _tree.unflatten(flat, static.spec)
        packed.publish(Update(changed, sown, static.meta))
        packed.hand_over(filled)
        return out


def _with_meaning(own: Any) -> Any:
    """The arguments of one method, without those that are accepted and have no meaning."""
    accepted = {"concrete", "prevent_cse", "static_argnums", "static_argnames"}
    return {key: own[key] for key in own if key not in accepted} if isinstance(own, dict) else own


@dataclass(frozen=True)
class _Static:
    """What is static about a result; a leaf of the tree that is rematerialised."""

    spec: _tree.Spec
    meta: Meta


def checkpoint(
    target: Target = None,
    variables: Filter = True,
    rngs: Filter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | Sequence[int] = (),
    policy: Callable[..., Any] | None = None,
    methods: Any = None,
    *,
    static_argnames: str | Sequence[str] = (),
) -> Any:
    """Computes a module's intermediate values again in backward, rather than keeping them.

    The lifted counterpart of ``jax.checkpoint`` (and of ``flax.linen.remat``), also under the name ``remat``. Unlike
    ``torch.utils.checkpoint`` it works under ``torch.func.grad``, ``vjp`` and ``vmap``, and updates batch statistics
    once. Under an outer ``torch.func`` transform nothing but the arguments is kept, whatever the policy.
    An object among the arguments that the body fills, as a cache of keys and values, is found again as it was at first;
    what it puts into a list, dict or dataclass there is put into the caller's, once.

    Args:
        target: a module class, a ``functools.partial`` of one, a function ``(module, *args)``, or nothing, for use as
            a decorator.
        variables: the collections that the body may change.
        rngs: the random streams that it may draw from; it draws the same again in the recomputation.
        concrete: has no meaning in torch, where Python control flow always works; accepted.
        prevent_cse: has no meaning in torch; accepted.
        static_argnums: has no meaning in torch, where what is no tensor is static; accepted.
        policy: which intermediate values are kept; see ``torchlift.checkpoint_policies``. None keeps nothing.
        methods: the methods to lift, for a class: a list, or a dict of arguments for each.
        static_argnames: as ``static_argnums``.

    Returns:
        A subclass of ``target``, or a function of the same signature, with the same values, gradients and state.

    Raises:
        ModifyCollectionError: the body changed a collection outside of ``variables``.
        RandomnessError: the body drew from a stream outside of ``rngs``.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.
        UnsupportedError: the body wrote into a tensor in an object among the arguments.

    Example:
        >>> block = torchlift.remat(torch.nn.TransformerEncoderLayer)(8, 2, batch_first=True)
        >>> block(torch.ones(1, 4, 8)).sum().backward()
        >>> block.linear1.weight.grad.shape
        torch.Size([2048, 8])
    """
    del concrete, prevent_cse, static_argnums, static_argnames
    if isinstance(methods, dict):
        methods = {name: _with_meaning(own) for name, own in methods.items()}
    return lift(_Remat, target, {"variables": variables, "rngs": rngs, "policy": policy}, methods)


remat = checkpoint
