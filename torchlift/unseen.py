"""Writes that torch does not count, or that it lets into parameters: where there may be some, told by names in code.

As is whether a body seeds generators, or sets their states: a graph has its draws, and nothing of that.

NOTE [Unseen writes]. What a body writes into a tensor is told by the tensor's version. A write through ``.data`` or
``.numpy()`` is not counted, and to hold every buffer against its value before takes longer than a small layer. So that
is done where code that a call can reach names one of these; code that no name leads to is not found.
"""

from __future__ import annotations

import dis
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift.code import function_in, in_closure, names_in, of_library, spaces_of

_UNCOUNTED = {"data", "numpy"}  # what gives a tensor of the same memory whose writes are not counted
# What lets code write into parameters, which are leaves of autograd: outside of these it is an error.
_LETS_WRITE = {"no_grad", "inference_mode", "set_grad_enabled", "max_norm", *_UNCOUNTED}
_SEEDS = {"manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all", "fork_rng", "seed_all", "seed_rngs"}
_KNOWN = 512  # bodies with their modules


class Unseen(NamedTuple):
    """What a call may write unseen: buffers uncounted; parameters of anything, or of modules of these classes.

    And whether it may set where torch's generators stand.
    """

    uncounted: bool
    into_all: bool
    into: frozenset[weakref.ref[type]]  # this is remembered, and keeps no class alive
    seeds: bool


_known: OrderedDict[Hashable, Unseen] = OrderedDict()


def code_of(fn: Any) -> Hashable:
    """What tells bodies apart by the names in them: code, not functions, for one made in each call is the same."""
    body = fn if type(fn) is types.FunctionType else _function_of(fn)
    if body is None:
        return None
    return (body.__code__, body.__module__, *[inner.__code__ for inner in in_closure(body)])


@torch.compiler.disable  # a graph that is registered asks, and Dynamo then meets the weak references
def unseen_writes(fn: Any, modules: Sequence[nn.Module]) -> Unseen:
    """What a call of ``fn`` on these modules may write unseen, by the code that names lead to."""
    own = [function for module in modules for function in _kept_functions(module)]
    classes = {type(module): type(module).forward for module in modules}
    told = frozenset((weakref.ref(cls), code_of(forward)) for cls, forward in classes.items())
    key = (code_of(fn), told, *(function.__code__ for function in own))
    found = _known.get(key)
    if found is None:
        found = _known[key] = _look([fn, *own], set(classes))
        while len(_known) > _KNOWN:
            _known.popitem(last=False)
    return found


def _look(bodies: Sequence[Any], classes: set[type]) -> Unseen:
    by_owner: dict[type | None, set[str]] = {owner: set() for owner in (None, *classes)}
    names, seeds = {"forward"}, False
    seen: set[tuple[type | None, types.FunctionType]] = set()
    work: list[tuple[type | None, types.FunctionType | None]] = [(None, _function_of(body)) for body in bodies]
    while work or (work := _members(classes, names, seen)):
        owner, fn = work.pop()
        if fn is None or (owner, fn) in seen:
            continue
        seen.add((owner, fn))
        if getattr(fn, "__wrapped__", None) is not None:
            work.append((owner, function_in(fn.__wrapped__)))  # type: ignore[attr-defined]
        if of_library(fn):
            # torch.no_grad and its like, as decorators; what else is torch's counts its writes.
            by_owner[owner] |= {"no_grad"} if fn.__code__.co_name == "decorate_context" else set()
            seeds = seeds or fn.__code__.co_name in _SEEDS  # by another name
            continue
        found = names_in(fn.__code__)
        seeds = seeds or not _SEEDS.isdisjoint(found) or ("seed" in found and _seeds_anew(fn.__code__))
        keywords = [name for part in fn.__code__.co_consts if isinstance(part, tuple) for name in part]
        by_owner[owner].update(found, [name for name in keywords if isinstance(name, str)])
        names.update(found)
        called = [function_in(space[name]) for space in spaces_of(fn, found) for name in found if name in space]
        work += [(owner, inner) for inner in (*called, *in_closure(fn))]
    into = {owner for owner, found in by_owner.items() if found & _LETS_WRITE}
    classes_into = frozenset(weakref.ref(owner) for owner in into if owner is not None)
    return Unseen(bool(names & _UNCOUNTED), None in into, classes_into, seeds)


def _seeds_anew(code: types.CodeType) -> bool:
    """Whether code calls ``torch.seed`` or ``torch.random.seed``; a ``seed`` of anything else may be a number."""
    loads = [step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_")]
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return any(name == "seed" and of in ("torch", "random") for of, name in zip(loads, loads[1:])) or any(
        map(_seeds_anew, inner)
    )


def _members(classes: set[type], names: set[str], seen: set[Any]) -> list[tuple[type | None, Any]]:
    """The members of classes that have one of these names, and were not seen."""
    found = [
        (cls, function_in(value))
        for cls in classes
        for base in cls.__mro__
        if not of_library(base)
        for name, value in vars(base).items()
        if name in names
    ]
    return [item for item in found if item[1] is not None and item not in seen]


def _function_of(body: Any) -> types.FunctionType | None:
    return function_in(body) or function_in(type(body).__call__)


def _kept_functions(module: nn.Module) -> list[types.FunctionType]:
    found = [function_in(value) for value in module.__dict__.values() if callable(value)]
    return [function for function in found if function is not None]


def renormalises(module: nn.Module) -> bool:
    """Whether it is one of torch's embeddings that write into their weight."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None


def can_compare() -> bool:
    """Whether values may be looked at: a CUDA graph that is being captured has none."""
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def same_values(some: Tensor, others: Tensor) -> bool:
    """Whether two tensors are equal; nan equals nan."""
    if torch.equal(some, others):
        return True
    if some.shape != others.shape or not (some.is_floating_point() or some.is_complex()):
        return False
    return bool(((some == others) | ((some != some) & (others != others))).all())
