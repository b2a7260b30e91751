"""A call of a function of a module, as what the derivatives differentiate: a function of its tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift._context import entered
from torchlift.engine.draws import States, devices_of, read_states, write_states
from torchlift.errors import DifferentiationError, FunctionTargetError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import is_module_class
from torchlift.pack import Meta, Packed, Update
from torchlift.variables import ATTRIBUTE


def is_differentiable(x: Any) -> bool:
    """Whether ``x`` is a tensor that can have a gradient."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def unbound(name: str, fn: Any, mdl: Any) -> tuple[Callable[..., Any], str]:
    """``fn`` as a function ``(module, *args)``, and how errors name this use of the transform.

    Raises:
        FunctionTargetError: ``fn`` is a module or a class, or ``mdl`` is not the module to call it with.
    """
    own = getattr(fn, "__qualname__", None) or type(fn).__name__
    label = f"{name}({own.rpartition('<locals>.')[2]})"
    cls = fn.func if isinstance(fn, functools.partial) else fn
    if isinstance(fn, nn.Module) or is_module_class(cls) or not callable(fn):
        what = f"an instance of {own}" if isinstance(fn, nn.Module) else "a class" if isinstance(cls, type) else repr(fn)
        raise FunctionTargetError(
            f"{label}: got {what}, expected a function whose first argument is a module; "
            f"write {name}(lambda m, *args: m(*args), module, ...)"
        )
    if not isinstance(mdl, nn.Module):
        raise FunctionTargetError(f"{label}: after fn got {type(mdl).__name__}, expected the module that fn is called with")
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module):
        if fn.__self__ is not mdl:
            raise FunctionTargetError(
                f"{label}: got a method bound to another {type(fn.__self__).__name__} than the module it is called "
                f"with; write {name}({own}, module, ...)"
            )
        return fn.__func__, label
    return fn, label


def collected(
    fn: Callable[..., Any], mdl: nn.Module, primals: Sequence[Any], variables: Filter, rngs: Filter, label: str
) -> Packed:
    """The call taken apart, with what it may change and draw from."""
    check(variables, f"{label}: variables")
    check(rngs, f"{label}: rngs")
    packed = Packed(fn, mdl, tuple(primals), {}, label)
    packed.allow(lambda c: matches(variables, c), lambda c: f"add {c!r} to variables=")
    packed.refuse(
        [stream for stream in (rng.DROPOUT, *rng.positions()) if not matches(rngs, stream)],
        lambda stream: f"add {stream!r} to rngs=",
    )
    return packed


def wanted_operands(packed: Packed, filter: Filter, argument: str, multi: bool = False) -> list[int]:
    """The operands of :class:`Call` that are differentiated: variables that ``filter`` selects, and all inputs.

    Raises:
        DifferentiationError: a second module has such variables, and ``multi`` is False.
    """
    wanted = []
    for at, entry in enumerate(packed.entries):
        if entry.store == ATTRIBUTE or not matches(filter, entry.collection):
            continue
        if entry.root > 0 and not multi:
            advice = "; pass multi_scope=True for a tuple of cotangents, one for each module"
            raise DifferentiationError(
                f"{packed.label}: the call reaches a second module, {type(packed.roots[entry.root]).__name__}, whose "
                f"{entry.name!r} of collection {entry.collection!r} is in {argument}"
                + (advice if argument == "vjp_variables" else "; make the one a submodule of the other")
            )
        if is_differentiable(entry.tensor):
            wanted.append(at)
    count = len(packed.entries)
    return wanted + [count + i for i, at in enumerate(packed.tensor_leaves) if is_differentiable(packed.leaves[at])]


class Call:
    """A call as a function of its operands: one tensor for each variable, and the tensors among its arguments.

    Derivatives pass tensors only. What is static about the results is noted here: it is the same in every run.
    """

    def __init__(self, packed: Packed, has_aux: bool = False, wanted: Sequence[int] = ()):
        self.packed, self.has_aux, self.wanted = packed, has_aux, list(wanted)
        self.operands = [*packed.snapshot(), *(packed.leaves[at] for at in packed.tensor_leaves)]
        # Where the randomness stands, to draw the same when the call runs again.
        self.streams = rng.positions()
        self.states: States = () if _compat.is_tracing() else read_states(devices_of(self.operands))

    def run(self, operands: Sequence[Tensor], *some: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs that can have a gradient, and all other tensors that come out: aux, new state, what was sown.

        ``some`` stand in the place of the operands that are differentiated.
        """
        given = list(operands)
        for at, tensor in zip(self.wanted, some, strict=True):
            given[at] = tensor
        count = len(self.packed.entries)
        out, update = self.packed.pure(given[:count], self.packed.with_tensors(given[count:]))
        aux = None
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise DifferentiationError(
                    f"{self.packed.label}: returned {type(out).__name__}, expected a pair (out, aux) with has_aux=True"
                )
            out, aux = out
        self.out_leaves = len(_tree.flatten(out)[0])
        leaves, self.spec = _tree.flatten((out, aux, update.changed, update.sown))
        self.out_spec = _tree.flatten(out)[1]
        self.out_paths = _tree.paths(out)
        self.out_shapes = [describe(leaf) for leaf in leaves[: self.out_leaves]]
        self.meta: Meta = update.meta
        self.out_at = [at for at in range(self.out_leaves) if is_differentiable(leaves[at])]
        if len(self.out_at) == 0:
            raise DifferentiationError(
                f"{self.packed.label}: returned {self.out_shapes}, expected a floating-point tensor to differentiate"
            )
        self.rest_at = [at for at, x in enumerate(leaves) if isinstance(x, Tensor) and at not in set(self.out_at)]
        self.static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaves[at] for at in self.out_at), [leaves[at] for at in self.rest_at]

    def again(self, operands: Sequence[Tensor], *some: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """As ``run``, drawing what the first run drew, and leaving the generators where they stand."""
        now = read_states(devices_of(operands)) if self.states else ()
        write_states(self.states)
        try:
            with entered(streams=self.streams):
                return self.run(operands, *some)
        finally:
            write_states(now)

    def joined(self, outs: Sequence[Tensor], rest: Sequence[Tensor]) -> tuple[Any, Any, Update]:
        """``(out, aux, update)`` from what ``run`` returned."""
        leaves = list(self.static)
        for at, tensor in zip([*self.out_at, *self.rest_at], [*outs, *rest], strict=True):
            leaves[at] = tensor
        out, aux, changed, sown = _tree.unflatten(leaves, self.spec)
        return out, aux, Update(changed, sown, self.meta)

    def like_out(self, what: str, tree: Any, outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The leaves of ``tree``, a cotangent, that belong to ``outs``; zeros where it has None."""
        leaves, spec = _tree.flatten(tree)
        label = f"{self.packed.label}: {what}"
        if spec != self.out_spec:
            raise DifferentiationError(
                f"{label} has the structure of {_tree.paths(tree)}, expected that of the output, {self.out_paths}"
            )
        found = []
        for at, like in zip(self.out_at, outs, strict=True):
            leaf = torch.zeros_like(like) if leaves[at] is None else leaves[at]
            if type(leaf) in (int, float):
                leaf = torch.full_like(like, leaf) if like.ndim == 0 else leaf
            if describe(leaf) != self.out_shapes[at]:
                raise DifferentiationError(
                    f"{label}{self.out_paths[at]} is {describe(leaf)}, expected {self.out_shapes[at]} like the output"
                )
            found.append(leaf)
        return tuple(found)


def describe(leaf: Any) -> str:
    """A tensor's dtype and shape, for errors: ``float32[2, 3]``."""
    return f"{str(leaf.dtype)[6:]}{list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
