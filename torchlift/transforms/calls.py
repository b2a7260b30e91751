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
from torchlift.changes import Meta, Update
from torchlift.engine.draws import States, devices_of, read_states, write_states
from torchlift.engine.remat import Recomputing
from torchlift.errors import DifferentiationError, FunctionTargetError, UnsupportedError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import is_module_class
from torchlift.pack import Packed
from torchlift.variables import ATTRIBUTE, BATCH_STATS


def is_differentiable(x: Any) -> bool:
    """Whether ``x`` is a tensor that can have a gradient."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def check_function(name: str, fn: Any) -> str:
    """How errors name this use of the transform ``name``.

    Raises:
        FunctionTargetError: ``fn`` is a module, a class, or nothing to call.
    """
    own = getattr(fn, "__qualname__", None) or type(fn).__name__
    own = own if isinstance(own, str) else fn.__name__  # Dynamo, which knows of no qualified names here and there
    label = f"{name}({own.rpartition('<locals>.')[2]})"
    cls = fn.func if isinstance(fn, functools.partial) else fn
    if isinstance(fn, nn.Module) or is_module_class(cls) or not callable(fn):
        what = (
            f"an instance of {own}" if isinstance(fn, nn.Module) else "a class" if isinstance(cls, type) else repr(fn)
        )
        raise FunctionTargetError(
            f"{label}: got {what}, expected a function whose first argument is a module: lambda m, *args: m(*args)"
        )
    return label


def unbound(name: str, fn: Any, mdl: Any) -> tuple[Callable[..., Any], str]:
    """``fn`` as a function ``(module, *args)``, and how errors name this use of the transform.

    Raises:
        FunctionTargetError: ``fn`` is a module or a class, or ``mdl`` is not the module to call it with.
    """
    label = check_function(name, fn)
    if not isinstance(mdl, nn.Module):
        raise FunctionTargetError(
            f"{label}: after fn got {type(mdl).__name__}, expected the module that fn is called with"
        )
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module):
        if fn.__self__ is not mdl:
            raise FunctionTargetError(
                f"{label}: got a method bound to another {type(fn.__self__).__name__} than the module after it; "
                f"write {name}({fn.__qualname__}, module, ...)"
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
        if is_differentiable(packed.tensors[at]):
            wanted.append(at)
    count = len(packed.entries)
    return wanted + [count + i for i, at in enumerate(packed.tensor_leaves) if is_differentiable(packed.leaves[at])]


class Graph:
    """What only the tensors can use that it was made from; it is dropped where a result is taken apart."""


class Form:
    """What is static about the results of a :class:`Call`: their structure, and whatever is no tensor."""

    def __init__(self, label: str, out: Any, second: Any, changed: list[Tensor], sown: list[Any], meta: Meta):
        self.label, self.meta = label, meta
        self.leaves, self.spec = _tree.flatten((out, second, changed, sown))
        flat, self.out_spec = _tree.flatten(out)
        self.out_leaves, self.out_paths = len(flat), _tree.paths(out)
        self.out_at = [at for at, leaf in enumerate(flat) if is_differentiable(leaf)]
        self.out_shapes = [describe(leaf) for leaf in flat]
        if len(self.out_at) == 0:
            raise DifferentiationError(f"{label}: returned {self.out_shapes}, expected a floating-point tensor")
        flat, self.second_spec = _tree.flatten(second)
        self.second_at = range(self.out_leaves, self.out_leaves + len(flat))
        self.rest_at = [at for at, x in enumerate(self.leaves) if isinstance(x, Tensor) and at not in set(self.out_at)]

    def take(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs that can have a gradient, and all other tensors; none of them is kept."""
        outs, rest = tuple(self.leaves[at] for at in self.out_at), [self.leaves[at] for at in self.rest_at]
        self.leaves = [None if isinstance(leaf, Tensor | Graph) else leaf for leaf in self.leaves]
        return outs, rest

    def joined(self, outs: Sequence[Tensor], rest: Sequence[Tensor]) -> tuple[Any, Any, Update]:
        """``(out, second, update)`` from what :meth:`take` gave."""
        leaves = list(self.leaves)
        for at, tensor in zip([*self.out_at, *self.rest_at], [*outs, *rest], strict=True):
            leaves[at] = tensor
        out, second, changed, sown = _tree.unflatten(leaves, self.spec)
        return out, second, Update(changed, sown, self.meta)

    def like_out(self, tensors: Sequence[Tensor | None]) -> Any:
        """A tree like the output, with these tensors for those that can have a gradient, and None elsewhere."""
        leaves: list[Any] = [None] * self.out_leaves
        for at, tensor in zip(self.out_at, tensors, strict=True):
            leaves[at] = tensor
        return _tree.unflatten(leaves, self.out_spec)

    def cotangents(self, tree: Any, outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The leaves of ``tree``, which must be like the output, that belong to ``outs``; zeros where it has None."""
        leaves, spec = _tree.flatten_like(tree, self.out_spec)
        if spec != self.out_spec:
            raise DifferentiationError(
                f"{self.label}: the cotangent has leaves {_tree.paths(tree)}, expected those of the output, "
                f"{self.out_paths}"
            )
        found = []
        for at, like in zip(self.out_at, outs, strict=True):
            leaf = torch.zeros_like(like) if leaves[at] is None else leaves[at]
            if isinstance(leaf, (int, float)) and like.ndim == 0:
                leaf = torch.full_like(like, leaf)
            if describe(leaf) != self.out_shapes[at]:
                raise DifferentiationError(
                    f"{self.label}: the cotangent{self.out_paths[at]} is {describe(leaf)}, expected "
                    f"{self.out_shapes[at]} like the output"
                )
            found.append(leaf)
        return tuple(found)


class Call:
    """A call as a function of its operands: one tensor for each variable, and the tensors among its arguments.

    ``second`` names the second of two results, which is not differentiated; empty if there is one only.
    """

    def __init__(self, packed: Packed, wanted: Sequence[int] = (), second: str = ""):
        self.packed, self.wanted, self.second = packed, list(wanted), second
        self.operands = [*packed.snapshot(), *(packed.leaves[at] for at in packed.tensor_leaves)]
        # Where the randomness stands, to draw the same when the call runs again.
        self.streams = rng.positions()
        self.states: States = () if _compat.is_tracing() else _states(self.operands)

    def run(self, operands: Sequence[Tensor], some: Sequence[Tensor] = ()) -> Form:
        """The results, before they are taken; ``some`` are given in the place of the operands that are wanted."""
        given = list(operands)
        for at, tensor in zip(self.wanted, some):
            given[at] = tensor
        count = len(self.packed.entries)
        out, update = self.packed.pure(given[:count], self.packed.with_tensors(given[count:]))
        second = None
        if self.second:
            if not isinstance(out, tuple) or len(out) != 2:
                raise DifferentiationError(
                    f"{self.packed.label}: returned {describe(out)}, expected a pair (out, {self.second})"
                )
            out, second = out
        return Form(self.packed.label, out, second, update.changed, update.sown, update.meta)

    def again(self, operands: Sequence[Tensor], some: Sequence[Tensor] = ()) -> Form:
        """As ``run``, drawing what the first run drew, and leaving the generators where they stand."""
        now = _states(operands) if self.states else ()
        # What a call was made from may come back as the result of an autograd function, which needs a gradient; torch's
        # norm layers cannot give their statistics one.
        statistics = {at for at, entry in enumerate(self.packed.entries) if entry.collection == BATCH_STATS}
        operands = [x.detach() if at in statistics else x for at, x in enumerate(operands)]
        write_states(self.states)
        try:
            with entered(streams=self.streams), Recomputing():
                return self.run(operands, some)
        except RuntimeError as error:
            if "randomness error mode" not in str(error):
                raise
            raise UnsupportedError(
                f"{self.packed.label}: jacrev over custom_vjp with a vjp function that draws: it runs again under the "
                "vmap that jacrev puts around backward; use torch.func.jacrev(..., chunk_size=1)"
            ) from error
        finally:
            write_states(now)


def _states(tensors: Sequence[Tensor]) -> States:
    # Inside a transform even a generator's state comes wrapped.
    return tuple((device, _compat.plain(state)) for device, state in read_states(devices_of(tensors)))


def describe(leaf: Any) -> str:
    """A tensor's dtype and shape, for errors: ``float32[2, 3]``."""
    return f"{str(leaf.dtype)[6:]}{list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


class Rerun:
    """What runs a call again, where it is a part of a result that other tensors were put into."""

    call: Call
