"""What the pipeline's calls share: the number of neighbours, progress, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from knnfast._checks import check_range
from knnfast._phases import phase
from knnfast.mixture import Mixture

if TYPE_CHECKING:
    from knnfast.database import Database, Item

DEFAULT_K = 10  # neighbours of a query


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
