"""A run on fakes that nobody notices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchlift import _compat
from torchlift.engine.draws import undone_draws


@contextmanager
def quiet() -> Iterator[None]:
    """A block that changes nothing outside, and does not log with its whole stack that a shape does not fit.

    Who runs into such an error on fakes tells of it, or runs the same on tensors and has torch's own.

    NOTE [autocast cache]: casts of fakes must not end up in the cache of real ones.
    """
    # A new filter for each block, since blocks nest.
    is_news = lambda record: not str(record.msg).startswith("failed while attempting to run meta")
    log, cached = logging.getLogger(_compat.FakeTensorMode.__module__), torch.is_autocast_cache_enabled()
    log.addFilter(is_news)
    torch.set_autocast_cache_enabled(False)
    try:
        with undone_draws():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        log.removeFilter(is_news)
