"""Searches of many threads: those that wait for the same rows are answered together."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from helpers import compile_cpp

from knnfast import _C, Index, reference, set_num_threads

D, ROWS, CALLERS = 32, 40_000, 12  # enough elements that searches take turns


@pytest.fixture(autouse=True)
def threads():
    before = _C.num_threads()
    set_num_threads(2)
    yield
    set_num_threads(before)


def make_rows():
    return np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float16)


def make_queries():
    return np.random.default_rng(1).standard_normal((256, D), dtype=np.float32)


rows = pytest.fixture(scope="module")(make_rows)
queries = pytest.fixture(scope="module")(make_queries)


def filled(rows, metric="ip"):
    index = Index(D, metric)
    index.add(rows)
    return index


def reference_topk(queries, rows, k, metric="ip"):
    tensors = torch.from_numpy(queries), torch.from_numpy(np.ascontiguousarray(rows))
    return [part.numpy() for part in reference.topk(*tensors, k, metric)]


def behind_a_long_search(index, queries, calls, holders=1):
    """Runs every call in a thread of its own when as many searches have begun to work."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    long = np.tile(queries, (16, 1))
    holding = [threading.Thread(target=index.search, args=(long, 10)) for _ in range(holders)]
    callers = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in holding:
        thread.start()
    time.sleep(0.02)
    for thread in callers:
        thread.start()
    for thread in (*holding, *callers):
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


@pytest.mark.tsan
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


def test_callers_that_ask_again_at_once_are_answered_all_together(rows, queries):
    """Not in two groups by turns, of which one waits while the other is answered: of 8 callers 7
    join, not 6."""
    index = Index(D)
    index.add(np.tile(rows, (8, 1)))
    want = index.search(queries, 5)[1]

    def ask(i):
        return [(index.search(queries[i], 5)[1] == want[i]).all() for _ in range(40)]

    for _ in range(20):  # how soon they come back is up to the machine
        before = index.stats
        with ThreadPoolExecutor(8) as pool:
            assert np.concatenate([*pool.map(ask, range(8))]).all()
        joined = index.stats["searches_joined"] - before["searches_joined"]
        if joined > 0.8 * 8 * 40:
            return
    pytest.fail(f"{joined} of {8 * 40} were answered by another")


# With one thread there are as many turns as cores: two at most here.
ONE_THREAD = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
sys.path.insert(0, sys.argv[1])
import test_turns
test_turns.set_num_threads(1)
test_turns.{check}(len(os.sched_getaffinity(0)))
"""


def with_one_thread(check):
    code = ONE_THREAD.format(check=check)
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], check=True, timeout=300)


def check_joined(cores):
    rows, queries = make_rows(), make_queries()
    index = filled(rows)
    calls = [lambda i=i: index.search(queries[i], 10) for i in range(CALLERS)]
    results, searches, _ = until_joined(
        index, 4, lambda: behind_a_long_search(index, queries, calls, cores)
    )
    assert searches == CALLERS + cores
    scores, ids = reference_topk(queries[:CALLERS], rows, 10)
    np.testing.assert_array_equal(np.stack([found[1] for found in results]), ids)
    np.testing.assert_array_equal(np.stack([found[0] for found in results]), scores)


@pytest.mark.tsan
def test_searches_of_one_thread_each_are_joined():
    with_one_thread("check_joined")


@pytest.mark.tsan
def test_the_number_of_threads_may_change_while_searches_wait(rows, queries):
    """Turns become more and fewer; nobody is forgotten in the line."""
    index = filled(rows)
    want, end = index.search(queries, 5)[1], time.perf_counter() + 1

    def ask(i):
        wrong, at = 0, i
        while time.perf_counter() < end:
            wrong += (index.search(queries[at % 256], 5)[1] != want[at % 256]).any()
            at += CALLERS
        return wrong

    with ThreadPoolExecutor(CALLERS) as pool:
        asked = [pool.submit(ask, i) for i in range(CALLERS)]
        for turn in itertools.cycle((1, 2, 3)):
            if time.perf_counter() > end:
                break
            set_num_threads(turn)
            time.sleep(0.005)
        assert [each.result(timeout=60) for each in asked] == [0] * CALLERS


FILTERS = {
    "deny ids": {"deny": np.arange(0, ROWS, 3)},
    "allow ids": {"allow": np.arange(7, ROWS, 41)},
    "allow bits": {"allow": np.packbits(np.arange(ROWS) % 5 < 2, bitorder="little")},
    "both": {
        "allow": np.arange(0, ROWS, 2),
        "deny": np.packbits(np.arange(ROWS) % 7 < 3, bitorder="little"),
    },
}


def kept(filters):
    """The rows that filters leave."""
    left = np.ones(ROWS, bool)
    for name, given in filters.items():
        if given.dtype == np.uint8:
            named = np.unpackbits(given, bitorder="little", count=ROWS).astype(bool)
        else:
            named = np.isin(np.arange(ROWS), given)
        left &= named if name == "allow" else ~named
    return np.flatnonzero(left)


@pytest.mark.tsan
@pytest.mark.parametrize("own", [False, True], ids=["automatic", "own ids"])
@pytest.mark.parametrize("given", FILTERS)
def test_searches_with_the_same_filter_are_joined(rows, queries, given, own):
    """Given as one array, as a copy or as a list."""
    filters, ids = FILTERS[given], np.arange(ROWS)
    index = Index(D)
    if own:  # neither in order nor near the rows' places
        ids = np.random.default_rng(2).permutation(ROWS)
        index.add(rows, ids)
    else:
        index.add(rows)
    forms = [lambda x: x, np.copy, lambda x: x if x.dtype == np.uint8 else x.tolist()]
    each = [{name: form(x) for name, x in filters.items()} for form in forms]
    calls = [lambda i=i: index.search(queries[i], 10, **each[i % 3]) for i in range(CALLERS)]
    results, searches, _ = until_joined(
        index, 6, lambda: behind_a_long_search(index, queries, calls)
    )
    assert searches == CALLERS + 1
    left = kept(filters)  # ids
    order = np.argsort(ids)[left]  # their rows
    scores, places = reference_topk(queries[:CALLERS], rows[order], 10)
    for i, found in enumerate(results):
        np.testing.assert_array_equal(found[1], left[places[i]])
        np.testing.assert_array_equal(found[0], scores[i])


def test_searches_among_the_same_few_rows_are_joined():
    """So few that they are listed; a part of them is another list."""
    index = Index(512)
    part = np.random.default_rng(3).standard_normal((1 << 14, 512)).astype(np.float16)
    for _ in range(9):
        index.add(part)
    allowed = np.arange(5, len(index), 70)
    calls = [
        lambda i=i: index.search(part[i], 3, allow=allowed[i % 3 // 2 :]) for i in range(CALLERS)
    ]
    long = part[:256].astype(np.float32)
    results, _, _ = until_joined(index, 2, lambda: behind_a_long_search(index, long, calls))
    assert index.stats["chunks_canonical"] > 0
    rows = part[allowed % len(part)]
    scores, places = reference_topk(part[:CALLERS].astype(np.float32), rows, 4)
    for i, found in enumerate(results):
        left = np.arange(4)[places[i] >= i % 3 // 2][:3]
        np.testing.assert_array_equal(found[1], allowed[places[i][left]])
        np.testing.assert_array_equal(found[0], scores[i][left])


def test_a_search_among_few_rows_does_not_wait(rows, queries):
    """Not even for one group of queries, which lets nobody in."""
    index = filled(np.tile(rows, (48, 1)))
    allowed = np.arange(7, ROWS, 4001)
    want = index.search(queries[0], 3, allow=allowed)[1]
    for _ in range(10):  # the machine may hold it up
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(index.search, queries, 10)
            time.sleep(0.01)
            np.testing.assert_array_equal(index.search(queries[0], 3, allow=allowed)[1], want)
            time.sleep(0.005)  # had it waited, the long search would be done now
            if not long.done():
                return
    pytest.fail("the long search was always done first")


def test_searches_with_another_filter_are_not_joined(rows, queries):
    """A part of the same memory, the same bytes as ids, and what one denies and the other allows:
    each caller gets its own answer."""
    index = filled(rows)
    ids = np.arange(0, 3000, 3)
    filters = [{"deny": ids}, {"deny": ids[:-1]}, {"deny": ids.view(np.uint8)}, {"allow": ids},
               {"allow": ids, "deny": ids[::2]}, {}]  # fmt: skip
    calls = [lambda i=i, kind=kind: index.search(queries[i], 5, **kind)
             for kind in filters for i in (0, 1)]  # fmt: skip
    results, _, joined = until_joined(index, 2, lambda: behind_a_long_search(index, queries, calls))
    assert joined <= len(filters)  # one of each two
    for at, found in enumerate(results):
        left = kept(filters[at // 2])
        scores, places = reference_topk(queries[at % 2 : at % 2 + 1], rows[left], 5)
        np.testing.assert_array_equal(found[1], left[places[0]])
        np.testing.assert_array_equal(found[0], scores[0])


def test_a_filter_that_changes_between_calls(rows, queries):
    """The same array, in which each caller denies a row before it asks for that row."""
    index = filled(rows, "cosine")
    denied = np.zeros(ROWS // 8, np.uint8)
    lock = threading.Lock()

    def call(row):
        with lock:
            denied[row // 8] |= 1 << row % 8
        return row, index.search(rows[row].astype(np.float32), 3, deny=denied)[1]

    for row, found in behind_a_long_search(
        index, queries, [partial(call, 7 * i) for i in range(99)]
    ):
        assert row not in found


def check_bulk(holders, kind="search"):
    """A single query is answered long before the bulks that have the turns, and all are right."""
    rows, queries = make_rows(), make_queries()
    index = filled(rows)
    deny, radius = np.arange(0, ROWS, 3), float(index.search(queries, 3)[0].max())
    run = {
        "search": lambda q: index.search(q, 10),
        "filtered": lambda q: index.search(q, 10, deny=deny),
        "range": lambda q: index.range_search(q, radius)[1:],
    }[kind]
    bulk = np.tile(queries, (48, 1))
    expected, alone = run(queries), index.search(queries[:3], 10)[1]
    for _ in range(10):  # the machine may hold up the single one
        with ThreadPoolExecutor(holders) as pool:
            bulks = [pool.submit(run, bulk) for _ in range(holders)]
            time.sleep(0.02)
            single = [index.search(queries[i], 10)[1] for i in range(3)]
            first = not any(each.done() for each in bulks)
            for each in bulks:
                for found, want in zip(each.result(timeout=60), expected, strict=True):
                    np.testing.assert_array_equal(found, np.concatenate([want] * 48))
        np.testing.assert_array_equal(np.stack(single), alone)
        if first:
            return
    pytest.fail("a bulk was always done first")


@pytest.mark.tsan
@pytest.mark.parametrize("kind", ["search", "filtered", "range"])
def test_a_bulk_of_queries_lets_others_in(kind):
    check_bulk(1, kind)


@pytest.mark.tsan
def test_bulks_of_one_thread_each_let_others_in():
    with_one_thread("check_bulk")


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


def test_a_search_takes_along_32_queries(rows, queries):
    """33 queries join nobody; who is too large for what is left is passed over."""
    index = filled(rows)
    sizes = [33] * 3 + [20] * 4 + [12, 0, 1, 32]
    calls = [lambda i=i, m=m: index.search(queries[i : i + m], 3) for i, m in enumerate(sizes)]
    results, searches, joined = until_joined(
        index, 2, lambda: behind_a_long_search(index, queries, calls)
    )
    assert searches == len(sizes) + 1
    assert joined <= 4  # 12, 0 and 1, and 20 or one of them; never two of 20
    for i, (m, found) in enumerate(zip(sizes, results, strict=True)):
        expected = index.search(queries[i : i + m], 3)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_a_large_k_is_searched_alone(rows, queries):
    """There is little that such searches share, and much memory that they would take."""
    index = filled(rows)
    calls = [lambda i=i, k=k: index.search(queries[i], k) for i in range(3) for k in (20_000, 5)]
    results, _, joined = until_joined(index, 1, lambda: behind_a_long_search(index, queries, calls))
    assert joined <= 2
    for i, found in enumerate(results):
        expected = index.search(queries[i // 2], (20_000, 5)[i % 2])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.tsan
def test_joined_searches_get_their_exact_scores(rows, queries):
    index = filled(rows)
    exact = [np.full((1 + i % 2, 4), np.nan) if i % 3 else None for i in range(CALLERS)]

    def call(i):
        q = queries[i : i + 1 + i % 2]
        return index._core.search(q, 4, False, None, None, None, exact[i])

    calls = [lambda i=i: call(i) for i in range(CALLERS)]
    until_joined(index, 4, lambda: behind_a_long_search(index, queries, calls))
    for i, scores in enumerate(exact):
        if scores is None:
            continue
        q = torch.from_numpy(queries[i : i + len(scores)])
        every = reference.canonical_scores(q, torch.from_numpy(rows)).numpy()
        np.testing.assert_array_equal(scores, -np.sort(-every, axis=1)[:, :4])


@pytest.mark.tsan
def test_joined_searches_that_have_to_be_repeated():
    """Rows whose codes mislead a positive query (test_topk.test_trust_is_checked), for some."""
    rng = np.random.default_rng(0)
    d, k, n = 256, 10, 2048
    rows = rng.integers(-9, 10, (n, d)).astype(np.float64)
    rows[: 3 * k] = 20 - 7 / 16
    better = rng.choice(np.arange(3 * n // 4, n), k, replace=False)  # no thread begins there
    rows[better] = 19
    rows[better, d // 3 :] = 20
    rows[:, 0] = 127
    x = np.stack([rows, -rows], 1).reshape(2 * n, d).astype(np.float16)
    queries = rng.standard_normal((CALLERS, d)).astype(np.float32)
    queries[::2] = 1
    many = rng.standard_normal((256, d)).astype(np.float32)
    want = reference_topk(queries, x, k)
    for _ in range(50):
        index = Index(d, scan="int8")  # a new one has not learnt yet
        index.add(x)
        calls = [lambda i=i, index=index: index.search(queries[i], k) for i in range(CALLERS)]
        for i, found in enumerate(behind_a_long_search(index, many, calls)):
            np.testing.assert_array_equal(found[0], want[0][i])
            np.testing.assert_array_equal(found[1], want[1][i])
        if index.stats["searches_joined"] >= 4 and index.stats["queries_repeated"] > 0:
            return
    pytest.fail("no joined search was repeated")


@pytest.mark.parametrize("filters", [{}, {"deny": np.arange(3)}], ids=["all", "filter"])
def test_rows_added_while_searches_wait_may_be_found(rows, queries, filters):
    """A search that joins another sees at least what was there when it was called, with a filter
    (which nearly all rows pass) what was there then."""
    index = filled(rows)
    best = 100 * queries[:1]

    def add_and_search():
        added = index.add(best)
        return added[0], index.search(queries[0], 1, **filters)[1][0], index.remove(added)

    least = 0 if filters else 1  # each add ends what may be joined with a filter
    results, _, _ = until_joined(
        index, least, lambda: behind_a_long_search(index, queries, [add_and_search] * CALLERS)
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
static std::atomic<int> count{0};
extern "C" void fail_of(long bytes, long times) { left = times; size = bytes; }
extern "C" int failed() { return count; }
void* operator new(std::size_t n) {
  if (long(n) == size.load() && left.fetch_sub(1) > 0) {
    ++count;
    throw std::bad_alloc();
  }
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
failed = ctypes.CDLL(None).failed
rng = np.random.default_rng(0)
d = 1009
index = Index(d)
index.add(rng.standard_normal((3000, d), dtype=np.float32))
queries = rng.standard_normal((256, d), dtype=np.float32)
want = [index.search(q, 4) for q in queries[:12]]
calls = [lambda q=q: index.search(q, 4) for q in queries[:12]]
for _ in range(50):
    fail_of(2 * d * 4, 2)
    for found, expected in zip(behind_a_long_search(index, queries, calls), want):
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
    if failed() >= 2:
        break
assert failed() >= 2
fail_of(-1, 0)
until_joined(index, 2, lambda: behind_a_long_search(index, queries, calls))
"""


@pytest.mark.no_asan
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_searches_that_cannot_be_joined_are_answered_alone(tmp_path):
    """Memory runs out for the one that took others along: all get their answers all the same."""
    failing = compile_cpp(FAILING, tmp_path / "failing.so")
    subprocess.run(
        [sys.executable, "-c", HOST_FAILS, os.path.dirname(__file__)],
        env={**os.environ, "LD_PRELOAD": failing}, check=True, timeout=300,
    )  # fmt: skip


FORKED = """
import os, threading, time
import numpy as np
from knnfast import Index, set_num_threads

set_num_threads(2)
rng = np.random.default_rng(0)
x = rng.standard_normal((40000, 32), dtype=np.float32)
busy, other = Index(32), Index(32)
busy.add(x)
other.add(x)
want = other.search(x[:3], 5)[1]
threads = [threading.Thread(target=busy.search, args=(x[:n], 10)) for n in (4096, 4096, 4096)]
for thread in threads:
    thread.start()
time.sleep(0.05)
pid = os.fork()  # while one search has the turn and two wait
same = (other.search(x[:3], 5)[1] == want).all()
if pid == 0:
    os._exit(not same)
for thread in threads:
    thread.join()
assert same and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.no_asan
def test_the_child_of_a_fork_has_a_line_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)


@pytest.mark.parametrize("rows", [200, ROWS])  # without turns and with them
def test_a_process_ends_while_daemon_threads_search(rows):
    code = (
        "import threading, time, numpy as np\n"
        "from knnfast import Index\n"
        f"x = np.random.default_rng(0).standard_normal(({rows}, {D}), dtype=np.float32)\n"
        f"index = Index({D}); index.add(x)\n"
        "def run():\n"
        "    while True: index.search(x[:1], 5)\n"
        "for _ in range(8): threading.Thread(target=run, daemon=True).start()\n"
        "time.sleep(0.2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
