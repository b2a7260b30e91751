"""Lifted classes with stacked variables: how they are constructed, and what they do with each module by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchlift import _tree, metadata, rng
from torchlift.errors import ArgumentError, AxisError, StateDictError
from torchlift.references import become
from torchlift.stacking import (
    PENDING,
    Stacking,
    check_classes,
    check_initialised,
    copied,
    fill,
    is_pending,
    listed,
    located,
    map_indices,
    module_at,
    sizes_of,
)
from torchlift.variables import UninitializedTensor, own_tensors, uninitialised_like


def members(base: type[nn.Module], how: Stacking) -> dict[str, Any]:
    """What a lifted class with stacked variables has of its own: construction, and everything that is per index."""

    def __init__(self: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        if how.sizes is None:
            _postpone(self, base, args, kwargs, how)
        else:
            fill(self, _built(base, args, kwargs, how), how.sizes, how)

    def from_modules(cls: type[nn.Module], modules: Iterable[nn.Module]) -> nn.Module:
        """One instance from existing modules, whose tensors are copied."""
        given = listed(how.label, modules)
        check_classes(how.label, given, base)
        sizes = how.sizes if how.sizes is not None else (len(given),)
        if math.prod(sizes) != len(given) or not given:
            raise AxisError(f"{how.label}: got {len(given)} modules, expected {math.prod(sizes) or 'at least one'}")
        stack = cls.__new__(cls)
        fill(stack, iter([copied(given[0]), *given[1:]]), sizes, how)
        return stack

    def to_modules(self: nn.Module) -> list[nn.Module]:
        """The modules one by one, each with tensors of its own."""
        count = math.prod(sizes_of(self, how))
        return [module_at(self, base, index, how, share=False) for index in range(count)]

    def apply(self: nn.Module, fn: Callable[[nn.Module], Any]) -> nn.Module:
        """``nn.Module.apply`` of each module by itself: an initialiser sees the shapes of one layer."""
        map_indices(self, base, how, lambda module: module.apply(fn))
        return self

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_pending(self):
            kwargs["keep_vars"] = True  # what is uninitialised cannot be detached
        return super(cls_of(self), self).state_dict(*args, **kwargs)

    def _load_from_state_dict(self: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        if is_pending(self):
            size = _told_size(self, state_dict, prefix, how)
            if size is not None:
                materialize(self, size)
        super(cls_of(self), self)._load_from_state_dict(state_dict, prefix, *rest)

    def cls_of(self: nn.Module) -> Any:
        return next(c for c in type(self).__mro__ if c.__dict__.get("_torchlift_base") is base)

    found: dict[str, Any] = {
        "__init__": __init__,
        "from_modules": classmethod(from_modules),
        "to_modules": to_modules,
        "apply": apply,
        "state_dict": state_dict,
        "_load_from_state_dict": _load_from_state_dict,
        "_torchlift_base": base,
        "_torchlift_stacking": how,
    }
    if hasattr(base, "reset_parameters"):

        def reset_parameters(self: nn.Module) -> None:
            map_indices(self, base, how, lambda module: module.reset_parameters())

        found["reset_parameters"] = reset_parameters
    __init__.__wrapped__ = base.__init__  # type: ignore[attr-defined]  # for help() and inspect.signature
    return found


def _built(base: type[nn.Module], args: Any, kwargs: Any, how: Stacking) -> Iterator[nn.Module]:
    """Instances of ``base``, one index after the other; the draws of all are the same unless ``params`` is split."""
    split = how.groups.splits(rng.PARAMS)
    start = rng.default_states()
    while True:
        if not split:
            rng.write_states(start)
        yield _build(base, args, kwargs, how)


def _build(base: type[nn.Module], args: Any, kwargs: Any, how: Stacking) -> nn.Module:
    """One instance of ``base``, which has no module of the caller's: all others would have the very same."""
    module = base(*args, **kwargs)
    given = dict(zip(_tree.argument_names(args, kwargs), _tree.flatten((args, kwargs))[0], strict=True))
    theirs = {id(m): name for name, leaf in given.items() if isinstance(leaf, nn.Module) for m in leaf.modules()}
    for path, inner in module.named_modules() if theirs else ():
        stacked = any(how.axis(inner, store, key) is not None for store, key, _ in own_tensors(inner))
        if stacked and id(inner) in theirs:
            raise ArgumentError(
                f"{how.label}: the module that {theirs[id(inner)]} brings would be {path!r} of each module that is "
                f"stacked, expected each to have its own: construct it in __init__, or stack what you construct with "
                "copies of it: from_modules([...])"
            )
    return module


# Size not known yet --------------------------------------------------------------------------------------------------


def _postpone(stack: nn.Module, base: type[nn.Module], args: Any, kwargs: Any, how: Stacking) -> None:
    """NOTE [Lazy size]. As torch's lazy modules: the parameters exist, uninitialised, so that an optimizer may hold
    them; the first call or ``load_state_dict`` tells the size, and then each index is built."""
    before = rng.default_states()
    one = _build(base, args, kwargs, how)
    rng.write_states(before)  # it is there for its names only: the stack's own construction draws
    become(stack, one)
    how.change_metadata(metadata.added, one)
    shapes, lazy = {}, {}
    for name, owner, store, key, tensor in list(located(one)):
        check_initialised(tensor, f"{how.label}: {name!r}")
        shapes[name] = tuple(tensor.shape)
        if tensor not in lazy:
            lazy[tensor] = uninitialised_like(tensor)
        owner.__dict__[store][key] = lazy[tensor]
    stack.__dict__[PENDING] = (base, args, kwargs, shapes)


def _told_size(stack: nn.Module, state_dict: Mapping[str, Any], prefix: str, how: Stacking) -> int | None:
    """The size of a stack that waits for it, as all entries of a state dict tell it; None if none does."""
    shapes, sizes = stack.__dict__[PENDING][-1], {}
    for name, owner, store, key, _ in located(stack):
        entry, axis = state_dict.get(prefix + name), how.axis(owner, store, key)
        if axis is None or entry is None or isinstance(entry, UninitializedTensor):
            continue
        one, got = shapes[name], tuple(entry.shape)
        at = axis % (len(one) + 1)
        if (*got[:at], *got[at + 1 :]) != one or len(got) == len(one):
            raise StateDictError(
                f"{how.label}: {prefix + name!r} of the state dict is {got}, expected {one} with an axis of modules at "
                f"{at}; torchlift.stack_state_dict stacks what has an entry for each of them"
            )
        sizes[prefix + name] = got[at]
    if len(set(sizes.values())) > 1:
        raise StateDictError(f"{how.label}: the state dict has different numbers of modules, expected one: {sizes}")
    return next(iter(sizes.values()), None)


def materialize(stack: nn.Module, size: int) -> None:
    """Builds a stack that waited for its size, into the parameters that it already has."""
    base, args, kwargs, _ = stack.__dict__[PENDING]
    how: Stacking = type(stack)._torchlift_stacking  # type: ignore[attr-defined]
    new = type(stack).__new__(type(stack))
    fill(new, _built(base, args, kwargs, how), (size,), how)
    built = {name: tensor for name, *_, tensor in located(new)}
    for name, _, _, _, lazy in list(located(stack)):
        source = built[name]
        if isinstance(lazy, UninitializedTensor):
            lazy.materialize(source.shape, device=lazy.device, dtype=lazy.dtype)
            with torch.no_grad():
                lazy.copy_(source)
    del stack.__dict__[PENDING]
