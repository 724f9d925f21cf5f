"""Filters of few rows: what lies between them is stepped over, and nothing is missing."""

import itertools

import numpy as np
import pytest
import torch

from knnfast import Index, reference

D, N = 136, 5_003  # scans of codes may stop early


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float16)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((70, D), dtype=np.float32)


def bitset(ids, bits):
    inside = np.zeros(bits, bool)
    inside[ids[ids < bits]] = True
    return np.packbits(inside, bitorder="little")


def segmented(rows, tmp_path, scan="auto", ids=None):
    """Segments that begin at rows 0, 1001 and 3015, whose automatic ids are no multiples of 8."""
    index = Index(D, scan=scan)
    for i, (begin, end) in enumerate(itertools.pairwise((0, 1001, 3015, len(rows)))):
        index.add(rows[begin:end], None if ids is None else ids[begin:end])
        index.save(tmp_path / str(i))
        index = Index.open(tmp_path / str(i))
    return index


KEPT = {
    "none": np.array([], int),
    "one": np.array([3014]),
    "the ends": np.array([0, 15, 16, 1000, 1001, 3015, N - 1]),
    "every 100th": np.arange(7, N, 100),
    "long runs": np.r_[200:210, 1010:1500, 3000:3040],
    "single blocks": np.flatnonzero(np.arange(N) // 16 % 2),
    "all but a run": np.r_[0:2000, 2900:N],
    "all": np.arange(N),
}


def search_reference(queries, rows, ids, kept, k):
    """Scores and ids of the rows at `kept`."""
    tensors = torch.from_numpy(queries), torch.from_numpy(np.ascontiguousarray(rows[kept]))
    scores, found = (part.numpy() for part in reference.topk(*tensors, k))
    return scores, np.where(found < 0, -1, np.append(ids[kept], -1)[found])


@pytest.mark.parametrize(
    ("scan", "own"),
    [
        pytest.param("auto", False, marks=pytest.mark.isa),
        pytest.param("int8", False, marks=pytest.mark.isa),
        ("auto", True),
        ("fp16", True),
    ],
)
def test_filters_of_few_rows(rows, queries, tmp_path, scan, own):
    """Lists and bitsets, also of fewer bits than ids, allowed and denied, for 1, 3 and 70 queries;
    after removals, too."""
    ids = np.arange(N)
    if own:
        ids = np.random.default_rng(2).permutation(2 * N)[:N]
        ids = np.sort(ids) if scan == "fp16" else ids  # ascending: found by bisection
    index = segmented(rows, tmp_path, scan, ids if own else None)
    gone = np.zeros(N, bool)
    for removed in ([], np.r_[210:260, 1020:1024, N - 3]):
        gone[removed] = True
        assert index.remove(ids[removed]) == len(removed)
        for kept in KEPT.values():
            left = kept[~gone[kept]]
            others = np.setdiff1d(np.arange(N), kept)
            short = int(ids[left].max(initial=0)) // 8 * 8  # the last bits are not there
            in_short = left[ids[left] < short]
            whole = search_reference(queries, rows, ids, left, 5)
            cut = search_reference(queries, rows, ids, in_short, 5)
            for m, (options, (scores, found)) in itertools.product(
                (1, 3, 70),
                (
                    ({"allow": ids[kept]}, whole),
                    ({"allow": bitset(ids[kept], 2 * N)}, whole),
                    ({"allow": bitset(ids[kept], short)}, cut),
                    ({"deny": ids[others]}, whole),
                    ({"deny": bitset(ids[others], 2 * N)}, whole),
                ),
            ):
                got = index.search(queries[:m], 5, **options)
                np.testing.assert_array_equal(got[1], found[:m])
                np.testing.assert_array_equal(got[0], scores[:m])


@pytest.mark.parametrize("own", [False, True])
def test_allowed_less_denied(rows, queries, tmp_path, own):
    """Both filters at once, as lists (in any order, with repeats and ids that are not there) and as
    bitsets: few rows, which are listed, many and runs of them, which are masked."""
    ids = np.random.default_rng(2).permutation(2 * N)[:N] if own else np.arange(N)
    index = segmented(rows, tmp_path, ids=ids if own else None)
    index.remove(ids[KEPT["the ends"][:2]])
    for kept in KEPT.values():
        denied = np.r_[kept[::3], 1500:1510, 3014]
        left = np.setdiff1d(kept, np.r_[denied, KEPT["the ends"][:2]])
        scores, found = search_reference(queries, rows, ids, left, 5)
        allow = np.r_[ids[kept][::-1], ids[kept][:4], 9 * N]
        deny = np.r_[ids[denied], 9 * N, ids[denied][:2]]
        for m, lists in itertools.product((1, 9, 70), itertools.product((True, False), repeat=2)):
            got = index.search(
                queries[:m],
                5,
                allow=allow if lists[0] else bitset(allow, 2 * N),
                deny=deny if lists[1] else bitset(deny, 2 * N),
            )
            np.testing.assert_array_equal(got[1], found[:m])
            np.testing.assert_array_equal(got[0], scores[:m])


def test_a_filter_of_few_rows_scans_few(rows, queries):
    scans = {scan: Index(D, scan=scan) for scan in ("auto", "int8")}
    for index in scans.values():
        index.add(rows)
        index.search(queries[:2], 3, allow=KEPT["one"])
        index.search(queries[:1], 3, allow=bitset(KEPT["every 100th"], N))
    few = 2 + len(KEPT["every 100th"])
    assert scans["auto"].stats["rows_scanned"] == few  # not the blocks that they lie in
    assert few < scans["int8"].stats["rows_scanned"] <= 16 * few
    assert scans["int8"].stats["chunks_canonical"] == 0
    index = scans["auto"]
    index.remove(np.arange(1600, N))
    before = index.stats["rows_scanned"]
    index.search(queries[:1], 3)
    assert index.stats["rows_scanned"] - before == 1600


def test_a_run_of_rows_is_scanned(rows, queries):
    """Not scored one by one, however few queries there are; a handful of rows always is."""
    index = Index(D)
    index.add(np.tile(rows, (16, 1)))
    for m in (1, 2, 70):
        for run, canonical in ((400, False), (64, True)):
            before = index.stats["chunks_canonical"]
            index.search(queries[:m], 5, allow=np.arange(800, 800 + run))
            assert (index.stats["chunks_canonical"] > before) == canonical


@pytest.mark.parametrize("m", [1, 3, 4, 9, 40])
def test_blocks_without_rows_are_not_counted_as_stopped(rows, m):
    rng = np.random.default_rng(7)
    centres = rng.standard_normal((500, 256))
    x = (centres[rng.integers(500, size=40_000)] + 0.1 * rng.standard_normal((40_000, 256))).astype(
        np.float16
    )
    index = Index(256, scan="int8")
    index.add(x)
    index.remove(np.flatnonzero(np.arange(len(x)) // 16 % 2))  # every other block
    index.search(x[:m].astype(np.float32), 3)
    scanned, stopped = (index.stats[name] for name in ("rows_scanned", "rows_stopped"))
    assert len(index) * m <= scanned <= len(x) * m
    assert stopped <= scanned


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("own", [False, True])
def test_filters_of_all_densities(rows, queries, metric, own):
    """Where rows begin to be read themselves, and chunks to be joined; with equal rows of which the
    filter leaves some."""
    x = np.concatenate([rows, rows[:700], np.repeat(rows[:1], 300, 0)])
    ids = np.random.default_rng(4).permutation(len(x)) if own else np.arange(len(x))
    order = np.argsort(ids)
    index = Index(D, metric)
    index.add(x, ids if own else None)
    draw = np.random.default_rng(5).random(len(x))
    for share in (0.3, 0.2, 0.13, 0.1, 0.08, 0.06, 0.03, 0.01, 0.002):
        kept = order[draw[order] < share]  # by id, as ties are
        tensors = torch.from_numpy(queries), torch.from_numpy(x[kept])
        scores, found = (part.numpy() for part in reference.topk(*tensors, 9, metric=metric))
        for m in (1, 7, 8, 70):
            got = index.search(queries[:m], 9, allow=bitset(ids[kept], len(x)))
            np.testing.assert_array_equal(got[1], ids[kept][found[:m]])
            np.testing.assert_array_equal(got[0], scores[:m])
    assert index.stats["chunks_canonical"] > 0
    assert index.stats["chunks_int8"] > 0


def test_a_range_of_few_rows(rows, queries):
    index = Index(D)
    index.add(rows)
    for kept in KEPT.values():
        lims, scores, ids = index.range_search(queries[:2], -1e9, allow=kept)
        np.testing.assert_array_equal(lims, np.arange(3) * len(kept))
        for q in range(2):
            part = slice(lims[q], lims[q + 1])
            want = search_reference(queries[q : q + 1], rows, np.arange(N), kept, max(1, len(kept)))
            np.testing.assert_array_equal(ids[part], want[1][0, : len(kept)])
            np.testing.assert_array_equal(scores[part], want[0][0, : len(kept)])


def test_scans_between_few_rows_learn_to_stop():
    """Of clustered rows most are left early, also where every run of blocks is short."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((50, 256)).astype(np.float32)
    x = centres[rng.integers(50, size=60_000)]
    x = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float16)
    index = Index(256)
    index.add(x)
    allowed = np.flatnonzero(np.arange(len(x)) // 16 % 6 == 0)
    for _ in range(10):  # what it learns from is time, and the machine may hold up a scan
        before = index.stats
        index.search(centres[:8], 3, allow=allowed)
        scanned, stopped = (
            index.stats[name] - before[name] for name in ("rows_scanned", "rows_stopped")
        )
        assert scanned < 8 * len(x) / 4
        if stopped > 0.3 * scanned:
            return
    pytest.fail("no scan learned to stop")
