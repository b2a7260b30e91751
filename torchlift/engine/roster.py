"""Tensors of layers that stay outside of the graph that runs them.

NOTE [Roster]. An input of a graph costs Dynamo, AOTAutograd and Inductor some 10 ms, and the parameters of 96 layers
are a thousand: the time to compile grew with depth, though the loop is one operator. So they are no inputs. The graph
gets a *ticket*, a number by which the operator finds the tensors when it runs, and a *stand-in* for each parameter that
every layer has: a tensor without storage, made outside of the graph, whose gradient is the stack of the layers'. To
stack the parameters themselves would do as well and copy the model at each call.

Nothing in the graph tells that it reads them. So who makes a roster sees to it that the same graph does not write them.
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
    """In a graph, what stands for a list of xs: the :meth:`Roster.inputs`."""

    inputs: Sequence[Tensor]


class Roster:
    """The tensors of layers: a row for each layer, all of one form."""

    def __init__(self, rows: Sequence[Sequence[Tensor]]):
        self.rows = rows
        self.number = next(_numbers)
        _rosters[self.number] = self

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, layer after layer."""
        return [tensor for row in self.rows for tensor in row]

    @property
    def version(self) -> int:
        """A number that is another one after each write into any of them."""
        return sum(map(_compat.version, self.tensors))

    def inputs(self) -> tuple[Tensor, ...]:
        """What a graph gets: the ticket, then a stand-in for each column in which some tensor wants a gradient."""
        ticket: Any = torch.tensor(self.number)
        ticket.roster = self  # which lives as long as anything that may still ask for it: see also _StandIns
        columns = [column for column in zip(*self.rows) if any(tensor.requires_grad for tensor in column)]
        if not columns:
            return (ticket,)
        # Whatever the mode of the caller: a graph may change it, and change it back, before it calls the layers.
        with torch.inference_mode(False), torch.enable_grad():
            standins = _StandIns.apply(self, *(tensor for column in columns for tensor in column))
        for tensor in standins:
            _compat.mark_static(tensor)  # or a second depth is taken for a size that changes
        return (ticket, *standins)


_numbers = itertools.count()
_rosters: weakref.WeakValueDictionary[int, Roster] = weakref.WeakValueDictionary()


def roster_of(ticket: Tensor) -> Roster:
    """The roster that a ticket is for."""
    return _rosters[int(ticket)]


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
