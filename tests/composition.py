"""Every function of torchlift as a wrapper of a body ``f(m, x)``, and beside each its definition in plain torch.

A wrapper makes ``g(m, x)`` of ``f(m, x)``, with a vector coming out like the one that goes in, so that any fits inside
any other. Its twin does the same to a plain function of :class:`Plain`, with Python loops and torch.autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

import torchlift
from torchlift import PARTITION_NAME, _compat

AOT = {"backend": "aot_eager"}
D = 3


# Modules and bodies --------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        torchlift.variable(self, "state", "seen", torch.zeros, D)


@dataclass
class Plain:
    """The variables of a module."""

    weight: torch.Tensor
    bias: torch.Tensor
    state: dict[str, torch.Tensor]
    layers: list[Plain] = field(default_factory=list)

    @classmethod
    def of(cls, m):
        return cls(m.weight, m.bias, {"seen": m.seen.clone()}, [cls.of(layer) for layer in getattr(m, "layers", ())])

    def map(self, fn):
        """With other parameters and the same state."""
        return Plain(fn(self.weight), fn(self.bias), self.state, [layer.map(fn) for layer in self.layers])

    @property
    def seen(self):
        return self.state["seen"]

    @seen.setter
    def seen(self, value):
        self.state["seen"] = value

    def leaves(self):
        return [self.weight, self.bias, *(p for layer in self.layers for p in layer.leaves())]

    def states(self):
        return [self.seen, *(seen for layer in self.layers for seen in layer.states())]

    def apart(self):
        """The same, none of which an earlier result was made from."""
        return self.map(lambda p: p.view_as(p))


def body(m, x):
    return torch.tanh(m.weight @ x + m.bias)


def stateful(m, x):
    """The same with a state on which the next call depends: whoever runs it once too often is found out."""
    y = torch.tanh(m.weight @ x + m.bias + m.seen)
    m.seen = 0.5 * m.seen + y.detach()
    return y


# Derivatives, by torch.autograd ---------------------------------------------------------------------------------------


def pulled(out, inputs, cotangent):
    return torch.autograd.grad(out, inputs, cotangent, create_graph=True, materialize_grads=True)


def pushed(out, inputs, tangents):
    """Forward mode as the derivative of a pullback in its cotangent, in which it is linear."""
    cotangent = torch.zeros_like(out, requires_grad=True)
    return pulled(pulled(out, inputs, cotangent), cotangent, tangents)[0]


# The table -----------------------------------------------------------------------------------------------------------

cosines = lambda tree: {c: {name: p.cos() for name, p in named.items()} for c, named in tree.items()}
loss = lambda f: lambda m, x: f(m, x).square().sum()
two = lambda x: torch.stack([x.sin(), x.cos()])


def by_steps(f, m, x):
    for other in two(x):
        x = f(m, x) + other
    return x


def by_vjp(f, m, x):
    out, pull = torchlift.vjp(f, m, x)
    variables, x_cotangent = pull(x.cos())
    return out + x_cotangent + variables["params"]["weight"].sum(0)


def by_vjp_twin(f, m, x):
    m, x = m.apart(), x.view_as(x)
    out = f(m, x)
    x_cotangent, weight = pulled(out, [x, m.weight], x.cos())
    return out + x_cotangent + weight.sum(0)


def by_jvp(f, m, x):
    out, tangent = torchlift.jvp(f, m, (x,), (x.cos(),), {"params": {"weight": m.weight.sin()}})
    return out + tangent


def by_jvp_twin(f, m, x):
    m, x = m.apart(), x.view_as(x)
    out = f(m, x)
    return out + pushed(out, [x, m.weight], [x.cos(), m.weight.sin()])


def by_value_and_grad_twin(f, m, x):
    x = x.view_as(x)
    value = loss(f)(m, x)
    return value, pulled(value, [x], None)[0]


def by_value_and_grad(f, m, x):
    value, (x_grad,) = torchlift.value_and_grad(loss(f), m, x)
    return value + x_grad


def twice(f):
    """With a gradient twice as large."""

    def backward(pull, cotangent):
        variables, x_cotangent = pull(cotangent)
        return {c: {name: 2 * p for name, p in named.items()} for c, named in variables.items()}, 2 * x_cotangent

    # A vjp function among the residuals runs again in compiled code, which has to know that it draws nothing.
    return torchlift.custom_vjp(f, lambda m, x: torchlift.vjp(f, m, x, rngs=False), backward)


def twice_twin(f, m, x):
    out = f(m, x)
    return 2 * out - out.detach()


def other(f):
    return lambda m, x: f(m, x.cos()) - x


def far(m, carry):
    step, x = carry
    return (step < 3) & (x[0] < 1)


def by_while(f, **options):
    def step(m, carry):
        return carry[0] + 1, f(m, carry[1]) + 0.5

    return lambda m, x: torchlift.while_loop(far, step, m, (torch.tensor(0), x), "state", **options)[1]


def by_while_twin(f, m, x):
    step = 0
    while step < 3 and x[0] < 1:
        step, x = step + 1, f(m, x) + 0.5
    return x


@dataclass(frozen=True)
class Function:
    """``lift(f)`` is ``g``; ``twin(f, m, x)`` is what that does with a plain ``f``."""

    lift: Callable
    twin: Callable


def scanned(f, compile):
    step = lambda m, carry, x: (f(m, carry) + x, None)
    loop = torchlift.scan(step, variable_broadcast="params", variable_carry="state", compile=compile)
    return lambda m, x: loop(m, x, two(x))[0]


def remat_scanned(f, compile):
    return torchlift.remat_scan(
        f, lengths=(2,), variable_axes={}, variable_broadcast="params", variable_carry="state", compile=compile
    )


through = lambda f, m, x: f(m, x)
by_layers = lambda f, m, x: f(m.layers[1], f(m.layers[0], x))
SCAN_LAYERS = "scan_layers"  # whose wrapper is the module's own
FUNCTIONS = {
    "vmap": Function(
        lambda f: lambda m, x: torchlift.vmap(f)(m, two(x)).sum(0), lambda f, m, x: sum(f(m, row) for row in two(x))
    ),
    "scan": Function(lambda f: scanned(f, False), by_steps),
    "scan (compiled)": Function(lambda f: scanned(f, AOT), by_steps),
    "remat": Function(torchlift.remat, through),
    "remat_scan": Function(lambda f: remat_scanned(f, False), lambda f, m, x: f(m, f(m, x))),
    SCAN_LAYERS: Function(lambda f: lambda m, x: m.layers(x), by_layers),
    "jit": Function(lambda f: torchlift.jit(f, **AOT), through),
    "map_variables": Function(
        lambda f: torchlift.map_variables(f, "params", cosines), lambda f, m, x: f(m.map(torch.cos), x)
    ),
    "vjp": Function(lambda f: functools.partial(by_vjp, f), by_vjp_twin),
    "jvp": Function(lambda f: functools.partial(by_jvp, f), by_jvp_twin),
    "grad": Function(
        lambda f: lambda m, x: torchlift.grad(loss(f), m, x)[0], lambda f, m, x: by_value_and_grad_twin(f, m, x)[1]
    ),
    "value_and_grad": Function(
        lambda f: functools.partial(by_value_and_grad, f),
        lambda f, m, x: sum(by_value_and_grad_twin(f, m, x)),
    ),
    "custom_vjp": Function(twice, twice_twin),
    "cond": Function(
        lambda f: lambda m, x: torchlift.cond(x[0] > 0, f, other(f), m, x),
        lambda f, m, x: f(m, x) if x[0] > 0 else other(f)(m, x),
    ),
    "switch": Function(
        lambda f: lambda m, x: torchlift.switch((x > 0).sum(), [f, other(f), f], m, x),
        lambda f, m, x: other(f)(m, x) if (x > 0).sum() == 1 else f(m, x),
    ),
    "while_loop": Function(by_while, by_while_twin),
    "while_loop (bounded)": Function(lambda f: by_while(f, max_steps=3), by_while_twin),
    "named_call": Function(torchlift.named_call, through),
    "add_metadata_axis": Function(
        lambda f: torchlift.add_metadata_axis(f, {"params": 0}, {PARTITION_NAME: "stage"}), through
    ),
}


def lifted(names: tuple[str, ...], body=body):
    """A module and ``g(m, x)``: the functions of these names, the first one outermost, around the body."""
    f, cls = body, Layer
    for name in reversed(names):
        if name == SCAN_LAYERS:
            cls = _with_layers(cls, f)
        f = FUNCTIONS[name].lift(f)
    return cls(), f


def _with_layers(cls, f):
    """A layer that has two more, of the class ``cls`` and with the body ``f``."""
    inner = type("Inner", (cls,), {"forward": lambda self, x: f(self, x)})

    class Outer(Layer):
        def __init__(self):
            super().__init__()
            self.layers = torchlift.scan_layers([inner(), inner()], compile=False)

    return Outer


def plain(names: tuple[str, ...], body=body):
    """The twin: a function of ``(Plain, x)``."""
    f = body
    for name in reversed(names):
        f = functools.partial(FUNCTIONS[name].twin, f)
    return f


# What is outside -----------------------------------------------------------------------------------------------------


def _rows(t, p, x):
    return torch.stack([t(p, row) for row in x])


def _jacobian(f, x):
    out = f(x)
    return torch.stack([pulled(out, [x], direction)[0] for direction in torch.eye(len(out))])


def _by_params(g, m, x):
    """The gradient in all parameters, as a function of them."""
    params = {name: p for name, p in m.named_parameters()}
    grads = torch.func.grad(lambda params: torchlift.apply(m, {"params": params}, x, method=loss(g)))(params)
    return torch.cat([grad.flatten() for grad in grads.values()])


def _by_params_twin(t, p, x):
    return torch.cat([grad.flatten() for grad in pulled(loss(t)(p, x), p.leaves(), None)])


# ``run(g, m, x)`` and ``twin(t, plain, x)``.
OUTSIDE = {
    "autograd": (lambda g, m, x: g(m, x), lambda t, p, x: t(p, x)),
    "torch.func.vmap": (
        lambda g, m, x: torch.func.vmap(lambda x: g(m, x))(two(x)),
        lambda t, p, x: _rows(t, p, two(x)),
    ),
    "torch.func.grad": (
        lambda g, m, x: torch.func.grad(lambda x: loss(g)(m, x))(x),
        lambda t, p, x: pulled(loss(t)(p, x), [x], None)[0],
    ),
    "torch.func.grad in parameters": (_by_params, _by_params_twin),
    "torch.func.vjp": (
        lambda g, m, x: torch.func.vjp(lambda x: g(m, x), x)[1](x.cos())[0],
        lambda t, p, x: pulled(t(p, x), [x], x.cos())[0],
    ),
    "torch.func.jvp": (
        lambda g, m, x: torch.func.jvp(lambda x: g(m, x), (x,), (x.cos(),))[1],
        lambda t, p, x: pushed(t(p, x), [x], [x.cos()]),
    ),
    "torch.func.jacrev": (
        lambda g, m, x: torch.func.jacrev(lambda x: g(m, x))(x),
        lambda t, p, x: _jacobian(lambda x: t(p, x), x),
    ),
    "torch.func.jacfwd": (
        lambda g, m, x: torch.func.jacfwd(lambda x: g(m, x))(x),
        lambda t, p, x: _jacobian(lambda x: t(p, x), x),
    ),
    "torch.func.hessian": (
        lambda g, m, x: torch.func.hessian(lambda x: loss(g)(m, x))(x),
        lambda t, p, x: _jacobian(lambda x: pulled(loss(t)(p, x), [x], None)[0], x),
    ),
    "torch.func.vmap of grad": (
        lambda g, m, x: torch.func.vmap(torch.func.grad(lambda x: loss(g)(m, x)))(two(x)),
        lambda t, p, x: torch.stack([pulled(loss(t)(p, row), [row], None)[0] for row in two(x)]),
    ),
}


# What is refused -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Pairs that have one of these names on each side; None stands for all of them. ``compiled``: by torch.compile."""

    match: str
    reason: str
    way: str
    outer: tuple[str, ...] | None
    inner: tuple[str, ...] | None
    compiled: bool

    def covers(self, outer: str, inner: str, compiled: bool) -> bool:
        sides = (self.outer, outer), (self.inner, inner)
        return compiled >= self.compiled and all(told is None or name in told for told, name in sides)


# Each is an UnsupportedError, which torch.compile wraps in an error of its own.
FORWARD = ("jvp", "torch.func.jvp", "torch.func.jacfwd", "torch.func.hessian")
REVERSE = ("vjp", "grad", "value_and_grad")
TORCHS = tuple(name for name in OUTSIDE if name.startswith("torch.func.") and name not in FORWARD)
REFUSALS = [
    Refusal(
        "jvp over custom_vjp: a backward function does not say .* take the derivative in reverse mode",
        "a backward function does not say what forward mode gives",
        "take the derivative in reverse mode: `vjp`, `grad`, `torch.func.jacrev` of `jacrev`",
        outer=FORWARD,
        inner=("custom_vjp",),
        compiled=False,
    ),
    Refusal(
        "torch.compile of a torch.func transform of custom_vjp: .* leave the transform, or custom_vjp, out of",
        "what `torch.compile` traces runs no `torch.func` transform over an autograd function",
        "leave the transform or `custom_vjp` out of the compiled function",
        outer=("vmap", *REVERSE, "custom_vjp", *TORCHS),
        inner=("custom_vjp",),
        compiled=True,
    ),
    Refusal(
        "torch.compile of remat over a reverse-mode derivative: .* put remat inside of the derivative",
        "under the hooks of a compiled checkpoint `torch.func` takes no derivative (`custom_vjp` where its residuals "
        "are a `vjp` function)",
        "put `remat` inside of the derivative",
        outer=("remat", "remat_scan"),
        inner=(*REVERSE, "custom_vjp"),
        compiled=True,
    ),
    Refusal(
        "(cannot differentiate a loop without bound|compiled under a torch.func transform|cannot be recorded in a "
        "graph); pass max_steps=",
        "compiled code does not differentiate, map or unroll a loop without bound",
        "pass `max_steps=`",
        outer=("jit",),
        inner=("while_loop",),
        compiled=False,
    ),
]
# The same, with all that is compiled.
REFUSALS += [
    replace(REFUSALS[-1], outer=None, compiled=True),
    replace(REFUSALS[-1], outer=("while_loop",), inner=None, compiled=True),
]


# Before torch 2.13, ahead of those: whatever jit or torch.compile would have to trace, but for these, which trace their body.
TRACED = ("jit", "named_call")
UNTRACED = Refusal("torch.compile before torch 2.13 cannot trace a lifted module", "", "", None, None, False)


def refusal_of(outer: str, inner: str, compiled=False, traced=_compat.TRACES_MODULES):
    """The first refusal that covers a pair, or None."""
    if not traced and (compiled and outer not in TRACED or (compiled or outer == "jit") and inner not in TRACED):
        return UNTRACED
    return next((refusal for refusal in REFUSALS if refusal.covers(outer, inner, compiled)), None)


# Cells: ``(outer, inner, compiled)`` ---------------------------------------------------------------------------------


def _partner(outer: str):
    """What is compiled inside of ``outer``: the second function after it in the table, or the next that is not refused."""
    names = list(FUNCTIONS)
    at = names.index(outer)
    equal = (name for name in [*names, *names][at + 2 :] if refusal_of(outer, name, True, traced=True) is None)
    return next(equal, names[at - 1])


EAGER = [(outer, inner, False) for outer in [*FUNCTIONS, *OUTSIDE] for inner in FUNCTIONS]
# To compile takes a second or two: of equal pairs each function is in one on each side, and what is refused is refused
# while it is traced. A loop without bound is refused around anything.
COMPILED = [
    (outer, inner, True)
    for outer in FUNCTIONS
    for inner in FUNCTIONS
    if inner == _partner(outer) or outer != "while_loop" and refusal_of(outer, inner, True, traced=True)
]
COMPILED += [(outer, "custom_vjp", True) for outer in TORCHS]


def limits() -> list[str]:
    """What is refused, as a Markdown list."""
    lines = []
    for refusal in REFUSALS:
        outer, inner = (
            ", ".join(f"`{name}`" for name in names or ["anything"]) for names in (refusal.outer, refusal.inner)
        )
        where = f"{outer} of {inner}".replace("`anything`", "anything") + (", compiled" if refusal.compiled else "")
        lines.append(f"- {where}: {refusal.reason}. Instead: {refusal.way}.")
    return lines
