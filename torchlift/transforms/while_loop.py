"""Lifted while_loop: a function of a module that runs as long as a condition holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift._context import entered
from torchlift.axes import PartialAxisError
from torchlift.changes import Change, Meta, Update
from torchlift.engine.capture import CaptureError
from torchlift.engine.draws import write_states
from torchlift.engine.remat import checkpointed, is_recomputing
from torchlift.engine.rows import Rows
from torchlift.errors import AxisError, CarryError, UnsupportedError
from torchlift.filters import Filter, check
from torchlift.groups import Groups
from torchlift.pack import Packed
from torchlift.transforms.choosing import (
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


class _While:
    """One call. Its *operands* are the tensors of all variables, then those of the carry; some of them *move*."""

    def __init__(
        self, label: str, cond_fn: Callable[..., Any], body_fn: Callable[..., Any], mdl: nn.Module, init: Any,
        groups: Groups, remat: Any,
    ):  # fmt: skip
        self.label, self.groups = label, groups
        self.test, self.body = (Packed(fn, mdl, (init,), {}, label) for fn in (cond_fn, body_fn))
        self.test.by_value = self.body.by_value = frozenset({0})
        roles = self.body.group(groups.role)
        self.test.allow(lambda c: False, lambda c: "change it in body_fn, with carry_variables=")
        self.body.allow(lambda c: groups.role(c).writable, lambda c: f"add {c!r} to carry_variables=")
        for packed in (self.test, self.body):
            packed.refuse(groups.untold_streams(rng.positions()))
        self.carry, self.spec = _tree.flatten(init)
        self.init = init
        self.carry = [as_tensor(leaf, self.body.device) for leaf in self.carry]
        self.carry_at = [at for at, leaf in enumerate(self.carry) if isinstance(leaf, Tensor)]
        self.count = len(self.body.tensors)
        self.state_at = [at for at, role in enumerate(roles) if role.carried]
        self.moving = [*self.state_at, *range(self.count, self.count + len(self.carry_at))]
        self.changes: dict[tuple[int, str, str], Change] = {}
        self.sown: list[tuple[Any, Any]] = []
        self.remat = remat
        self.start = [*self.body.snapshot(), *(self.carry[at] for at in self.carry_at)]
        self.expected = [describe(self.start[at]) for at in self.moving]
        # NOTE [Streams]. As in scan: a stream that is not split starts anew in each iteration.
        self.begin = rng.positions()
        self.draws = draw_states(self.start) if groups.splits(rng.DROPOUT) is False else None

    # Pure functions of the operands ----------------------------------------------------------------------------------

    def asks(self, operands: Sequence[Tensor]) -> Any:
        """Whether to go on: what the condition returned."""
        out, update = self.test.pure(operands[: self.count], self.leaves(operands))
        if update.sown:
            raise UnsupportedError(f"{self.label}: cond_fn sows, expected a condition only; sow in body_fn")
        return out

    def leaves(self, operands: Sequence[Tensor]) -> list[Any]:
        leaves = list(self.carry)
        for at, tensor in zip(self.carry_at, operands[self.count :], strict=True):
            leaves[at] = tensor
        return leaves

    def once(self, operands: Sequence[Tensor]) -> tuple[list[Tensor], Update]:
        """One iteration: what moves, moved; and what the body did to variables, for its kind and for what it sowed."""
        out, update = self.body.pure(operands[: self.count], self.leaves(operands))
        state = {at: operands[at] for at in self.state_at}
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            if change.entry < 0:
                raise CarryError(
                    f"{self.label}: created {change.key!r} in {change.collection!r}, expected the variables that were "
                    "there before; declare it before the loop"
                )
            state[change.entry] = value
        new = [*state.values(), *self._checked(out)]
        for at, value, expected in zip(self.state_at, new, self.expected):
            if describe(value) != expected:
                entry = self.body.entries[at]
                raise CarryError(
                    f"{self.label}: {entry.name!r} in {entry.collection!r} is {describe(value)} after an "
                    f"iteration, expected {expected}, as before"
                )
        return new, update

    def _checked(self, out: Any) -> list[Tensor]:
        leaves, spec = _tree.flatten_like(out, self.spec)
        if spec != self.spec:
            raise CarryError(
                f"{self.label}: body_fn returned {_tree.kind(out)} with leaves {_tree.paths(out)}, expected "
                f"{_tree.kind(self.init)} with leaves {_tree.paths(self.init)}, as in init"
            )
        leaves = [as_tensor(leaf, self.body.device) for leaf in leaves]
        kinds = iter(self.expected[len(self.state_at) :])
        for path, leaf, old in zip(_tree.paths(self.init), leaves, self.carry, strict=True):
            expected = next(kinds) if isinstance(old, Tensor) else describe(old)
            if describe(leaf) != expected:
                raise CarryError(
                    f"{self.label}: body_fn returned {describe(leaf)} as carry{path}, expected {expected}, as in init"
                )
        return [leaves[at] for at in self.carry_at]

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self, max_steps: int | None) -> Any:
        if max_steps is None and _compat.is_compiling():
            if _compat.functorch_active():
                return _transformed(self)
            if torch.is_grad_enabled() and any(x.requires_grad for x in self.start):
                return _differentiated(self)
            return self.finish(self._captured(), None)
        operands, alive, rows = list(self.start), None, None
        steps = 0
        while max_steps is None or steps < max_steps:
            going = self.asks(operands)
            if alive is not None:
                going = alive & (torch.as_tensor(going) != 0)
            seen = look(truth(going, "what cond_fn returned", self.label), self.label)
            if seen == 0:
                break
            step = self._step()
            if isinstance(seen, int):
                new = self._note(step(operands))
            elif seen.values is not None and not seen.values.any():
                break
            elif seen.rows is not None and seen.values is not None:
                rows, start, positions = seen.rows, draw_states(operands), rng.positions()
                try:
                    new = self._rows_step(step, operands, rows, seen.values)
                except PartialAxisError:  # a collective is of all rows, also of those that are done
                    write_states(start)
                    rng.rewind(positions)
                    new = self._select_step(step, operands, seen.index != 0)
            else:
                new = self._select_step(step, operands, seen.index != 0)
            if not isinstance(seen, int):
                alive = seen.index != 0  # rows that are done stay so
            operands = self.moved(operands, new)
            steps += 1
            if max_steps is None and _compat.is_tracing():
                if _compat.is_recording():
                    raise CaptureError(
                        f"{self.label}: a loop without max_steps= cannot be recorded in a graph; pass max_steps="
                    )
                break  # on fake tensors: shapes are as after one iteration
        return self.finish(operands, rows)

    def moved(self, operands: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        operands = list(operands)
        for at, value in zip(self.moving, new, strict=True):
            operands[at] = value
        return operands

    def _step(self) -> Callable[[Sequence[Tensor]], tuple[list[Tensor], Update]]:
        """One iteration as a function that may run again: with the draws that it has now."""
        if self.draws is not None and not _compat.is_tracing():
            write_states(self.draws)
        rng.rewind({name: at for name, at in self.begin.items() if not self.groups.splits(name)})
        if not self.remat:
            return self.once
        streams = rng.positions()

        def once(operands: Sequence[Tensor]) -> tuple[list[Tensor], Update]:
            with entered(streams=streams) if is_recomputing() else entered():
                return self.once(operands)

        return checkpointed(once, None if self.remat is True else self.remat, name=self.label)

    def _note(self, result: tuple[list[Tensor], Update], everywhere: bool = True) -> list[Tensor]:
        """Keeps of an iteration what its body did to variables."""
        new, update = result
        for change in update.meta.changes:
            self.changes[change.node, change.store, change.key] = change
        if update.sown and not everywhere:
            raise UnsupportedError(
                f"{self.label}: sowed {update.meta.sites[0].dotted_name!r} in an iteration that rows or Python do not "
                "know to run; put it into the carry"
            )
        self.sown.extend(zip(update.meta.sites, update.sown, strict=True))
        return new

    def _rows_step(self, step: Any, operands: list[Tensor], rows: Rows, values: Tensor) -> list[Tensor]:
        """An iteration of the rows that go on; the others are frozen."""
        here, done = values.nonzero().squeeze(1), (values == 0).nonzero().squeeze(1)
        new = rows.run(lambda operands: self._note(step(operands), everywhere=False), operands, here)
        old = [operands[at] for at in self.moving]
        if not len(done):
            return [rows.scatter(value) for value in new]
        return [rows.merge([(here, value), (done, rows.take(was, done))]) for value, was in zip(new, old, strict=True)]

    def _select_step(self, step: Any, operands: list[Tensor], going: Tensor) -> list[Tensor]:
        """An iteration whose results are kept where the condition holds."""
        given = [*guarded_variables(operands[: self.count], going), *guarded(operands[self.count :], going)]
        with refusing_draws(self.label):
            new = self._note(step(given), everywhere=False)
        old = [operands[at] for at in self.moving]
        return [torch.where(going, value, was) for value, was in zip(new, old, strict=True)]

    def _captured(self) -> list[Tensor]:
        """The loop as torch's operator, which has a forward only."""

        def asks(*moving: Tensor) -> Tensor:
            return torch.as_tensor(self.asks(self.moved(self.start, moving))).reshape(()) != 0

        def once(*moving: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.clone() for value in self.once(self.moved(self.start, moving))[0])

        # What the body changes is not known outside of the operator: all that it may change is taken to be.
        for number, node in enumerate(self.body.nodes):
            for store, key, at in node.tensors:
                if at in self.state_at:
                    place = number, store, key
                    self.changes[place] = Change("copy", *place, at, self.body.entries[at].collection)
        return self.moved(self.start, torch.while_loop(asks, once, tuple(self.start[at] for at in self.moving)))

    def finish(self, operands: list[Tensor], rows: Rows | None) -> Any:
        """Publishes; returns the carry."""
        changes = []
        for change in self.changes.values():
            if rows is not None and not rows.concern(self.start[change.entry]):
                change = change._replace(how="rebind")  # what is the same in all rows cannot be written in one
            changes.append(change)
        meta = Meta(tuple(changes), tuple(site for site, _ in self.sown))
        changed = [operands[change.entry] for change in changes]
        self.body.publish(Update(changed, [value for _, value in self.sown], meta))
        return _tree.unflatten(self.leaves(operands), self.spec)


def _between_graphs(loop: _While) -> Any:
    """The loop in Python. An error would not do: after it Dynamo compiles what ``run`` calls, which sees no values."""
    return loop.run(None)


_WAY_ROUND = (
    "pass max_steps=, a bound on the number of iterations; outside of fullgraph=True it runs between two graphs"
)
_differentiated = torch.compiler.disable(
    _between_graphs,
    reason=f"torchlift: while_loop: compiled code cannot differentiate a loop without bound; {_WAY_ROUND}",
)
_transformed = torch.compiler.disable(
    _between_graphs, reason=f"torchlift: while_loop: compiled under a torch.func transform; {_WAY_ROUND}"
)


@_compat.outside_of_graphs
def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    mdl: nn.Module,
    init: Any,
    carry_variables: Filter = False,
    broadcast_variables: Filter = True,
    split_rngs: Mapping[Any, bool] = {},  # noqa: B006  never mutated; an empty dict reads better in help()
    *,
    max_steps: int | None = None,
    remat: bool | Callable[..., Any] = False,
) -> Any:
    """Runs a function of a module again and again, as long as a condition holds.

    The lifted counterpart of ``jax.lax.while_loop`` (and of ``flax.linen.while_loop``). Under ``vmap`` with a condition
    that differs from row to row, rows that are done stay as they are. Gradients go through the iterations that ran.
    Compiled code has gradients, and runs under ``torch.func``, with ``max_steps`` only, which then is the number of
    iterations it computes; without it the loop runs between two graphs, which ``fullgraph=True`` refuses.

    Args:
        cond_fn: ``(module, carry) -> bool``, a number or a tensor with one element; changes no variable.
        body_fn: ``(module, carry) -> carry``.
        mdl: the module that they get.
        init: the first carry: tensors, in any structure. Numbers become tensors.
        carry_variables: the collections that the body may change; each iteration gets those of the one before.
        broadcast_variables: the collections that are read-only in the loop: all that are not carried.
        split_rngs: for each random stream whether its draws differ from iteration to iteration.
        max_steps: stop after so many iterations, also where the condition still holds.
        remat: compute the values inside of an iteration again in backward rather than keep them; or a policy that
            says which to keep, as in :func:`torchlift.remat`.

    Returns:
        The last carry.

    Raises:
        AxisError: ``max_steps`` is no number of iterations.
        BranchError: the condition is a tensor with several elements, or no number.
        CarryError: the carry, or a carried variable, changed its structure, a shape or a dtype.
        FunctionTargetError: one of the functions is a class or a module.
        ModifyCollectionError: the body changed a collection that is not carried, or the condition changed any.
        RandomnessError: a random stream was drawn from that the loop was not told about.
        TransformTargetError: ``mdl`` is no module.
        UnsupportedError: the condition sows; or draws are to repeat in compiled code.

    Example:
        >>> halve = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(halve.weight, 0.5)
        >>> torchlift.while_loop(lambda m, x: x.sum() > 1, lambda m, x: m(x), halve, torch.tensor([12.0]))
        tensor([0.7500], grad_fn=...)
    """
    label = label_of("while_loop", mdl)
    if max_steps is not None and (type(max_steps) is not int or max_steps < 0):
        raise AxisError(f"{label}: max_steps is {max_steps!r}, expected None or an int from 0 on")
    check(broadcast_variables, f"{label}: broadcast_variables")
    groups = Groups(label, carry=carry_variables, split_rngs=split_rngs)
    if _compat.is_compiling() and groups.splits(rng.DROPOUT) is False:
        raise UnsupportedError(
            f"{label}: compiled code cannot repeat its draws, which split_rngs={{'dropout': False}} "
            "asks for; draw before the loop and put that into the carry"
        )
    cond_fn, body_fn = functions_of("while_loop", (cond_fn, body_fn), mdl)
    return _While(label, cond_fn, body_fn, mdl, init, groups, remat).run(max_steps)
