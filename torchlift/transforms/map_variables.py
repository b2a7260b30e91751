"""Lifted map_variables: a module that sees functions of its variables in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng, stacking
from torchlift.errors import ModifyCollectionError, UnsupportedError, VariableNameError
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.variables import PARAMS, assign_collection, own_tensors, variables as variables_of

Tree = Mapping[str, Mapping[str, Tensor]]  # {collection: {dotted name: tensor}}


def _identity(tree: Tree) -> Tree:
    return tree


@dataclass(frozen=True, kw_only=True)
class _Map_variables(Transform):
    mapped_collections: Filter = True
    trans_in_fn: Callable[[Tree], Tree] = field(default=_identity, repr=False)
    trans_out_fn: Callable[[Tree], Tree] = field(default=_identity, repr=False)
    init: bool = False
    mutable: bool = False
    rngs: Filter = True
    variables: Filter = True

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        for name in ("mapped_collections", "rngs", "variables"):
            check(getattr(self, name), f"{label}: {name}")
        if self.init and inside is None:
            raise UnsupportedError(
                f"{label}: init=True with a function, whose module was constructed before; lift the class, or store "
                "trans_out_fn of the variables in the module"
            )

        def mapped(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # NOTE [Mapping]. The modules here are bound for this call, so they may be changed: the mapped variables
            # take the place of the stored ones while the body runs. What reads them back sees the stored ones again.
            others = [leaf for leaf in _tree.flatten((args, kwargs))[0] if isinstance(leaf, nn.Module)]
            views = [_View(self, root, label) for root in _outermost(module, others)]
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
        out, update = packed.pure(packed.tensors, packed.leaves)
        packed.publish(update)
        return out

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        return _members(self, base, self.label(base)) if self.init else {}


class _View:
    """A bound module that holds what ``trans_in_fn`` makes of its mapped variables, until they are put back."""

    def __init__(self, config: _Map_variables, root: nn.Module, label: str):
        self.config, self.root, self.label = config, root, label
        self.stored = variables_of(root, config.mapped_collections)
        seen = _tensors(config.trans_in_fn(_copied(self.stored)), f"{label}: trans_in_fn")
        # Cloned where the body may write: trans_in_fn may hand out what it was given, or a view of it.
        self.seen = {c: named if c == PARAMS else {n: t.clone() for n, t in named.items()} for c, named in seen.items()}
        self.versions = {(c, n): _compat.version(t) for c, named in self.seen.items() for n, t in named.items()}
        self.places = _places(root, self.stored)
        _exchange(root, self.places, self.stored, self.seen, f"{label}: trans_in_fn")

    def put_back(self) -> None:
        """Takes the mapped variables out again; if the body changed them, through ``trans_out_fn``."""
        now = variables_of(self.root, self.config.mapped_collections)
        changed = {
            (collection, name)
            for collection, named in now.items()
            for name, tensor in named.items()
            if self._was_changed(collection, name, tensor)
        }
        if changed and not self.config.mutable:
            collection, name = min(changed)
            raise ModifyCollectionError(
                f"{self.label}: changed {name!r} of collection {collection!r}, which is mapped and read-only; pass "
                "mutable=True, and as trans_out_fn the way back"
            )
        new = _tensors(self.config.trans_out_fn(now), f"{self.label}: trans_out_fn") if changed else {}
        rebound = any(self.seen.get(c, {}).get(n) is not now[c][n] for c, n in changed)
        _exchange(self.root, _places(self.root, now), now, self.stored, self.label, self.places)
        for collection, named in new.items():
            for name, tensor in named.items():
                untouched = name in now.get(collection, {}) and (collection, name) not in changed
                if not untouched:
                    self._store(collection, name, tensor, rebound)

    def _was_changed(self, collection: str, name: str, tensor: Tensor) -> bool:
        seen = self.seen.get(collection, {}).get(name)
        if seen is not tensor:
            return True
        if collection == PARAMS:
            return False
        # NOTE [Batch norm] in pack: not every write counts; what Dynamo traces has no count at all.
        unknown = _compat.is_compiling() or collection == "batch_stats"
        return self.config.mutable and unknown or _compat.version(tensor) != self.versions[collection, name]

    def _store(self, collection: str, name: str, tensor: Tensor, rebound: bool) -> None:
        old = self.stored.get(collection, {}).get(name)
        if old is None or rebound or collection == PARAMS:
            _set(self.root, collection, name, tensor, f"{self.label}: trans_out_fn")
        else:
            old.copy_(tensor)
