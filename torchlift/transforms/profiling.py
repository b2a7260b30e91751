"""Spans in torch.profiler, named by module path and method."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from torchlift import _compat
from torchlift.errors import TransformTargetError
from torchlift.variables import AT

Open = tuple[tuple[nn.Module, str], ...]  # the modules of the spans that are open, innermost last, and their names


class _State(threading.local):
    """One per thread. A trace has spans of its own: what is compiled may not depend on who calls it."""

    def __init__(self) -> None:
        self.running: Open = ()
        self.traced: Open = ()
        self.handles: list[tuple[Any, Open]] = []  # of spans that hooks opened


_state = _State()
_enabled = False
_hooks: list[Any] = []


def _name(module: nn.Module, around: Open) -> str:
    for outer, prefix in reversed(around):
        for path, candidate in outer.named_modules():
            if candidate is module:
                return f"{prefix}.{path}" if path else prefix
    # Bound in the body of a transform: the path in the transform's root is known, and what called the transform.
    _, path = module.__dict__.get(AT, (0, ""))
    prefix = around[-1][1] if around and AT in module.__dict__ else type(module).__name__
    return f"{prefix}.{path}" if path else prefix


def named_call(class_fn: Callable[..., Any], force: bool = True) -> Callable[..., Any]:
    """Labels a method in traces of ``torch.profiler``, by the path of its module and its own name.

    The counterpart of ``flax.linen.named_call``. The span ``Net.layers.0.forward`` is the method ``forward`` of the
    module ``layers.0`` in the outermost labelled one, a ``Net``. It is there in eager runs and in what
    ``torch.compile`` makes of them. Costs next to nothing while no profiler runs.

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
            f"named_call: got {class_fn!r}, expected a method, or a function whose first argument is a module; decorate "
            "the class's forward"
        )
    method = getattr(class_fn, "__name__", "function")

    @functools.wraps(class_fn)
    def named(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, nn.Module):
            raise TransformTargetError(
                f"named_call({method}): the first argument is a {type(module).__name__}, expected a module"
            )
        if not (force or _enabled):
            return class_fn(module, *args, **kwargs)
        if _compat.is_compiling():
            return _traced(class_fn, method, module, args, kwargs)
        if not _compat.is_profiling():
            return class_fn(module, *args, **kwargs)
        before = _state.running
        name = _name(module, before)
        _state.running = (*before, (module, name))
        try:
            with record_function(f"{name}.{method}"):
                return class_fn(module, *args, **kwargs)
        finally:
            _state.running = before

    return named


def _traced(class_fn: Callable[..., Any], method: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    before = _state.traced
    name = _name(module, before)
    _state.traced = (*before, (module, name))
    _compat.keep_spans()
    with record_function(f"{name}.{method}"):
        _compat.keep_spans_no_more()
        try:
            out = class_fn(module, *args, **kwargs)
        finally:
            _state.traced = before
        _compat.keep_spans()
    _compat.keep_spans_no_more()
    return out


# Everywhere ----------------------------------------------------------------------------------------------------------


def _enter(module: nn.Module, args: Any) -> None:
    if _compat.is_compiling() or not _compat.is_profiling():
        return
    before = _state.running
    name = _name(module, before)
    span = record_function(f"{name}.forward")
    span.__enter__()
    _state.handles.append((span, before))
    _state.running = (*before, (module, name))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _compat.is_compiling() or not _state.running or _state.running[-1][0] is not module or not _state.handles:
        return
    span, _state.running = _state.handles.pop()
    span.__exit__(None, None, None)


def enable_named_call() -> None:
    """Labels every call of every module in profiler traces, until :func:`disable_named_call`.

    Code that is compiled keeps the labels of :func:`named_call` alone.

    Example:
        >>> torchlift.enable_named_call()
        >>> with torch.profiler.profile() as trace:
        ...     _ = torch.nn.Sequential(torch.nn.ReLU())(torch.ones(2))
        >>> [event.name for event in trace.events() if "Sequential" in event.name]
        ['Sequential.forward', 'Sequential.0.forward']
        >>> torchlift.disable_named_call()
    """
    global _enabled
    _enabled = True
    if not _hooks:
        _hooks.append(nn.modules.module.register_module_forward_pre_hook(_enter))
        _hooks.append(nn.modules.module.register_module_forward_hook(_leave, always_call=True))


def disable_named_call() -> None:
    """Ends :func:`enable_named_call`. Methods under ``named_call(force=True)`` stay labelled.

    Example:
        >>> torchlift.disable_named_call()
    """
    global _enabled
    _enabled = False
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
    before = _enabled
    (enable_named_call if enable else disable_named_call)()
    try:
        yield
    finally:
        (enable_named_call if before else disable_named_call)()
