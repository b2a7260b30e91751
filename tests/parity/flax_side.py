"""The Flax half of a scenario: small modules, and the recorder of what they compute.

`torch_side` has the same modules under the same names, with the same parameter names and shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .store import cotangent, generator, leaves, nest

jax.config.update("jax_enable_x64", True)

D = 3  # features of every layer
N = 4  # size of every lifted axis, unless a scenario says otherwise
NORMAL = nn.initializers.normal()
NOT_PARAMS = nn.DenyList("params")


class Layer(nn.Module):
    dim: int = D

    def setup(self):
        self.w = self.param("w", NORMAL, (self.dim, self.dim))
        self.b = self.param("b", NORMAL, (self.dim,))

    def __call__(self, x):
        return jnp.tanh(x @ self.w + self.b)

    def project(self, x):
        return x @ self.w

    def back(self, x, y):
        return (x - self.b) @ self.w.T + y


class Norm(nn.Module):
    """Batch normalisation with biased statistics, momentum 0.9."""

    dim: int = D

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.dim,))
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.dim,))
        self.var = self.variable("batch_stats", "var", jnp.ones, (self.dim,))

    def __call__(self, x):
        mean, var = x.mean(0), x.var(0)
        self.mean.value = 0.9 * self.mean.value + 0.1 * mean
        self.var.value = 0.9 * self.var.value + 0.1 * var
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.scale


class Block(nn.Module):
    dim: int = D

    def setup(self):
        self.layer = Layer(self.dim)
        self.norm = Norm(self.dim)

    def __call__(self, x):
        return x + self.norm(self.layer(x))


class Counter(nn.Module):
    """`x * count + bias`, and counts its calls."""

    dim: int = D

    def setup(self):
        self.bias = self.param("bias", NORMAL, (self.dim,))
        self.count = self.variable("state", "count", jnp.zeros, ())

    def __call__(self, x):
        y = x * self.count.value + self.bias
        self.count.value = self.count.value + 1.0
        return y


class Constant(nn.Module):
    """A layer with a read-only collection."""

    dim: int = D

    def setup(self):
        self.layer = Layer(self.dim)
        self.shift = self.variable("const", "shift", jnp.zeros, (self.dim,))

    def __call__(self, x):
        return self.layer(x) + self.shift.value


class Sower(nn.Module):
    """A layer that sows its output."""

    dim: int = D

    def setup(self):
        self.layer = Layer(self.dim)

    def __call__(self, x):
        y = self.layer(x)
        self.sow("intermediates", "h", y)
        return y


class Cell(nn.Module):
    """A plain recurrent cell: `(carry, x) -> (carry, y)`."""

    dim: int = D

    def setup(self):
        self.u = self.param("u", NORMAL, (self.dim, self.dim))
        self.w = self.param("w", NORMAL, (self.dim, self.dim))

    def __call__(self, carry, x):
        carry = jnp.tanh(carry @ self.u + x @ self.w)
        return carry, 2.0 * carry


class Pair(nn.Module):
    """Two given modules, one after the other; they may be the same one."""

    first: nn.Module
    second: nn.Module

    def __call__(self, x):
        return self.second(self.first(x))


class Noise(nn.Module):
    """Draws from the stream `dropout`."""

    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("dropout"), x.shape)


def step(module, x, _):
    """A body for `scan` from a module that maps x to x."""
    return module(x), None


def steps(cls):
    """The class of such bodies: `(carry, _) -> (carry, None)`."""

    class Steps(cls):
        def __call__(self, x, _):
            return super().__call__(x), None

    return Steps


def equal_rows(x):
    """Which rows of `x` are the same: all that two libraries can agree on about random numbers."""
    return (x[:, None] == x[None]).reshape(len(x), len(x), -1).all(-1).astype(jnp.int64)


@dataclass
class Case:
    module: nn.Module
    args: list
    call: Callable = lambda module, *args: module(*args)
    init: Callable | None = None  # makes the variables, where `call` can't
    mutable: Any = NOT_PARAMS
    grad: bool = True
    random: bool = False


def record(name, scenario):
    """Run one scenario and return its record."""
    source = generator(name)
    case = scenario(lambda *shape: source.normal(size=shape))
    rngs = {"dropout": jax.random.key(1)} if case.random else {}
    keep = nn.DenyList("intermediates")
    init = nn.init(case.init or case.call, case.module, mutable=keep)
    shapes = jax.eval_shape(lambda: init({"params": jax.random.key(0), **rngs}, *case.args))
    variables = {
        collection: {path: _draw(source, collection, leaf.shape) for path, leaf in leaves(nn.meta.unbox(tree))}
        for collection, tree in shapes.items()
    }
    boxed = {collection: _box(shapes[collection], nest(flat)) for collection, flat in variables.items()}
    apply = nn.apply(case.call, case.module, mutable=case.mutable)
    floats = [i for i, arg in enumerate(case.args) if np.asarray(arg).dtype.kind == "f"]

    def loss(params, float_args):
        args = list(case.args)
        for i, arg in zip(floats, float_args):
            args[i] = arg
        out, updated = apply({**boxed, "params": params}, *args, rngs=rngs)
        arrays = {path: jnp.asarray(leaf) for path, leaf in leaves(out)}
        total = sum(
            (leaf * cotangent(i, leaf.shape)).sum() for i, leaf in enumerate(arrays.values()) if leaf.dtype.kind == "f"
        )
        return total + 0.0, (arrays, updated)

    inputs = boxed.get("params", {}), [jnp.asarray(case.args[i]) for i in floats]
    grads = ({}, [])
    if case.grad:
        grads, (out, updated) = jax.grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
    else:
        _, (out, updated) = loss(*inputs)
    return {
        "arg": {str(i): np.asarray(arg) for i, arg in enumerate(case.args)},
        "variable": _flat(variables),
        "out": out,
        "grad": _flat({"params": nn.meta.unbox(grads[0])}),
        "arg_grad": {str(i): grad for i, grad in zip(floats, grads[1])},
        "updated": _flat(nn.meta.unbox(updated)),
        "names": _names(shapes),
    }


def _draw(source, collection, shape):
    return source.normal(size=shape) if collection == "params" else source.uniform(0.5, 1.5, size=shape)


def _names(shapes):
    """The axis names of every `Partitioned` variable, as text."""
    is_box = lambda x: isinstance(x, nn.Partitioned)
    boxes = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_box)
    return {
        f"{path[0].key}/{'.'.join(key.key for key in path[1:])}": ",".join(map(str, box.names))
        for path, box in boxes
        if is_box(box)
    }


def _box(shapes, values):
    if isinstance(shapes, nn.meta.AxisMetadata):
        return shapes.replace_boxed(values)
    if isinstance(shapes, dict):
        return {key: _box(shapes[key], values[key]) for key in shapes}
    return values


def _flat(variables):
    return {f"{collection}/{path}": leaf for collection, tree in variables.items() for path, leaf in leaves(tree)}
