"""Index: its contract outside the scores: ids, errors, snapshots, memory."""

import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import compile_c, compile_cpp

from knnfast import _C, reference
from knnfast.search import Index, num_threads, set_num_threads


@pytest.fixture
def filled(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((100, 24)).astype(np.float32)
    index = Index(24)
    index.add(x)
    return index, x


def test_ids(filled):
    index, x = filled
    np.testing.assert_array_equal(index.ids, np.arange(100))
    assert index.remove([99, 99, 5, 1000]) == 2
    assert index.add(x[0]) == [100]  # never reused
    assert index.add(x[:2], [500, 7_000]).tolist() == [500, 7000]
    assert index.add(x[:1]).tolist() == [7001]
    assert index.add(x[:2], [300, 200]).tolist() == [300, 200]  # no longer ascending
    assert index.remove([300, 5]) == 1
    with pytest.raises(ValueError, match="is not in the index"):
        index.vectors([300])
    np.testing.assert_array_equal(index.vectors([200, 7]), x[[1, 7]].astype(np.float16))
    assert len(index) == 98 + 1 + 2 + 1 + 1


def one_buffer(x):
    """Scores and ids for `search(x, 1, out=...)` that overlap."""
    held = np.empty((len(x), 1), np.int64)
    return held.view(np.float32).reshape(-1)[: len(x), None], held


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda i, x: i.add(x[:, :3]), ValueError, "vectors must have shape"),
        (lambda i, x: i.add(x.astype(np.float64)), TypeError, "vectors must be float16"),
        (
            lambda i, x: i.add(np.full((1, 24), np.nan, np.float32)),
            ValueError,
            "vectors: row 0 holds NaN",
        ),
        (lambda i, x: i.add(np.full((1, 24), 65520, np.float32)), ValueError, "65504"),
        (lambda i, x: i.add(x[:2], [1000, 1000]), ValueError, "1000 is taken"),
        (lambda i, x: i.add(x[:2], [1000, 3]), ValueError, "3 is taken"),
        (lambda i, x: i.add(x[:2], [-1, 3]), ValueError, "-1"),
        (lambda i, x: i.add(x[:2], [2**63 - 1, 300]), ValueError, "ids are 0 to"),
        (lambda i, x: i.add(x[:2], [1.5, 2.5]), TypeError, "integers"),
        (lambda i, x: i.add(x[:2], [7]), ValueError, "one id a row"),
        (lambda i, x: i.search(x, 0), ValueError, "k must be 1 to 2147483647, got 0"),
        (lambda i, x: i.plan(2, 2**31), ValueError, "k must be 1 to 2147483647, got 21474"),
        (lambda i, x: i.search(x, 2**62), ValueError, "k must be 1 to 2147483647, got 46116"),
        (lambda i, x: i.search(x, 2**70), ValueError, "k must be 1 to 2147483647, got 11805"),
        (lambda i, x: i.save("/"), ValueError, "path: / holds other files .* and no index"),
        (lambda i, x: i.search(x, 1, out=one_buffer(x)), ValueError, "must not share memory"),
        (lambda i, x: i.save("a\0b"), ValueError, "path holds a NUL byte"),
        (lambda i, x: Index.open("a\0b"), ValueError, "path holds a NUL byte"),
        (lambda i, x: i.search(x[:, :5], 1), ValueError, "queries must have shape"),
        (lambda i, x: i.search(np.full(24, np.inf, np.float32), 1), ValueError, "infinity"),
        (lambda i, x: i.search("text", 1), TypeError, "array"),
        (lambda i, x: i.search(x, 2, allow=[0.5]), TypeError, "allow"),
        (lambda i, x: i.search(x, 2, out=(x, x)), ValueError, "out"),
        (lambda i, x: i.range_search(x, float("nan")), ValueError, "radius"),
        (lambda i, x: Index(0), ValueError, "dim"),
        (lambda i, x: Index(3, "dot"), ValueError, "metric"),
        (lambda i, x: Index(3, scan="int4"), ValueError, "scan"),
        (lambda i, x: Index("a"), TypeError, "dim must be a whole number, got 'a'"),
        (lambda i, x: Index(2.0), TypeError, "dim must be a whole number, got 2.0"),
        (lambda i, x: Index(10**30), ValueError, "dim: 10+ is no int64"),
        (lambda i, x: i.search(x, 2.5), TypeError, "k must be a whole number, got 2.5"),
        (lambda i, x: i.search(x, True), TypeError, "k must be a whole number, got True"),
        (lambda i, x: i.search(x.astype("e"), "5"), TypeError, "k must be a whole number, got '5'"),
        (lambda i, x: i.search(x, 2, out=5), TypeError, "out must be a pair .*, got int"),
        (lambda i, x: i.search(x, 2, allow="a"), TypeError, "allow must hold integers"),
        (
            lambda i, x: i.search(x, 2, deny=np.ones(3, bool)),
            TypeError,
            "deny must be ids, or a bitset",
        ),
        (lambda i, x: i.range_search(x, "1"), TypeError, "radius must be a number, got '1'"),
        (lambda i, x: i.range_search(x, None), TypeError, "radius must be a number, got None"),
        (lambda i, x: i.range_search("x", 1), TypeError, "queries must be an array"),
        (lambda i, x: i.plan("a", 1), TypeError, "batch must be a whole number, got 'a'"),
        (lambda i, x: i.plan(1, 2.5), TypeError, "k must be a whole number, got 2.5"),
        (lambda i, x: i.remove("a"), TypeError, "ids must hold integers"),
        (lambda i, x: "a" in i, TypeError, "id must be a whole number, got 'a'"),
        (lambda i, x: i.vectors(None), TypeError, "ids must be a sequence of .*, got NoneType"),
        (lambda i, x: i.search(x, 2, deny={1, 2}), TypeError, "sequence of .* int64, got set"),
        (lambda i, x: i.search(x, 2, deny=[2**64]), TypeError, "sequence of .* int64, got list"),
        (lambda i, x: i.add(x[:1], ["a"]), TypeError, "ids must hold integers"),
        (lambda i, x: i.add(x[:2], [2**63, 2]), ValueError, "ids: 9223372036854775808 is no int64"),
        (lambda i, x: i.add(x[:2], [1.5, 2]), TypeError, "ids must hold integers, got float64"),
        (lambda i, x: i.save(""), ValueError, "path is empty"),
        (lambda i, x: i.add([1.0] * 24), TypeError, "vectors must be an array .* got list"),
        (lambda i, x: i.save(5), TypeError, "path must be a str or an os.PathLike, got int"),
        (lambda i, x: Index.open(None), TypeError, "path must be a str .* got NoneType"),
        (lambda i, x: set_num_threads("a"), TypeError, "n must be a whole number, got 'a'"),
        (lambda i, x: set_num_threads(0), ValueError, "n must be 1 to 1024, got 0"),
        (lambda i, x: set_num_threads(2**40), ValueError, "n must be 1 to 1024, got 1099511627776"),
        (lambda i, x: Index(3, device="tpu"), ValueError, "device: must be cpu, cuda or cuda:N"),
        (lambda i, x: i.to("cuda:x"), ValueError, "device: must be cpu, .* got 'cuda:x'"),
        (lambda i, x: i.to("cpu:1"), ValueError, "device: must be cpu, .* got 'cpu:1'"),
    ],
)
def test_rejects(filled, call, error, match):
    index, x = filled
    before = index.search(x, 5)
    with pytest.raises(error, match=match) as raised:
        call(index, x)
    assert "\n" not in str(raised.value)
    assert len(index) == 100
    after = index.search(x, 5)
    np.testing.assert_array_equal(before[1], after[1])
    assert index.add(x[:1]) == [100]


@pytest.mark.gpu
def test_the_engine_finds_the_devices_that_torch_finds():
    import torch

    assert _C.has_cuda
    assert _C.cuda_device_count() == torch.cuda.device_count()


@pytest.mark.skipif(
    _C.has_cuda and _C.cuda_device_count() > 0, reason="there is a CUDA device here"
)
def test_rejects_cuda_where_there_is_none(filled, tmp_path):
    index, _ = filled
    index.save(tmp_path)
    for call in (
        lambda: index.to("cuda"),
        lambda: Index(3, device="cuda"),
        lambda: Index.open(tmp_path, device="cuda"),
    ):
        with pytest.raises(ValueError, match=r"device: must be cpu, .* got 'cuda'"):
            call()


def test_layouts(filled):
    index, x = filled
    want = index.search(x, 4)
    wide = np.zeros((200, 48), np.float32)
    wide[::2, ::2] = x
    view = wide[::2, ::2]
    for q in (np.asfortranarray(x), view, x.astype(">f4")):
        np.testing.assert_array_equal(index.search(q, 4)[1], want[1])
    half = np.zeros((100, 30), np.float32)
    half[:, :24] = x
    other = Index(24)
    other.add(half[:, :24])
    np.testing.assert_array_equal(other.search(x, 4)[0], want[0])
    scores, ids = index.search(x[3], 4)
    assert scores.shape == ids.shape == (4,)
    np.testing.assert_array_equal(ids, want[1][3])
    out = np.empty((100, 4), np.float32), np.empty((100, 4), np.int64)
    assert index.search(x, 4, out=out)[0] is out[0]
    np.testing.assert_array_equal(out[1], want[1])
    plan = index.plan(100, 4)
    np.testing.assert_array_equal(plan(x)[1], want[1])
    assert plan(x)[0] is plan.scores


def test_padding():
    index = Index(4, "l2")
    scores, ids = index.search(np.zeros((2, 4), np.float32), 3)
    assert (ids == -1).all()
    assert (scores == np.inf).all()
    index.add(np.ones((1, 4), np.float16))
    scores, ids = index.search(np.zeros(4, np.float32), 2)
    assert ids.tolist() == [0, -1]
    assert scores.tolist() == [4, np.inf]


def test_which_ids_are_in_it(tmp_path):
    """Automatic ones, after a removal, of one's own in any order, and in a mapped file."""
    x = np.ones((5, 4), np.float32)
    automatic, own = Index(4), Index(4)
    automatic.add(x)
    automatic.remove([2])
    own.add(x, [40, 7, 2**62, 0, 9])
    own.remove([7])
    own.save(tmp_path / "own")
    for index, there in (
        (automatic, {0, 1, 3, 4}),
        (own, {40, 2**62, 0, 9}),
        (Index.open(tmp_path / "own"), {40, 2**62, 0, 9}),
        (Index(4), set()),
    ):
        asked = [-1, 0, 1, 2, 3, 4, 5, 7, 9, 40, 2**62, np.int64(3)]
        assert {id for id in asked if id in index} == there


def test_threads_are_asked_for_and_given_back():
    before = num_threads()
    try:
        set_num_threads(3)
        assert num_threads() == 3
        set_num_threads(None)
        assert num_threads() == len(os.sched_getaffinity(0))
    finally:
        set_num_threads(before)


def test_negative_ids_are_nobodys():
    """Not those of the slots that removed rows have left in the id map, either."""
    for n in range(60, 120):
        index = Index(4)
        x = np.ones((n, 4), np.float32)
        index.add(x, np.arange(n)[::-1])
        index.remove(np.arange(n))
        for id in (-1, -2, -(2**63)):
            assert index.search(x[0], 1, allow=[id])[1].tolist() == [-1]
            assert index.remove([id]) == 0
            with pytest.raises(ValueError, match=f"{id} is not in the index"):
                index.vectors([id])
        assert index.add(x, np.arange(n)).tolist() == list(range(n))
        assert index.remove([-2]) == 0
        assert len(index) == n


@pytest.mark.parametrize("scan", ["fp16", "int8"])
@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_range_search(metric, scan, seed):
    """Rows strictly beyond the radius, in order: over threads, chunks, stops, removals, filters."""
    rng = np.random.default_rng(seed)
    n, d = 20_000, 128
    # Integers, so that scores tie and the radius is one of them.
    x, q = rng.integers(-3, 4, (n, d)), rng.integers(-3, 4, (5, d)).astype(np.float32)
    x[rng.random(n) < 0.5, d // 4 :] //= 3
    index = Index(d, metric, scan=scan)
    index.add(x.astype(np.float16))
    gone = rng.choice(n, 500, replace=False)
    index.remove(gone)
    some = rng.choice(n, n // 2, replace=False)
    threads = _C.num_threads()
    try:
        for number, options in ((3, {}), (1, {"allow": some}), (3, {"deny": some})):
            set_num_threads(number)
            kept = np.setdiff1d(np.arange(n), gone)
            if options:
                kept = kept[np.isin(kept, some) == ("allow" in options)]
            scores, ids = reference.topk(
                torch.as_tensor(q), torch.as_tensor(x[kept].astype(np.float16)), len(kept), metric,
                torch.as_tensor(kept),
            )  # fmt: skip
            scores, ids = scores.numpy(), ids.numpy()
            radius = float(scores[0, 150])
            if metric == "cosine":  # between two scores: these are rounded to float
                radius = (radius + float(scores[0][scores[0] < radius][0])) / 2
            lims, found_scores, found = index.range_search(q, radius, **options)
            for i in range(len(q)):
                inside = scores[i] < radius if metric == "l2" else scores[i] > radius
                np.testing.assert_array_equal(found[lims[i] : lims[i + 1]], ids[i][inside])
                np.testing.assert_array_equal(
                    found_scores[lims[i] : lims[i + 1]], scores[i][inside]
                )
            assert 100 < lims[1] < 200
    finally:
        set_num_threads(threads)


@pytest.mark.no_asan
def test_memory():
    n, d = 100_000, 256
    x = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    index = Index(d)
    index.add(x)
    assert index.nbytes <= n * (3 * d + 16) + 4 * d
    plain = Index(d, scan="fp16")
    plain.add(x)
    assert plain.nbytes <= n * (2 * d + 16)
    own = Index(d)
    own.add(x, np.random.default_rng(1).permutation(10 * n)[:n])
    assert own.nbytes <= n * (3 * d + 48) + 4 * d


@pytest.mark.no_asan
@pytest.mark.parametrize("pieces", [1, 60])
def test_memory_of_own_ids(pieces):
    """At whatever number of rows their table has just grown."""
    rng = np.random.default_rng(2)
    d, most = 16, 20_000
    x, ids = rng.standard_normal((most, d), dtype=np.float32), rng.permutation(10 * most)
    for n in range(1000, most, 977):
        index = Index(d)
        for part in np.array_split(np.arange(n), pieces):
            index.add(x[part], ids[part])
        assert index.nbytes <= n * (3 * d + 48) + 4 * d, n


def test_stats_show_what_the_scan_proved():
    rng = np.random.default_rng(0)
    index = Index(128)
    index.add(rng.standard_normal((50_000, 128), dtype=np.float32))
    index.search(rng.standard_normal((1, 128)).astype(np.float32), 10)
    stats = index.stats
    assert stats["chunks_int8"] > 0
    assert 10 <= stats["rows_rescored"] < 2_000
    ties = Index(128)
    ties.add(np.ones((50_000, 128), np.float16))
    scores, ids = ties.search(np.ones(128, np.float32), 10)
    assert ids.tolist() == list(range(10))
    assert (scores == 128).all()
    assert ties.stats["chunks_canonical"] > ties.stats["chunks_int8"]


COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static _Atomic long calls;
long allocations(void) { return calls; }
void* malloc(size_t n) {
  static void* (*real)(size_t);
  if (!real) real = (void* (*)(size_t))dlsym(RTLD_NEXT, "malloc");
  if (n >= 512) ++calls;
  return real(n);
}
"""


@pytest.mark.no_asan
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_plan_allocates_nothing(tmp_path):
    """No buffer of 512 bytes or more, once a plan has run: in the best of three rounds, as Python
    itself allocates now and then.

    On one thread: of several, each warms up only when it first gets work.
    """
    code = (
        "import ctypes, sys, numpy as np\n"
        "from knnfast.search import Index, set_num_threads\n"
        "set_num_threads(1)\n"
        "count = ctypes.CDLL(None).allocations\n"
        "rng = np.random.default_rng(0)\n"
        "for metric in ('ip', 'cosine', 'l2'):\n"
        "    ix = Index(64, metric); ix.add(rng.standard_normal((40000, 64), dtype=np.float32))\n"
        "    for batch, k in ((1, 10), (33, 100)):\n"
        "        plan, q = ix.plan(batch, k), rng.standard_normal((batch, 64), dtype=np.float32)\n"
        "        for _ in range(20): plan(q)\n"
        "        rounds = []\n"
        "        for _ in range(3):\n"
        "            before = count()\n"
        "            for _ in range(100): plan(q)\n"
        "            rounds.append(count() - before)\n"
        "        assert min(rounds) == 0, (metric, batch, rounds)\n"
    )
    counter = compile_c(COUNTER, tmp_path / "counter.so", "-ldl")
    env = {**os.environ, "LD_PRELOAD": counter}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


FAILING = """
#include <cstdlib>
#include <new>
static long left = -1;  // allocations before the one that fails; below 0: none does
extern "C" void fail_after(long n) { left = n; }
static void* get(void* p) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  return p ? p : throw std::bad_alloc();
}
void* operator new(std::size_t n) { return get(std::malloc(n)); }
void* operator new(std::size_t n, std::align_val_t at) {
  const std::size_t to = static_cast<std::size_t>(at);
  return get(std::aligned_alloc(to, (n + to - 1) / to * to));
}
"""

OUT_OF_MEMORY = """
import ctypes, itertools, sys
import numpy as np
from knnfast.search import Index, set_num_threads

set_num_threads(1)
fail_after = ctypes.CDLL(None).fail_after
fail_after.argtypes = [ctypes.c_long]
rng = np.random.default_rng(0)
x = rng.standard_normal((200, 24)).astype(np.float32)


def state(index):
    ids = index.ids
    found = [tuple(map(tuple, part)) for part in index.search(x[:3], 5)]
    return len(index), ids.tolist(), found, index.vectors(ids).tobytes()


def check(make, change, expected):
    for k in itertools.count():
        index = make()
        before = state(index)
        fail_after(k)
        try:
            change(index)
        except MemoryError:
            assert state(index) == before, k
            change(index)
            expected(index)
        else:
            fail_after(-1)
            expected(index)
            return print(k)


def filled(ids):
    index = Index(24)
    index.add(x[:100], ids)
    return index


for ids in (None, np.arange(100)[::-1].copy()):
    taken = np.arange(100)

    def added(index):
        assert sorted(index.ids.tolist()) == [*range(100), *range(500, 600)]
        assert index.search(x[150], 1, allow=[549])[1].tolist() == [549]

    check(lambda: filled(ids), lambda ix: ix.add(x[100:], np.arange(599, 499, -1)), added)

    def removed(index):
        assert sorted(index.ids.tolist()) == list(range(30, 100))
        assert index.remove(np.arange(31)) == 1
        assert index.add(x[:2], [5, 7]).tolist() == [5, 7]

    check(lambda: filled(ids), lambda ix: ix.remove(np.arange(30)), removed)

    def half():
        index = filled(ids)
        index.remove(np.arange(0, 100, 2))
        return index

    def compacted(index):
        assert index.remove([3]) == 1

    check(half, lambda ix: ix.compact(), compacted)
"""


@pytest.mark.no_asan
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_memory_that_runs_out_changes_nothing(tmp_path):
    """Whichever allocation of an add, a removal or a compaction fails."""
    failing = compile_cpp(FAILING, tmp_path / "failing.so")
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], env={**os.environ, "LD_PRELOAD": failing},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 6
    assert min(counts) > 2  # each had some that could fail


def test_the_largest_ids(tmp_path):
    index = Index(4)
    x = np.eye(4, dtype=np.float32)
    index.add(x[:3], [2**63 - 2, 5, 6])
    index.remove([6])
    index.compact()
    index.save(tmp_path / "own")
    opened = Index.open(tmp_path / "own")
    assert opened.ids.tolist() == [2**63 - 2, 5]
    np.testing.assert_array_equal(opened.search(x, 1)[1], index.search(x, 1)[1])
    index = Index(4)
    index.add(x[:1], [2**63 - 4])
    assert index.add(x[1:3]).tolist() == [2**63 - 3, 2**63 - 2]
    with pytest.raises(ValueError, match="no automatic ids are left above 9223372036854775806"):
        index.add(x[3:])
    index.save(tmp_path / "automatic")
    assert Index.open(tmp_path / "automatic").ids.tolist() == index.ids.tolist()


FEW_THREADS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
static int left = 1 << 30;
void threads_left(int n) { left = n; }
int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* arg) {
  static int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  if (!real) real = (int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*))
      dlsym(RTLD_NEXT, "pthread_create");
  return left-- > 0 ? real(t, a, f, arg) : EAGAIN;
}
"""


@pytest.mark.no_asan
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("left", [0, 2])
def test_threads_that_the_system_refuses(tmp_path, left):
    """Under a limit of a container, say: those that there are do the work."""
    code = (
        "import ctypes, os, numpy as np\n"
        "from knnfast.search import Index, set_num_threads\n"
        f"ctypes.CDLL(None).threads_left({left})\n"
        "x = np.random.default_rng(0).standard_normal((40000, 32), dtype=np.float32)\n"
        "answers = []\n"
        "for n in (8, 9, 1, 8):\n"
        "    set_num_threads(n)\n"
        "    ix = Index(32); ix.add(x)\n"
        "    answers.append(ix.search(x[:20], 5)[1].tolist())\n"
        "assert answers == answers[:1] * 4\n"
        "few = len(os.listdir('/proc/self/task'))\n"
        "ix.search(x[:20], 5)\n"
        "ctypes.CDLL(None).threads_left(100)\n"
        "ix.search(x[:20], 5)\n"
        "assert len(os.listdir('/proc/self/task')) == few  # asked for when it is said again\n"
        "set_num_threads(8)\n"
        "assert ix.search(x[:20], 5)[1].tolist() == answers[0]\n"
        "assert len(os.listdir('/proc/self/task')) == 8\n"
    )
    few = compile_c(FEW_THREADS, tmp_path / "few.so", "-ldl")
    env = {**os.environ, "LD_PRELOAD": few, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


LISTENER = """
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
struct Callbacks { size_t size; int (*table)(int, void*** out, unsigned* count); };
static int push(const char* name) {
  FILE* f = fopen(getenv("RANGES"), "a");
  fprintf(f, "%s\\n", name);
  return fclose(f);
}
int InitializeInjectionNvtx2(const void* (*get)(unsigned)) {
  const struct Callbacks* callbacks = get(1);
  void** table; unsigned count;
  callbacks->table(1, &table, &count);
  *(void**)table[9] = (void*)push;  /* RangePushA */
  return 1;
}
"""


@pytest.mark.no_asan
@pytest.mark.skipif(not _C.has_nvtx, reason="built without NVTX's headers")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_phases_have_nvtx_ranges(tmp_path):
    """What a tool that injects itself (as Nsight does) hears of one search."""
    code = (
        "import numpy as np; from knnfast.search import Index\n"
        "ix = Index(64); ix.add(np.random.rand(3000, 64).astype(np.float32))\n"
        "ix.search(np.random.rand(2, 64).astype(np.float32), 5)\n"
    )
    listener = compile_c(LISTENER, tmp_path / "listener.so")
    env = {**os.environ, "NVTX_INJECTION64_PATH": listener, "RANGES": str(tmp_path / "ranges")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    heard = set((tmp_path / "ranges").read_text().split())
    assert heard == {f"knnfast.{phase}" for phase in ("scan", "select", "rescore", "merge")}


@pytest.mark.tsan
@pytest.mark.parametrize("others", [0, 40_000])  # below 2^20 elements a search has one thread
def test_snapshots(others, seed):
    """Readers while one thread adds and removes: every answer is that of some snapshot."""
    rng = np.random.default_rng(seed)
    d, seconds = 32, float(os.environ.get("KNNFAST_STRESS_SECONDS", "3"))
    index = Index(d, "l2")
    query = rng.integers(-8, 9, d).astype(np.float32)
    batch_rows = np.repeat(query[None], 64, 0)
    batch_rows[:, 0] += np.arange(64)  # so that row i scores i * i
    if others:
        far = query + 100 + rng.integers(0, 50, (others, d)).astype(np.float32)
        index.add(far, 10**9 + np.arange(others))
    index.add(batch_rows, np.arange(64))
    stop, failures, seen = threading.Event(), [], []

    def read(m):
        queries, newest = np.repeat(query[None], m, 0), 0
        try:
            while not stop.is_set():
                scores, ids = index.search(queries, 256)
                assert (ids == ids[0]).all()
                ours = (ids[0] >= 0) & (ids[0] < 10**9)
                ids, scores = ids[0][ours], scores[0][ours]
                np.testing.assert_array_equal(scores, (ids % 64).astype(np.float32) ** 2)
                batches, counts = np.unique(ids // 64, return_counts=True)
                assert (counts == 64).all(), (batches, counts)  # they come and go whole
                first, last = int(batches[0]), int(batches[-1])
                assert batches.tolist() == list(range(first, last + 1))
                assert last - first in ((0, 1, 2) if first == 0 else (1, 2)), batches
                assert last >= newest, "an older snapshot than the one before"
                newest = last
            seen.append(newest)
        except Exception as error:  # a thread's own would be lost
            failures.append(repr(error))

    threads = _C.num_threads()
    set_num_threads(3)
    try:
        readers = [threading.Thread(target=read, args=(m,)) for m in (1, 20) * 4]
        for t in readers:
            t.start()
        end, batch = time.monotonic() + seconds, 1
        while time.monotonic() < end:
            index.add(batch_rows, np.arange(64) + 64 * batch)
            index.remove(np.arange(64) + 64 * (batch - 2))
            if batch % 16 == 0:
                index.compact()
            batch += 1
        stop.set()
        for t in readers:
            t.join()
    finally:
        set_num_threads(threads)
    assert not failures, failures[:3]
    assert len(seen) == 8
    assert min(seen) > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
@pytest.mark.skipif(not 2 <= (os.cpu_count() or 1) <= 8, reason="needs 2 to 8 cores")
def test_workers_wake_off_the_callers_core():
    """Woken on it, a worker would stand behind its caller until the scheduler looks again."""
    code = """
import os, time
import numpy as np
from knnfast import Index, set_num_threads

cores = os.sched_getaffinity(0)
set_num_threads(len(cores))
index = Index(64)
rows = np.random.default_rng(0).standard_normal((300_000, 64), dtype=np.float32)
before = set(os.listdir("/proc/self/task"))
index.add(rows)
index.search(rows[0], 10)
workers = [int(t) for t in set(os.listdir("/proc/self/task")) - before]
assert len(workers) == len(cores) - 1, workers

def last_core(worker):
    with open(f"/proc/self/task/{worker}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[36])

here = min(cores)
os.sched_setaffinity(0, {here})
met, whole = 0, 0
for _ in range(40):
    time.sleep(0.01)
    index.search(rows[0], 10)
    met += sum(last_core(worker) == here for worker in workers)
    whole += all(os.sched_getaffinity(worker) == cores for worker in workers)
assert met <= 20 * len(workers), f"{met} of 40 times on the caller's core"
assert whole > 0, "awake, a worker may run on every core again"

for worker in workers:  # as taskset does; the caller's core is all that is left
    os.sched_setaffinity(worker, {here})
for _ in range(5):
    index.search(rows[0], 10)
    assert all(os.sched_getaffinity(worker) == {here} for worker in workers)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.no_asan
def test_fork():
    """A child makes its own threads."""
    code = (
        "import os, numpy as np\n"
        "from knnfast.search import Index, set_num_threads\n"
        "set_num_threads(3)\n"
        "ix = Index(64); ix.add(np.random.rand(60000, 64).astype(np.float32))\n"
        "q = np.random.rand(8, 64).astype(np.float32); want = ix.search(q, 5)[1]\n"
        "pid = os.fork()\n"
        "same = (ix.search(q, 5)[1] == want).all()\n"
        "os._exit(not same) if pid == 0 else None\n"
        "assert same and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.no_asan
def test_imports_without_torch():
    code = "import sys, knnfast.search, knnfast.faiss_api; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_other_files_is_no_place_for_an_index(tmp_path):
    index = Index(4)
    index.add(np.eye(4, dtype=np.float32))
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"path: .* holds other files \(letter\.txt\) and no index"
    ):
        index.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "0123456789abcdef-0000.rows.f16").touch()  # of a first save that was killed
    index.save(folder)
    others = {"letter.txt", "0123456789abcdef-photo.jpg", "0123456789abcdef-0000.rows.f16.bak"}
    for name in others:
        (folder / name).write_text("mine")
    index.save(folder)  # an index it is
    assert len(Index.open(folder)) == 4
    assert all((folder / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("text", ['{"name": "an app"}', '{"needs":["knnfast-index"]}'])
def test_a_manifest_of_something_else_stays(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds other files \(manifest\.json\) and no index"):
        Index(4).save(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_manifest_that_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")  # to open it would wait for a writer
    with pytest.raises(ValueError, match=r"holds other files \(manifest\.json\) and no index"):
        Index(4).save(tmp_path)


def test_opening_while_another_process_saves(tmp_path):
    """What the manifest named is gone when it is opened: the new one is taken."""
    index = Index(8)
    index.add(np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32))
    index.save(tmp_path / "index")
    code = (
        "import sys; from knnfast import Index; index = Index.open(sys.argv[1])\n"
        "for _ in range(150): index.save(sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "index")]) as saving:
        opened = 0
        while saving.poll() is None:
            assert len(Index.open(tmp_path / "index")) == 400
            opened += 1
    assert saving.returncode == 0
    assert opened > 10
