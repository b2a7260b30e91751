"""A loop as one operator of an outer ``torch.compile`` graph, ``fullgraph=True`` included.

The outer graph holds a call of ``torchlift::loop_forward`` whatever the length of the loop, so its compile time does
not grow with depth. What backward needs is among the operator's outputs.

NOTE [who runs when]: Dynamo traces :func:`opaque_run`, calls :func:`_in_graph` with fake tensors to see what comes
out, and puts a call of it in its graph. AOTAutograd calls it again, on functional tensors over fakes, and sees the
operators. The body is captured and compiled at the first of these.

NOTE [call sites]: common-subexpression elimination merges equal calls, and two passes through one dropout would get
one mask. So every call bears a number of its own.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchlift import _compat
from torchlift.engine.capture import CaptureError
from torchlift.engine.compiled import ON_VALUES
from torchlift.engine.draws import DRAWS_APART
from torchlift.engine.handles import Options, Row, prepare
from torchlift.engine.kept import KEEPS
from torchlift.engine.loop import Body, Stacked, Tree, Xs, plain_run
from torchlift.engine.operators import OpaqueLoop, forward, laid_out
from torchlift.engine.roster import Enrolled, roster_of
from torchlift.engine.structure import decode, encode, mutable
from torchlift.engine.trees import Parts, split
from torchlift.errors import CarryError, RandomnessError, TorchliftCompileWarning, UnsupportedError, warn

_bodies: dict[str, tuple[Callable[..., Body], Any, Row | None]] = {}  # what makes a body, its remat policy, its row
_sites = itertools.count()
_outputs: dict[int, Any] = {}  # structure of a call's results, by call site; read once, while tracing
_warned: set[str] = set()
ON_CARRY, ON_WRITES = "carry", "writes"
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def register_body(
    key: str, factory: Callable[..., Body], policy: Callable[..., Any] | None = None, row: Row | None = None
) -> str:
    """Makes the body that ``factory`` builds known under ``key``, a hash of its content; returns ``key``.

    ``policy`` is that of ``remat``, if it is one, and ``row`` says what enrolled xs are like; the key tells these from
    others. ``factory`` may be given the holder of what is enrolled. Called while Dynamo traces, from what it does not.
    """
    _bodies[key] = factory, policy, row
    return key


@torch.compiler.assume_constant_result
def _new_site() -> int:
    return next(_sites)


@torch.compiler.assume_constant_result
def _y_structure(site: int) -> Any:
    return _outputs[site]


def opaque_run(
    key: str,
    consts: Tree,
    carry: Tree,
    xs: Xs | Enrolled,
    length: int,
    *,
    reverse: bool = False,
    shared_draws: bool = False,
    unroll: int | str = 1,
    remat: Any = None,
    lengths: Sequence[int] | None = None,
    every: int = 1,
    compile: bool | dict[str, Any] = True,
    refused: str | None = None,
    names: Sequence[str] = (),
) -> tuple[Tree, Any]:
    """:func:`torchlift.engine.run.run` for code that Dynamo traces; ``key`` is that of :func:`register_body`.

    ``refused``, if given, is the message of the error that a body raises if it draws. ``names`` are the names of the
    roots, one in a line, for each iteration or once for all: what a graph holds of the names of a body.

    Trees are of dicts, lists, tuples and named tuples. Of a policy given as ``remat`` only that it is there counts;
    the one that was registered with the body is used.

    If xs are enrolled, ys come as a list of one tree, of stacks. There y is a pair: what else there is, and a dict of
    the new state, by the number of a column of the xs. There are none, and no carry but a word on why, where the body
    cannot be compiled and xs are enrolled, where no graph at all can hold it (``ON_VALUES``), where the carry of
    layers comes out as something else (``ON_CARRY``), or where they must be called one by one (``ON_WRITES``).
    """
    site = _new_site()
    length = operator.index(length)  # where Dynamo made sizes symbolic: one loop is of one number of iterations
    stacked = isinstance(xs, Stacked)
    enrolled = isinstance(xs, Enrolled)
    tree = xs.tree if isinstance(xs, Stacked) else xs.inputs if isinstance(xs, Enrolled) else xs
    options = (
        ("reverse", reverse),
        ("shared_draws", shared_draws),
        ("unroll", unroll),
        ("remat", remat if remat is None or remat is True else "policy"),
        ("lengths", None if lengths is None else tuple(lengths)),
        ("every", every),
    )
    # As they are: Dynamo is slow at taking trees of a thousand parameters apart.
    outs = _in_graph(
        key, site, length, stacked, enrolled, options, _backend(compile), refused, tuple(names), consts, carry, tree
    )
    structure = _y_structure(site)
    if isinstance(structure, str):
        return structure, []
    carry_structure, y_structures = structure
    at = iter(outs)
    carry = decode(carry_structure, at)
    if stacked:
        return carry, Stacked(decode(y_structures[0], at))
    return carry, [decode(y, at) for y in y_structures]


def _backend(compile: bool | dict[str, Any]) -> Any:
    """``compile`` as constants that a graph can hold."""
    if not isinstance(compile, dict):
        return ()
    return tuple((k, tuple(v.items()) if isinstance(v, dict) else v) for k, v in compile.items())


@torch.compiler.allow_in_graph
def _in_graph(
    key: str, site: int, length: int, stacked: bool, enrolled: bool, options: Options, backend: Any,
    refused: str | None, names: tuple[str, ...], consts: Tree, carry: Tree, xs: Tree,
) -> list[torch.Tensor]:  # fmt: skip
    if isinstance(_outputs.get(site), str):  # a graph that was not compiled any further calls what came to nothing
        return []
    factory, policy, row = _bodies[key]
    # A graph that is not compiled any further calls this each time, and serves others than whom it was traced with.
    live = enrolled and not _compat.is_traced(xs[0])
    body = factory(roster_of(xs[0]).holder()) if live else factory()
    consts, carry, xs = mutable((consts, carry, xs))
    settings = dict(options)
    if settings["remat"] == "policy":
        settings["remat"] = policy
    elif settings["lengths"] is not None:
        settings["remat"] = True
    options = tuple(settings.items())
    compile = {k: dict(v) if isinstance(v, tuple) else v for k, v in backend}
    flat_consts, flat_carry = split(consts), split(carry)
    flat_xs = [] if enrolled else [split(xs)] if stacked else [split(x) for x in xs]
    tensors = [*flat_consts[0], *flat_carry[0], *(t for x, _ in flat_xs for t in x)]
    if live or (tensors and not any(_compat.is_traced(t) for t in tensors)):
        from torchlift.engine.run import run

        if row is not None:
            # What may be written after the loop is copied: autograd keeps the inputs for backward.
            found = [[t if t.requires_grad else t.clone() for t in tensors] for tensors in roster_of(xs[0]).rows]
            xs = [Parts(tensors, row.template) for tensors in found]
        out = run(body, consts, carry, Stacked(xs) if stacked else xs, length, compile=compile or True, **settings)
        ys: Any = out[1]
        return _publish(site, out[0], [_compat.pytree.tree_map(_stack, *ys)] if enrolled else ys)
    try:
        if any(isinstance(leaf, _SYMBOLIC) for leaf in _compat.pytree.tree_leaves((consts, carry))):
            raise CaptureError("a number among the arguments differs from call to call; pass it as a tensor")
        handle = prepare(body, key, length, stacked, options, compile, flat_consts, flat_carry, flat_xs, tensors, row)
    except CarryError:
        if stacked:
            raise
        _outputs[site] = ON_CARRY
        return []
    except UnsupportedError as error:
        if stacked:
            raise
        if not enrolled:
            _warn_once(key, f"{body.name} runs layer by layer: {error}")
        _outputs[site] = ON_WRITES
        return []
    except CaptureError as error:
        # What is unrolled here is a capture, too, in which fakes would be kept and numbers drawn once for all calls.
        if enrolled or any(why in str(error) for why in (ON_VALUES, KEEPS, DRAWS_APART)):
            _outputs[site] = ON_VALUES
            return []
        _warn_once(key, f"{body.name} is unrolled into the surrounding graph: {error}")
        settings.pop("unroll")
        out = plain_run(body, consts, carry, Stacked(xs) if stacked else xs, length, **settings)
        return _publish(site, *out)
    if refused is not None and handle.program.random:
        raise RandomnessError(refused)
    tensors = laid_out(handle, [*tensors, *xs] if enrolled else tensors)
    called = list(names) if handle.program.marks else []
    if handle.train:
        outs = list(OpaqueLoop.apply(handle, site, called, *tensors))
    else:
        outs = list(forward(handle, site, called, tensors))
    y = handle.program.ys[0]
    at = handle.spec.carry.tensors
    carry = handle.spec.carry.fill(outs[:at])
    stacks = outs[at : at + y.tensors]
    if stacked:
        return _publish(site, carry, Stacked(y.fill(stacks)))
    if enrolled:
        return _publish(site, carry, [y.fill(stacks)])
    rows = zip(*(s.unbind(0) for s in stacks)) if stacks else [()] * length
    return _publish(site, carry, [y.fill(row) for row in rows])


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warn(message, TorchliftCompileWarning)


def _stack(*leaves: Any) -> Any:
    return torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]


def _publish(site: int, carry: Tree, ys: Xs) -> list[torch.Tensor]:
    """The tensors of a result, its structure left for :func:`opaque_run` to read."""
    leaves: list[Any] = []
    carry_structure = encode(carry, leaves, static=True)
    parts = [ys.tree] if isinstance(ys, Stacked) else ys
    if len(_outputs) >= 4096:
        _outputs.pop(next(iter(_outputs)))
    _outputs[site] = carry_structure, [encode(part, leaves, static=True) for part in parts]
    return leaves
