"""Lifted map_variables: a module whose body sees functions of its variables in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng, stacking
from torchlift import variables as data
from torchlift.errors import ModifyCollectionError, UnsupportedError, VariableNameError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.transforms.options import check_callable, check_flag

Variables = dict[str, dict[str, Tensor]]  # {collection: {dotted name: tensor}}
Function = Callable[[Variables], Mapping[str, Mapping[str, Tensor]]]


def _identity(variables: Variables) -> Variables:
    return variables


@dataclass(frozen=True, kw_only=True)
class _Map_variables(Transform):
    mapped_collections: Filter = True
    trans_in_fn: Function = field(default=_identity, repr=False)
    trans_out_fn: Function = field(default=_identity, repr=False)
    init: bool = False
    mutable: bool = False
    rngs: Filter = True
    variables: Filter = True

    def __post_init__(self) -> None:
        check_flag(self.init, "map_variables: init")
        check_flag(self.mutable, "map_variables: mutable")
        for name in ("trans_in_fn", "trans_out_fn"):
            check_callable(getattr(self, name), f"map_variables: {name}", "a function of {collection: {name: tensor}}")

    @_compat.outside_of_graphs
    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        if self.init and inside is None:
            raise UnsupportedError(
                f"{label}: init=True with a function, whose module was constructed before; lift the module's class, or "
                "put trans_out_fn of its variables into the module"
            )

        def mapped(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            # NOTE [Mapping]. The modules here are bound for this run alone, so they may be changed: while the body
            # runs, the mapped variables take the place of the stored ones. Who reads them back finds the stored ones.
            views = [_View(self, root, label) for root in _roots(module, args, kwargs)]
            out = fn(module, *args, **kwargs)
            for view in views:
                view.put_back()
            return out

        packed = Packed(mapped, module, args, kwargs, label, inside)
        packed.allow(
            lambda c: matches(self.variables, c) or (self.mutable and matches(self.mapped_collections, c)),
            lambda c: f"add {c!r} to variables=",
        )
        packed.refuse(
            [stream for stream in (rng.DROPOUT, *rng.positions()) if not matches(self.rngs, stream)],
            lambda stream: f"add {stream!r} to rngs=",
        )
        packed.fills = not _compat.is_compiling()
        out, update = packed.pure(packed.tensors, packed.leaves)
        packed.publish(update)
        packed.hand_over(packed.filled)
        return out

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        return _members(self, base, self.label(base)) if self.init else {}

    def seen(self, stored: Variables, label: str) -> Variables:
        return _checked(self.trans_in_fn(_copied(stored)), f"{label}: trans_in_fn")

    def stored(self, seen: Variables, label: str) -> Variables:
        return _checked(self.trans_out_fn(_copied(seen)), f"{label}: trans_out_fn")


class _View:
    """A bound module that holds what ``trans_in_fn`` makes of its variables, until they are put back."""

    def __init__(self, config: _Map_variables, root: nn.Module, label: str):
        self.config, self.root, self.label = config, root, label
        self.stored = data.variables(root, config.mapped_collections)
        self.places = _places(root)
        # Cloned where the body may write: trans_in_fn may hand out what it was given, or a view of it.
        self.seen = {
            collection: named if collection == data.PARAMS else {name: x.clone() for name, x in named.items()}
            for collection, named in config.seen(self.stored, label).items()
        }
        self.versions = {path: _compat.version(x) for path, x in _flat(self.seen)}
        _replace(root, self.stored, self.seen, f"{label}: trans_in_fn")

    def put_back(self) -> None:
        """Takes the mapped variables out again; if the body changed them, by way of ``trans_out_fn``."""
        now = data.variables(self.root, self.config.mapped_collections)
        before = dict(_flat(self.seen))
        changed = {path: x for path, x in _flat(now) if self._was_changed(path, x, before.get(path))}
        if changed and not self.config.mutable:
            collection, name = min(changed)
            raise ModifyCollectionError(
                f"{self.label}: changed {name!r} of collection {collection!r}, which is mapped and read-only; pass "
                "mutable=True, and as trans_out_fn the way back"
            )
        new = self.config.stored(now, self.label) if changed else {}
        _replace(self.root, now, {}, self.label)
        old = dict(_flat(self.stored))
        for x in old.values():
            for owner, store, key in self.places[x]:
                owner.__dict__[store][key] = x
        _replace_in_lists(self.root, {x: old[path] for path, x in before.items() if path in old})
        written = {path: x is before.get(path) for path, x in changed.items()}  # rather than rebound
        for path, x in _flat(new):
            if path in before and path not in changed:
                continue  # so that a way there and back leaves no rounding error
            if written.get(path, all(written.values())) and path in old and path[0] != data.PARAMS:
                old[path].copy_(x)
            else:
                _put(self.root, *path, x, f"{self.label}: trans_out_fn")

    def _was_changed(self, path: tuple[str, str], now: Tensor, before: Tensor | None) -> bool:
        if now is not before:
            return True
        if path[0] == data.PARAMS:
            return False
        # As in pack: not every write of batch_norm counts, and Dynamo knows no counts at all.
        unknown = _compat.is_compiling() or (path[0] == data.BATCH_STATS and self.root.training)
        return (unknown and self.config.mutable) or _compat.version(now) != self.versions[path]


def _roots(module: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """The modules of a call, less those that lie in another one."""
    found = [module]
    for leaf in _tree.flatten((args, kwargs))[0]:
        if isinstance(leaf, nn.Module) and all(leaf is not known for root in found for known in root.modules()):
            found.append(leaf)
    return found


# Trees of variables --------------------------------------------------------------------------------------------------


def _copied(tree: Variables) -> Variables:
    return {collection: dict(named) for collection, named in tree.items()}


def _flat(tree: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[tuple[str, str], Tensor]]:
    return [((collection, name), x) for collection, named in tree.items() for name, x in named.items()]


def _checked(tree: Any, where: str) -> Variables:
    fits = isinstance(tree, Mapping) and all(isinstance(named, Mapping) for named in tree.values())
    if not fits or not all(isinstance(x, Tensor) for _, x in _flat(tree)):
        raise VariableNameError(
            f"{where} returned {_compat.pytree.tree_map(lambda x: type(x).__name__, tree)!r}, expected "
            "{collection: {name: tensor}}, as it was given"
        )
    return _copied(tree)


def _places(root: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str, str]]]:
    """Where each variable of a module lies: the owners, stores and keys of all its names."""
    places: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}
    for owner in root.modules():
        for store, key, x in data.own_tensors(owner):
            places.setdefault(x, []).append((owner, store, key))
    return places


def _replace(root: nn.Module, old: Variables, new: Variables, where: str) -> None:
    """Puts ``new`` variables of a module in the place of ``old`` ones, under all names that those have."""
    places, other = _places(root), dict(_flat(new))
    for path, x in _flat(old):
        for owner, store, key in places[x]:
            if path in other:
                owner.__dict__[store][key] = other[path]
            else:
                del owner.__dict__[store][key]
    known = dict(_flat(old))
    for path, x in other.items():
        if path not in known:
            _put(root, *path, x, where)
    _replace_in_lists(root, {x: other[path] for path, x in known.items() if path in other})


def _replace_in_lists(root: nn.Module, new: dict[Tensor, Tensor]) -> None:
    """Plain lists of a module's own tensors (``nn.LSTM`` keeps one) hold the new ones too."""
    for owner in root.modules():
        for key, value in list(owner.__dict__.items()):
            if type(value) is list and any(isinstance(x, Tensor) for x in value):
                owner.__dict__[key][:] = [new.get(x, x) if isinstance(x, Tensor) else x for x in value]


def _put(root: nn.Module, collection: str, name: str, x: Tensor, where: str) -> None:
    *path, key = name.split(".")
    owner: Any = root
    for part in path:
        owner = owner.__dict__["_modules"].get(part) if owner is not None else None
    if owner is None:
        known = [path for path, _ in root.named_modules() if path]
        raise VariableNameError(
            f"{where} returned {name!r} in {collection!r}, expected a name in one of the modules {known}"
        )
    if collection == data.PARAMS:
        owner.__dict__["_parameters"][key] = x
    else:
        owner.__dict__["_buffers"][key] = x
        if data.collection_of(owner, "_buffers", key) != collection:
            data.assign_collection(owner, key, collection)


# Classes with init=True ----------------------------------------------------------------------------------------------


def _members(config: _Map_variables, base: type[nn.Module], label: str) -> dict[str, Any]:
    """What a lifted class has of its own whose constructor makes other variables than it stores."""

    def to_stored(module: nn.Module) -> nn.Module:
        if stacking.is_pending(module):
            raise UnsupportedError(
                f"{label}: init=True needs variables to transform, and {base.__name__} makes them in "
                "its first call; give its vmap or scan a size"
            )
        made = data.variables(module, config.mapped_collections)
        with torch.no_grad():
            new = config.stored(made, label)
        trains = any(x.requires_grad for _, x in _flat(made))
        before = dict(_flat(made))
        owned = {
            collection: {
                name: x if before.get((collection, name)) is x else _owned(collection, x, trains)
                for name, x in named.items()
            }
            for collection, named in new.items()
        }
        _replace(module, made, owned, f"{label}: trans_out_fn")
        return module

    def as_made(module: nn.Module) -> Any:
        """A copy of a module as its own class knows it."""
        plain = copy.deepcopy(module)
        plain.__class__ = base
        stored = data.variables(plain, config.mapped_collections)
        with torch.no_grad():
            seen = config.seen(stored, label)
        owned = {c: {n: _owned(c, x, True) for n, x in named.items()} for c, named in seen.items()}
        _replace(plain, stored, owned, f"{label}: trans_in_fn")
        return plain

    def __init__(self: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        # An instance of the base: its constructor calls its methods, reset_parameters say, on variables of its own.
        object.__setattr__(self, "__dict__", to_stored(base(*args, **kwargs)).__dict__)

    found: dict[str, Any] = {"__init__": __init__}
    __init__.__wrapped__ = base.__init__  # type: ignore[attr-defined]  # for help() and inspect.signature

    if hasattr(base, "reset_parameters"):

        def reset_parameters(self: nn.Module) -> None:
            plain = as_made(self)
            plain.reset_parameters()
            with torch.no_grad():
                new = dict(_flat(data.variables(to_stored(plain), config.mapped_collections)))
                for path, x in _flat(data.variables(self, config.mapped_collections)):
                    x.copy_(new[path])

        found["reset_parameters"] = reset_parameters

    if hasattr(base, "from_modules"):

        def from_modules(cls: type[nn.Module], modules: Iterable[nn.Module]) -> nn.Module:
            """One instance from existing modules, whose tensors are copied."""
            return to_stored(base.from_modules.__func__(cls, modules))

        def to_modules(self: nn.Module) -> list[nn.Module]:
            """The modules one by one, each with tensors of its own, as trans_in_fn shows them."""
            return as_made(self).to_modules()

        found |= {"from_modules": classmethod(from_modules), "to_modules": to_modules}
    return found


def _owned(collection: str, x: Tensor, trains: bool) -> Tensor:
    """A tensor that a module may own: no view of another one."""
    x = x.detach().clone()
    return nn.Parameter(x, trains and (x.is_floating_point() or x.is_complex())) if collection == data.PARAMS else x


def map_variables(
    target: Target = None,
    mapped_collections: Filter = True,
    trans_in_fn: Function = _identity,
    trans_out_fn: Function = _identity,
    init: bool = False,
    mutable: bool = False,
    rngs: Filter = True,
    variables: Filter = True,
    methods: Any = None,
) -> Any:
    """Shows a module functions of its variables in their place: masked, tied, quantised or factored weights.

    The lifted counterpart of ``flax.linen.map_variables``. The stored variables are the parameters that an optimizer
    sees; the body sees what ``trans_in_fn`` makes of them, and gradients go through it.

    Args:
        target: a module class, a ``functools.partial`` of one, a function ``(module, *args)``, or nothing, for use as
            a decorator.
        mapped_collections: the collections that are mapped.
        trans_in_fn: from the stored variables, ``{collection: {dotted_name: tensor}}``, to those that the body sees,
            in the same form. Names may differ.
        trans_out_fn: the way back, for ``init`` and ``mutable``.
        init: the constructor makes variables as the body sees them; a lifted class stores ``trans_out_fn`` of them.
        mutable: the body may change mapped variables; ``trans_out_fn`` of them is stored.
        rngs: the random streams that the body may draw from.
        variables: the other collections that it may change.
        methods: the methods to lift, for a class: a list, or a dict of arguments for each.

    Returns:
        A subclass of ``target``, or a function of the same signature. Where modules are among its arguments, the
        variables of each are mapped by themselves.

    Raises:
        ModifyCollectionError: the body changed a mapped collection without ``mutable``, or another one outside of
            ``variables``.
        UnsupportedError: ``init`` with a function, or with variables that do not exist yet.
        VariableNameError: a function returned something else than ``{collection: {name: tensor}}``, or a name in a
            module that there is not.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.

    Example:
        >>> def causal(tree):
        ...     return {"params": {name: weight.tril() for name, weight in tree["params"].items()}}
        >>> layer = torchlift.map_variables(torch.nn.Linear, "params", causal)(3, 3, bias=False)
        >>> layer(torch.eye(3)).count_nonzero(), layer.weight.count_nonzero()
        (tensor(6), tensor(9))
    """
    check(mapped_collections, "map_variables: mapped_collections")
    check(rngs, "map_variables: rngs")
    check(variables, "map_variables: variables")
    arguments = {
        "mapped_collections": mapped_collections, "trans_in_fn": trans_in_fn, "trans_out_fn": trans_out_fn,
        "init": init, "mutable": mutable, "rngs": rngs, "variables": variables,
    }  # fmt: skip
    return lift(_Map_variables, target, arguments, methods)
