"""What the pipeline's calls share: checks of arguments, progress, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch

from knnfast._phases import phase
from knnfast.mixture import Mixture

if TYPE_CHECKING:
    from knnfast.database import Database, Item

DEFAULT_K = 10  # neighbours of a query


def check_range(
    name: str, value: int, low: int, high: int | None = None, why_high: str = ""
) -> None:
    """Refuse what is no whole number, or one out of its range."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} ... {high}"
        allowed += f" ({why_high})" if why_high else ""
        raise ValueError(f"{name}: must be {allowed}, got {value}")


def check_number(name: str, value: float) -> None:
    """Refuse what is no real number; its range is the caller's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name}: must be within the range of a float") from None


def check_flag(name: str, value: bool) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def scaled(
    callback: Callable[[int, int], None] | None, part: int, parts: int
) -> Callable[[int, int], None] | None:
    """A callback for one of several equal parts, told in terms of the whole."""
    if callback is None:
        return None
    return lambda done, total: callback(part * total + done, parts * total)


class Clock:
    """Measures phases, and names them to profilers."""

    def __init__(self, timings: dict[str, float], device: torch.device) -> None:
        self.timings = timings
        self.device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to those under a name."""
        start = time.perf_counter()
        with phase(name):
            yield
            if self.device.type == "cuda":  # not the device: a thread may be recording a graph
                torch.cuda.current_stream(self.device).synchronize()
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def choose_neighbours(
    db: Database | Mixture,
    k: int | None,
    groups: Sequence[str] | None,
    where: Callable[[Item], bool] | None,
) -> tuple[int, np.ndarray | None]:
    """How many neighbours to search, and the ids that a filter leaves, [n] int64; None: all.

    k None: DEFAULT_K, or as many as there are.
    """
    ids = None if groups is None and where is None else db.ids_of(groups, where)
    if ids is None:
        size, what, empty = len(db), "the size of the database", "database: holds no image"
    else:
        size, what, empty = len(ids), "what the filter leaves", "groups, where: leave no image"
    if size == 0:
        raise ValueError(empty)
    if k is None:
        k = max(1, db.most(DEFAULT_K, ids))
    check_range("k", k, 1, size, what)
    if isinstance(db, Mixture):
        db.check_shares(k, ids)
    return k, ids
