"""The transforms of the matrix, and beside each the plain loop that it must equal."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import functional_call

import torchlift
from torchlift import DenyList

from .modules import B, D

N = 3  # indices of a vmap, layers of a stack, steps of a loop over time
STATE = DenyList("params")


# Bodies: how a layer, which maps x to x, meets a transform ------------------------------------------------------------


def plain(layer, x):
    return layer(x)


def step(layer, x):
    return layer(x), None


def time(layer, carry, x):
    carry = layer(carry + x)
    return carry, 2.0 * carry


@functools.cache
def class_with(body, cls):
    """The layer as a class whose forward is the body."""
    if body is plain:
        return cls

    def forward(self, *args):
        return body(functools.partial(cls.forward, self), *args)

    return type(f"{cls.__name__}{body.__name__.title()}", (cls,), {"forward": forward})


# Plain loops ---------------------------------------------------------------------------------------------------------


def each(layers, xs):
    """A layer of its own for each index."""
    return torch.stack([layer(x) for layer, x in zip(layers, xs, strict=True)])


def each_drawing(layers, xs):
    """The same as torch maps it, which draws the masks of all indices at once."""
    names = [name for name, _ in layers[0].named_parameters()]
    stacked = {name: torch.stack([layer.get_parameter(name) for layer in layers]) for name in names}
    return torch.func.vmap(lambda p, x: functional_call(layers[0], p, (x,)), randomness="different")(stacked, xs)


def same(layers, xs):
    """One layer for all indices."""
    return torch.stack([layers[0](x) for x in xs])


def same_drawing(layers, xs):
    return torch.func.vmap(layers[0], randomness="different")(xs)


def deep(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def deep_step(layers, x):
    return deep(layers, x), None


def over_time(layers, carry, xs):
    ys = []
    for x in xs:
        carry, y = time(layers[0], carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


# The table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """A row of the table.

    ``lift(target, compile)`` is the transform; ``loop(layers, *args)`` its plain twin, ``drawing_loop`` the one for
    modules that draw. ``sizes``: the axes on which ``stacked`` collections of its layers lie.
    """

    name: str
    lift: Callable
    loop: Callable
    shapes: tuple  # of its arguments
    body: Callable = plain
    drawing_loop: Callable | None = None
    sizes: tuple = ()
    stacked: object = True
    layers: int = 1
    calls: int = 1  # of a layer's forward, in one call
    engine: bool = False  # takes compile=
    bitwise: bool = True
    forms: tuple = ("class", "function")
    listed: bool = False  # its layers are the children of a list
    tied: bool = False  # its layers share their parameters
    applied: bool = False  # always called through torchlift.apply


def _vmap(target, compile, **options):
    return torchlift.vmap(target, axis_size=N, **options)


def _own(target, compile):
    return _vmap(target, compile, variable_axes={"params": 0})


def _shared(target, compile):
    return _vmap(target, compile, split_rngs={"dropout": True})


def _own_state(target, compile):
    return _vmap(target, compile, variable_axes={"params": None, True: 0}, split_rngs={"dropout": True})


def _layers(target, compile):
    return torchlift.scan(target, variable_axes={"params": 0}, length=N, compile=compile)


def _time(target, compile):
    return torchlift.scan(
        target, variable_broadcast="params", variable_carry=STATE, split_rngs={"dropout": True}, compile=compile
    )


def _remat(target, compile):
    return torchlift.remat(target)


def _remat_scan(target, compile):
    return torchlift.remat_scan(target, lengths=(2, 2), compile=compile)


def _scan_layers(target, compile):
    return lambda: torchlift.scan_layers([target() for _ in range(N)], compile=compile)


def _nothing(target, compile):
    return target


ROWS, ROW = (N, B, D), (B, D)
MAPPED = dict(shapes=(ROWS,), bitwise=False)
TRANSFORMS = [
    Transform("vmap (own params)", _own, each, drawing_loop=each_drawing, sizes=(N,), layers=N, **MAPPED),
    Transform("vmap (shared params)", _shared, same, drawing_loop=same_drawing, **MAPPED),
    Transform(
        "vmap (own state)",
        _own_state,
        each,
        drawing_loop=same_drawing,
        sizes=(N,),
        stacked=STATE,
        layers=N,
        tied=True,
        forms=("class",),
        **MAPPED,
    ),
    Transform("scan (layers)", _layers, deep_step, (ROW,), step, sizes=(N,), layers=N, calls=N, engine=True),
    Transform("scan (time)", _time, over_time, (ROW, ROWS), time, calls=N, engine=True),
    Transform("remat", _remat, deep, (ROW,)),
    Transform("remat_scan", _remat_scan, deep, (ROW,), sizes=(2, 2), layers=4, calls=4, engine=True),
    Transform("scan_layers", _scan_layers, deep, (ROW,), layers=N, calls=N, listed=True, engine=True, forms=("class",)),
    Transform("apply", _nothing, deep, (ROW,), applied=True),
]
