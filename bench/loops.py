"""Closed and open loops of many client threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from answers import Answer, Search


def in_threads(clients: int, work: Callable[[int], None]) -> None:
    """Runs work(i) in as many threads; the first exception is raised here."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _Request:
    """A query that waits, its answer, and what wakes its thread: the answer, or its turn."""

    def __init__(self, query: np.ndarray) -> None:
        self.query, self.answer, self.wake = query, None, threading.Event()


class Joiner:
    """Joins the searches of many threads: while one batch runs, the next one gathers.

    Args:
        search: queries [m, d] -> an answer for each, which can be indexed.
    """

    def __init__(self, search: Callable[[np.ndarray], Any]) -> None:
        self._search = search
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._busy = False  # somebody searches

    def search(self, query: np.ndarray) -> Any:
        """The answer to one query [d], found with those of others that wait."""
        mine = _Request(query)
        with self._lock:
            self._waiting.append(mine)
            waits, self._busy = self._busy, True
        if waits:
            mine.wake.wait()
        if mine.answer is None:  # its turn to search, for all that wait
            with self._lock:
                batch, self._waiting = self._waiting, []
            found = self._search(np.stack([each.query for each in batch]))
            with self._lock:
                for each, answer in zip(batch, found, strict=True):
                    each.answer = answer
                following = self._waiting[:1]
                self._busy = bool(following)
            for each in [*batch, *following]:
                each.wake.set()
        return mine.answer


def closed_loop(
    search: Search, queries: np.ndarray, clients: int, seconds: float
) -> tuple[np.ndarray, float, list[Answer]]:
    """Latencies in seconds, queries per second, and the answers."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    answers: list[list[Answer]] = [[] for _ in range(clients)]
    end = time.perf_counter() + seconds

    def work(i: int) -> None:
        at = i
        while (begin := time.perf_counter()) < end or not latencies[i]:
            answer = search(queries[at % len(queries)])
            latencies[i].append(time.perf_counter() - begin)
            answers[i].append((at % len(queries), answer))
            at += clients

    start = time.perf_counter()
    in_threads(clients, work)
    seconds = time.perf_counter() - start
    every = np.concatenate([np.array(each) for each in latencies])
    return every, len(every) / seconds, [answer for each in answers for answer in each]


def open_loop(
    search: Search, queries: np.ndarray, clients: int, arrivals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[Answer]]:
    """Latencies in seconds, counted from the arrivals (seconds from the start).

    Also when each search began and ended, [queries, 2], and the answers.
    """
    spans = np.full((len(arrivals), 2), np.nan)
    answers: list[Answer] = []
    lock = threading.Lock()
    todo = iter(range(len(arrivals)))
    start = time.perf_counter() + 0.05

    def work(_: int) -> None:
        while True:
            with lock:
                i = next(todo, None)
            if i is None:
                return
            due = start + arrivals[i]
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            spans[i, 0] = time.perf_counter()
            answer = search(queries[i % len(queries)])
            spans[i, 1] = time.perf_counter()
            answers.append((i % len(queries), answer))

    in_threads(clients, work)
    return spans[:, 1] - start - arrivals, spans, answers
