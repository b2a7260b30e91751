"""The torch half of a scenario: the modules of `flax_side`, and the comparison with what Flax computed."""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

import torchlift
from torchlift import variable

from .store import cotangent, leaves

D = 3
N = 4
TOLERANCE = 1e-12


class Layer(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.w = nn.Parameter(torch.randn(dim, dim))
        self.b = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return torch.tanh(x @ self.w + self.b)

    def project(self, x):
        return x @ self.w

    def back(self, x, y):
        return (x - self.b) @ self.w.mT + y


class Norm(nn.Module):
    """Batch normalisation with biased statistics, momentum 0.9; updates them in place, as torch's do."""

    def __init__(self, dim=D):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        variable(self, "batch_stats", "mean", torch.zeros, dim)
        variable(self, "batch_stats", "var", torch.ones, dim)

    def forward(self, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * mean)
            self.var.mul_(0.9).add_(0.1 * var)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.scale


class Block(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.layer = Layer(dim)
        self.norm = Norm(dim)

    def forward(self, x):
        return x + self.norm(self.layer(x))


class Counter(nn.Module):
    """`x * count + bias`, and counts its calls; rebinds its state."""

    def __init__(self, dim=D):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(dim))
        variable(self, "state", "count", torch.zeros, ())

    def forward(self, x):
        y = x * self.count + self.bias
        self.count = self.count + 1.0
        return y


class Constant(nn.Module):
    """A layer with a read-only collection."""

    def __init__(self, dim=D):
        super().__init__()
        self.layer = Layer(dim)
        variable(self, "const", "shift", torch.zeros, dim)

    def forward(self, x):
        return self.layer(x) + self.shift


class Sower(nn.Module):
    """A layer that sows its output."""

    def __init__(self, dim=D):
        super().__init__()
        self.layer = Layer(dim)

    def forward(self, x):
        y = self.layer(x)
        torchlift.sow(self, "intermediates", "h", y)
        return y


class Cell(nn.Module):
    """A plain recurrent cell: `(carry, x) -> (carry, y)`."""

    def __init__(self, dim=D):
        super().__init__()
        self.u = nn.Parameter(torch.randn(dim, dim))
        self.w = nn.Parameter(torch.randn(dim, dim))

    def forward(self, carry, x):
        carry = torch.tanh(carry @ self.u + x @ self.w)
        return carry, 2.0 * carry


class Pair(nn.Module):
    """Two given modules, one after the other; they may be the same one."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x))


class Noise(nn.Module):
    """Draws from torch's default generator, the stream `dropout`."""

    def forward(self, x):
        return x + torch.randn(x.shape)


def step(module, x, _):
    """A body for `scan` from a module that maps x to x."""
    return module(x), None


def steps(cls):
    """The class of such bodies: `(carry, _) -> (carry, None)`."""

    class Steps(cls):
        def forward(self, x, _):
            return super().forward(x), None

    return Steps


def equal_rows(x):
    """Which rows of `x` are the same."""
    return (x[:, None] == x[None]).reshape(len(x), len(x), -1).all(-1).long()


def find_twins(expected, *modules):
    """The functions of the given files that are named as a scenario is."""
    return {name: twin for module in modules for name, twin in vars(module).items() if name in expected}


def check(expected, twin, *options):
    """Build the twin, give it Flax's weights and inputs, and compare all that a record holds.

    A twin returns a module, or a module and the function `(module, *args) -> out` to call.
    """
    with _float64():
        built = twin(*options)
        module, call = built if isinstance(built, tuple) else (built, type(built).__call__)
        _fill(module, expected["variable"])
        args = [torch.as_tensor(value) for _, value in sorted(expected["arg"].items())]
        for arg in args:
            arg.requires_grad_(arg.is_floating_point())
        with torchlift.capture("intermediates") as sown:
            out = dict(leaves(call(module, *args)))
        _same("out", {path: torch.as_tensor(leaf) for path, leaf in out.items()}, expected["out"])
        if expected["grad"] or expected["arg_grad"]:
            _backward(out.values())
            params = torchlift.variables(module, "params")
            _same("grad", {path: _grad(leaf) for path, leaf in _flat(params).items()}, expected["grad"])
            _same("arg_grad", {path: _grad(args[int(path)]) for path in expected["arg_grad"]}, expected["arg_grad"])
        state = {path: value for path, value in expected["variable"].items() if not path.startswith("params/")}
        updated = torchlift.variables(module, torchlift.DenyList("params"))
        _same("updated", _flat({**updated, **sown}), {**state, **expected["updated"]})


@contextmanager
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill(module, values):
    """Put Flax's weights into the module's own tensors, which take on their shapes."""
    tensors = _flat(torchlift.variables(module))
    assert set(tensors) == set(values), f"variables are {sorted(tensors)}, in Flax {sorted(values)}"
    for path, value in values.items():
        tensors[path].data = torch.tensor(value)


def _backward(outputs):
    loss = sum(
        (leaf * torch.as_tensor(cotangent(i, leaf.shape))).sum()
        for i, leaf in enumerate(outputs)
        if torch.is_tensor(leaf) and leaf.is_floating_point()
    )
    if torch.is_tensor(loss) and loss.requires_grad:
        loss.backward()


def _grad(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _same(kind, found, expected):
    assert set(found) == set(expected), f"{kind}: found {sorted(found)}, in Flax {sorted(expected)}"
    for path, value in expected.items():
        actual = found[path].detach().numpy()
        assert actual.shape == value.shape, f"{kind} {path}: shape {actual.shape}, in Flax {value.shape}"
        scale = max(1.0, float(np.abs(value).max(initial=0)))
        np.testing.assert_allclose(actual, value, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=f"{kind} {path}")


def _flat(variables):
    return {f"{collection}/{path}": leaf for collection, tree in variables.items() for path, leaf in leaves(tree)}
