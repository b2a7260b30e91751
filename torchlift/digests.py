"""Content keys that are hashed once, and their digests, the same in every process that runs the same code."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections import Counter
from collections.abc import Hashable
from typing import Any

from torchlift._compat import pytree
from torchlift.errors import UnsupportedError
from torchlift.nodes import ATOMS


class Key(tuple[Hashable, ...]):
    """A large key, which is hashed once."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)


def digest(key: Hashable, by_address: bool = True) -> str:
    """A hash of a key's content, the same in every process that runs the same code.

    What has no content that can be told is told by its address, for as long as it lives; or is refused.

    Raises:
        UnsupportedError: there is such a thing, and ``by_address`` is False.
    """
    text = _text(key)
    if not by_address and _ADDRESS in text:
        raise UnsupportedError("a plain value can only be told by its address")
    return hashlib.sha256(text.encode()).hexdigest()


_ADDRESS = "\0"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_text(item) for item in value) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(_text(item) for item in value)) + "}"
    if isinstance(value, pytree.TreeSpec):
        return repr(value)
    if isinstance(value, types.CodeType):
        return _text((value.co_code.hex(), value.co_consts, value.co_names, value.co_varnames, value.co_freevars))
    if isinstance(value, type):
        return _source(value)
    if isinstance(value, ATOMS):
        return f"{type(value).__name__}:{value!r}"
    if value is Ellipsis or value is NotImplemented:
        return repr(value)
    if isinstance(value, types.BuiltinFunctionType) and (value.__self__ is None or inspect.ismodule(value.__self__)):
        return f"builtin {value.__module__}.{value.__qualname__}"
    # By address, true in this process only: another one compiles anew, which is slow and never wrong.
    return f"{type(value).__qualname__}{_ADDRESS}{id(value)}"


_sources: Counter[str] = Counter()  # how many classes have this source


@functools.cache
def _source(cls: type) -> str:
    """The source of a class, and a number: a function that makes classes, or a transform, makes many of one source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # typed in, or generated
        source = repr(sorted(map(str, vars(cls))))
    source = f"{cls.__module__}.{cls.__qualname__}:{source}"
    _sources[source] += 1
    return f"{_sources[source]}:{source}"
