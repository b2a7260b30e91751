"""Tensors of layers that stay outside of the graph that runs them.

NOTE [Roster]. An input of a graph costs Dynamo, AOTAutograd and Inductor some 10 ms, and the parameters of 96 layers
are a thousand: the time to compile grew with depth, though the loop is one operator. So they are no inputs. The graph
gets a *ticket*, a number by which the operator finds the tensors when it runs, and a *stand-in* for each parameter that
every layer has: a tensor without storage, made outside of the graph, whose gradient is the stack of the layers'. To
stack the parameters themselves would do as well and copy the model at each call.

Nothing in the graph tells that it reads them. So who makes a roster sees to it that the same graph does not write them.

NOTE [State]. Buffers that layers write, batch statistics say, are written by an operator after the loop. It takes the
ticket for what it writes into: so it is no dead code, and comes before whatever runs these layers next. A backward that
reads what such a buffer held gets it from its forward.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlift import _compat


@dataclass(frozen=True)
class Enrolled:
    """In a graph, what stands for a list of xs: a ticket, then stand-ins."""

    inputs: Sequence[Tensor]


class Roster:
    """The tensors of layers: a row for each layer, all of one form. ``holder`` is what has the layers.

    Writes into the columns ``uncounted`` do not count as such, for those that await their backward.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]], holder: object, uncounted: frozenset[int] = frozenset()):
        self.rows, self.holder, self.uncounted = rows, weakref.ref(holder), uncounted
        self.number = next(_numbers)
        _rosters[self.number] = self

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, layer after layer."""
        return [tensor for row in self.rows for tensor in row]

    @property
    def versions(self) -> list[int]:
        """A number for each column, that is another one after each write into it."""
        found, width = _compat.versions(self.tensors), len(self.rows[0])
        return [sum(found[column::width]) for column in range(width)]

    def write(self, columns: Sequence[int], stacks: Sequence[Tensor]) -> None:
        """Writes the state that a loop left, a stack for each of some columns."""
        for column, stack in zip(columns, stacks, strict=True):
            targets = [row[column].data if column in self.uncounted else row[column].detach() for row in self.rows]
            _compat.foreach_copy_(targets, list(stack.unbind(0)))


# What a graph gets of one is made without regard to the mode of the caller: a graph may change that, and change it
# back, before it calls the layers.


def ticket_for(roster: Roster) -> Tensor:
    """A tensor by which an operator finds the roster, and knows which versions of its columns were meant.

    A call that writes gets one of its own: who saved another for its backward is not to see a write into it.
    """
    with torch.inference_mode(False):
        ticket: Any = torch.tensor([roster.number, *roster.versions], device="cpu")
    _compat.mark_static(ticket)  # as stand-ins
    ticket.roster = roster  # which lives as long as anything that may still ask for it: see also _StandIns
    return ticket


def stand_ins(roster: Roster) -> tuple[Tensor, ...]:
    """One for each column in which some tensor wants a gradient."""
    columns = [column for column in zip(*roster.rows) if any(tensor.requires_grad for tensor in column)]
    if not columns:
        return ()
    with torch.inference_mode(False), torch.enable_grad():
        made = _StandIns.apply(roster, *(tensor for column in columns for tensor in column))
    for tensor in made:
        _compat.mark_static(tensor)  # or a second depth is taken for a size that changes
    return tuple(made)


_numbers = itertools.count()
_rosters: weakref.WeakValueDictionary[int, Roster] = weakref.WeakValueDictionary()


def roster_of(ticket: Tensor) -> Roster:
    """The roster that a ticket is for.

    Raises:
        RuntimeError: there is none any more: a hook on saved tensors copied the ticket, and the layers got others.
    """
    roster = _rosters.get(int(ticket[0]))
    if roster is None:
        raise RuntimeError(
            "the parameters of the layers were replaced while a backward waited for them, under hooks on saved tensors "
            "(save_on_cpu, say); replace them after backward()"
        )
    return roster


def check_versions(ticket: Tensor, columns: Sequence[int]) -> None:
    """Refuses columns that were written since the ticket was made, as autograd refuses tensors among those it saved."""
    meant, found = ticket.tolist()[1:], roster_of(ticket).versions
    if any(meant[column] != found[column] for column in columns):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            "parameter or buffer of the layers was written after they ran; write it after backward()"
        )


class _StandIns(torch.autograd.Function):
    """From the tensors of some columns to one stand-in for each column."""

    @staticmethod
    def forward(ctx: Any, roster: Roster, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.roster = roster
        ctx.set_materialize_grads(False)
        length = len(roster.rows)
        return tuple(t.new_zeros(()).expand(length, *t.shape) for t in tensors[::length])

    @staticmethod
    def backward(ctx: Any, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        length = len(ctx.roster.rows)
        grads = [grad for stack in stacks for grad in ([None] * length if stack is None else stack.unbind(0))]
        return None, *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[1:]))
