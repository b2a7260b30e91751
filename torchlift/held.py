"""Modules that a body reaches by a closure, or as a global: a recomputation leaves their buffers alone.

NOTE [Held]. Variables of the lifted modules are operands of a body, and published once. A module that its code leads to
by another way is called as it is: gradients of its parameters are right, but its batch statistics would be updated once
more in backward, as ``torch.utils.checkpoint`` does. So a recomputation finds copies of such buffers, as they were
before the body ran.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchlift import _compat
from torchlift.code import names_in, of_library
from torchlift.references import in_cell

_lock = threading.RLock()  # or one thread would take the copies of another for what is to be put back


def modules_held(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules that the code of ``fn``, and of functions in it, leads to."""
    found: dict[int, nn.Module] = {}
    todo: list[Any] = [fn]
    seen = set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif id(value) in seen:
            continue
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            todo += [value.__self__, value.__func__]
        elif isinstance(value, (list, tuple)) and all(isinstance(item, nn.Module) for item in value):
            todo += value
        elif isinstance(value, types.FunctionType):
            todo += [in_cell(cell) for cell in value.__closure__ or ()]
            todo += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            if not of_library(value):
                todo += [value.__globals__.get(name) for name in names_in(value.__code__)]
        seen.add(id(value))
    return list(found.values())


class Held:
    """The buffers of the modules that ``fn`` reaches, as they are before it runs."""

    def __init__(self, fn: Callable[..., Any]):
        modules = {id(m): m for root in modules_held(fn) for m in root.modules()}.values()
        self.stores = [(store, dict(store)) for store in (module._buffers for module in modules) if store]
        with torch.no_grad():
            buffers = {id(b): b for _, own in self.stores for b in own.values() if b is not None}
            self.copies = {at: (buffer, buffer.clone(), _compat.version(buffer)) for at, buffer in buffers.items()}

    @contextmanager
    def again(self) -> Iterator[None]:
        """In this block the modules have copies of what they had; what is done to these is lost."""
        if not self.stores:
            yield
            return
        with _lock:
            stood = [(store, dict(store)) for store, _ in self.stores]
            given = {at: copy.clone() for at, (_, copy, _) in self.copies.items()}
            try:
                for store, own in self.stores:
                    store.update({name: given.get(id(buffer)) for name, buffer in own.items()})
                yield
            finally:
                for store, own in stood:
                    store.clear()
                    store.update(own)

    def put_back(self) -> None:
        """Undoes what a run did that is to be done in another way."""
        for store, own in self.stores:
            store.clear()
            store.update(own)
        with torch.no_grad():
            for buffer, copy, version in self.copies.values():
                if _compat.version(buffer) != version:
                    buffer.copy_(copy)
