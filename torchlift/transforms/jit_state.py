"""What a compiled body did to the modules of its call, and how they are put back.

NOTE [When to look]. What is compiled changes the modules themselves. Which plain attributes it sets is the same in all
runs of a graph, so the calls that trace one are looked at, and the others cost nothing. Where Python runs between
graphs, or not every collection may change, all of them are.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, rng
from torchlift.changes import outlives
from torchlift.collecting import Collected
from torchlift.containers import changed_attributes, held_in, tensors_in
from torchlift.errors import ModifyCollectionError, PlainAttributeError, RandomnessError, TorchliftWarning, warn
from torchlift.filters import Filter, matches
from torchlift.nodes import SCALARS
from torchlift.variables import collection_of, own_tensors

_warned: set[tuple[str, str]] = set()


class _Before:
    """The modules of a call as they were."""

    def __init__(self, collected: Collected):
        self.nodes = collected.nodes
        self.fields = [dict(node.module.__dict__) for node in self.nodes]
        self.held = [
            (self.nodes[at], key, container)
            for at, key in collected.containers
            for container in held_in(self.fields[at].get(key))
        ]
        self.tensors = [(*place, _compat.version(place[-1]), _copy(*place)) for place in self._now()]

    def _now(self) -> list[tuple[nn.Module, str, str, Tensor]]:
        return [(node.module, *place) for node in self.nodes for place in own_tensors(node.module)]

    def created(self) -> list[tuple[nn.Module, str, str]]:
        known = {(owner, store, key) for owner, store, key, *_ in self.tensors}
        return [(owner, store, key) for owner, store, key, _ in self._now() if (owner, store, key) not in known]

    def changed(self) -> list[tuple[nn.Module, str, str]]:
        return [
            (owner, store, key)
            for owner, store, key, tensor, version, _ in self.tensors
            if owner.__dict__[store].get(key) is not tensor or _compat.version(tensor) != version
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for owner, store, key in self.created():
            del owner.__dict__[store][key]
        for owner, store, key, tensor, version, value in self.tensors:
            owner.__dict__[store][key] = tensor
            if value is not None and _compat.version(tensor) != version:
                tensor.copy_(value)
        for node, old in zip(self.nodes, self.fields, strict=True):
            fields = node.module.__dict__
            for key in [key for key in fields if key not in old]:
                del fields[key]
            fields.update({key: value for key, value in old.items() if fields.get(key, fields) is not value})
        for _, _, container in self.held:
            if container.added():
                container.restore()


def _copy(owner: nn.Module, store: str, key: str, tensor: Tensor) -> Tensor | None:
    return tensor.detach().clone() if store == "_buffers" else None


class Watch:
    """A call that may change ``variables`` and draw from ``rngs``; what it changed is undone if it raises."""

    def __init__(self, collected: Collected, label: str, variables: Filter, rngs: Filter, fullgraph: bool):
        self.collected, self.label, self.variables = collected, label, variables
        always = variables is not True or rngs is not True or not fullgraph
        self.before = _Before(collected) if always else None
        self.has_traced = False
        self.draws = None if matches(rngs, rng.DROPOUT) else rng.default_states()

    def __enter__(self) -> None:
        self.outer, _local.watch = _local.watch, self

    def __exit__(self, kind: Any, *error: Any) -> None:
        _local.watch = self.outer
        if kind is not None and self.before is not None:
            self.before.restore()

    def check(self) -> None:
        """Refuses what the body may not change."""
        if self.before is None:
            return
        try:
            self._check_collections(self.before)
            self._check_attributes(self.before)
            if self.draws is not None and rng.drew(self.draws):
                rng.write_states(self.draws)
                raise RandomnessError(f"{self.label}: drew from the random stream 'dropout'; add 'dropout' to rngs=")
        except BaseException:
            self.before.restore()
            raise

    def _check_collections(self, before: _Before) -> None:
        if self.variables is True:
            return
        changes = [*(("changed", *place) for place in before.changed()), *(("created", *p) for p in before.created())]
        for what, owner, store, key in changes:
            collection = collection_of(owner, store, key)
            if not matches(self.variables, collection):
                name = next(node.dotted(key) for node in before.nodes if node.module is owner)
                raise ModifyCollectionError(
                    f"{self.label}: {what} {name!r} of collection {collection!r}, which is read-only there; add "
                    f"{collection!r} to variables="
                )

    def _check_attributes(self, before: _Before) -> None:
        for node, old in zip(before.nodes, before.fields, strict=True):
            for key, value, with_tensor in changed_attributes(node.module, node.module.__dict__, old):
                name = node.dotted(key)
                where = f"{self.label}: assigned {name!r} in the body"
                if with_tensor:
                    raise PlainAttributeError(f"{where}, {outlives('attribute', key)}")
                # NOTE [Numbers]. It is kept, as the plain call keeps it: Dynamo sees it change.
                if type(value) in SCALARS and value != old.get(key, old) and (self.label, name) not in _warned:
                    _warned.add((self.label, name))
                    warn(
                        f"{where}: {old.get(key)!r} -> {value!r}, a constant for what is compiled, which is compiled "
                        "anew for each value that it reads; make it a tensor: torchlift.variable(self, 'state', "
                        f"{key!r}, init_fn)",
                        TorchliftWarning,
                    )
        for node, key, container in before.held:
            own = [tensor for _, _, tensor in own_tensors(node.module)]  # which torch's recurrent layers keep in a list
            if any(all(tensor is not known for known in own) for tensor in tensors_in(container.added())):
                kind = type(container.container).__name__
                raise PlainAttributeError(
                    f"{self.label}: put a tensor into {node.dotted(key)!r} in the body, {outlives(kind, key)}"
                )


class _Local(threading.local):
    watch: Watch | None = None


_local = _Local()


@torch.compiler.assume_constant_result
def traced() -> bool:
    """Called by Dynamo when it traces a body, before anything of it has run."""
    if _local.watch is not None:
        _local.watch.has_traced = True
        _local.watch.before = _local.watch.before or _Before(_local.watch.collected)
    return True
