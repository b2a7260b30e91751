"""Running a module on given variables, without changing it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from torchlift import _compat, misspelt
from torchlift._context import context
from torchlift.errors import ArgumentError, TransformTargetError, VariableNameError
from torchlift.filters import Filter, check, matches
from torchlift.pack import Packed
from torchlift.rng import seed_rngs
from torchlift.variables import Capture, sow_at


@_compat.outside_of_graphs
def apply(
    module: nn.Module,
    variables: Mapping[str, Mapping[str, Tensor]],
    *args: Any,
    method: str | Callable[..., Any] | None = None,
    mutable: Filter = False,
    rngs: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> Any:
    """Runs a module on given variables and changes nothing in it.

    ``torch.func.functional_call`` is its base case; it composes with every ``torch.func`` transform.

    Args:
        module: the module.
        variables: ``{collection: {dotted_name: tensor}}``. Those that are missing come from the module.
        *args: for the method.
        method: a method name, or a function ``(module, *args)``; the module's ``forward`` by default.
        mutable: the collections that may change, or be sown; their new values are returned.
        rngs: a seed for each random stream, as for ``seed_rngs``.
        **kwargs: for the method.

    Returns:
        What the method returns; with ``mutable``, a pair of that and ``{collection: {dotted_name: tensor}}`` with all
        variables of the mutable collections, with their graph, and what was sown in them (tuples).

    Raises:
        ArgumentError: the variables are no tensors in collections, or the rngs no seeds of streams.
        VariableNameError: a name is given that the module does not have.
        ModifyCollectionError: a variable changed whose collection is not mutable.

    Example:
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> out, updated = torchlift.apply(norm, {}, torch.ones(4, 2), mutable="batch_stats")
        >>> updated["batch_stats"]["running_mean"], norm.running_mean
        (tensor([0.1000, 0.1000]), tensor([0., 0.]))
    """
    label = f"apply({type(module).__name__})"
    if not isinstance(module, nn.Module):
        raise TransformTargetError(f"{label}: got {module!r}, expected an nn.Module: apply(module, variables, ...)")
    if not _is_mapping(variables) or not all(map(_is_mapping, variables.values())):
        raise ArgumentError(
            f"{label}: got variables of type {type(variables).__name__}, expected {{collection: {{name: tensor}}}}; "
            "parameters alone are {'params': {name: tensor}}"
        )
    if rngs is not None and not _is_mapping(rngs):
        raise ArgumentError(f"{label}: got rngs of type {type(rngs).__name__}, expected {{stream: seed}}")
    if mutable is not False:
        check(mutable, f"{label}: mutable")
    with seed_rngs(**rngs) if rngs else nullcontext():
        packed = Packed(_method(module, method), module, args, kwargs, label)
        packed.allow(lambda c: matches(mutable, c), lambda c: _how_to_write(c, mutable))
        packed.isolated, packed.fills = True, not _compat.is_compiling()
        if mutable is not False:
            packed.context = {**packed.context, "captures": (*context.captures, Capture(mutable))}
        tensors = _overridden(packed, variables)
        try:
            out, update = packed.pure(tensors, packed.leaves)
        except Exception as error:
            if not _compat.is_compiling():  # Dynamo has no notes
                _note_shapes(error, packed, tensors)
            raise
    packed.hand_over(packed.filled)
    for site, value in zip(update.meta.sites, update.sown, strict=True):
        sow_at(packed.module_at(site.root, site.path), site, value)  # for captures around this call
    if mutable is False:
        return out
    others = []
    for change, value in zip(update.meta.changes, update.changed, strict=True):
        if change.how == "copy" and packed.entries[change.entry].root == 0:
            tensors[change.entry] = value
        else:
            others.append((change, value))
    updated: dict[str, dict[str, Any]] = {}
    writable = packed.writable
    for collection, places in _names(packed, "named", first=True).items():
        found = {name: tensors[at] for name, at in places.items() if writable[at]}
        if found:
            updated[collection] = found
    for change, value in others:
        node = packed.nodes[change.node]
        name = packed.entries[change.entry].name if change.how == "copy" else node.dotted(change.key)
        updated.setdefault(change.collection, {})[name] = value
    for site, value in zip(update.meta.sites, update.sown, strict=True):
        if matches(mutable, site.collection):
            named = updated.setdefault(site.collection, {})
            named[site.dotted_name] = (*named.get(site.dotted_name, ()), value)
    if not _compat.is_compiling() and (given := misspelt.named({"mutable": mutable})):
        known = {entry.collection for entry in packed.entries}
        misspelt.warn_misspelt(module, label, given, lambda: known.union(updated))
    return out, updated


def _how_to_write(collection: str, mutable: Filter) -> str:
    if mutable is False:
        return f"pass mutable=[{collection!r}] and take it from the result"
    return f"mutable={mutable!r} does not allow it: name {collection!r} there and take it from the result"


def _is_mapping(value: Any) -> bool:
    return type(value) is dict or isinstance(value, Mapping)


def _call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _method(module: nn.Module, method: Any) -> Callable[..., Any]:
    if method is None:
        return _call
    found = getattr(type(module), method, None) if isinstance(method, str) else method
    if not callable(found):
        raise VariableNameError(f"apply({type(module).__name__}): there is no method {method!r}")
    if isinstance(method, str):
        return found
    return method.__func__ if isinstance(method, types.MethodType) else method


def _overridden(packed: Packed, variables: Mapping[str, Mapping[str, Tensor]]) -> list[Tensor]:
    """The tensor of each entry, those that are given instead of the module's own."""
    tensors = list(packed.tensors)
    if not variables:
        return tensors
    places = _names(packed, "places", first=False)
    for collection, named in variables.items():
        known = places.get(collection, {})
        for name, tensor in named.items():
            at = known.get(name)
            if at is None:
                at = known.get(_first_name(packed, name))
            if at is None:
                raise VariableNameError(
                    f"{packed.label}: got a variable {name!r} of collection {collection!r}, expected one of "
                    f"{sorted(known) or sorted(places)}"
                )
            if not isinstance(tensor, Tensor):
                raise ArgumentError(
                    f"{packed.label}: got {type(tensor).__name__} for the variable {name!r} of collection "
                    f"{collection!r}, expected a tensor"
                )
            tensors[at] = tensor
    return tensors


def _names(packed: Packed, what: str, first: bool) -> dict[str, dict[str, int]]:
    """The number of each variable of the module by collection and name: the ``first`` name, or each that it has."""
    found: Any = None if packed.memory is None else packed.memory.keys.get(what)
    if found is None:
        found = {}
        for at, entry in enumerate(packed.entries):
            for place in (entry.places[:1] if first else entry.places) if entry.root == 0 else ():
                found.setdefault(place.collection, {})[place.name] = at
        if packed.memory is not None:
            packed.memory.keys[what] = found
    return found


def _note_shapes(error: Exception, packed: Packed, tensors: Sequence[Tensor]) -> None:
    """Adds to an error of a body which of the given variables have another shape than the module's.

    That alone is none: a module may serve for weights of any width, or for a batch of them.
    """
    others = [
        f"{entry.name!r} of collection {entry.collection!r} is {tuple(tensor.shape)}, expected {tuple(own.shape)}"
        for entry, tensor, own in zip(packed.entries, tensors, packed.tensors, strict=True)
        if tensor.shape != own.shape
    ]
    if others:
        error.add_note(f"{packed.label}: got variables of other shapes than those of the module: {', '.join(others)}")


def _first_name(packed: Packed, name: str) -> str:
    """The name that a variable has under the first name of its module, which may be a part in several places."""
    path, _, key = name.rpartition(".")
    owner = dict(packed.roots[0].named_modules(remove_duplicate=False)).get(path)
    return next((node.dotted(key) for node in packed.nodes if node.module is owner), name)
