"""Named phases of longer work, for profilers: Nsight Systems (package `nvtx`) and torch's own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@functools.cache
def _nvtx() -> Any:
    """The package `nvtx`, or None."""
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range `knnfast.<name>` for the profilers that are there; microseconds where none listens.

    Used around phases and steps, never inside an op.
    """
    label = f"knnfast.{name}"
    nvtx = _nvtx()
    torch = sys.modules.get("torch")
    token = None if nvtx is None else nvtx.start_range(label, domain="knnfast")
    try:
        if torch is not None and torch.autograd._profiler_enabled():
            with torch.profiler.record_function(label):
                yield
        else:
            yield
    finally:
        if nvtx is not None:
            nvtx.end_range(token)
