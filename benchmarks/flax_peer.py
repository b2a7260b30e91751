"""The same models in Flax, in an environment of its own: ``flax_peer.py WHAT '{"argument": ...}'`` prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(name: str, model: Any, x: Any, seconds: float) -> dict[str, dict[str, float]]:
    import jax

    params = model.init(jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda params: (model.apply(params, x) ** 2).mean()))

    def clock() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(params))
        return time.perf_counter() - start

    first, best, rounds, end = clock(), float("inf"), 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        best, rounds = min(best, clock()), rounds + 1
    return {name: {"first": first, "step": best}}


def stacks(layers: int, width: int, batch: int = 4, time: int = 64, seconds: float = 0.0, heads: int = 4) -> Any:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
            qkv = nn.Dense(3 * width)(nn.LayerNorm()(x)).reshape(batch, time, 3, heads, width // heads)
            y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0)).reshape(x.shape)
            x = x + nn.Dense(width)(y)
            y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)), approximate=False)
            return x + nn.Dense(width)(y), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)
            return scan()(x, None)[0]

    return measure("flax.linen.scan", Stack(), jax.random.normal(jax.random.key(1), (batch, time, width)), seconds)


def lstm(length: int, width: int, batch: int, seconds: float) -> Any:
    import flax.linen as nn
    import jax

    model = nn.RNN(nn.OptimizedLSTMCell(width))  # flax's own scan of a cell
    return measure("flax scanned LSTM", model, jax.random.normal(jax.random.key(1), (batch, length, width)), seconds)


WHAT: dict[str, Callable[..., Any]] = {"stacks": stacks, "lstm": lstm}


def main(what: str, arguments: str) -> None:
    given = json.loads(arguments)
    threads = given.pop("threads", 2)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as there are CPUs
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    print(json.dumps(WHAT[what](**given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
