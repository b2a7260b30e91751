"""The modules of the matrix: each maps a tensor of shape (B, D) to one of the same shape."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import torchlift

B, D = 3, 4


class Burnt(Exception):
    """Raised by a forward that was told to fail."""


class Fuse:
    """Counts the calls of all layers, and fails one of them."""

    left: int | None = None

    def burn(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Burnt


FUSE = Fuse()


class Layer(nn.Module):
    """A layer does its work, state and draws included, and then may fail."""

    def forward(self, x):
        y = self.work(x)
        FUSE.burn()
        return y


class Linear(Layer):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def work(self, x):
        return torch.tanh(self.lin(x))


class BatchNorm(Linear):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def work(self, x):
        return self.norm(super().work(x))


class Dropout(Linear):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def work(self, x):
        return self.drop(super().work(x))


class Tied(Linear):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.back = nn.Linear(D, D)
        self.back.weight = self.lin.weight

    def work(self, x):
        return torch.tanh(self.back(super().work(x)))


class SharedSubmodule(Linear):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.both = nn.ModuleList([self.lin, nn.Linear(D, D)])

    def work(self, x):
        return torch.tanh(self.both[1](self.both[0](super().work(x))))


class Nested(Layer):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Sequential(nn.Linear(D, 2), nn.GELU()), "last": nn.Linear(2, D)})

    def work(self, x):
        return x + self.parts["last"](self.parts["first"](x))


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Parametrized(Linear):
    def __init__(self):
        super().__init__()
        register_parametrization(self.lin, "weight", Symmetric())
        self.normed = weight_norm(nn.Linear(D, D))

    def work(self, x):
        return torch.tanh(self.normed(super().work(x)))


class WeightNorm(Linear):
    """The old kind: a pre-forward hook that computes a plain attribute."""

    def __init__(self):
        super().__init__()
        nn.utils.weight_norm(self.lin)


class Hooked(Linear):
    def __init__(self):
        super().__init__()
        self.lin.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
        self.lin.register_forward_hook(lambda module, args, out: out * module.weight.sum())


class Frozen(Linear):
    def __init__(self):
        super().__init__()
        self.lin.weight.requires_grad_(False)


class Collections(Linear):
    """State that the output depends on: rebound, written in place, and created in the first call; and a sown value."""

    def __init__(self):
        super().__init__()
        torchlift.variable(self, "state", "mean", torch.randn, D)
        torchlift.variable(self, "count", "calls", torch.zeros, 1)

    def work(self, x):
        y = super().work(x) + self.mean * (1.0 + self.calls)
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            self.calls.add_(1.0)
        torchlift.sow(self, "intermediates", "y", y)
        return y


SCALE = nn.Parameter(torch.linspace(0.5, 1.5, D, dtype=torch.float64))  # reaches bodies by a closure only


class Closure(Linear):
    def work(self, x):
        return super().work(x) * SCALE


class LSTM(Layer):
    """A cell whose state is the two halves of x."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(D, D // 2)

    def work(self, x):
        return torch.cat(self.cell(x, x.chunk(2, -1)), -1)


class Transformer(Layer):
    """A pre-norm block of two heads over B positions."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def work(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, D // 2)).movedim(0, -2).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.movedim(-2, 0).flatten(-2)))
        return x + self.drop(self.mlp(x))


@dataclass(frozen=True)
class Module:
    """A row of the table.

    ``stateful``: its variables change in a call. ``draws``: it draws random numbers. ``hooked``: it has hooks, which a
    captured graph would run once and never again, so that the engine runs the plain loop.
    """

    name: str
    cls: type
    stateful: bool = False
    draws: bool = False
    hooked: bool = False
    extra: tuple = ()  # parameters that are not the module's


MODULES = [
    Module("linear", Linear),
    Module("batch-norm", BatchNorm, stateful=True),
    Module("dropout", Dropout, draws=True),
    Module("tied weights", Tied),
    Module("shared submodule", SharedSubmodule),
    Module("nested", Nested),
    Module("parametrized", Parametrized),
    Module("weight-norm hook", WeightNorm),
    Module("with hooks", Hooked, hooked=True),
    Module("frozen", Frozen),
    Module("custom collections", Collections, stateful=True),
    Module("closure", Closure, extra=(SCALE,)),
    Module("LSTM cell", LSTM),
    Module("transformer block", Transformer, draws=True),
]
