"""Tensors of a capture that a body left where they outlive it: found, and taken out again.

NOTE [Kept tensors]. A body may make a table once and keep it: in a dict, by ``functools.lru_cache``, in an attribute of
an object. In a capture that table has no data, and all who read the cache later on, in other models too, would compute
with it. So whatever a body made on fakes must be gone once the run is over. What is not is taken out of what holds it,
nothing is captured, and the plain loop runs, which fills the cache with a tensor that has data. That is no failure: the
next call captures again, finds the cache full, and nobody is warned. A body that keeps a tensor of each run (a list of
attention maps) will do so then as well: that is remembered, with a warning.

What the body's code leads to is put back as it was, see NOTE [Reached]. Of anything else it is not known what was there
before: an entry of a dict goes; so do the last ones of a list; an attribute and an element amid a list become None, as
what is made when it is first needed mostly starts. A cache of functools is emptied.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from torchlift._compat import pytree
from torchlift.engine.reached import LRU, Reached, is_ours

KEEPS = "keeps a tensor that it made"  # says why a body was not captured
_DEPTH = 6  # of tuples in one another that hold a tensor
_MOST = 512  # requests remembered
_SLOT = types.MemberDescriptorType
_CONTAINERS = (dict, list, set, collections.deque)
_NO_HOLDERS = (types.FrameType, types.GeneratorType, torch.Tensor, weakref.ref)

_failed: OrderedDict[Hashable, None] = OrderedDict()  # requests whose body kept a tensor


def is_first(request: Hashable) -> bool:
    """Whether no capture for this request was told here before to have failed since the body kept a tensor."""
    first = request not in _failed
    _failed[request] = None
    while len(_failed) > _MOST:
        _failed.popitem(last=False)
    return first


def forget() -> None:
    """Forgets all of these requests."""
    _failed.clear()


class Made:
    """The tensors that one run of a body on fakes made, as long as they live."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[torch.Tensor]] = []

    def note(self, tree: Any) -> None:
        leaves = (tree,) if isinstance(tree, torch.Tensor) else pytree.tree_leaves(tree)
        self.refs += [weakref.ref(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def alive(self) -> list[torch.Tensor]:
        found = (ref() for ref in self.refs)
        return list({id(tensor): tensor for tensor in found if tensor is not None}.values())

    def take_out(self, reached: Reached, collect: bool = True) -> str | None:
        """Takes those out that anything in Python still holds, when the run is over, and says of what.

        Then what was ``reached`` is made as it was. Mostly no tensor is left, as nothing of the run is, and there is
        nothing to look for. With ``collect`` what is left in cycles goes first: the youngest objects, which is fast.
        """
        for generation in (0, 1, 2) if collect else ():
            if not self.alive():
                return None
            gc.collect(generation)
        tensors = self.alive()
        if not tensors:
            return None
        held = reached.holds(tensors)
        found = _take_out(tensors)
        if held:
            reached.put_back()
        return found or ("what its code leads to" if held else None)


def _take_out(inner: list[Any]) -> str | None:
    """Takes ``inner``, and the tuples that hold some of it, out of all that can be changed; the first of these."""
    found: list[str] = []
    known = {id(inner), id(found)}
    for _ in range(_DEPTH):
        if not inner:
            break
        wanted = {id(value) for value in inner}
        holders = [h for h in gc.get_referrers(*inner) if id(h) not in known and not isinstance(h, _NO_HOLDERS)]
        outer: list[Any] = []
        containers = [holder for holder in holders if isinstance(holder, _CONTAINERS)]
        owners = gc.get_referrers(*containers) if containers else []  # once for all: it looks at every object there is
        known |= {id(holders), id(outer), id(containers), id(owners), *map(id, holders)}
        for holder in holders:
            if isinstance(holder, (tuple, frozenset, types.MethodType, functools.partial)):
                outer.append(holder)
                continue
            with contextlib.suppress(Exception):  # whatever a class of the user's raises
                what = _clear(holder, wanted, owners)
                found += [] if what is None else [what]
        inner = outer
        known.add(id(inner))
    return found[0] if found else None


def _clear(holder: Any, wanted: set[int], owners: list[Any]) -> str | None:
    """Takes what is ``wanted``, by id, out of one object that holds it, and says what that is."""
    if isinstance(holder, LRU):
        holder.cache_clear()
        return f"the cache of {holder.__qualname__}"
    if isinstance(holder, dict):
        return _clear_dict(holder, wanted, owners)
    if isinstance(holder, types.CellType):
        closures = [owner for owner in gc.get_referrers(holder) if isinstance(owner, tuple)]
        around = [fn for fn in gc.get_referrers(*closures) if isinstance(fn, types.FunctionType)] if closures else []
        if all(is_ours(fn.__module__ or "") for fn in around):  # torch.func's, say, as part of a graph on fakes
            return None
        holder.cell_contents = None
        return "a variable of a function around it"
    if isinstance(holder, _CONTAINERS):
        what = _called(holder, owners)
        if what is not None:
            _clear_container(holder, wanted)
        return what
    if is_ours(type(holder).__module__):  # autograd's, say: not all of a graph on fakes is gone with the run
        return None
    names = [name for name in _attributes(holder) if id(getattr(holder, name, None)) in wanted]
    for name in names:
        _clear_attribute(holder, name)
    return f"the attribute {names[0]} of a {type(holder).__name__}" if names else None


def _clear_dict(holder: dict[Any, Any], wanted: set[int], owners: list[Any]) -> str | None:
    keys = [key for key, value in holder.items() if id(value) in wanted or id(key) in wanted]
    if "__name__" in holder and "__builtins__" in holder:
        for key in keys:
            holder[key] = None
        return f"the global {keys[0]} of {holder['__name__']}"
    for owner in owners:
        if isinstance(owner, LRU) and any(inner is holder for inner in gc.get_referents(owner)):
            return _clear(owner, wanted, owners)
        # That of a class cannot be had but by asking the class what it refers to.
        of_class = isinstance(owner, type) and any(inner is holder for inner in gc.get_referents(owner))
        if of_class or (not isinstance(owner, _NO_HOLDERS) and getattr(owner, "__dict__", None) is holder):
            if is_ours(owner.__module__ if of_class else type(owner).__module__):
                return None
            for key in keys:
                _clear_attribute(owner, key)
            return f"the attribute {keys[0]} of a {owner.__name__ if of_class else type(owner).__name__}"
    what = _called(holder, owners)
    for key in keys if what is not None else ():
        del holder[key]
    return what


def _clear_container(holder: Any, wanted: set[int]) -> None:
    if isinstance(holder, set):
        holder.difference_update([value for value in holder if id(value) in wanted])
        return
    while holder and id(holder[-1]) in wanted:
        holder.pop()
    for at, value in enumerate(holder):
        if id(value) in wanted:
            holder[at] = None


def _attributes(holder: Any) -> list[str]:
    slots = [name for base in type(holder).__mro__ for name in vars(base) if type(vars(base)[name]) is _SLOT]
    return [*getattr(holder, "__dict__", ()), *slots]


def _clear_attribute(owner: Any, name: str) -> None:
    if isinstance(owner, type):
        setattr(owner, name, None)
    elif any(name in _names(base.__dict__.get("__init__")) for base in type(owner).__mro__):
        object.__setattr__(owner, name, None)
    else:
        object.__delattr__(owner, name)


def _names(fn: Any) -> Sequence[str]:
    return getattr(getattr(fn, "__code__", None), "co_names", ())


def _called(holder: Any, owners: list[Any]) -> str | None:
    """What a container is called, if a global is it. No other is known to be the user's: autograd has some as well."""
    spaces = [owner for owner in owners if isinstance(owner, dict) and "__name__" in owner and "__builtins__" in owner]
    names = (f"{key} of {space['__name__']}" for space in spaces for key in list(space) if space[key] is holder)
    name = next(names, None)
    return None if name is None else f"a {type(holder).__name__}, {name}"
