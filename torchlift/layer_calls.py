"""A call of layers in order, one by one: the definition of what :func:`torchlift.scan_layers` does."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from torchlift import _compat, _tree, fingerprint
from torchlift.enrolling import shared_buffers
from torchlift.nodes import Forest, ground
from torchlift.pack import Packed
from torchlift.transforms.profiling import names_of
from torchlift.transforms.remat import remat


def call_layer(layer: nn.Module, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    return layer(x, *args, **kwargs)


def carried_by(out: Any, spec: _tree.Spec) -> Any:
    """What a layer that returned ``out`` carries on: all of it, if it is built as what it was given."""
    return out[0] if isinstance(out, tuple) and out and _tree.flatten(out)[1] != spec else out


_filling: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, str]] = weakref.WeakKeyDictionary()


class LayersCall:
    """One call of the layers."""

    forest: Forest | None = None

    def __init__(self, layers: Any, x: Any, args: Any, kwargs: Any):  # layers: a ScanLayers, which stands above
        self.layers, self.x, self.args, self.kwargs = layers, x, args, kwargs
        first = Packed(call_layer, layers[0], (x, *args), kwargs, layers.label)
        first.allow(lambda collection: True, str)
        first.one_of_many = True
        self.carry, self.carry_spec = _tree.flatten(x)
        # Not by way of this object, which has what it was given: that would live until the next search for garbage.
        first.handed_on = functools.partial(carried_by, spec=self.carry_spec)
        self.packed = self._beside(first, list(layers))
        self.remat = layers.options()["remat"]

    def _beside(self, first: Packed, layers: list[nn.Module]) -> list[Packed]:
        """The calls of all layers; ``forest`` is that of their trees, if none has changed since the call before."""
        place = None if first.memory is None else ground(self.layers)
        known = None if place is None else place.recall(layers)
        if known is not None:
            self.forest, trees = known
            found = zip(self.forest.memories[1:], self.forest.nodes[1:], trees[1:])
            return [first, *map(first.beside, layers[1:], found)]
        packed = [first, *map(first.beside, layers[1:])]
        if place is not None:
            place.plant([one.memory for one in packed], [one.nodes for one in packed])
        return packed

    def why_plain(self) -> tuple[str | None, bool]:
        """Why the layers must be called one by one in Python (None: they need not), and whether to warn of it."""
        if _compat.is_compiling() and self.packed[0].nested:
            return "inside another transform inside torch.compile", False
        if _compat.is_compiling() and self.layers.compile_options is False:
            return "compile=False", False
        if not _compat.is_compiling() and self.has_hooks:  # Dynamo is slow at it: there, _register looks for them
            return "a layer has hooks", False
        if not _compat.is_compiling() and len(_filling) and (told := _filling.get(self.layers, {}).get(self.way())):
            return told, True
        if (_compat.is_tracing() or self.layers.compile_options is False) and self.shared:
            return "layers share a buffer", False
        if self.forest is None or not self.forest.in_step:
            sizes = [len(packed.nodes) for packed in self.packed]
            if len(set(sizes)) > 1:
                at = next(at for at, size in enumerate(sizes) if size != sizes[0])
                told = f"layer {at} has other submodules than layer 0, {sizes[at]} modules, expected {sizes[0]}"
                return f"{told}; change all layers alike, or put those that differ into a stack of their own", True
            if len({tuple(node.module.training for node in packed.nodes) for packed in self.packed}) > 1:
                return "some layers are in training mode and some are not; put these into a stack of their own", True
            if self.forest is not None:
                self.forest.in_step = True
        return fingerprint.opaque(self.packed[0].leaves), True

    def names(self, index: int) -> tuple[str, ...]:
        """What the roots of the call of a layer are called in traces."""
        return names_of(self.packed[index].roots)

    def learn(self, told: str) -> None:
        """Remembers that layers that are called this way put something into containers, and what was said of it."""
        _filling.setdefault(self.layers, {})[self.way()] = told

    def way(self) -> Hashable:
        """How the layers are called: a layer may fill what it is given in training alone, or where it is given it."""
        first = self.packed[0]
        return first.nodes[0].module.training, first.fillable is not None

    @property
    def has_hooks(self) -> bool:
        # Layers that are remembered have no hooks of their own; that of all modules the first one is asked for.
        asked = self.packed[:1] if self.forest is not None else self.packed
        return any(packed.has_hooks(skip_root=False) for packed in asked)

    @property
    def gathers(self) -> bool:
        """Whether layers that are run again have hooks of FSDP, which gather the parameters.

        Dynamo passes over those hooks, and what remat then binds are the shards.
        """
        modules = [node.module for packed in self.packed for node in packed.nodes] if self.remat is not None else []
        return any(base.__name__ == "FSDPModule" for module in modules for base in type(module).__mro__)

    @property
    def shared(self) -> frozenset[int]:
        return shared_buffers(self.packed)

    def plain(self) -> Any:
        """The definition."""
        return self.undone_if_raised(self._in_order)

    def undone_if_raised(self, run: Callable[[], Any]) -> Any:
        """What ``run`` returns; when a layer raises, what those before it changed is put back."""
        if _compat.is_compiling() or self.packed[0].nested:
            return run()
        before = [(packed, packed.snapshot()) for packed in self.packed]
        try:
            return run()
        except BaseException:
            for packed, values in before:
                packed.put_back(values)
            raise

    def _in_order(self) -> Any:
        out, x = None, self.x
        for packed in self.packed:
            out, x = self.call_one(packed, x)
        return out

    def call_one(self, packed: Packed, x: Any) -> tuple[Any, Any]:
        """What a layer returns, and what it carries on."""
        out = self._callable(packed)(x, *self.args, **self.kwargs)
        return out, carried_by(out, self.carry_spec)

    def _callable(self, packed: Packed) -> Callable[..., Any]:
        """A layer, rematerialised if layers are: each by itself, whatever ``every`` and ``lengths`` say."""
        layer = packed.nodes[0].module
        if self.remat is None:
            return layer
        policy = None if self.remat is True else self.remat
        if _compat.is_compiling() or not packed.has_hooks(skip_root=False):
            return functools.partial(remat(call_layer, policy=policy), layer)
        # Its own hooks run around, once: those of FSDP gather the parameters that the rest then sees.
        lifted = remat(type(layer), policy=policy)
        again = object.__new__(lifted)
        object.__setattr__(again, "__dict__", layer.__dict__)
        return again
