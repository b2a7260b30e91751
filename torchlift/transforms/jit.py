"""Lifted jit: a module whose methods run as one compiled graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift._context import context, entered
from torchlift.collecting import Collected
from torchlift.errors import (
    ArgumentError,
    DonatedTensorError,
    PlainAttributeError,
    TransformedMethodReturnValueError,
    UnsupportedError,
)
from torchlift.filters import Filter, check, matches
from torchlift.lifting import Target, Transform, lift
from torchlift.pack import Packed
from torchlift.transforms.donation import Donated, give_up
from torchlift.transforms.jit_state import Watch, traced
from torchlift.transforms.options import check_backend, check_device
from torchlift.variables import AT, Capture, Site, Variable, own_tensors, sow_at


class _Places(NamedTuple):
    """Some of a function's arguments: by position, where the module is 0, and by name."""

    positions: frozenset[int]
    names: frozenset[str]

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
        """Those that a call has, without its module."""
        found: dict[int | str, Any] = {at: arg for at, arg in enumerate(args, 1) if at in self.positions}
        return {**found, **{name: value for name, value in kwargs.items() if name in self.names}}


@dataclass(frozen=True, kw_only=True)
class _Jit(Transform):
    """NOTE [Jit]. The compiled function takes the module itself: Dynamo guards on what the code reads of it, so that
    one graph serves every instance whose static fields agree, and mutates it as the code does. The state that a graph
    computes is that of the plain call; what is left to do is to detach what was rebound, as every publish does.
    """

    variables: Filter = True
    rngs: Filter = True
    static_argnums: tuple[int, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    device: Any = None
    backend: Any = None
    static_argnames: tuple[str, ...] = ()
    donate_argnames: tuple[str, ...] = ()
    fullgraph: bool = True
    dynamic: bool | None = None
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        check_backend(self.backend, self.mode, "jit: got")
        check_device(self.device, "jit: device", there=False)

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        check(self.variables, f"{label}: variables")
        check(self.rngs, f"{label}: rngs")
        if _runs_inline():
            plain = self.variables is True and self.rngs is True
            if plain and (_compat.is_compiling() or AT in module.__dict__):
                return fn(module, *args, **kwargs)  # state belongs to the transform around
            return self._inline(fn, module, args, kwargs, label, inside)
        spelled = args, kwargs
        args, kwargs = _bound(fn, module, args, kwargs)
        static = _places(fn, self.static_argnums, self.static_argnames, f"{label}: static")
        donate = _places(fn, self.donate_argnums, self.donate_argnames, f"{label}: donate")
        key, run = self._compiled(fn, static.of(args, kwargs), label)
        left = [None if at in static.positions else arg for at, arg in enumerate(args, 1)]
        given = {name: value for name, value in kwargs.items() if name not in static.names}
        collected = Collected(module, args, kwargs, label)
        roots, leaves = collected.roots, collected.leaves
        for leaf in leaves:
            if isinstance(leaf, Donated):
                raise leaf.error()
        giving = donate.of(*spelled)
        tensors = [*_tensors(roots), *leaves] if giving or self.device is not None else []
        donated = self._donated(giving, tensors, label)
        self._check_device(tensors, label)
        watch = Watch(collected, label, self.variables, self.rngs, self.fullgraph)
        finished = False
        try:
            with watch:
                out, sown = run(roots, left, given, bool(context.captures))
            finished = True
        except TransformedMethodReturnValueError as error:
            raise TransformedMethodReturnValueError(f"{label}: {error}") from error
        except _compat.capture_errors() as error:
            # A refusal inside is one of compiled code: the plain body would do its work.
            refused = UnsupportedError.__name__ in str(error.__cause__)
            if _compat.comes_from_the_body(error) and not refused:
                self._inline(fn, module, args, kwargs, label, inside, publish=False)  # raises as the body does
            raise UnsupportedError(
                f"{label}: the body cannot be captured as one graph; rewrite what is named below, or pass "
                f"fullgraph=False to let Python run between graphs. {error} {error.__cause__ or ''}".rstrip()
            ) from error
        finally:
            if not finished and watch.has_traced:
                self.compiled.pop(key, None)  # which would not be traced, nor looked at, at the next call
        try:
            watch.check()
        except PlainAttributeError:
            self.compiled.pop(key, None)
            raise
        for at, path, collection, name, value in sown:
            sow_at(roots[at].get_submodule(path), Site(at, path, collection, name), value)
        return give_up(donated, out, roots) if donated else out

    @_compat.outside_of_graphs
    def _inline(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None,
        publish: bool = True,
    ) -> Any:  # fmt: skip
        packed = Packed(fn, module, args, kwargs, label, inside)
        packed.allow(lambda c: matches(self.variables, c), lambda c: f"add {c!r} to variables=")
        streams = [stream for stream in (rng.DROPOUT, *rng.positions()) if not matches(self.rngs, stream)]
        packed.refuse(streams, lambda stream: f"add {stream!r} to rngs=")
        out, update = packed.pure(packed.snapshot(), packed.leaves)
        if publish:
            packed.publish(update)
        return out

    def _compiled(self, fn: Callable[..., Any], static: dict[int | str, Any], label: str) -> tuple[Any, Any]:
        """The compiled function for these static arguments, which are constants in it, and what it is kept under."""
        try:
            key = tuple((place, type(value), value) for place, value in static.items())
            if key not in self.compiled:
                self.compiled[key] = _compat.compile_apart(
                    _body(fn, static),
                    fullgraph=self.fullgraph, dynamic=self.dynamic, backend=self.backend or "inductor",
                    mode=self.mode, options=self.options and dict(self.options),
                )  # fmt: skip
            return key, self.compiled[key]
        except TypeError as error:
            for place, value in static.items():
                if not _is_hashable(value):
                    raise ArgumentError(
                        f"{label}: static argument {place!r} is a {type(value).__name__}, expected a hashable value, "
                        "which tells for which calls to compile anew; pass a tuple for a list"
                    ) from error
            raise  # pragma: no cover

    def _check_device(self, leaves: Sequence[Any], label: str) -> None:
        if self.device is None:
            return
        check_device(self.device, f"{label}: device", there=True)
        expected = torch.empty(0, device=self.device).device
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device != expected:
                raise ArgumentError(
                    f"{label}: a tensor of shape {tuple(leaf.shape)} is on {leaf.device}, expected {expected}; move "
                    "the module and its arguments there"
                )

    def _donated(self, arguments: dict[int | str, Any], tensors: Sequence[Any], label: str) -> list[tuple[Tensor, str]]:
        donated: list[tuple[Tensor, str]] = []
        for place, argument in arguments.items():
            for leaf in _tree.flatten(argument)[0]:
                if isinstance(leaf, Tensor) and all(leaf is not tensor for tensor, _ in donated):
                    donated.append((leaf, f"{label} as argument {place!r}"))
        needed = any(t.requires_grad for t in tensors if isinstance(t, Tensor))
        if donated and torch.is_grad_enabled() and needed:
            raise DonatedTensorError(
                f"{label}: argument {next(iter(arguments))!r} is donated, but a gradient is recorded, whose backward "
                "may need it; call it under torch.no_grad(), or do not donate"
            )
        return donated


def _runs_inline() -> bool:
    """Whether something around the call has to see the operators of the body, which is then not compiled by itself."""
    return (
        _compat.is_tracing()
        or _compat.functorch_active()
        or _compat.forward_ad_active()
        or _compat.dispatch_modes_active()
    )


def _body(fn: Callable[..., Any], static: dict[int | str, Any]) -> Callable[..., Any]:
    """What is compiled: the call, with static arguments in their places; and what it sowed."""

    def jit(roots: list[nn.Module], args: list[Any], kwargs: dict[str, Any], captures: bool) -> tuple[Any, list[Any]]:
        traced()
        module = roots[0]
        args = [static.get(at, arg) for at, arg in enumerate(args, 1)]
        kwargs = {**kwargs, **{name: value for name, value in static.items() if isinstance(name, str)}}
        frame = _Frame(roots, context.captures)
        # Before the body: of a module that was changed Dynamo lists no modules.
        owners = [] if AT in module.__dict__ else [owner for root in roots for owner in root.modules()]
        aliases = _aliased_scalars(owners)
        with entered(captures=(frame,) if captures else ()):
            out = fn(module, *args, **kwargs)
        if any(isinstance(leaf, (nn.Module, Variable)) for leaf in _tree.flatten(out)[0]):
            raise TransformedMethodReturnValueError(
                "returned a module or a Variable, expected tensors: it means nothing outside of the transform; return "
                "its tensors, or what you compute with it"
            )
        for owner, key, given, alias in aliases:
            if owner._buffers.get(key) is alias:
                owner._buffers[key] = given
        for owner in owners:
            for key, tensor in owner._buffers.items():
                if tensor is not None and tensor.requires_grad:
                    owner._buffers[key] = tensor.detach()
        return out, frame.values

    return jit


def _aliased_scalars(owners: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Puts aliases in the place of the buffers that torch.compile would lose writes into."""
    found = []
    for owner in owners:
        for key, tensor in owner._buffers.items():
            if tensor is not None and (alias := _compat.writable(tensor)) is not tensor:
                found.append((owner, key, tensor, alias))
    for owner, key, _, alias in found:
        owner._buffers[key] = alias
    return found


class _Frame(Capture):
    """Collects what a graph sows, to be sown again outside of it."""

    def __init__(self, roots: Sequence[nn.Module], captures: Sequence[Capture]):
        super().__init__(True)
        self.filters = [capture.filter for capture in captures]
        self.places = [
            (at, *place) for at, root in enumerate(roots if captures else ()) for place in root.named_modules()
        ]
        self.values: list[tuple[int, str, str, str, Any]] = []

    def add(self, module: nn.Module, collection: str, name: str, value: Any, path: str = "") -> None:
        if any(matches(filter, collection) for filter in self.filters):
            for at, found, candidate in self.places:
                if candidate is module:
                    self.values.append((at, found, collection, name, value))
                    return


# Arguments -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _places(fn: Callable[..., Any], positions: tuple[int, ...], names: tuple[str, ...], where: str) -> _Places:
    """Arguments told by position or by name, each by both where it can be passed by both."""
    parameters = list(inspect.signature(fn).parameters.values())
    ordered = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_name = {p.name: at for at, p in enumerate(ordered) if p.kind is p.POSITIONAL_OR_KEYWORD}
    by_position = {at: name for name, at in by_name.items()}
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_names = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for at in positions:
        if at % max(len(ordered), 1) == 0 and abs(at) <= len(ordered) and at <= 0:
            raise ArgumentError(f"{where}_argnums has {at}, which is the module; count its arguments from 1")
        if not (-len(ordered) < at < len(ordered) or (open_ended and at > 0)):
            raise ArgumentError(f"{where}_argnums has {at}, expected 1 to {len(ordered) - 1}, the module being 0")
    for name in names:
        if name not in known and not open_names:
            raise ArgumentError(f"{where}_argnames has {name!r}, expected one of {[p.name for p in parameters[1:]]}")
    numbers = {at % len(ordered) if at < 0 else at for at in positions}
    return _Places(
        frozenset(numbers | {by_name[name] for name in names if name in by_name}),
        frozenset({*names, *(by_position[at] for at in numbers if at in by_position)}),
    )


_signature = functools.lru_cache(maxsize=1024)(functools.partial(inspect.signature, follow_wrapped=False))


def _bound(fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments by position where they can be, so that what is called the one way and the other is compiled once."""
    if not kwargs:
        return args, kwargs
    try:
        bound = _signature(fn).bind(module, *args, **kwargs)
    except TypeError:  # arguments that do not fit are refused where the body is called
        return args, kwargs
    return bound.args[1:], bound.kwargs


def _tensors(roots: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for root in roots for owner in root.modules() for _, _, tensor in own_tensors(owner)]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def jit(
    target: Target = None,
    variables: Filter = True,
    rngs: Filter = True,
    static_argnums: int | Iterable[int] = (),
    donate_argnums: int | Iterable[int] = (),
    device: torch.device | str | None = None,
    backend: str | Callable[..., Any] | None = None,
    methods: Any = None,
    *,
    static_argnames: str | Iterable[str] = (),
    donate_argnames: str | Iterable[str] = (),
    fullgraph: bool = True,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles a module's methods.

    The lifted counterpart of ``jax.jit`` (and of ``flax.linen.jit``), by way of ``torch.compile``. One compilation
    serves all instances of a class whose static fields agree; there is one more for each new static argument, one for
    the first other batch size. Their number has no limit, but for instances of one class, which torch holds to
    ``torch._dynamo.config.accumulated_recompile_limit`` different ones. A body that cannot be captured as one graph
    raises, rather than run slowly. A plain number is a constant: a body that reads one and changes it is compiled anew
    in each call, which is said once. Inside of another transform, ``torch.compile`` among them, the body is part of
    that.

    Args:
        target: a module class, a ``functools.partial`` of one, a function ``(module, *args)``, or nothing, for use as
            a decorator.
        variables: the collections that the body may change.
        rngs: the random streams that it may draw from. The draws are those of the plain call where the backend keeps
            them; Inductor does with ``options={"fallback_random": True}``.
        static_argnums: arguments, by position with the module as 0, that are constants in the graph: any hashable
            value.
        donate_argnums: arguments whose memory is freed after the call; a later use of them raises. Refused where a
            gradient is recorded.
        device: where all tensors have to be; it is checked, and nothing is moved.
        backend: that of ``torch.compile``; Inductor by default.
        methods: the methods to lift, for a class: a list, or a dict of arguments for each.
        static_argnames: as ``static_argnums``, by name.
        donate_argnames: as ``donate_argnums``, by name.
        fullgraph: False lets Python run between several graphs, where the body cannot be captured as one.
        dynamic: that of ``torch.compile``.
        mode: that of ``torch.compile``.
        options: those of ``torch.compile``.

    Returns:
        A subclass of ``target``, or a function of the same signature, with the same values, gradients and state.

    Raises:
        ArgumentError: a static argument is not hashable, a number or name fits no argument, a tensor is elsewhere than
            on ``device``.
        DonatedTensorError: a donated tensor was used, or is donated where autograd may need it.
        ModifyCollectionError: the body changed a collection outside of ``variables``.
        OptionError: there is no such backend, mode or device.
        PlainAttributeError: the body left a tensor in a plain attribute, or in a list or dict there.
        RandomnessError: the body drew from a stream outside of ``rngs``.
        TransformTargetError: ``target`` is a module instance, or nothing that can be lifted.
        UnsupportedError: the body cannot be captured as one graph, with torch's reason.

    Example:
        >>> Fast = torchlift.jit(torch.nn.Linear, backend="aot_eager")
        >>> layers = [Fast(4, 4) for _ in range(3)]  # compiled once for all
        >>> layers[0](torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """
    arguments = {
        "variables": variables, "rngs": rngs, "static_argnums": static_argnums, "donate_argnums": donate_argnums,
        "device": device, "backend": backend, "static_argnames": static_argnames, "donate_argnames": donate_argnames,
        "fullgraph": fullgraph, "dynamic": dynamic, "mode": mode, "options": options,
    }  # fmt: skip
    return lift(_Jit, target, arguments, methods)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, (int, str)) else tuple(value)
