"""Lifted choice: cond and switch, which run one of several functions of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift.axes import PartialAxisError
from torchlift.changes import Change, Meta, Update
from torchlift.engine.draws import write_states
from torchlift.engine.rows import Rows
from torchlift.errors import BranchError
from torchlift.filters import Filter, check, matches
from torchlift.pack import Packed
from torchlift.transforms.choosing import (
    Unseen,
    as_tensor,
    describe,
    draw_states,
    functions_of,
    guarded,
    guarded_variables,
    label_of,
    look,
    refusing_draws,
    truth,
)

Place = tuple[int, str, str]  # of a variable: node, store, key


@dataclass(frozen=True)
class _Form:
    """What is static about the result of a branch. Its tensors are outputs, changed variables and sown values."""

    branch: str
    out: _tree.Spec
    paths: list[str]
    leaves: list[Any]  # of the output; None for a tensor, else a tuple of the value
    meta: Meta
    sown: _tree.Spec
    kinds: list[str]  # of the tensors
    changes: dict[Place, tuple[Change, int]]  # with the place among the tensors

    @property
    def outputs(self) -> int:
        return self.leaves.count(None)


class _Choice:
    """One call of ``cond`` or ``switch``."""

    def __init__(
        self, label: str, branches: dict[str, Callable[..., Any]], mdl: nn.Module, operands: tuple[Any, ...],
        variables: Filter, rngs: Filter,
    ):  # fmt: skip
        check(variables, f"{label}: variables")
        check(rngs, f"{label}: rngs")
        self.label, self.names = label, list(branches)
        functions = list(branches.values())

        def branch(mdl: nn.Module, number: int, *operands: Any) -> Any:
            return functions[number](mdl, *operands)

        self.packed = packed = Packed(branch, mdl, (0, *operands), {}, label)
        packed.before = 1  # the number
        packed.allow(lambda c: matches(variables, c), lambda c: f"add {c!r} to variables=")
        packed.refuse(
            [stream for stream in (rng.DROPOUT, *rng.positions()) if not matches(rngs, stream)],
            lambda stream: f"add {stream!r} to rngs=",
        )
        self.operands = [*packed.tensors, *(packed.leaves[at] for at in packed.tensor_leaves)]

    def run(self, index: int | Unseen) -> Any:
        if isinstance(index, int):
            self.packed.fills = not _compat.is_compiling()
            out, update = self.packed.pure(self.packed.tensors, [index, *self.packed.leaves[1:]])
            self.packed.publish(update)
            self.packed.hand_over(self.packed.filled)
            return out
        if index.rows is not None and index.values is not None:
            return self._run_rows(index.index, index.rows, index.values)
        return self._run_all(index.index)

    def _run_one(self, number: int, operands: Sequence[Tensor], others: Sequence[_Form]) -> tuple[_Form, list[Tensor]]:
        count = len(self.packed.tensors)
        out, update = self.packed.pure(operands[:count], [number, *self.packed.with_tensors(operands[count:])[1:]])
        leaves, spec = _tree.flatten_like(out, others[0].out) if others else _tree.flatten(out)
        paths = others[0].paths if others and spec == others[0].out else _tree.paths(out)
        leaves = [as_tensor(leaf, self.packed.device) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        changes = {
            (change.node, change.store, change.key): (change, len(tensors) + at)
            for at, change in enumerate(update.meta.changes)
        }
        sown, sown_spec = _tree.flatten(update.sown)
        tensors = [*tensors, *update.changed, *sown]
        static = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        kinds = [describe(tensor) for tensor in tensors]
        return _Form(self.names[number], spec, paths, static, update.meta, sown_spec, kinds, changes), tensors

    def _run_rows(self, index: Tensor, rows: Rows, values: Tensor) -> Any:
        """Each branch, on the rows that chose it."""
        start, positions = draw_states(self.operands), rng.positions()
        ends = dict(positions)
        forms: list[_Form] = []
        found: list[list[Tensor]] = []
        numbers = values.unique().tolist()
        at = [(values == number).nonzero().squeeze(1) for number in numbers]
        for number, here in zip(numbers, at, strict=True):
            if forms and rows.shares_draws:
                write_states(start)
            rng.rewind(positions)

            def branch(operands: list[Tensor], number: int = number) -> list[Tensor]:
                form, tensors = self._run_one(number, operands, forms)
                forms.append(form)
                return tensors

            try:
                found.append(rows.run(branch, self.operands, here))
            except PartialAxisError:  # a collective is of all rows, whatever these choose
                write_states(start)
                rng.rewind(positions)
                return self._run_all(index)
            ends = {name: max(end, rng.positions()[name]) for name, end in ends.items()}
        rng.rewind(ends)
        columns = self._aligned(forms, found, lambda branch, entry: rows.take(self.operands[entry], at[branch]))
        results = [rows.merge(list(zip(at, column, strict=True))) for column in columns]
        return self._finish(forms, results, lambda entry: rows.concern(self.operands[entry]))

    def _run_all(self, index: Tensor) -> Any:
        """All branches, and of their results those that were chosen."""
        count = len(self.packed.tensors)
        forms: list[_Form] = []
        found: list[list[Tensor]] = []
        for number in range(len(self.names)):
            taken = index == number
            operands = [*guarded_variables(self.operands[:count], taken), *guarded(self.operands[count:], taken)]
            with refusing_draws(self.label):
                form, tensors = self._run_one(number, operands, forms)
            forms.append(form)
            found.append(tensors)
        columns = self._aligned(forms, found, lambda _, entry: self.operands[entry])
        results = []
        for column in columns:
            result = column[-1]
            for number, value in enumerate(column[:-1]):
                result = torch.where(index == number, value, result)
            results.append(result)
        return self._finish(forms, results, lambda _: not _compat.functorch_active())

    def _aligned(
        self, forms: list[_Form], found: list[list[Tensor]], given: Callable[[int, int], Tensor]
    ) -> list[list[Tensor]]:
        """The values that each tensor of the result has in the branches: outputs, changed variables, sown values.

        ``given(branch, entry)`` is a variable, where a branch did not change it.
        """
        first = forms[0]
        for form in forms[1:]:
            self._compare(first, form)
        columns = [[tensors[at] for tensors in found] for at in range(first.outputs)]
        for place, change in _changes(forms).items():
            column, kinds = [], []
            for branch, (form, tensors) in enumerate(zip(forms, found, strict=True)):
                if place in form.changes:
                    at = form.changes[place][1]
                    column.append(tensors[at])
                    kinds.append(form.kinds[at])
                elif change.entry >= 0:
                    column.append(given(branch, change.entry))
                    kinds.append(describe(self.operands[change.entry]))
                else:
                    column.append(tensors[0])
                    kinds.append("not there")
            name = f"{self.packed.nodes[change.node].dotted(change.key)!r} in {change.collection!r}"
            for form, kind in zip(forms, kinds, strict=True):
                self._require(name, form, kind, first, kinds[0])
            columns.append(column)
        sown = first.outputs + len(first.changes)
        return columns + [
            [tensors[form.outputs + len(form.changes) + at] for form, tensors in zip(forms, found, strict=True)]
            for at in range(len(first.kinds) - sown)
        ]

    def _compare(self, first: _Form, form: _Form) -> None:
        if form.out != first.out:
            self._require(
                "the output", form, f"a tree with leaves {form.paths}", first, f"one with leaves {first.paths}"
            )
            self._require("the output", form, "a tree of other types", first, "the types there")
        for path, kind, expected in zip(form.paths, _leaf_kinds(form), _leaf_kinds(first), strict=True):
            self._require(f"output{path}", form, kind, first, expected)
        sites, others = ([f"{s.dotted_name!r} in {s.collection!r}" for s in f.meta.sites] for f in (form, first))
        self._require("what is sown", form, str(sites), first, str(others))
        kinds, others = (f.kinds[f.outputs + len(f.changes) :] for f in (form, first))
        same = form.sown == first.sown
        self._require(
            "what is sown",
            form,
            str(kinds if same else form.sown.outer),
            first,
            str(others if same else first.sown.outer),
        )

    def _require(self, what: str, form: _Form, got: str, first: _Form, expected: str) -> None:
        if got != expected:
            raise BranchError(
                f"{self.label}: {what} is {got} in {form.branch}, expected {expected}, as in {first.branch}: where the "
                "choice is not known to Python, branches return and change the same"
            )

    def _finish(self, forms: list[_Form], results: list[Tensor], copied: Callable[[int], bool]) -> Any:
        """Publishes; returns the output. ``copied``: whether a variable can be written in place."""
        first = forms[0]
        tensors = iter(results)
        out = _tree.unflatten([next(tensors) if leaf is None else leaf[0] for leaf in first.leaves], first.out)
        changes = []
        for place, change in _changes(forms).items():
            in_place = all(form.changes[place][0].how == "copy" for form in forms if place in form.changes)
            if change.entry >= 0:
                change = change._replace(how="copy" if in_place and copied(change.entry) else "rebind")
            changes.append(change)
        changed = [next(tensors) for _ in changes]
        sown = _tree.unflatten(list(tensors), first.sown)
        self.packed.publish(Update(changed, sown, Meta(tuple(changes), first.meta.sites)))
        return out


def _changes(forms: Sequence[_Form]) -> dict[Place, Change]:
    """What any branch changed."""
    return {place: change for form in reversed(forms) for place, (change, _) in form.changes.items()}


def _leaf_kinds(form: _Form) -> list[str]:
    kinds = iter(form.kinds)
    return [next(kinds) if leaf is None else repr(leaf[0]) for leaf in form.leaves]


@_compat.outside_of_graphs
def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    mdl: nn.Module,
    *operands: Any,
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """Runs one of two functions of a module.

    The lifted counterpart of ``jax.lax.cond`` (and of ``flax.linen.cond``). A number, or a tensor that no ``vmap``
    maps, runs the one function and nothing else. Under ``vmap`` with a predicate for each row, each function runs on
    its own rows, so that no NaN comes from the other ones, and outputs and variables are put together. Under
    ``torch.compile``, and in a compiled ``scan``, a tensor cannot be looked into: both functions run, and of their
    results, variables included, those of one are selected. A function that draws draws there in either case.

    Args:
        pred: a number, or a tensor with one element.
        true_fun: ``(module, *operands) -> out``, run where ``pred`` is true; a method of ``mdl`` will do.
        false_fun: the same, run where it is not.
        mdl: the module that they get.
        *operands: what else they get. What they reach by a closure keeps its gradient too.
        variables: the collections that they may change.
        rngs: the random streams that they may draw from.

    Returns:
        What the function returned. Under ``vmap`` and ``torch.compile`` both must return the same structure, shapes and
        dtypes, and numbers come back as tensors.

    Raises:
        BranchError: the functions return or create different things, or ``pred`` has several elements, or
            is no number.
        FunctionTargetError: one of them is a class or a module.
        ModifyCollectionError: a function changed a collection outside of ``variables``.
        RandomnessError: a function drew from a stream outside of ``rngs``.
        TransformTargetError: ``mdl`` is no module.

    Note:
        No NaN comes from the function not taken by a select either, be it in values or in gradients, with two
        exceptions: through tensors that it reaches by a closure, and, in compiled code under a ``torch.func``
        transform, through parameters.

    Example:
        >>> def row(net, x):
        ...     return torchlift.cond(x.sum() > 0, lambda net, x: net(x), lambda net, x: -x, net, x)
        >>> torchlift.vmap(row)(torch.nn.ReLU(), torch.tensor([[1.0, -0.5], [-1.0, 0.5]]))
        tensor([[ 1.0000,  0.0000],
                [ 1.0000, -0.5000]])
    """
    label = label_of("cond", mdl)
    index = look(truth(pred, "pred", label), label)
    index = int(not index) if isinstance(index, int) else index.mapped(lambda value: (value == 0).long())
    functions = functions_of("cond", (true_fun, false_fun), mdl)
    return _Choice(label, dict(zip(("true_fun", "false_fun"), functions)), mdl, operands, variables, rngs).run(index)


@_compat.outside_of_graphs
def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    mdl: nn.Module,
    *operands: Any,
    variables: Filter = True,
    rngs: Filter = True,
) -> Any:
    """Runs one of several functions of a module, by number.

    The lifted counterpart of ``jax.lax.switch`` (and of ``flax.linen.switch``); see :func:`cond`, whose rules hold.

    Args:
        index: an int, or an integer tensor with one element; one that is too small or too large is clamped.
        branches: functions ``(module, *operands) -> out``.
        mdl: the module that they get.
        *operands: what else they get.
        variables: the collections that they may change.
        rngs: the random streams that they may draw from.

    Returns:
        What the function returned.

    Raises:
        BranchError: there are no functions, ``index`` is no integer or has several elements, or the functions return
            or create different things.
        FunctionTargetError: one of them is a class or a module.

    Example:
        >>> branches = [lambda net, x: x, lambda net, x: net(x), lambda net, x: -net(x)]
        >>> [torchlift.switch(i, branches, torch.nn.ReLU(), torch.tensor(3.0)).item() for i in (0, 1, 7)]
        [3.0, 3.0, -3.0]
    """
    label = label_of("switch", mdl)
    if not isinstance(branches, Sequence) or not branches:
        got = "no branches" if isinstance(branches, Sequence) else f"branches of type {type(branches).__name__}"
        raise BranchError(f"{label}: got {got}, expected a list of at least one function")
    kind = index.dtype if isinstance(index, Tensor) else type(index)
    if (
        isinstance(index, Tensor)
        and (index.is_floating_point() or index.is_complex())
        or not hasattr(index, "__index__")
    ):
        raise BranchError(f"{label}: index is {kind}, expected an integer; for a condition use torchlift.cond")
    last = len(branches) - 1
    if isinstance(index, Tensor):
        found = look(index.long().clamp(0, last), label)
    else:
        found = min(max(int(index), 0), last)
    named = {f"branches[{number}]": branch for number, branch in enumerate(functions_of("switch", branches, mdl))}
    return _Choice(label, named, mdl, operands, variables, rngs).run(found)
