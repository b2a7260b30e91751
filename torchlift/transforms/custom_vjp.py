"""Lifted custom_vjp: a function of a module with a backward function of its own."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift.changes import Update
from torchlift.engine.closures import find_closures
from torchlift.errors import ClosureError, DifferentiationError, UnsupportedError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Transform, as_tuple, lift_function
from torchlift.pack import Packed
from torchlift.transforms.calls import Call, Form, Rerun, check_function, describe, wanted_operands
from torchlift.variables import ATTRIBUTE


@dataclass(frozen=True, kw_only=True)
class _Custom_vjp(Transform):
    forward_fn: Callable[..., Any]
    backward_fn: Callable[..., Any]
    grad_vars: Filter = "params"
    nondiff: tuple[int, ...] = ()

    def label(self, target: Any) -> str:
        return check_function("custom_vjp", target)

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if kwargs or max(self.nondiff, default=0) > len(args):
            args = _by_position(fn, module, args, kwargs, label)
        if max(self.nondiff, default=0) > len(args):
            raise DifferentiationError(
                f"{label}: nondiff_argnums has {max(self.nondiff)}, expected 1 to {len(args)}: the module is 0"
            )
        if _compat.forward_ad_active():
            raise UnsupportedError(
                f"{label}: jvp over custom_vjp: a backward function does not say what forward mode gives; take the "
                "derivative in reverse mode (vjp, grad, torch.func.jacrev of jacrev), or that of a plain function"
            )
        packed = _collected(fn, module, args, label)
        operands = [*packed.tensors, *(packed.leaves[at] for at in packed.tensor_leaves)]
        if torch.is_grad_enabled() and any(map(_compat.is_tracked, operands)):
            rule = _Rule(self, module, args, label)
            packed = rule.packed
            out, update = rule.traced() if _compat.is_compiling() else rule.apply()
        else:
            out, update = packed.pure(packed.tensors, packed.leaves)
        packed.publish(update)
        return out


def _collected(fn: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], label: str) -> Packed:
    packed = Packed(fn, module, args, {}, label)
    packed.allow(lambda collection: True, lambda collection: "")
    return packed


def _by_position(fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str) -> tuple[Any, ...]:
    """All arguments by position, defaults filled in: cotangents come in the order of the arguments."""
    bound = inspect.signature(fn).bind(module, *args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise DifferentiationError(
            f"{label}: {sorted(bound.kwargs)} can only be given by keyword, expected arguments that have a position, "
            "since cotangents come in the order of the arguments"
        )
    return bound.args[1:]


class _Results:
    """What ``forward_fn`` gave, as the results of an autograd function: each a tensor of its own.

    They are the differentiable outputs, then all other tensors (``Form.take``), less those residuals that are operands
    or results themselves.
    """

    def __init__(self, form: Form, operands: Sequence[Tensor]):
        outs, rest = form.take()
        self.form = form
        self.zeros = [(out.shape, out.dtype, out.device) for out in outs]
        self.places: list[int] = []  # the result for each of rest; for residuals anything will do
        self.sources: list[tuple[int, bool, int]] = []  # of residuals: the leaf; whether it is an operand; which one
        self.fresh: dict[int, int] = {}  # results that are residuals and nothing else, and which of rest they are
        tensors: list[Tensor] = []
        for out in outs:
            tensors.append(out if _index(out, operands) is None and _index(out, tensors) is None else out.clone())
        for number, (at, tensor) in enumerate(zip(form.rest_at, rest, strict=True)):
            operand, known = _index(tensor, operands), _index(tensor, tensors)
            if at not in form.second_at:
                self.places.append(len(tensors))
                tensors.append(tensor if operand is None and known is None else tensor.clone())
                continue
            self.places.append(0)
            leaf = at - form.second_at.start
            if operand is not None:
                self.sources.append((leaf, True, operand))
                continue
            if known is None:
                known = len(tensors)
                self.fresh[known] = number
                tensors.append(tensor)
            self.sources.append((leaf, False, known))
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        self.saved = sorted({at for _, is_operand, at in self.sources if not is_operand})

    def residuals(self, operands: Sequence[Tensor], saved: Sequence[Tensor]) -> Any:
        leaves = [self.form.leaves[at] for at in self.form.second_at]
        for leaf, is_operand, at in self.sources:
            leaves[leaf] = operands[at] if is_operand else saved[self.saved.index(at)]
        return _tree.unflatten(leaves, self.form.second_spec)

    def cotangent(self, cotangents: Sequence[Tensor | None]) -> Any:
        given = []
        for cotangent, (shape, dtype, device) in zip(cotangents, self.zeros, strict=True):
            given.append(torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent)
        return self.form.like_out(given)

    def joined(self, tensors: Sequence[Tensor]) -> tuple[Any, Update]:
        """The output and the new state, which has no cotangent."""
        outs = tensors[: len(self.form.out_at)]
        out, _, update = self.form.joined(outs, [tensors[at].detach() for at in self.places])
        return out, update


def _index(tensor: Tensor, tensors: Sequence[Tensor]) -> int | None:
    return next((at for at, other in enumerate(tensors) if other is tensor), None)


class _Rule:
    """One call that is differentiated. Its operands are all tensors of the call (:class:`Call`)."""

    results: _Results

    def __init__(self, config: _Custom_vjp, module: nn.Module, args: tuple[Any, ...], label: str):
        self.config, self.label = config, label
        self.plain = plain = not _compat.functorch_active() and not _compat.is_compiling()
        kept: list[Any] = []
        self.kept = kept  # the residuals as forward_fn returned them, if it has run

        # No method: this object has what it was given, and would lead to itself.
        def forward_fn(*args: Any) -> Any:
            result = config.forward_fn(*args)
            if plain and isinstance(result, tuple):
                kept[:] = result[1:]
            return result

        self.packed = packed = _collected(forward_fn, module, args, label)
        self.call = Call(packed, wanted_operands(packed, config.grad_vars, "grad_vars"), "residuals")
        self.args_spec = _tree.flatten(args)[1]
        self.shapes = [describe(operand) for operand in self.call.operands]
        self.names = {
            (collection, name): at
            for at, entry in enumerate(packed.entries)
            if entry.root == 0 and entry.store != ATTRIBUTE and matches(config.grad_vars, entry.collection)
            for name, collection in entry.paths
        }
        operand_of = {at: len(packed.entries) + i for i, at in enumerate(packed.tensor_leaves)}
        self.spans: list[tuple[list[int | None], _tree.Spec]] = []  # for each argument the operands that it holds
        start = 0
        for arg in args:
            leaves, spec = _tree.flatten(arg)
            self.spans.append(([operand_of.get(at) for at in range(start, start + len(leaves))], spec))
            start += len(leaves)

    # Forward ---------------------------------------------------------------------------------------------------------

    def apply(self) -> tuple[Any, Update]:
        if not self.plain:
            _refuse_transformed(self.label, "forward_fn", self.config.forward_fn, set())
            _refuse_transformed(self.label, "backward_fn", self.config.backward_fn, set())
        # NOTE [Marker], as in engine.remat: a vmap that maps no operand would run the function outside of itself.
        marker = _compat.batched_marker()
        tensors = _Custom.apply(self, *self.call.operands, *(() if marker is None else (marker,)))
        return self.results.joined(tensors)

    def traced(self) -> tuple[Any, Update]:
        """NOTE [Under Dynamo]. It makes a graph of its own of each half of an autograd function, runs no transform over
        one, and lets neither half change what is outside of it. So ``forward_fn`` runs before, and the function says
        no more than where gradients go. A vjp function runs again in backward: its graph is not in that half."""
        if _compat.functorch_active():
            raise UnsupportedError(
                f"{self.label}: torch.compile of a torch.func transform of custom_vjp: Dynamo runs none over an "
                "autograd function; leave the transform, or custom_vjp, out of the compiled function"
            )
        tensors = self.forward(self.call.operands)
        for leaf in self.results.form.leaves:
            if isinstance(leaf, Rerun) and all(stream != rng.DROPOUT for stream, _ in leaf.call.packed.refused):
                raise UnsupportedError(
                    f"{self.label}: torch.compile of custom_vjp with a vjp function among the residuals: it runs again "
                    "in backward, where compiled code could not draw the same; if it draws nothing say vjp(..., "
                    "rngs=False), else keep other residuals"
                )
        count = len(self.results.form.out_at)
        outs = _Grafted.apply(self, count, *self.call.operands, *tensors)
        return self.results.joined([*outs, *tensors[count:]])

    def forward(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = [operand.detach() for operand in operands[: len(self.call.operands)]]
        with torch.enable_grad():
            form = self.call.run(given)
        # What is still part of a graph got there by a closure: backward_fn has no place for its gradient.
        if any(isinstance(leaf, Tensor) and _compat.is_tracked(leaf) for leaf in form.leaves):
            shapes = "" if _compat.is_compiling() else self._closures(given)
            raise ClosureError(
                f"{self.label}: forward_fn uses a tensor{shapes} that is no argument and needs a gradient, which would "
                "be lost; pass it as an argument, or detach it"
            )
        self.results = _Results(form, given)
        tensors, self.results.tensors = self.results.tensors, ()  # autograd holds those, and knows when to let go
        return tensors

    def _closures(self, given: list[Tensor]) -> str:
        found = find_closures(self.label, self.config.forward_fn, self.call.again, given)
        return f" of shape {', '.join(str(tuple(tensor.shape)) for tensor in found)}"

    # Backward --------------------------------------------------------------------------------------------------------

    def backward(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The cotangent of each operand, from those of all results."""
        count = len(self.call.operands)
        operands, saved = tensors[:count], tensors[count:]
        outs = cotangents[: len(self.results.form.out_at)]
        found: list[Tensor | None] = [None] * count
        if any(cotangent is not None for cotangent in outs):
            found = self.pulled_back(operands, saved, outs)
        # NOTE [Second derivatives]. backward_fn is differentiated in its residuals, and from there on it is forward_fn
        # as it stands. Residuals that are outputs are differentiated as outputs, by backward_fn.
        present = [at for at in self.results.fresh if cotangents[at] is not None]
        if present:

            def residuals(*some: Tensor) -> tuple[Tensor, ...]:
                rest = self.call.again(operands, some).take()[1]
                return tuple(rest[self.results.fresh[at]] for at in present)

            pull: Any = torch.func.vjp(residuals, *(operands[at] for at in self.call.wanted))[1]
            for at, more in zip(self.call.wanted, pull(tuple(cotangents[at] for at in present)), strict=True):
                before = found[at]
                found[at] = more if before is None else before + more
        return found

    def pulled_back(
        self, operands: Sequence[Tensor], saved: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """What ``backward_fn`` gives for each operand."""
        if self.kept and not torch.is_grad_enabled():
            # A vjp function among the very ones still has its graph, which knows nothing of what came before the call.
            residuals = self.kept[0]
            if not _compat.backward_keeps_graph():
                self.kept.clear()
        else:
            residuals = self.results.residuals(operands, saved)
        leaves = self.packed.with_tensors(operands[len(self.packed.entries) :])
        args = _tree.unflatten(leaves, self.args_spec)
        nondiff = [args[at - 1] for at in self.config.nondiff]
        return self._checked(self.config.backward_fn(*nondiff, residuals, self.results.cotangent(cotangents)))

    def _checked(self, result: Any) -> list[Tensor | None]:
        where = f"{self.label}: backward_fn returned"
        arguments = [at for at in range(len(self.spans)) if at + 1 not in self.config.nondiff]
        if not isinstance(result, tuple) or len(result) != 1 + len(arguments) or not isinstance(result[0], dict):
            raise DifferentiationError(
                f"{where} {describe(result)} with leaves {_tree.paths(result)}, expected a tuple (variable_cotangents, "
                f"*input_cotangents) of {1 + len(arguments)}, of which the first is a dict, {{}} where all are zero"
            )
        found: list[Tensor | None] = [None] * len(self.call.operands)
        for collection, named in result[0].items():
            for name, cotangent in named.items():
                if (collection, name) not in self.names:
                    raise DifferentiationError(
                        f"{where} a cotangent for {name!r} of collection {collection!r}, expected some of "
                        f"{sorted(self.names)}"
                    )
                at = self.names[collection, name]
                found[at] = self._like(cotangent, at, f"{where} for {name!r} of collection {collection!r}")
        for argument, cotangent in zip(arguments, result[1:], strict=True):
            if cotangent is None:
                continue
            places, spec = self.spans[argument]
            leaves, got = _tree.flatten_like(cotangent, spec)
            if got != spec:
                raise DifferentiationError(
                    f"{where} for argument {argument + 1} a cotangent with leaves {_tree.paths(cotangent)}, expected "
                    "those of the argument"
                )
            for place, leaf in zip(places, leaves, strict=True):
                if place is not None:
                    found[place] = self._like(leaf, place, f"{where} for argument {argument + 1}")
        return found

    def _like(self, cotangent: Any, at: int, what: str) -> Tensor | None:
        if cotangent is not None and describe(cotangent) != self.shapes[at]:
            raise DifferentiationError(f"{what} {describe(cotangent)}, expected {self.shapes[at]}")
        return cotangent if at in self.call.wanted else None


class _Custom(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rule: _Rule, *operands: Tensor) -> tuple[Tensor, ...]:
        return rule.forward(operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rule, *operands = inputs
        ctx.rule, ctx.count = rule, len(operands)
        ctx.save_for_backward(*operands[: len(rule.call.operands)], *(output[at] for at in rule.results.saved))
        ctx.set_materialize_grads(False)  # whether there are second derivatives shows in the cotangents of residuals

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.rule.backward([_compat.alive(tensor) for tensor in ctx.saved_tensors], cotangents)
        return (None, *found, *[None] * (ctx.count - len(found)))


class _Grafted(torch.autograd.Function):
    """Operands and results to the outputs; see NOTE [Under Dynamo]."""

    @staticmethod
    def forward(rule: _Rule, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        start = len(rule.call.operands)
        return tuple(out.clone() for out in tensors[start : start + count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rule, _, *tensors = inputs
        start = len(rule.call.operands)
        ctx.rule, ctx.count = rule, len(tensors)
        ctx.save_for_backward(*tensors[:start], *(tensors[start + at] for at in rule.results.saved))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        start = len(ctx.rule.call.operands)
        found = ctx.rule.pulled_back(ctx.saved_tensors[:start], ctx.saved_tensors[start:], cotangents)
        return (None, None, *found, *[None] * (ctx.count - len(found)))


def _refuse_transformed(label: str, name: str, fn: Any, seen: set[int]) -> None:
    """NOTE [Closures of a transform]. ``torch.func`` runs an autograd function outside of its transforms, and backward
    later, where the tensors that they wrap mean nothing. Operands it unwraps; what is in a closure it does not."""
    for cell in getattr(fn, "__closure__", None) or ():
        for leaf in _tree.flatten(cell.cell_contents)[0] if cell != types.CellType() else ():
            if isinstance(leaf, Tensor) and _compat.is_wrapped(leaf):
                raise ClosureError(
                    f"{label}: {name} uses a tensor of shape {tuple(leaf.shape)} that is no argument and belongs to a "
                    "torch.func transform around the call; pass it as an argument"
                    + (", or among the residuals" if name == "backward_fn" else "")
                )
            if isinstance(leaf, types.FunctionType) and id(leaf) not in seen:
                seen.add(id(leaf))
                _refuse_transformed(label, name, leaf, seen)


@_compat.outside_of_graphs
def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: Filter = "params",
    nondiff_argnums: int | Sequence[int] = (),
    *,
    nondiff_argnames: str | Sequence[str] = (),
) -> Callable[..., Any]:
    """A function of a module whose gradient is computed by a function of its own.

    The lifted counterpart of ``jax.custom_vjp`` (and of ``flax.linen.custom_vjp``). Where no gradient can be asked
    for, ``fn`` runs, else ``forward_fn``, which updates the module's state once. ``backward_fn`` says what every
    derivative of the outputs is, second ones too; its own derivative in the residuals goes on through ``forward_fn``.

    Args:
        fn: a function ``(module, *args)``, or a method.
        forward_fn: called as ``fn`` is; returns ``(out, residuals)``. Residuals are any tree, the function that
            :func:`vjp` returns included: inside of transforms and for second derivatives that runs again, with the
            same draws. Under ``torch.compile`` say that it draws nothing: ``vjp(..., rngs=False)``.
        backward_fn: called as ``backward_fn(*nondiff_args, residuals, cotangents)``; returns ``(variable_cotangents,
            *input_cotangents)``: ``{collection: {dotted_name: tensor}}``, zero for what is not there, and for each
            argument that is differentiated a tree like it, or None for zeros.
        grad_vars: the collections that get a cotangent; other variables get none.
        nondiff_argnums: arguments that get none either, and are passed to ``backward_fn``; the module counts as 0.
        nondiff_argnames: the same by name.

    Returns:
        A function of the same signature as ``fn``.

    Raises:
        ClosureError: ``forward_fn`` uses a tensor that needs a gradient and is no argument.
        DifferentiationError: ``backward_fn`` returned what does not fit.
        FunctionTargetError: one of the functions is a class or a module.
        UnsupportedError: it is differentiated in forward mode; or ``torch.compile`` cannot express the composition.

    Example:
        >>> def backward(vjp_fn, cotangent):
        ...     variables, x = vjp_fn(cotangent)
        ...     return variables, x.clamp(-1, 1)
        >>> call = lambda m, x: m(x)
        >>> clipped = torchlift.custom_vjp(call, lambda m, x: torchlift.vjp(call, m, x), backward)
        >>> x = torch.ones(2, requires_grad=True)
        >>> clipped(torch.nn.Identity(), x).mul(5).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    for function in (fn, forward_fn, backward_fn):
        check_function("custom_vjp", function)
    check(grad_vars, "custom_vjp: grad_vars")
    positions = list(as_tuple(nondiff_argnums))
    if nondiff_argnames:
        names = list(inspect.signature(fn).parameters)
        for name in as_tuple(nondiff_argnames):
            if name not in names:
                raise DifferentiationError(f"custom_vjp: nondiff_argnames has {name!r}, expected some of {names}")
            positions.append(names.index(name) + isinstance(fn, types.MethodType))
    if any(not isinstance(at, int) or at < 1 for at in positions):
        raise DifferentiationError(
            f"custom_vjp: nondiff_argnums is {nondiff_argnums!r}, expected positions from 1: the module is 0"
        )
    transform = _Custom_vjp(
        forward_fn=forward_fn,
        backward_fn=backward_fn,
        grad_vars=grad_vars,
        nondiff=tuple(sorted(set(positions))),
    )
    return lift_function(transform, fn)
