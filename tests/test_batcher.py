"""Batcher: every caller gets its own answer or its own error, whatever the others do."""

import threading
import time

import numpy as np
import pytest
import torch

import knnfast
from knnfast import Batcher, Index


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((2_000, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def index(rows):
    ix = Index(32)
    ix.add(rows)
    return ix


def in_threads(count, work):
    """Runs work(i) in `count` threads at once and returns results; an exception is a result."""
    results = [None] * count
    barrier = threading.Barrier(count)

    def run(i):
        barrier.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a caller was never answered"
    return results


def same(found, expected):
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found, expected, strict=True))


def test_many_threads_get_the_answers_of_the_index(index, rows):
    """32 threads x 40 calls of mixed sizes, k and filters, nobody lost, every bit the index's."""
    allow, deny = np.arange(0, 2_000, 2), np.arange(100)
    kinds = [(5, None, None), (7, None, None), (5, allow, None), (5, None, deny), (5, allow, deny)]
    with Batcher(index, deadline_ms=0.5) as batcher:

        def work(i):
            rng = np.random.default_rng(i)
            for _ in range(40):
                k, yes, no = kinds[rng.integers(len(kinds))]
                m = int(rng.integers(0, 4))  # 0: a single query without its batch axis
                q = rng.standard_normal((m, 32) if m else 32).astype(np.float32)
                if not same(batcher.search(q, k, yes, no), index.search(q, k, yes, no)):
                    return (i, k)
            return None

        assert in_threads(32, work) == [None] * 32
        stats = batcher.stats
    assert stats["requests"] == 32 * 40
    assert stats["searches"] < stats["requests"]


def test_callers_within_the_deadline_share_a_search(index, rows):
    with Batcher(index, deadline_ms=10_000, max_batch=8) as batcher:
        start = time.perf_counter()
        found = in_threads(8, lambda i: batcher.search(rows[i], 3))
        assert time.perf_counter() - start < 9  # the eighth query ended the wait
        assert batcher.stats == {"requests": 8, "queries": 8, "searches": 1}
    for i in range(8):
        assert same(found[i], index.search(rows[i], 3))


def test_a_single_caller_waits_no_longer_than_the_deadline(index, rows):
    with Batcher(index, deadline_ms=50) as batcher:
        start = time.perf_counter()
        assert same(batcher.search(rows[0], 3), index.search(rows[0], 3))
        assert 0.04 < time.perf_counter() - start < 5


def test_searches_that_the_index_joins_are_handed_on(rows):
    """All of a large index."""
    large = Index(32)
    large.add(np.tile(rows, (17, 1)))  # 2^20 elements and more
    bits = np.packbits(np.arange(2_000) % 3 == 0, bitorder="little")
    with Batcher(large, deadline_ms=10_000, max_batch=2) as batcher:
        start = time.perf_counter()
        for kind in ({}, {"deny": [3, 1]}, {"allow": bits}):
            found = in_threads(3, lambda i, kind=kind: batcher.search(rows[i], 3, **kind))
            for i in range(3):
                assert same(found[i], large.search(rows[i], 3, **kind))
        assert time.perf_counter() - start < 9
        assert batcher.stats == {"requests": 0, "queries": 0, "searches": 0}
        assert large.stats["searches"] == 18
    with pytest.raises(RuntimeError, match="closed"):
        batcher.search(rows[0], 3)


def test_deadline_zero_collects_while_another_search_runs(rows):
    class Slow(Index):
        def search(self, *args):
            time.sleep(0.2)
            return super().search(*args)

    slow = Slow(32)
    slow.add(rows)
    with Batcher(slow, deadline_ms=0) as batcher:
        in_threads(10, lambda i: batcher.search(rows[i], 3))
        assert batcher.stats["searches"] <= 3


def test_other_frameworks_and_types_share_a_search(index, rows):
    queries = [
        rows[0],
        rows[1].astype(np.float16),
        torch.from_numpy(rows[2]),
        torch.from_numpy(rows[3:5]).bfloat16(),
    ]
    with Batcher(index, deadline_ms=10_000, max_batch=5) as batcher:
        found = in_threads(4, lambda i: batcher.search(queries[i], 4))
        assert batcher.stats["searches"] == 1
    for q, (scores, ids) in zip(queries, found, strict=True):
        expected = index.search(q, 4)
        assert type(scores) is type(expected[0])
        assert scores.shape == expected[0].shape
        assert same((scores, ids), expected)


def test_errors_reach_their_own_caller(index, rows):
    bad = {
        0: (np.full(32, np.nan, np.float32), 3, None),
        1: (rows[0, :31], 3, None),
        2: (rows[0], 0, None),
        3: (rows[0].astype(np.float64), 3, None),
        4: (rows[0], 3, np.array([0.5])),
        5: (np.zeros((1, 1, 32), np.float32), 3, None),
        6: (rows[0], True, None),
        7: (rows[0], 3.0, None),
        8: ("text", 2.5, None),
        9: (np.zeros((3, 0), np.float32), 3, None),
    }

    def work(i):
        q, k, allow = bad.get(i, (rows[i], 3, None))
        return batcher.search(q, k, allow)

    with Batcher(index, deadline_ms=20) as batcher:
        results = in_threads(16, work)
    for i, result in enumerate(results):
        if i not in bad:
            assert same(result, index.search(rows[i], 3))
            continue
        q, k, allow = bad[i]
        with pytest.raises((ValueError, TypeError)) as expected:
            index.search(q, k, allow)
        assert type(result) is expected.type
        assert str(result) == str(expected.value)


def test_a_failed_search_is_repeated_by_each_caller(rows):
    """The shared search fails: those who can be answered are, the error goes to nobody else."""

    class Fails(Index):
        def search(self, queries, k, *filters):
            if queries.ndim == 2 and len(queries) > 1:
                raise MemoryError("too many at once")
            return super().search(queries, k, *filters)

    fails = Fails(32)
    fails.add(rows)
    with Batcher(fails, deadline_ms=10_000, max_batch=6) as batcher:
        found = in_threads(6, lambda i: batcher.search(rows[i], 3))
        assert batcher.stats == {"requests": 6, "queries": 6, "searches": 6}
    for i in range(6):
        assert same(found[i], fails.search(rows[i], 3))


@pytest.mark.parametrize(("callers", "rows_each"), [(2, 1), (1, 0)])
def test_close_waits_for_those_who_search_alone(rows, callers, rows_each):
    """After a failed search, or without a query; one at a time, too."""
    begun, go_on, running = threading.Event(), threading.Event(), []

    class Slow(Index):
        def search(self, queries, k, *filters):
            if len(queries) > 1:
                raise MemoryError("too many at once")
            running.append(1)
            assert len(running) == 1
            begun.set()
            assert go_on.wait(30)
            running.pop()
            return super().search(queries, k, *filters)

    slow = Slow(32)
    slow.add(rows)
    batcher = Batcher(slow, deadline_ms=10_000, max_batch=2)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(batcher.search(rows[:rows_each], 3)))
        for _ in range(callers)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    closing.join(timeout=0.2)
    waits = closing.is_alive()
    go_on.set()
    for thread in (closing, *threads):
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert waits
    assert len(answers) == batcher.stats["searches"] == callers


def test_close_answers_those_who_wait_and_refuses_others(index, rows):
    batcher = Batcher(index, deadline_ms=60_000)
    answers = []
    waiting = [
        threading.Thread(target=lambda i=i: answers.append((i, batcher.search(rows[i], 3))))
        for i in range(4)
    ]
    for thread in waiting:
        thread.start()
    while batcher.stats["requests"] < 4:
        time.sleep(0.001)
    batcher.close()
    for thread in waiting:
        thread.join(timeout=30)
    assert sorted(i for i, _ in answers) == [0, 1, 2, 3]
    assert all(same(found, index.search(rows[i], 3)) for i, found in answers)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.search(rows[0], 3)
    batcher.close()


def test_the_index_may_change_meanwhile(rows):
    growing = Index(32)
    growing.add(rows[:100])
    with Batcher(growing, deadline_ms=0.1) as batcher:

        def work(i):
            if i == 0:
                for row in rows[100:400]:
                    growing.add(row)
                return True
            for _ in range(50):
                scores, ids = batcher.search(rows[i], 1)
                if not (ids >= 0).all() or scores[0] < rows[i] @ rows[i] * 0.99:
                    return False
            return True

        assert all(in_threads(8, work))


def test_rejects(index):
    with pytest.raises(TypeError, match=r"index must be a knnfast\.Index, got int"):
        Batcher(3)
    with pytest.raises(ValueError, match=r"deadline_ms must be 0 to .*, got -1"):
        Batcher(index, deadline_ms=-1)
    with pytest.raises(ValueError, match=r"deadline_ms must be 0 to .*, got 1e\+300"):
        Batcher(index, deadline_ms=1e300)  # more than a thread can wait
    with pytest.raises(TypeError, match="deadline_ms"):
        Batcher(index, deadline_ms="1")
    with pytest.raises(TypeError, match=r"max_batch must be a whole number, got 1\.5"):
        Batcher(index, max_batch=1.5)
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        Batcher(index, max_batch=0)
    assert knnfast.Batcher is Batcher
