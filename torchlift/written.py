"""Which buffers layers are given as copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torchlift.engine.compiled import SIGNATURES
from torchlift.engine.run import last_report
from torchlift.errors import UnsupportedError

_changes: OrderedDict[Any, frozenset[int]] = OrderedDict()


class Written:
    """Which buffers, by their number, the compiled calls of one kind change: the same in each, once that is known.

    NOTE [Copies]. A large buffer that is constant, a mask say, is not copied in each call for those that are not.
    """

    def __init__(self, call: Any):
        self.call, self.known = call, _changes.get(call)

    def note(self, entries: Iterable[int]) -> None:
        self.known = frozenset(entries)
        report = last_report()
        if self.call is None or report is None or report.path != "compiled":
            return  # what the plain loop writes may depend on values
        _changes.pop(self.call, None)
        _changes[self.call] = self.known
        while len(_changes) > SIGNATURES:
            _changes.popitem(last=False)

    def require_apart(self, shared: frozenset[int]) -> None:
        """Refuses layers that write what others read: side by side they would all see what was there before."""
        if self.known and self.known & shared:
            raise UnsupportedError("layers share a buffer that they write")
