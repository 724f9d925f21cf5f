"""What a service under load must answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from knnfast.benchmark.topk import Truth

Search = Callable[[np.ndarray], Any]  # one query [d] -> its answer
Answer = tuple[int, Any]  # a query's number, and what a search said


class Expected:
    """The answers to all queries: those of searches alone, which FP64 agrees with.

    Args:
        among: the rows that may be found, as a mask; all by default.
    """

    def __init__(
        self,
        search: Search,
        rows: np.ndarray,
        queries: np.ndarray,
        k: int,
        among: np.ndarray | None = None,
    ) -> None:
        self.place = np.arange(len(rows))  # of a row among those that may be found
        if among is not None:
            self.place = np.where(among, np.cumsum(among) - 1, -1)
        self.truth = Truth(rows[self.place >= 0], queries, k, check=len(queries))
        answers = [search(q) for q in queries]
        self.scores = np.stack([scores for scores, _ in answers])
        self.ids = np.stack([ids for _, ids in answers])
        self.verdicts: dict[tuple[int, ...], bool] = {}
        close = np.allclose(self.scores, self.truth.best, rtol=1e-6, atol=1e-6)
        if not (close and self.truth.judge(self.place[self.ids])["exact"]):
            raise SystemExit("a search alone is not exact: nothing is measured")

    def same(self, answers: list[Answer]) -> bool:
        """Ends the script at an answer with other ids or other bits of a score."""
        for at, (scores, ids) in answers:
            if not ((ids == self.ids[at]).all() and (scores == self.scores[at]).all()):
                raise SystemExit(
                    f"a wrong answer under load, query {at}: rows {ids.tolist()}, scores "
                    f"{scores.tolist()}; alone {self.ids[at].tolist()}, {self.scores[at].tolist()}"
                )
        return True

    def best(self, answers: list[Answer]) -> bool:
        """Whether all answers, ids [1, k], are the best rows in any order."""
        return all(self._best(at, ids.reshape(-1)) for at, ids in answers)

    def _best(self, at: int, ids: np.ndarray) -> bool:
        key = (at, *sorted(ids.tolist()))
        if key not in self.verdicts:
            answer = self.ids.copy()
            answer[at] = ids
            self.verdicts[key] = self.truth.judge(np.where(answer < 0, -1, self.place[answer]))[
                "exact"
            ]
        return self.verdicts[key]
