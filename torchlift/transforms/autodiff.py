"""Lifted derivatives of functions of a module: vjp, jvp, grad, value_and_grad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree
from torchlift.changes import Update
from torchlift.errors import DifferentiationError, UnsupportedError, VariableNameError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import as_tuple
from torchlift.named_axes import NamedAxis, find
from torchlift.pack import Packed
from torchlift.transforms.calls import (
    Call,
    Form,
    Graph,
    Rerun,
    collected,
    describe,
    is_differentiable,
    unbound,
    wanted_operands,
)
from torchlift.variables import ATTRIBUTE


# NOTE [A vjp function as a value]. A vjp function holds a graph, whose tensors belong to the torch.func transforms in
# effect when it was made. It is a dataclass, hence a node of trees, whose tensors are the operands of the call: so
# custom_vjp can keep it for a backward that runs under other transforms. With other operands than its own the graph
# is none of theirs; the call then runs again, with the same draws.
@dataclass(eq=False, repr=False)
class Pullback:
    """The second result of :func:`vjp`: from a cotangent of the output to those of variables and inputs."""

    operands: list[Tensor]
    how: _How
    graph: _Graph | None

    def __call__(self, cotangent: Any) -> tuple[Any, ...]:
        how, graph = self.how, self.graph
        if graph is None or any(a is not b for a, b in zip(self.operands, graph.operands, strict=True)):
            graph, _ = _linearised(how.call, self.operands, how.call.again)
        cotangents: list[Tensor | None] = [None] * len(self.operands)
        for at, found in zip(how.call.wanted, graph.pull(graph.form.cotangents(cotangent, graph.outs))):
            cotangents[at] = _reduced(found, self.operands[at], how.reduce_axes, how.call.packed.label)
        return how.sorted(cotangents)


class _Graph(Graph):
    """A run of a call at ``operands``, and torch's function that pulls cotangents of ``outs`` back."""

    def __init__(self, operands: list[Tensor], outs: tuple[Tensor, ...], pull: Callable[..., Any], form: Form):
        self.operands, self.outs, self.pull, self.form = operands, outs, pull, form


def _linearised(call: Call, operands: list[Tensor], run: Callable[..., Form]) -> tuple[_Graph, list[Tensor]]:
    if _compat.is_compiling() and _compat.traced_within("tag_activation_checkpoint"):
        raise UnsupportedError(
            f"{call.packed.label}: torch.compile of remat over a reverse-mode derivative: torch.func does not run "
            "under the hooks of a checkpoint; put remat inside of the derivative, or leave one out of the compiled "
            "function"
        )
    forms = []

    def fn(*some: Tensor) -> Any:
        forms.append(run(operands, some[: len(call.wanted)]))
        return forms[0].take()

    # torch.func.vjp wants something to differentiate in.
    some = [operands[at] for at in call.wanted] or [torch.zeros(())]
    result: Any = torch.func.vjp(fn, *some, has_aux=True)
    outs, pull, rest = result
    return _Graph(operands, outs, pull, forms[0]), rest


class _How(Rerun):
    """What a vjp function knows besides tensors."""

    def __init__(
        self, call: Call, primals: tuple[Any, ...], vjp_variables: Filter, multi: bool, reduce_axes: tuple[str, ...]
    ):
        self.call, self.vjp_variables, self.multi, self.reduce_axes = call, vjp_variables, multi, reduce_axes
        self.primals_spec = _tree.flatten(primals)[1]

    def sorted(self, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
        """The cotangents of operands, as variables and inputs are arranged."""
        packed = self.call.packed
        by_root: list[dict[str, dict[str, Tensor | None]]] = [{} for _ in packed.roots]
        for entry, cotangent in zip(packed.entries, cotangents):
            if entry.store != ATTRIBUTE and matches(self.vjp_variables, entry.collection):
                by_root[entry.root].setdefault(entry.collection, {})[entry.name] = cotangent
        leaves: list[Tensor | None] = [None] * len(packed.leaves)
        for at, cotangent in zip(packed.tensor_leaves, cotangents[len(packed.entries) :], strict=True):
            leaves[at] = cotangent
        return (tuple(by_root) if self.multi else by_root[0], *_tree.unflatten(leaves, self.primals_spec))


# NOTE [reduce_axes]. What all indices of a map share has a cotangent at each index, and they add up; what is mapped has
# its own. Which is which a vmap rule is told, as in the collectives of torchlift.axes.
class _SumOfShared(torch.autograd.Function):
    @staticmethod
    def forward(cotangent: Tensor, primal: Tensor, index: Tensor, size: int) -> Tensor:
        raise UnsupportedError(
            "vjp(reduce_axes=): the vjp function was called outside of the vmap of that axis; call it in the body"
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return _sum_of_shared(cotangent, *ctx.saved_tensors, ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _sum_of_shared(tangent, *ctx.saved_tensors, ctx.size)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], cotangent: Tensor, *rest: Any) -> tuple[Tensor, int | None]:
        dim, primal_dim, index_dim, _ = in_dims
        if index_dim is None:  # another map than the one that is meant
            return _sum_of_shared(cotangent, *rest), dim
        if primal_dim is not None:
            return cotangent.clone(), dim
        return (cotangent * info.batch_size if dim is None else cotangent.sum(dim)), None


def _sum_of_shared(*args: Any) -> Tensor:
    return _SumOfShared.apply(*args)


_allow = _compat.kept_in_graphs(_sum_of_shared)


def _reduced(cotangent: Tensor, primal: Tensor, names: tuple[str, ...], label: str) -> Tensor:
    """``cotangent``, summed over the named axes whose indices share ``primal``."""
    if names and _compat.is_compiling():
        _allow()
    for axis in _mapped_axes(names, label):
        assert isinstance(axis.index, Tensor)
        cotangent = _sum_of_shared(cotangent, primal, axis.index.view_as(axis.index), axis.size)
    return cotangent


def _mapped_axes(names: tuple[str, ...], label: str) -> list[NamedAxis]:
    found = find(names, f"{label}: reduce_axes")
    for axis in found:
        if axis.group is not None:
            raise UnsupportedError(
                f"{label}: reduce_axes has {axis.name!r}, a dimension of a device mesh, whose processes do not tell "
                f"what they share; sum what they do: torchlift.psum(gradient, {axis.name!r})"
            )
    return found


def _started(
    label: str, fn: Callable[..., Any], mdl: nn.Module, primals: tuple[Any, ...], has_aux: bool, reduce_axes: Any,
    vjp_variables: Filter, variables: Filter, rngs: Filter, multi_scope: bool = False,
) -> tuple[Any, Any, Update, Pullback, Packed]:  # fmt: skip
    """The forward half of a reverse-mode derivative, nothing of it published."""
    reduced = as_tuple(reduce_axes)
    _mapped_axes(reduced, label)
    check(vjp_variables, f"{label}: vjp_variables")
    packed = collected(fn, mdl, primals, variables, rngs, label)
    wanted = wanted_operands(packed, vjp_variables, "vjp_variables", multi_scope)
    call = Call(packed, wanted, "aux" if has_aux else "")
    graph, rest = _linearised(call, call.operands, call.run)
    how = _How(call, primals, vjp_variables, multi_scope, reduced)
    return *graph.form.joined(graph.outs, rest), Pullback(call.operands, how, graph), packed


@_compat.outside_of_graphs
def vjp(
    fn: Callable[..., Any],
    mdl: nn.Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: str | Sequence[str] = (),
    vjp_variables: Filter = "params",
    variables: Filter = True,
    rngs: Filter = True,
    multi_scope: bool = False,
) -> Any:
    """The output of a function of a module, and the function that pulls a cotangent of it back.

    The lifted counterpart of ``torch.func.vjp`` (and of ``flax.linen.vjp``): it differentiates in the module's
    variables and in the inputs, updates the module's state once, and its results are part of the surrounding graph.

    Args:
        fn: called as ``fn(mdl, *primals)``; a method of ``mdl`` will do.
        mdl: the module.
        *primals: the inputs: trees of tensors. What is no floating-point tensor is passed on, its cotangent is None.
        has_aux: whether ``fn`` returns a pair, of which only the first is differentiated.
        reduce_axes: named axes of an enclosing ``vmap``, over which the cotangents of what all indices share are
            summed.
        vjp_variables: the collections that get a cotangent.
        variables: the collections that ``fn`` may change.
        rngs: the random streams that it may draw from.
        multi_scope: whether variables of further modules, reached through ``primals``, get cotangents too.

    Returns:
        ``(out, vjp_fn)``, with ``has_aux`` ``(out, vjp_fn, aux)``. ``vjp_fn(cotangent)`` takes a tree like ``out``,
        None standing for zeros, and returns ``(variable_cotangents, *input_cotangents)``: ``{collection: {dotted_name:
        tensor}}`` and a tree like each primal. With ``multi_scope`` the first is a tuple, an entry for each module in
        the order they are found. It may be called several times, and later, unless a tensor that it was made from has
        been changed in place: like that of ``torch.func.vjp`` it does not notice.

    Raises:
        DifferentiationError: a cotangent is not like the output, or a second module has variables in
            ``vjp_variables``.
        FunctionTargetError: ``fn`` is a class or a module.
        ModifyCollectionError: ``fn`` changed a collection outside of ``variables``.
        RandomnessError: it drew from a stream outside of ``rngs``.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> out, vjp_fn = torchlift.vjp(lambda m, x: m(x), layer, torch.tensor([3.0, 4.0]))
        >>> variables, x = vjp_fn(torch.ones_like(out))
        >>> variables["params"]["weight"], bool((x == layer.weight[0]).all())
        (tensor([[3., 4.]]...), True)
    """
    target, label = unbound("vjp", fn, mdl)
    out, aux, update, pullback, packed = _started(
        label, target, mdl, primals, has_aux, reduce_axes, vjp_variables, variables, rngs, multi_scope
    )
    packed.publish(update)
    return (out, pullback, aux) if has_aux else (out, pullback)


@_compat.outside_of_graphs
def value_and_grad(
    fn: Callable[..., Any],
    mdl: nn.Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: str | Sequence[str] = (),
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """Differentiates in the inputs only; parameters through :func:`vjp`, or by ordinary ``backward()``.

    The value of a scalar function of a module, and its gradients (the counterpart of ``flax.linen.value_and_grad``).

    Args:
        fn: called as ``fn(mdl, *primals)``, returns a scalar.
        mdl: the module.
        *primals: the inputs; see :func:`vjp`.
        has_aux: whether ``fn`` returns a pair, of which only the first is differentiated.
        reduce_axes: see :func:`vjp`.
        variables: the collections that ``fn`` may change.
        rngs: the random streams that it may draw from.

    Returns:
        ``(out, grads)``, with ``has_aux`` ``((out, aux), grads)``. ``grads`` is a tuple, for one primal too.

    Raises:
        DifferentiationError: ``fn`` returned no scalar.
        FunctionTargetError: ``fn`` is a class or a module.

    Example:
        >>> scale = torch.nn.Linear(1, 1, bias=False)
        >>> loss, (x_grad,) = torchlift.value_and_grad(lambda m, x: m(x).sum(), scale, torch.ones(1))
        >>> bool(x_grad == scale.weight)
        True
    """
    value, grads = _value_and_grad("value_and_grad", fn, mdl, primals, has_aux, reduce_axes, variables, rngs)
    return (value if has_aux else value[0]), grads


@_compat.outside_of_graphs
def grad(
    fn: Callable[..., Any],
    mdl: nn.Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: str | Sequence[str] = (),
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """Differentiates in the inputs only; parameters through :func:`vjp`, or by ordinary ``backward()``.

    The gradients of a scalar function of a module (the counterpart of ``flax.linen.grad``).

    Args:
        fn: called as ``fn(mdl, *primals)``, returns a scalar.
        mdl: the module.
        *primals: the inputs; see :func:`vjp`.
        has_aux: whether ``fn`` returns a pair, of which only the first is differentiated.
        reduce_axes: see :func:`vjp`.
        variables: the collections that ``fn`` may change.
        rngs: the random streams that it may draw from.

    Returns:
        A tuple of gradients, for one primal too; with ``has_aux`` ``(grads, aux)``.

    Raises:
        DifferentiationError: ``fn`` returned no scalar.
        FunctionTargetError: ``fn`` is a class or a module.

    Example:
        >>> net = torch.nn.Tanh()
        >>> (x_grad,) = torchlift.grad(lambda m, x: m(x).sum(), net, torch.zeros(3))
        >>> x_grad
        tensor([1., 1., 1.])
    """
    (_, *aux), grads = _value_and_grad("grad", fn, mdl, primals, has_aux, reduce_axes, variables, rngs)
    return (grads, aux[0]) if has_aux else grads


def _value_and_grad(
    name: str, fn: Any, mdl: nn.Module, primals: tuple[Any, ...], has_aux: bool, reduce_axes: Any,
    variables: Filter, rngs: Filter,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # fmt: skip
    target, label = unbound(name, fn, mdl)
    out, aux, update, pullback, packed = _started(
        label, target, mdl, primals, has_aux, reduce_axes, False, variables, rngs
    )
    if not is_differentiable(out) or out.shape != ():
        raise DifferentiationError(
            f"{label}: returned {describe(out)}, expected a scalar, float[]; reduce it in the function"
        )
    _, *grads = pullback(torch.ones_like(out))
    packed.publish(update)
    return (out, aux) if has_aux else (out,), tuple(grads)


@_compat.outside_of_graphs
def jvp(
    fn: Callable[..., Any],
    mdl: nn.Module,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Mapping[str, Mapping[str, Tensor]],
    variables: Filter = True,
    rngs: Filter = True,
) -> tuple[Any, Any]:
    """The output of a function of a module, and its derivative in a direction.

    The lifted counterpart of ``torch.func.jvp`` (and of ``flax.linen.jvp``).

    Args:
        fn: called as ``fn(mdl, *primals)``; a method of ``mdl`` will do.
        mdl: the module.
        primals: a tuple or list of the inputs.
        tangents: the direction in the inputs: a tree like ``primals``, None standing for zeros.
        variable_tangents: the direction in the variables, ``{collection: {dotted_name: tensor}}``; zero for what is
            not there.
        variables: the collections that ``fn`` may change.
        rngs: the random streams that it may draw from.

    Returns:
        ``(out, out_tangents)``, trees of one structure; None is the tangent of what is no floating-point tensor.

    Raises:
        DifferentiationError: tangents are not like what they belong to.
        VariableNameError: ``variable_tangents`` names a variable that the module does not have.
        FunctionTargetError: ``fn`` is a class or a module.

    Example:
        >>> scale = torch.nn.Linear(1, 1, bias=False)
        >>> direction = {"params": {"weight": torch.ones(1, 1)}}
        >>> out, tangent = torchlift.jvp(lambda m, x: m(x), scale, (torch.full((1,), 3.0),), (None,), direction)
        >>> tangent
        tensor([3.]...)
    """
    target, label = unbound("jvp", fn, mdl)
    for what, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, (tuple, list)):
            raise DifferentiationError(
                f"{label}: {what} is {describe(value)}, expected a tuple with one for each input"
            )
    packed = collected(target, mdl, primals, variables, rngs, label)
    directions = _directions(packed, tuple(primals), tuple(tangents), variable_tangents)
    call = Call(packed, sorted(directions))
    given = tuple(directions[at] for at in call.wanted)
    at_point = tuple(call.operands[at] for at in call.wanted)
    forms = []

    def run(*some: Tensor) -> Any:
        forms.append(call.run(call.operands, some))
        return forms[0].take()

    if directions:
        result: Any = torch.func.jvp(run, at_point, given, has_aux=True)
        outs, out_tangents, rest = result
    else:
        outs, rest = run()
        out_tangents = [torch.zeros_like(out) for out in outs]
    out, _, update = forms[0].joined(outs, rest)
    packed.publish(update)
    return out, forms[0].like_out(out_tangents)


def _directions(
    packed: Packed, primals: tuple[Any, ...], tangents: tuple[Any, ...], variable_tangents: Any
) -> dict[int, Tensor]:
    """The tangent of each operand that has one."""
    found: dict[int, tuple[str, Tensor, Any]] = {}
    expected_spec = _tree.flatten(primals)[1]
    leaves, spec = _tree.flatten_like(tangents, expected_spec)
    if spec != expected_spec:
        raise DifferentiationError(
            f"{packed.label}: tangents has leaves {_tree.paths(tangents)}, expected those of primals, "
            f"{_tree.paths(primals)}"
        )
    operand = {at: len(packed.entries) + i for i, at in enumerate(packed.tensor_leaves)}
    for at, (path, tangent) in enumerate(zip(_tree.paths(primals), leaves, strict=True)):
        if tangent is not None:
            found[operand.get(at, -1 - at)] = (f"tangents{path}", tangent, packed.leaves[at])
    places = {
        (collection, name): at
        for at, entry in enumerate(packed.entries)
        if entry.root == 0 and entry.store != ATTRIBUTE
        for name, collection in entry.paths
    }
    fits = isinstance(variable_tangents, Mapping)
    if not fits or not all(isinstance(named, Mapping) for named in variable_tangents.values()):
        raise DifferentiationError(
            f"{packed.label}: variable_tangents is {_tree.map_leaves(describe, variable_tangents)}, expected "
            "{collection: {name: tensor}}, {} for no direction in the variables"
        )
    for collection, named in variable_tangents.items():
        for name, tangent in named.items():
            if (collection, name) not in places:
                known = sorted(known for c, known in places if c == collection)
                raise VariableNameError(
                    f"{packed.label}: variable_tangents has {name!r} of collection {collection!r}, expected one of "
                    f"{known or sorted({c for c, _ in places})}"
                )
            at = places[collection, name]
            if tangent is not None:
                found[at] = (f"the tangent of {name!r} in {collection!r}", tangent, packed.tensors[at])
    for what, tangent, primal in found.values():
        if not is_differentiable(primal) or describe(tangent) != describe(primal):
            expected = describe(primal) if is_differentiable(primal) else f"None, as for any {describe(primal)}"
            raise DifferentiationError(f"{packed.label}: {what} is {describe(tangent)}, expected {expected}")
    return {at: tangent for at, (_, tangent, _) in found.items()}
