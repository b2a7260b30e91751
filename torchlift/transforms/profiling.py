"""Spans in torch.profiler, named by module path and method."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from torchlift import _compat
from torchlift.engine import spans
from torchlift.errors import TransformTargetError
from torchlift.variables import AT, outer_place


class _Open(threading.local):
    """The spans that are open, per thread, innermost last."""

    def __init__(self) -> None:
        self.modules: tuple[tuple[nn.Module, str], ...] = ()  # and the name of each
        # Of modules bound in the body of a transform: number and name of their root. Constants: a rematerialised
        # region that Dynamo traces may set nothing else, and has to put it back.
        self.bound: tuple[tuple[int, str], ...] = ()
        self.hooked: tuple[Any, ...] = ()  # what the hooks below opened


_running = _Open()
_traced = _Open()  # a trace has spans of its own: what is compiled may not depend on who calls it
_hooks: list[Any] = []


class _Entered:
    """Notes that the span of a module is open."""

    def __init__(self, module: nn.Module, opened: _Open | spans.Recorder):
        self.opened, self.modules, self.bound = opened, opened.modules, opened.bound
        self.is_bound = AT in module.__dict__
        if not self.is_bound:
            self.name = _name(module, opened.modules)
            opened.modules = (*opened.modules, (module, self.name))
            return
        number, path, root = outer_place(module)
        # In a capture not the name of today: the same graph serves other roots.
        name = f"{{{number}}}" if isinstance(opened, spans.Recorder) else _root_name(number, root, opened)
        self.name = _joined(name, path)
        opened.bound = (*opened.bound, (number, name))

    def leave(self) -> None:
        if self.is_bound:
            self.opened.bound = self.bound
        else:  # not both: see above
            self.opened.modules = self.modules


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _name(module: nn.Module, around: tuple[tuple[nn.Module, str], ...]) -> str:
    """What a module that is bound in no body is called, with these around it."""
    for outer, name in reversed(around):
        for path, candidate in outer.named_modules():
            if candidate is module:
                return _joined(name, path)
    return type(module).__name__


def _root_name(number: int, root: nn.Module, opened: _Open) -> str:
    """What a root of the outermost body is called: as where something of it was named before."""
    return next((name for at, name in reversed(opened.bound) if at == number), None) or _name(root, opened.modules)


def names_of(roots: Sequence[nn.Module]) -> tuple[str, ...]:
    """What the roots of a call are called in traces, by the spans that are open."""
    opened, names = _traced if _compat.is_compiling() else _running, []
    for module in roots:
        if AT in module.__dict__:
            number, path, root = outer_place(module)
            names.append(_joined(_root_name(number, root, opened), path))
        else:
            names.append(_name(module, opened.modules))
    return tuple(names)


def traced_names(*calls: Sequence[nn.Module]) -> list[str]:
    """As :func:`names_of` for each of many calls, while Dynamo traces; the names of one in lines.

    Dynamo would take long to look for each among all modules.
    """
    names = [name for _, name in _traced.modules]
    modules = [module for module, _ in _traced.modules]
    return _names_in(names, [len(roots) for roots in calls], *modules, *[root for roots in calls for root in roots])


def traced_names_within(holder: nn.ModuleList) -> list[str]:
    """As :func:`traced_names`, for modules in a list that the graph does not hold; one name if all have the same."""
    if not _traced.modules:
        return [_compat.ask(holder, "kind")]
    return _names_within([name for _, name in _traced.modules], holder, *[module for module, _ in _traced.modules])


@torch.compiler.assume_constant_result
def _names_within(names: list[str], holder: nn.ModuleList, *modules: nn.Module) -> list[str]:
    opened = tuple(zip(modules, names))
    return [_name(module, opened) for module in holder]


@torch.compiler.assume_constant_result
def _names_in(names: list[str], counts: list[int], *modules: nn.Module) -> list[str]:
    opened = tuple(zip(modules, names))
    roots = iter(modules[len(names) :])
    return ["\n".join(_name(next(roots), opened) for _ in range(count)) for count in counts]


def named_call(class_fn: Callable[..., Any], force: bool = True) -> Callable[..., Any]:
    """Labels a method in traces of ``torch.profiler``, by the path of its module and its own name.

    The counterpart of ``flax.linen.named_call``. The span ``Net.layers.0.forward`` is the method ``forward`` of the
    module ``layers.0`` in the outermost labelled one, a ``Net``; if none is around, in what was lifted. It is there in
    eager runs, in what ``torch.compile`` makes of them, and in the loops that torchlift compiles, where each layer has
    its own path. A label changes no bit of a result. In a compiled loop the kernels of a method lie in its span, one
    that does the work of several methods in that of the last; in what ``torch.compile`` makes, a span says where the
    method begins, not how long it takes. Backward has no spans, but where it runs a forward again. In compiled code a
    span costs about 5 us while no profiler runs, elsewhere next to nothing.

    Args:
        class_fn: a method, or a function whose first argument is a module.
        force: False to label it only while :func:`enable_named_call` is in effect.

    Returns:
        A function of the same signature.

    Raises:
        TransformTargetError: ``class_fn`` is a class, a module or not callable, or its first argument is no module.

    Example:
        >>> class Net(torch.nn.Linear):
        ...     @torchlift.named_call
        ...     def forward(self, x):
        ...         return super().forward(x)
        >>> with torch.profiler.profile() as trace:
        ...     _ = Net(2, 2)(torch.ones(2))
        >>> [event.name for event in trace.events() if "Net" in event.name]
        ['Net.forward']
    """
    if isinstance(class_fn, (type, nn.Module)) or not callable(class_fn):
        raise TransformTargetError(
            f"named_call: got {class_fn!r}, expected a method, or a function whose first argument is a module; "
            "decorate the class's forward"
        )
    method = getattr(class_fn, "__name__", "function")

    @functools.wraps(class_fn)
    def named(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, nn.Module):
            raise TransformTargetError(
                f"named_call({method}): the first argument is a {type(module).__name__}, expected a module"
            )
        if not force:
            if not _compat.is_compiling():
                spans.met_optional()
            if not spans.enabled():
                return class_fn(module, *args, **kwargs)
        if _compat.is_compiling():
            entered = _Entered(module, _traced)
            enter, leave = spans.traced()
            enter(f"{entered.name}.{method}")
            out = class_fn(module, *args, **kwargs)
            leave()
            entered.leave()
            return out
        recorder = spans.recorder()
        if recorder is not None:
            entered = _Entered(module, recorder)
            recorder.enter(f"{entered.name}.{method}")
            try:
                return class_fn(module, *args, **kwargs)
            finally:
                recorder.leave()
                entered.leave()
        if not _compat.is_profiling() or _compat.is_tracing():  # what is traced takes no time of its own
            return class_fn(module, *args, **kwargs)
        entered = _Entered(module, _running)
        try:
            with record_function(f"{entered.name}.{method}"):
                return class_fn(module, *args, **kwargs)
        finally:
            entered.leave()

    return named


# Everywhere ----------------------------------------------------------------------------------------------------------


def _enter(module: nn.Module, args: Any) -> None:
    if _compat.is_compiling() or not _compat.is_profiling() or _compat.is_tracing():
        return
    entered = _Entered(module, _running)
    span = record_function(f"{entered.name}.forward")
    span.__enter__()
    _running.hooked = (*_running.hooked, (module, entered, span))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _compat.is_compiling() or not _running.hooked or _running.hooked[-1][0] is not module:
        return
    *before, (_, entered, span) = _running.hooked
    _running.hooked = tuple(before)
    entered.leave()
    span.__exit__(None, None, None)


def enable_named_call() -> None:
    """Labels every call of every module in profiler traces, until :func:`disable_named_call`.

    Code that is compiled keeps the labels of :func:`named_call` alone; loops whose bodies have optional ones are
    compiled once with and once without them. What ``torch.compile`` has traced keeps those that it met.

    Example:
        >>> torchlift.enable_named_call()
        >>> with torch.profiler.profile() as trace:
        ...     _ = torch.nn.Sequential(torch.nn.ReLU())(torch.ones(2))
        >>> [event.name for event in trace.events() if "Sequential" in event.name]
        ['Sequential.forward', 'Sequential.0.forward']
        >>> torchlift.disable_named_call()
    """
    spans.enable(True)
    if not _hooks:
        _hooks.append(nn.modules.module.register_module_forward_pre_hook(_enter))
        _hooks.append(nn.modules.module.register_module_forward_hook(_leave, always_call=True))


def disable_named_call() -> None:
    """Ends :func:`enable_named_call`. Methods under ``named_call(force=True)`` stay labelled.

    Example:
        >>> torchlift.disable_named_call()
    """
    spans.enable(False)
    while _hooks:
        _hooks.pop().remove()


@contextmanager
def override_named_call(enable: bool = True) -> Iterator[None]:
    """Enables or disables named calls for the duration of a block.

    Args:
        enable: which of the two.

    Example:
        >>> with torchlift.override_named_call():
        ...     with torch.profiler.profile() as trace:
        ...         _ = torch.nn.ReLU()(torch.ones(2))
        >>> any(event.name == "ReLU.forward" for event in trace.events())
        True
    """
    before = spans.enabled()
    (enable_named_call if enable else disable_named_call)()
    try:
        yield
    finally:
        (enable_named_call if before else disable_named_call)()
