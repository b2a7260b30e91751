"""What a cell compares: a lifted module and its twin, a list of plain layers, of equal weights."""

from dataclasses import dataclass

import torch

import torchlift
from torchlift.filters import matches

from .modules import Module
from .twins import STATE, Transform, class_with

SEED = 1


def tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def loss(tree):
    """A number on which every output depends in its own way."""
    return sum((t * torch.arange(1.0, 1.0 + t.numel()).view(t.shape).sin()).sum() for t in tensors(tree))


def arguments(shapes, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch, *shape, generator=generator, requires_grad=True) for shape in shapes]


def _by_name(module, filter):
    found = torchlift.variables(module, filter)
    return {(collection, name): tensor for collection, named in found.items() for name, tensor in named.items()}


def tree_of(named):
    tree = {}
    for (collection, name), tensor in named.items():
        tree.setdefault(collection, {})[name] = tensor
    return tree


class Lifted:
    """The module of one form, and how it is called."""

    def __init__(self, transform: Transform, module: Module, form: str, compile=False):
        self.transform, self.extra = transform, module.extra
        cls = class_with(transform.body, module.cls)
        torch.manual_seed(SEED)
        if form == "class":
            self.module = transform.lift(cls, compile)()
            self.fn = lambda m, *args: m(*args)
        else:
            self.fn = transform.lift(transform.body, compile)
            self.module = _stacked([module.cls() for _ in range(transform.layers)], transform.sizes)

    def __call__(self, *args):
        return self.fn(self.module, *args)

    def apply(self, args, variables):
        """``(out, state, sown)``, with the module as it was."""
        out, updated = torchlift.apply(self.module, variables, *args, method=self.fn, mutable=STATE)
        flat = {(collection, name): value for collection, named in updated.items() for name, value in named.items()}
        state = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
        return out, state, {key: value for key, value in flat.items() if not isinstance(value, torch.Tensor)}

    @property
    def params(self):
        return _by_name(self.module, "params")

    @property
    def state(self):
        return _by_name(self.module, STATE)

    def gather(self, read):
        return read(self.module)

    def eval(self):
        self.module.eval()


def _stacked(layers, sizes):
    """One module of a function form."""
    if not sizes:
        return layers[0]
    for size in reversed(sizes):
        layers = [torchlift.stack_modules(layers[at : at + size]) for at in range(0, len(layers), size)]
    return layers[0]


class Twin:
    """Plain layers, run by a plain loop; what is read from them has the layout of the lifted module."""

    def __init__(self, transform: Transform, module: Module):
        self.transform, self.extra = transform, module.extra
        self.loop = transform.drawing_loop if module.draws and transform.drawing_loop else transform.loop
        torch.manual_seed(SEED)
        self.layers = []
        for _ in range(transform.layers):
            if transform.tied:
                torch.manual_seed(SEED)
            self.layers.append(module.cls())
        if transform.tied:
            for name, tensor in self.layers[0].named_parameters(remove_duplicate=False):
                path, _, key = name.rpartition(".")
                for layer in self.layers:
                    layer.get_submodule(path)._parameters[key] = tensor

    def __call__(self, *args):
        return self.loop(self.layers, *args)

    def gather(self, read):
        """What ``read`` finds in each layer, as one dict."""
        t, found = self.transform, [read(layer) for layer in self.layers]
        if t.listed:
            return {(c, f"{i}.{name}"): tensor for i, one in enumerate(found) for (c, name), tensor in one.items()}
        return {
            key: torch.stack([one[key] for one in found]).unflatten(0, t.sizes)
            if t.sizes and matches(t.stacked, key[0]) and tensor is not None
            else tensor
            for key, tensor in found[0].items()
        }

    @property
    def state(self):
        return self.gather(lambda layer: _by_name(layer, STATE))

    def apply(self, args):
        """``(out, state)``, with the layers as they were; one call after the other, as this is a loop."""
        places = [(m, dict(m._buffers)) for layer in self.layers for m in layer.modules()]
        for module, buffers in places:
            module._buffers.update({key: buffer.clone() for key, buffer in buffers.items()})
        out = self(*args)
        state = {key: tensor.detach() for key, tensor in self.state.items()}
        for module, buffers in places:
            module._buffers.update(buffers)
        return out, state

    def eval(self):
        for layer in self.layers:
            layer.eval()


@dataclass(frozen=True)
class Cell:
    transform: Transform
    module: Module
    form: str
    context: str

    def __str__(self):
        return f"{self.transform.name}-{self.module.name}-{self.form}-{self.context}"


def gradients(built, args):
    """The gradients of all parameters, of what a closure holds, and of the arguments, by name."""
    found = built.gather(lambda module: {key: p.grad for key, p in _by_name(module, "params").items()})
    named = {f"grad of {name}": grad for (_, name), grad in found.items()}
    named |= {f"grad of extra {at}": p.grad for at, p in enumerate(built.extra)}
    return named | {f"grad of argument {at}": arg.grad for at, arg in enumerate(args)}


def outputs(out, state=None):
    named = {f"out {at}": leaf for at, leaf in enumerate(tensors(out))}
    return named | {f"state {key}": value for key, value in (state or {}).items()}


def compare(got, want, bitwise):
    """Asserts that two dicts of tensors are equal."""
    assert list(got) == list(want) or set(got) == set(want), f"got {sorted(got)}, expected {sorted(want)}"
    for name, expected in want.items():
        actual = got[name]
        if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
            assert actual is None and expected is None, f"{name}: got {actual}, expected {expected}"
            continue
        assert actual.shape == expected.shape, f"{name}: got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{name}: got {actual.dtype}, expected {expected.dtype}"
        equal = torch.equal(actual, expected) if bitwise else torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
        assert equal, (
            f"{name} differs by {(actual - expected).abs().max():.3g}, by {'0' if bitwise else '1e-12'} at most"
        )
