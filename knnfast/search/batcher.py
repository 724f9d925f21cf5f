"""`Batcher`: many threads' small queries, one scan."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from knnfast.search import interop
from knnfast.search.index import Index


class _Kind(NamedTuple):
    """Requests of one kind share a search. Filters are compared by identity."""

    k: int
    allow: int
    deny: int


class _Group:
    """Requests that wait for the same search."""

    def __init__(self) -> None:
        self.queries: list[np.ndarray] = []
        self.rows = 0
        self.full = threading.Event()  # no reason to wait any longer
        self.done = threading.Event()
        self.found: tuple[np.ndarray, np.ndarray] | None = None  # None after done: it failed

    def add(self, q: np.ndarray) -> slice:
        """Append queries and return which rows of the result will be theirs."""
        first = self.rows
        self.queries.append(q)
        self.rows += len(q)
        return slice(first, self.rows)


class Batcher:
    """Collects the queries of many threads and answers them with one search.

    The first caller of a kind (same k, same filter objects) leads: it waits up to the deadline for
    others, then until the search before it has ended, and searches for all who came meanwhile.
    There is no thread of its own, and one search at a time. Searches of a large CPU index are
    handed on, with neither deadline nor max_batch: `Index.search` joins them by itself, up to 32
    queries. Answers are `Index.search`'s, bit for bit, and so are errors: a bad call raises in its
    own thread and disturbs nobody.

    Args:
        index: what is searched; it may grow and shrink meanwhile.
        deadline_ms: how long a first caller waits for others, >= 0; 0 collects only those who come
            while another search runs.
        max_batch: queries that end the waiting, >= 1.
    Raises: ValueError range; TypeError type.
    Queries on a GPU pass through host memory. After a fork, make a new Batcher.
    Example: >>> with Batcher(ix, deadline_ms=1.0) as batcher:
             ...     scores, ids = batcher.search(query, k=10)  # from any number of threads
    """

    def __init__(self, index: Index, deadline_ms: float = 1.0, max_batch: int = 64) -> None:
        if not isinstance(index, Index):
            raise TypeError(f"index must be a knnfast.Index, got {type(index).__name__}")
        deadline_ms = interop.as_float(deadline_ms, "deadline_ms")
        if not 0 <= deadline_ms <= 1000 * threading.TIMEOUT_MAX:
            raise ValueError(
                f"deadline_ms must be 0 to {1000 * threading.TIMEOUT_MAX:.3g}, got {deadline_ms}"
            )
        max_batch = interop.as_int(max_batch, "max_batch")
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.index = index
        self.deadline_ms = deadline_ms
        self.max_batch = max_batch
        self._groups: dict[_Kind, _Group] = {}  # those that still take requests
        self._lock = threading.Lock()  # of everything here but _calls
        self._idle = threading.Condition(self._lock)
        self._turn = threading.Lock()  # held by the one that searches
        self._closed = False
        self._calls: set[object] = set()  # that are not answered
        self._stats = {"requests": 0, "queries": 0, "searches": 0}

    @property
    def stats(self) -> dict[str, int]:
        """Counters so far: requests and queries that were collected, searches that succeeded.

        Those that were handed on are counted by the index.
        """
        with self._lock:
            return dict(self._stats)

    def search(self, queries: Any, k: int, allow: Any = None, deny: Any = None) -> tuple[Any, Any]:
        """`Index.search`, together with what other threads ask within the deadline.

        Args: as in `Index.search`. A filter object must not change while it is in use here.
        Returns: scores [M, k] float32 and ids [M, k] int64 ([k] for one query), in the framework
            and on the device of the queries.
        Raises: what `Index.search` raises; RuntimeError when the batcher is closed.
        """
        # What is handed on takes no lock: a set's add and remove are atomic. The call is in it
        # before it looks at _closed, which `close` sets before it looks at the set.
        call = object()
        self._calls.add(call)
        try:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if self.index._joins:
                return self.index.search(queries, k, allow, deny)
            return self._collect(queries, k, allow, deny)
        finally:
            self._calls.remove(call)
            if self._closed:
                with self._lock:
                    self._idle.notify_all()

    def _collect(self, queries: Any, k: int, allow: Any, deny: Any) -> tuple[Any, Any]:
        k = interop.as_int(k, "k")
        rows = interop.as_rows(queries, "queries")
        shape, found = rows.array.shape, None
        if len(shape) in (1, 2) and rows.array.size and shape[-1] == self.index.dim and k >= 1:
            q = _as_float(rows).reshape(-1, self.index.dim)
            if np.isfinite(q).all():
                found = self._join(q, k, allow, deny)
        if found is None:  # alone, so that an error is raised where it belongs
            with self._turn:
                return self._search(queries, k, allow, deny)
        scores, ids = (part.reshape(*shape[:-1], k) for part in found)
        return rows.back(scores), rows.back(ids)

    def _join(
        self, q: np.ndarray, k: int, allow: Any, deny: Any
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The rows of a shared result that answer q; None when that search failed."""
        kind = _Kind(k, id(allow), id(deny))  # the callers hold the filters while they wait
        with self._lock:
            group = self._groups.get(kind)
            leads = group is None
            if group is None:
                group = self._groups[kind] = _Group()
            mine = group.add(q)
            self._stats["requests"] += 1
            self._stats["queries"] += len(q)
            if group.rows >= self.max_batch or self._closed:
                self._groups.pop(kind)
                group.full.set()
        if leads:
            self._lead(group, kind, allow, deny)
        else:
            group.done.wait()
        if group.found is None:
            return None
        scores, ids = group.found
        return scores[mine].copy(), ids[mine].copy()

    def _lead(self, group: _Group, kind: _Kind, allow: Any, deny: Any) -> None:
        """Wait for others, search for all of them; whatever happens, they are released."""
        try:
            group.full.wait(self.deadline_ms * 1e-3)
            with self._turn:
                self._seal(group, kind)
                q = group.queries[0] if len(group.queries) == 1 else np.concatenate(group.queries)
                group.found = self._search(q, kind.k, allow, deny)
        except Exception:
            group.found = None  # each of them searches alone and sees its own error, or none
        finally:
            self._seal(group, kind)
            group.done.set()

    def _search(self, queries: Any, k: int, allow: Any, deny: Any) -> tuple[Any, Any]:
        found = self.index.search(queries, k, allow, deny)
        with self._lock:
            self._stats["searches"] += 1
        return found

    def _seal(self, group: _Group, kind: _Kind) -> None:
        """From here on nobody joins the group."""
        with self._lock:
            if self._groups.get(kind) is group:
                del self._groups[kind]

    def close(self) -> None:
        """Refuse new searches, and return when all that had begun are answered."""
        with self._lock:
            self._closed = True
            for group in self._groups.values():
                group.full.set()
            while self._calls:
                self._idle.wait()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_float(rows: interop.Rows) -> np.ndarray:
    """FP32, as the engine itself widens queries: exact."""
    if rows.bf16:
        return (rows.array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(rows.array, np.float32)
