"""Searches of many threads: those that wait for the same rows are answered together."""

import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_index import compile_cpp

from knnfast import _C, Index, reference, set_num_threads

D, ROWS, CALLERS = 32, 40_000, 12  # enough elements that searches take turns


@pytest.fixture(autouse=True)
def threads():
    before = _C.num_threads()
    set_num_threads(2)
    yield
    set_num_threads(before)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float16)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((256, D), dtype=np.float32)


def filled(rows, metric="ip"):
    index = Index(D, metric)
    index.add(rows)
    return index


def reference_topk(queries, rows, k, metric="ip"):
    tensors = torch.from_numpy(queries), torch.from_numpy(np.ascontiguousarray(rows))
    return [part.numpy() for part in reference.topk(*tensors, k, metric)]


def behind_a_long_search(index, queries, calls):
    """Runs every call in a thread of its own while a search of many queries has the turn."""
    long = np.tile(queries, (16, 1))
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    holder = threading.Thread(target=index.search, args=(long, 10))
    callers = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    holder.start()
    time.sleep(0.02)
    for thread in callers:
        thread.start()
    for thread in (holder, *callers):
        thread.join(timeout=60)
        assert not thread.is_alive(), "a caller was never answered"
    return results


def until_joined(index, least, attempt):
    """Which callers come in time is up to the machine: tries until at least so many joined."""
    for _ in range(50):
        before = index.stats
        result = attempt()
        joined = index.stats["searches_joined"] - before["searches_joined"]
        if joined >= least:
            return result, index.stats["searches"] - before["searches"], joined
    pytest.fail(f"never {least} searches were answered by another")


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_joined_searches_give_the_reference_bits(rows, queries, metric):
    """Batches of 1 to 3 queries and two k side by side, beside filters and a range search."""
    index = filled(rows, metric)
    shapes = [(1 + i % 3, (5, 12)[i % 2]) for i in range(CALLERS)]
    deny = np.arange(0, ROWS, 3)
    radius = float(index.search(queries[:1], 8)[0][0, -1])
    calls = [lambda i=i, m=m, k=k: index.search(queries[i : i + m], k)
             for i, (m, k) in enumerate(shapes)]  # fmt: skip
    calls += [lambda: index.search(queries[:2], 5, deny=deny),
              lambda: index.range_search(queries[:1], radius)]  # fmt: skip
    results, searches, _ = until_joined(
        index, 4, lambda: behind_a_long_search(index, queries, calls)
    )
    assert searches == len(calls) + 1  # each counts, whoever did it
    for i, (m, k) in enumerate(shapes):
        scores, ids = reference_topk(queries[i : i + m], rows, k, metric)
        np.testing.assert_array_equal(results[i][1], ids)
        np.testing.assert_array_equal(results[i][0], scores)
    alone = index.search(queries[:2], 5, deny=deny)
    np.testing.assert_array_equal(results[-2][1], alone[1])
    for got, want in zip(results[-1], index.range_search(queries[:1], radius), strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_indexes_in_one_line(rows, queries):
    """The same k and size, but other rows: each answers its own callers."""
    both = rows, rows[::-1]
    first, second = map(filled, both)
    calls = [lambda i=i: (first, second)[i % 2].search(queries[i], 7) for i in range(CALLERS)]
    results, _, joined = until_joined(first, 2, lambda: behind_a_long_search(first, queries, calls))
    assert joined < CALLERS / 2
    for i, (scores, ids) in enumerate(results):
        want = reference_topk(queries[i : i + 1], both[i % 2], 7)
        np.testing.assert_array_equal(ids, want[1][0])
        np.testing.assert_array_equal(scores, want[0][0])


def test_large_batches_are_searched_alone(rows, queries):
    """33 queries join nobody, and of 20 and 20 each is a search of its own."""
    index = filled(rows)
    for m in (33, 20):
        calls = [lambda i=i, m=m: index.search(queries[i : i + m], 3) for i in range(4)]
        before = index.stats["searches_joined"]
        results = behind_a_long_search(index, queries, calls)
        assert index.stats["searches_joined"] == before
        for i, found in enumerate(results):
            np.testing.assert_array_equal(found[1], index.search(queries[i : i + m], 3)[1])


def test_rows_added_while_searches_wait_may_be_found(rows, queries):
    """A search that joins another sees at least what was there when it was called."""
    index = filled(rows)
    best = 100 * queries[:1]

    def add_and_search():
        added = index.add(best)
        return added[0], index.search(queries[0], 1)[1][0], index.remove(added)

    results, _, _ = until_joined(
        index, 1, lambda: behind_a_long_search(index, queries, [add_and_search] * CALLERS)
    )
    for added, found, removed in results:
        assert removed == 1
        assert ROWS <= found <= added  # equal rows: the lowest id that is still there
    assert len(index) == ROWS


# Allocations of one size fail, so many times.
FAILING = """
#include <atomic>
#include <cstdlib>
#include <new>
static std::atomic<long> size{-1}, left{0};
extern "C" void fail_of(long bytes, long times) { left = times; size = bytes; }
void* operator new(std::size_t n) {
  if (long(n) == size.load() && left.fetch_sub(1) > 0) throw std::bad_alloc();
  if (void* p = std::malloc(n)) return p;
  throw std::bad_alloc();
}
"""

# With an odd number of dimensions nothing else is as long as two queries: the memory that the
# first of several takes when it has copied itself and a second one.
HOST_FAILS = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_turns import behind_a_long_search, until_joined
from knnfast import Index, set_num_threads

set_num_threads(2)
fail_of = ctypes.CDLL(None).fail_of
fail_of.argtypes = [ctypes.c_long, ctypes.c_long]
rng = np.random.default_rng(0)
d = 1009
index = Index(d)
index.add(rng.standard_normal((3000, d), dtype=np.float32))
queries = rng.standard_normal((256, d), dtype=np.float32)
want = [index.search(q, 4) for q in queries[:12]]
calls = [lambda q=q: index.search(q, 4) for q in queries[:12]]
failed = answered = 0
for _ in range(50):
    fail_of(2 * d * 4, 2)
    for found, expected in zip(behind_a_long_search(index, queries, calls), want):
        if isinstance(found, MemoryError):
            failed += 1
            continue
        answered += 1
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
    if failed >= 2:
        break
fail_of(-1, 0)
assert failed >= 2 and answered > failed, (failed, answered)
until_joined(index, 2, lambda: behind_a_long_search(index, queries, calls))
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_who_waits_for_a_search_that_fails_is_searched_for_alone(tmp_path):
    """Memory runs out for the one that took others along: they get their answers all the same."""
    failing = compile_cpp(FAILING, tmp_path / "failing.so")
    subprocess.run(
        [sys.executable, "-c", HOST_FAILS, os.path.dirname(__file__)],
        env={**os.environ, "LD_PRELOAD": failing}, check=True, timeout=300,
    )  # fmt: skip
