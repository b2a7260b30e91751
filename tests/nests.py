"""Nested transforms of a class and of a function, and the same nest as plain loops over a list of lists of layers."""

import torch
from torch import nn

import torchlift

# And how many layers each runs.
KINDS = {"vmap": 2, "scan": 2, "remat": 1, "remat_scan": 2, "named_call": 1, "map_variables": 1}
D = 3


# Layers --------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.lin(x))


class BatchNorm(Linear):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return super().forward(self.norm(x))


class LayerNorm(Linear):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return super().forward(self.norm(x))


class Counter(Linear):
    """A buffer that is written in place, and read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls.cos()


class Collection(Linear):
    """A variable that is rebound, and read."""

    def __init__(self):
        super().__init__()
        torchlift.variable(self, "state", "mean", torch.zeros, D)

    def forward(self, x):
        y = super().forward(x) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y


class Tied(Linear):
    def __init__(self):
        super().__init__()
        self.back = nn.Linear(D, D)
        self.back.weight = self.lin.weight

    def forward(self, x):
        return torch.sin(self.back(super().forward(x)))


LAYERS = {cls.__name__: cls for cls in (Linear, BatchNorm, LayerNorm, Counter, Collection, Tied)}


# Nests ---------------------------------------------------------------------------------------------------------------


def unchanged(tree):
    return {collection: {name: p * 1 for name, p in named.items()} for collection, named in tree.items()}


def lifted_class(kind, cls):
    """A class that maps x to x, lifted."""
    if kind == "vmap":
        return torchlift.vmap(cls, variable_axes={"params": 0}, axis_size=2)
    if kind == "remat":
        return torchlift.remat(cls)
    if kind == "remat_scan":
        return torchlift.remat_scan(cls, lengths=(2,), compile=False)
    if kind == "named_call":
        return type("Named", (cls,), {"forward": torchlift.named_call(cls.forward)})
    if kind == "map_variables":
        return torchlift.map_variables(cls, "params", unchanged)

    class Step(cls):
        def forward(self, x):
            return super().forward(x), None

    class Scan(torchlift.scan(Step, variable_axes={"params": 0}, length=2, compile=False)):
        def forward(self, x):
            return super().forward(x)[0]

    return Scan


def lifted_function(kind, fn):
    if kind == "vmap":
        return torchlift.vmap(fn, variable_axes={"params": 0}, axis_size=2)
    if kind == "remat":
        return torchlift.remat(fn)
    if kind == "remat_scan":
        return torchlift.remat_scan(fn, lengths=(2,), compile=False)
    if kind == "named_call":
        return torchlift.named_call(fn)
    if kind == "map_variables":
        return torchlift.map_variables(fn, "params", unchanged)
    scanned = torchlift.scan(lambda m, x: (fn(m, x), None), variable_axes={"params": 0}, length=2, compile=False)
    return lambda m, x: scanned(m, x)[0]


def plain(kinds, layers, x):
    """The definition: ``layers`` is a list of lists."""
    if not kinds:
        return layers(x)
    if kinds[0] == "vmap":
        return torch.stack([plain(kinds[1:], layer, row) for layer, row in zip(layers, x, strict=True)])
    for layer in layers:
        x = plain(kinds[1:], layer, x)
    return x


def build(kinds, make, join):
    return join(kinds[0], [build(kinds[1:], make, join) for _ in range(KINDS[kinds[0]])]) if kinds else make()


def join(kind, found):
    """One module of several, or the only one."""
    return torchlift.stack_modules(found) if KINDS[kind] > 1 else found[0]


def stacked(kinds, layers, read):
    """What ``read`` finds in each layer, in the layout of the nested transforms."""
    if not kinds:
        return read(layers)
    found = [stacked(kinds[1:], layer, read) for layer in layers]
    return {name: torch.stack([f[name] for f in found]) for name in found[0]} if KINDS[kinds[0]] > 1 else found[0]


def state_and_grads(module):
    return dict(module.named_buffers()) | {f"grad of {name}": p.grad for name, p in module.named_parameters()}
