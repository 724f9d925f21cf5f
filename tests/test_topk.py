"""The search returns reference.topk's bits, whatever the data, scan, order of work and machine."""

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_topk
from hypothesis import given, settings
from hypothesis import strategies as st

from knnfast import _C, ops, reference
from knnfast.search import Index, set_num_threads

METRICS = ("ip", "cosine", "l2")
SCANS = ("fp16", "int8", "auto")
ISAS = ("portable", "avx2", "avx512", "avx512vnni", "amx")
STOPPING = ("portable", "avx2", "avx512", "avx512vnni")  # amx: at small batches


@pytest.fixture
def one_thread():
    """Another one would see rows in an order of its own."""
    before = _C.num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)


def hard_rows(kind, n, d, rng):
    """Data that breaks a bound, an order or a range if anything does."""
    x = rng.standard_normal((n, d))
    if kind == "duplicates":
        x = x[rng.integers(0, max(1, n // 7), n)]
    elif kind == "equal":
        x = np.repeat(x[:1], n, 0)
    elif kind == "zeros":
        x[rng.random(n) < 0.5] = 0
    elif kind == "subnormal":
        x *= 6e-8
    elif kind == "huge":
        x = np.clip(x * 2e4, -6e4, 6e4)
    elif kind == "mixed":
        x *= 10.0 ** rng.uniform(-7, 4, (n, 1))
        x = np.clip(x, -6e4, 6e4)
    elif kind == "dominant":
        x[:, 0] = 500
        x[:, -1] += rng.standard_normal(n) * 100
    elif kind == "mean":
        x = x * 0.01 + rng.standard_normal(d) * 30
    elif kind == "near":  # closer than the codes can tell
        x = x[:1] + rng.standard_normal((n, d)) * 1e-3
    elif kind == "integers":
        x = rng.integers(-2, 3, (n, d)).astype(float)
    return x.astype(np.float16)


KINDS = ("normal", "duplicates", "equal", "zeros", "subnormal", "huge", "mixed", "dominant", "mean",
         "near", "integers")  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, metric, seed):
    rng = np.random.default_rng(seed)
    for (n, d), (m, k), scan in zip(
        [(37, 3), (700, 31), (1601, 64), (2000, 100)],
        [(1, 5), (5, 1), (20, 17), (33, 60)],
        itertools.cycle(SCANS),
        strict=False,
    ):
        x = hard_rows(kind, n, d, rng)
        q = rng.standard_normal((m, d)).astype(np.float32)
        q[0] = x[n // 2]
        index = Index(d, metric, scan=scan)
        index.add(x[: n // 3])
        index.add(x[n // 3 :])
        assert_topk(index, x, q, k)


STOPPING_KINDS = ("clusters", "late", "parallel", "uneven", "mean", "queries")


def stopping_rows(kind, n, d, rng):
    """Rows of which most are left after a part of their codes, and queries that decide late."""
    centres = rng.standard_normal((40, d))
    x = centres[rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((n, d))
    q = centres[rng.integers(0, 40, 64)] + 0.3 * rng.standard_normal((64, d))
    tail = slice(-(-5 * d // 256) * 16, d)  # behind the first stop
    if kind == "late":  # most of a score lies behind the stops
        x[:, : tail.start] *= 0.1
        q[:, : tail.start] *= 0.1
    elif kind == "parallel":  # the rest of every second row is all that Cauchy and Schwarz allow
        x[::2, tail] = (
            q[rng.integers(0, 64, len(x[::2])), tail] * rng.uniform(0.5, 1, (n + 1) // 2)[:, None]
        )
    elif kind == "uneven":
        x[:, d // 2 :] *= 10.0 ** rng.uniform(-3, 1, (n, 1))
    elif kind == "mean":
        x += 20 * rng.standard_normal(d)
    elif kind == "queries":  # of one batch, but as different as they can be
        q *= 10.0 ** rng.uniform(-6, 6, (64, 1))
        q[::7] = 0
        q[1::7, tail] = 0
        q[2::7, : tail.start] = 0
        q[3::7, 1:] = 0
    return x.astype(np.float16), q.astype(np.float32)


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", STOPPING_KINDS)
def test_stops(kind, metric, seed):
    """Rows may be left before all their codes are read; the answers stay."""
    rng = np.random.default_rng(seed)
    stopped = 0
    for d, scan in ((128, "int8"), (131, "auto"), (512, "int8"), (516, "auto")):
        x, q = stopping_rows(kind, 3000, d, rng)
        ids = np.arange(len(x))
        index = Index(d, metric, scan=scan)
        index.add(x[:1000])
        index.add(x[1000:])
        gone = rng.choice(ids, 400, replace=False)
        kept = np.setdiff1d(ids, gone)
        for m, k in ((1, 10), (3, 1), (20, 5), (64, 2)):
            assert_topk(index, x, q[:m], k)
        index.remove(gone)
        for m, k in ((2, 3), (9, 10)):
            assert_topk(index, x[kept], q[:m], k, torch.as_tensor(kept))
        stopped += index.stats["rows_stopped"]
    if _C.isa() in STOPPING and kind == "clusters":
        assert stopped > 0


SETTLED = 16_640  # rows from which codes of up to 260 dimensions are final


def narrow_rows(kind, n, d, rng):
    """Rows that lie near a few directions, which no coordinate follows: codes are rotated."""
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    size = np.arange(1, d + 1) ** -0.8
    x = rng.standard_normal((n, d)) * size @ basis
    q = rng.standard_normal((12, d)) * size @ basis
    if kind == "mean":
        x += 5 * rng.standard_normal(d)
    elif kind == "plane":
        x = rng.standard_normal((n, 2)) @ basis[:2]
    elif kind == "line":
        x = rng.integers(-9, 10, (n, 1)) * basis[:1]
    elif kind == "dominant":
        x = rng.standard_normal((n, d))
        x[:, -1] *= 1000
    elif kind == "sizes":
        x *= 10.0 ** rng.uniform(-6, 4, (n, 1))
    elif kind == "subnormal":
        x *= 2e-6
    elif kind == "huge":
        x *= 6e4 / np.abs(x).max()
    elif kind == "duplicates":
        x = x[rng.integers(0, 50, n)]
    elif kind == "across":  # queries that see only what the rows hardly have
        q = rng.standard_normal((12, d // 4)) @ basis[-(d // 4) :]
    q[1] = x[5]
    q[2] = 0
    q[3] *= 1e9
    return x.astype(np.float16), q.astype(np.float32)


def is_rotated(folder):
    return len(list(folder.glob("*.rotation.f32"))) == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.isa) for kind in ("spectrum", "dominant", "sizes")),
     "mean", "plane", "line", "subnormal", "huge", "duplicates", "across"],
)  # fmt: skip
def test_rotated(kind, metric, seed, tmp_path):
    """Rows near a few directions: codes in other coordinates, the same answers."""
    rng = np.random.default_rng(seed)
    few = 256 if _C.isa() == "avx2" else 128  # dimensions that have stops
    for d, scan in ((few, "auto"), (260, "int8")):
        x, q = narrow_rows(kind, SETTLED + 21, d, rng)
        index = Index(d, metric, scan=scan)
        index.add(x[:4000])  # too few to tell
        index.add(x[4000:])
        for m, k in ((1, 10), (12, 40)):
            assert_topk(index, x, q[:m], k)
        index.save(tmp_path / str(d))
        assert is_rotated(tmp_path / str(d))
        index = Index.open(tmp_path / str(d), mmap=d == few)
        index.verify()
        more = narrow_rows("spectrum", 100, d, rng)[0]  # into a segment that takes it over
        index.add(more)
        every = np.concatenate([x, more])
        assert_topk(index, every, q[:4], 10)
        gone = rng.choice(len(every), 700, replace=False)
        kept = np.setdiff1d(np.arange(len(every)), gone)
        index.remove(gone)
        for _ in range(2):
            assert_topk(index, every[kept], q[:4], 7, torch.as_tensor(kept))
            index.compact()


def test_rotation_pays(seed):
    """Codes are left early; rows in all directions alike are not rotated."""
    rng = np.random.default_rng(seed)
    x, q = narrow_rows("spectrum", 40_000, 256, rng)
    narrow, wide = Index(256, scan="int8"), Index(256, scan="int8")
    narrow.add(x)
    wide.add(rng.standard_normal(x.shape).astype(np.float16))
    assert narrow.nbytes - wide.nbytes == 256 * 256 * (4 + 2)  # as floats and as whole numbers
    narrow.search(q, 10)
    if _C.isa() in STOPPING:
        assert narrow.stats["rows_stopped"] > 0.3 * narrow.stats["rows_scanned"]


@pytest.mark.parametrize("mean", [0, 1, 3000])
def test_rotated_l2(mean, seed, tmp_path):
    """Far from the origin a difference of rotated vectors is too inaccurate for the bounds."""
    rng = np.random.default_rng(seed)
    x, q = narrow_rows("spectrum", SETTLED, 256, rng)
    centre = mean * rng.standard_normal(256)
    x = (100 * x.astype(np.float64) + centre).astype(np.float16)
    index = Index(256, "l2", scan="int8")
    index.add(x)
    index.save(tmp_path / "index")
    assert is_rotated(tmp_path / "index")
    assert_topk(index, x, (100 * q + centre).astype(np.float32), 10)
    assert_topk(index, x, q, 10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 5, 24])
def test_rows_at_the_bound_of_a_stop(m, metric, seed):
    """Each row that is looked for scores nearly all that its codes up to a stop allow: what
    rounding took from it and from the query lies along the other, as does what is behind the
    stop."""
    rng = np.random.default_rng(seed)
    d, n, step = 512, 4096, 2.0**-7
    x = 0.25 * rng.standard_normal((n, d))
    size = np.where(np.arange(d) % 2, 127, 63.4)  # of which a code keeps 63
    q = rng.choice([-1, 1], (48, d)) * size / np.linalg.norm(size)
    rows = 600 + 70 * np.arange(48)
    for i, stop in enumerate((160, 320) * 24):
        y = np.where(np.arange(d) % 2, 40, 20) + np.where(np.arange(d) < stop, 0.45, 0)
        y[1] = 127  # the largest, so that a step is one
        y[3] += 3 * (i // 2)  # shares are rounded up, each by another part of a step
        x[rows[i]] = step * np.sign(q[i]) * y
    x = np.concatenate([x, -x]).astype(np.float16)  # of mean 0
    q = 8 * q.astype(np.float32)  # l2: beyond the rows
    index = Index(d, metric, scan="int8")
    index.add(x)
    for i, row in enumerate(rows):
        query, found = torch.as_tensor(q[i : i + 1]), torch.as_tensor(x[row : row + 1])
        score = reference.topk(query, found, 1, metric)[0].item()
        radius = score * (1 + 1e-5 if metric == "l2" else 1 - 1e-5)
        offsets, _, ids = index.range_search(np.repeat(q[i : i + 1], m, 0), radius)
        np.testing.assert_array_equal(np.diff(offsets), 1)
        assert (ids == row).all()
    if _C.isa() in STOPPING:
        assert index.stats["rows_stopped"] > 0.5 * index.stats["rows_scanned"]


@pytest.mark.parametrize("m", [1, 24])
def test_equal_rows_behind_a_stop(m):
    """Cosine rows that are all the mean: of norm 0, but for their own rounding. The queries lie
    behind the last stop and across them, so that nothing else is in the bound."""
    rng = np.random.default_rng(0)
    d, n = 512, 20_000
    x = np.repeat(rng.integers(1, 8, (1, d)), n, 0).astype(np.float16)
    index = Index(d, "cosine", scan="int8")
    index.add(x)
    q = np.zeros((8, d), np.float32)
    first = np.arange(320, d, 2)
    for i in range(8):  # pairs of elements, each across the rows'
        size = rng.integers(1, 8, len(first))
        q[i, first], q[i, first + 1] = size * x[0, first + 1], -size * x[0, first]
    for query in np.concatenate([q, -q]):
        lims, scores, _ = index.range_search(np.repeat(query[None], m, 0), -1e-10)
        np.testing.assert_array_equal(np.diff(lims), n)
        assert (scores == 0).all()


@pytest.mark.parametrize("m", [1, 16])
def test_rows_left_out_hold_up_no_stop(m, seed, one_thread):
    """Every block has a row near the queries, but only the first 40 are in the search."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(256)
    x = rng.standard_normal((32_000, 256))
    near = np.arange(0, len(x), 16)
    x[near] = centre + 0.02 * rng.standard_normal((len(near), 256))
    x = x.astype(np.float16)
    q = (centre + 0.1 * rng.standard_normal((m, 256))).astype(np.float32)
    kept = np.setdiff1d(np.arange(len(x)), near[40:])
    index = Index(256, scan="int8")
    index.add(x)
    index.remove(near[40:])
    assert_topk(index, x[kept], q, 10, torch.as_tensor(kept))
    if _C.isa() in STOPPING:
        assert index.stats["rows_stopped"] > 0.7 * index.stats["rows_scanned"]


@pytest.mark.isa
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("m", [1, 20])
def test_trust_is_checked(d, m, seed, one_thread):
    """Rows whose codes overstate them set a threshold above better rows, which must come back.

    Codes are whole numbers here, rows that are listed first have 7/16 less everywhere: all of their
    error is parallel to the query. Every row has its negative beside it, so that the mean is 0.
    """
    rng = np.random.default_rng(seed)
    k, n = 10, 2048
    rows = rng.integers(-9, 10, (n, d)).astype(np.float64)
    rows[: 3 * k] = 20 - 7 / 16
    better = rng.choice(np.arange(n // 4, n // 2), k, replace=False)
    rows[better] = 19
    rows[better, d // 3 :] = 20
    rows[:, 0] = 127
    x = np.stack([rows, -rows], 1).reshape(2 * n, d).astype(np.float16)
    q = np.repeat(np.ones((1, d), np.float32), m, 0)
    q[1:] *= rng.choice([1, 2, 4], (m - 1, 1))
    index = Index(d, scan="int8")
    index.add(x)
    assert_topk(index, x, q, k)
    assert index.stats["queries_repeated"] == m
    assert set(index.search(q, k)[1].flatten()) == set(2 * better)
    assert index.stats["queries_repeated"] == m  # the index has learnt


@pytest.mark.isa
@pytest.mark.parametrize("scan", ["int8", "fp16"])
@pytest.mark.parametrize("m", [1, 20])
def test_order_is_checked(m, scan, seed, one_thread):
    """The best rows come first: a threshold for rows in no order is too high, and they are lost."""
    rng = np.random.default_rng(seed)
    k, n, d = 50, 1 << 16, 64
    x = rng.standard_normal((n, d)).astype(np.float16)
    q = rng.standard_normal(d)
    q = (q * rng.choice([1, 2, 4], (m, 1))).astype(np.float32)
    x = x[np.argsort(-(x.astype(np.float64) @ q[0]), kind="stable")]
    index = Index(d, scan=scan)
    index.add(x)
    assert_topk(index, x, q, k)
    assert index.stats["queries_repeated"] == m
    assert_topk(index, x, q, k)
    if m > 1:
        return
    # The order is doubted by the next 256 searches; after another failure by four times as many.
    for repeated, searches in ((1, 255), (2, 1 + 1024), (3, 1)):
        for _ in range(searches):
            index.search(q, k)
        assert index.stats["queries_repeated"] == repeated


def test_an_order_is_trusted_again(seed, one_thread):
    rng = np.random.default_rng(seed)
    k, n, d = 50, 1 << 16, 64
    x = rng.standard_normal((n, d)).astype(np.float16)
    wrong, right = rng.standard_normal((2, 1, d)).astype(np.float32)
    x = x[np.argsort(-(x.astype(np.float32) @ wrong[0]))]
    index = Index(d, scan="int8")
    index.add(x)

    def search(query, searches=1):
        """How many of them are repeated."""
        before = index.stats["queries_repeated"]
        for _ in range(searches):
            index.search(query, k)
        return index.stats["queries_repeated"] - before

    assert search(wrong) == 1
    assert search(wrong, 256) == 0
    assert search(wrong) == 1  # soon after: doubted by 1024
    assert search(wrong, 1024) == 0
    assert search(right, 40) == 0
    assert search(wrong) == 1  # trusted by 40 before: doubted by 256 again
    assert search(wrong, 256) == 0
    assert search(wrong) == 1


@pytest.mark.isa
@pytest.mark.parametrize("m", [1, 20])
def test_rows_in_no_order_set_early_thresholds(m, seed, one_thread):
    rng = np.random.default_rng(seed)
    k, n, d = 200, 1 << 16, 64
    x = rng.standard_normal((n, d)).astype(np.float16)
    q = rng.standard_normal((m, d)).astype(np.float32)
    index = Index(d, scan="fp16")
    index.add(x)
    assert_topk(index, x, q, k)
    # A row is among the k best so far so often:
    assert index.stats["rows_opened"] < 0.6 * m * k * (1 + np.log(n / k))
    # Where a filter leaves k rows or fewer, none may set a threshold.
    for left in (k - 1, k, k + 1, 3 * k):
        kept = np.sort(rng.choice(n // 2, left, replace=False))
        bits = np.zeros(n, bool)
        bits[kept] = True
        allow = np.packbits(bits, bitorder="little")
        assert_topk(index, x[kept], q, k, torch.as_tensor(kept), allow=allow)
    assert index.stats["queries_repeated"] == 0


@pytest.mark.isa
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 64, 500, 1024])
def test_extreme_products(d, metric, seed):
    """Rows of extreme codes against queries of the same signs: every partial sum at its largest.

    Kernels sum products in 16 bits where the queries' codes allow for it (csrc/isa/kernels.h).
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (200, d))
    rows = np.concatenate([signs, -signs, np.sign(rng.standard_normal((200, d)) + 2)])
    x = rows.astype(np.float16)
    flat = signs[:8]
    queries = [flat, np.ones((1, d)), -np.ones((1, d)), flat * (rng.random((8, d)) + 0.5)]
    # 14 x 15.5 and 2 x 16.5 in each half of a window: the step is 1, all round up, Σ|p| = 258.
    queries.append(flat * np.where(np.arange(d) % 32 < 4, 16.5, 15.5))
    for width in (1, 2, 4, 16, 32):  # all weight in a few elements, alone or alternating
        q = np.where(np.arange(d) % (2 * width) < width, flat, 1e-3 * flat)
        queries += [q, np.where(np.arange(d) < width, flat, 0)]
    q = np.concatenate(queries).astype(np.float32)
    index = Index(d, metric, scan="int8")
    index.add(x)
    for first in range(0, len(q), 5):  # an odd number of queries at a time
        assert_topk(index, x, q[first : first + 5], 7)
    assert_topk(index, x, q, 7)


FACTORS = {
    "d": (1, 3, 31, 64, 100, 384, 512, 768, 1000),
    "n": ("0", "1", "k - 1", "k", "17", "999", "3000"),
    "m": (1, 2, 7, 16, 33, 64, 257),
    "k": (1, 2, 10, 17, 100, 333, 1000),
    "metric": METRICS, "scan": SCANS, "kind": KINDS, "threads": (1, 2, 3), "pieces": (1, 3),
    "removed": (0, 0.3), "filter": ("none", "allow", "allow bits", "deny", "deny bits"),
    "dtype": (torch.float16, torch.bfloat16, torch.float32), "scale": (1, 1e-40, 1e6, 3e38),
}  # fmt: skip


def pairwise(factors, tries=20):
    """Cases in which every value of a factor meets every value of every other one."""
    rng, names = random.Random(0), list(factors)
    missing = {
        (f, x, g, y)
        for f, g in itertools.combinations(names, 2)
        for x in factors[f]
        for y in factors[g]
    }
    while missing:
        best, gain = None, -1
        for f, x, g, y in rng.sample(sorted(missing, key=str), min(tries, len(missing))):
            case = {name: rng.choice(values) for name, values in factors.items()} | {f: x, g: y}
            covers = {(f, case[f], g, case[g]) for f, g in itertools.combinations(names, 2)}
            if len(covers & missing) > gain:
                best, gain, covered = case, len(covers & missing), covers
        missing -= covered
        yield best


CASES = list(pairwise(FACTORS))
PARTS = 4  # of which each instruction set runs one, and ASan the first


def marked(part):
    marks = [pytest.mark.no_asan] if part > 0 else []
    marks += [pytest.mark.isa] if part == ISAS.index(_C.isa()) % PARTS else []
    return pytest.param(part, marks=marks)


@pytest.mark.parametrize("part", [marked(part) for part in range(PARTS)])
def test_pairwise(part):
    """Shapes, data, types, filters, removals and thread counts: every pair of values occurs."""
    before = _C.num_threads()
    for number, case in enumerate(CASES[part::PARTS]):
        d, m, k, metric = (case[name] for name in ("d", "m", "k", "metric"))
        n = max(0, k - 1) if case["n"] == "k - 1" else k if case["n"] == "k" else int(case["n"])
        rng = np.random.default_rng(number)
        # All queries are searched; the reference's own cost allows so many of them.
        asked = np.sort(rng.permutation(m)[: max(3, 20_000_000 // max(1, n * d))])
        x = hard_rows(case["kind"], n, d, rng) if n else np.empty((0, d), np.float16)
        ids = rng.permutation(3 * n + 1)[:n]
        q = torch.as_tensor(np.clip(rng.standard_normal((m, d)), -1, 1) * case["scale"])
        largest = torch.finfo(case["dtype"]).max
        q = q.clamp(-largest, largest).to(case["dtype"])
        try:
            set_num_threads(case["threads"])
            index = Index(d, metric, scan=case["scan"])
            for part_of in np.array_split(np.arange(n), case["pieces"]):
                index.add(x[part_of], ids[part_of])
            gone = ids[rng.random(n) < case["removed"]]
            assert index.remove(gone) == len(gone)
            some = ids[rng.random(n) < 0.5]
            rule, _, as_bits = case["filter"].partition(" ")
            bits = np.packbits(np.isin(np.arange(3 * n + 1), some), bitorder="little")
            given = {} if rule == "none" else {rule: bits if as_bits else some}
            scores, found = index.search(q, k, **given)
        finally:
            set_num_threads(before)
        stays = ~np.isin(ids, gone)
        if given:
            stays &= np.isin(ids, some) == (rule == "allow")
        want_s, want_i = reference.topk(
            q[asked], torch.as_tensor(x[stays]), k, metric, torch.as_tensor(ids[stays])
        )
        assert torch.equal(found[asked], want_i), case
        assert torch.equal(scores[asked], want_s), case


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([125, 128, 131, 253, 260, 516]), st.integers(1, 4000), st.integers(1, 20),
    st.integers(1, 100), st.sampled_from(METRICS), st.sampled_from(SCANS),
    st.sampled_from(STOPPING_KINDS), st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_that_stops(d, n, m, k, metric, scan, kind, threads, seed):
    """Scans with stops, over several chunks and threads."""
    x, q = stopping_rows(kind, n, d, np.random.default_rng(seed))
    before = _C.num_threads()
    try:
        set_num_threads(threads)
        index = Index(d, metric, scan=scan)
        index.add(x)
        assert_topk(index, x, q[:m], k)
    finally:
        set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 80), st.integers(0, 400), st.integers(1, 40), st.integers(1, 50),
    st.sampled_from(METRICS), st.sampled_from(SCANS), st.sampled_from(KINDS),
    st.sampled_from([1e-40, 1e-20, 1.0, 1e6, 1e30, 3e38]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(d, n, m, k, metric, scan, kind, scale, seed):
    rng = np.random.default_rng(seed)
    x = hard_rows(kind, n, d, rng) if n else np.empty((0, d), np.float16)
    direction = np.clip(rng.standard_normal((m, d)), -1, 1)
    q = (direction * scale).astype(np.float32)
    index = Index(d, metric, scan=scan)
    ids = rng.permutation(5 * n + 5)[:n]
    cut = int(rng.integers(0, n + 1))
    for part in (slice(0, cut), slice(cut, n)):
        if part.start != part.stop:
            index.add(x[part], ids[part])
    assert_topk(index, x, q, k, torch.as_tensor(ids))
    removed = ids[rng.random(n) < 0.3]
    assert index.remove(removed) == len(removed)
    kept = ~np.isin(ids, removed)
    assert_topk(index, x[kept], q, k, torch.as_tensor(ids[kept]))
    index.compact()
    assert_topk(index, x[kept], q, k, torch.as_tensor(ids[kept]))
    allowed = ids[rng.random(n) < 0.5]
    both = kept & np.isin(ids, allowed)
    want = reference.topk(
        torch.as_tensor(q), torch.as_tensor(x[both]), k, metric, torch.as_tensor(ids[both])
    )
    bits = np.packbits(np.isin(np.arange(5 * n + 5), allowed), bitorder="little")
    denied = np.setdiff1d(ids, allowed)
    for options in ({"allow": allowed}, {"allow": bits}, {"deny": denied}):
        scores, found = index.search(q, k, **options)
        np.testing.assert_array_equal(found, want[1].numpy())
        np.testing.assert_array_equal(scores, want[0].numpy())


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_query_types(dtype):
    x = torch.randn(300, 40)
    q = torch.randn(9, 40).to(dtype)
    index = Index(40)
    index.add(x.to(dtype))
    want = reference.topk(q, x.to(dtype), 6)
    scores, ids = index.search(q, 6)
    assert torch.equal(ids, want[1])
    assert torch.equal(scores, want[0])
    assert ops.topk(q, x.to(dtype), 6)[1].equal(want[1])


def test_opcheck():
    q, x, ids = torch.randn(3, 9), torch.randn(20, 9).half(), torch.arange(20).flip(0)
    torch.library.opcheck(torch.ops.knnfast.topk.default, (q, x, 4, "l2", ids))
    torch.library.opcheck(torch.ops.knnfast.topk.default, (q, x, 30))
    for got, want in zip(ops.topk(q, x, 30, "cosine", ids), reference.topk(q, x, 30, "cosine", ids),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_parallel_rows_tie_as_the_reference_says():
    """Cosine divides by two square roots: an ulp off, as torch's may be, is another order."""
    x = np.outer(np.arange(1, 600), [1, 1, 0]).astype(np.float16)
    q = np.array([[1, 0, 0], [2, 3, 1]], np.float32)
    index = Index(3, "cosine")
    index.add(x)
    scores, ids = reference.topk(torch.from_numpy(q), torch.from_numpy(x), 300, "cosine")
    for got, wanted in zip(index.search(q, 300), (scores, ids), strict=True):
        np.testing.assert_array_equal(got, wanted.numpy())
    exact = reference.exact_sqrt(torch.arange(1.0, 10_001, dtype=torch.float64)).tolist()
    assert exact == [math.sqrt(i) for i in range(1, 10_001)]


def test_reference_keeps_to_the_device():
    q, x = torch.empty(2, 4, device="meta"), torch.empty(9, 4, device="meta")
    assert [v.device for v in reference.topk(q, x, 3)] == [x.device, x.device]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.ones(3)}, ValueError, "q: shape"),
        ({"x": torch.ones(4, 3)}, ValueError, "one width"),
        ({"x": torch.ones(4, 2).int()}, TypeError, "x: dtype"),
        ({"k": 0}, ValueError, "k must be 1 to 2147483647, got 0"),
        ({"metric": "dot"}, ValueError, "metric: must be one of"),
        ({"ids": torch.arange(3)}, ValueError, "ids: shape"),
    ],
)
def test_op_rejects(change, error, match):
    with pytest.raises(error, match=match):
        ops.topk(**({"q": torch.ones(1, 2), "x": torch.ones(4, 2), "k": 1} | change))


OPENED = """
import numpy as np
from knnfast.search import Index
from helpers import rows_of_all_sizes

rng = np.random.default_rng(3)
for d in (64, 100, 512):
    q = rng.standard_normal((40, d)) * 2.0 ** rng.integers(-8, 9, (40, 1))
    q[::7] = 0
    q[::5, 3] += 2**9
    q = q.astype(np.float32)
    normal, equal = rng.standard_normal((2000, d)), np.ones((2000, d))
    every = rows_of_all_sizes(rng, 2000, d), normal.astype(np.float16), equal.astype(np.float16)
    for rows in every:
        for metric in ("ip", "cosine", "l2"):
            index = Index(d, metric=metric, scan="int8")
            index.add(rows)
            index.remove(np.arange(0, 2000, 11))
            for part in (q[:1], np.repeat(q[1:2], 20, 0), q):
                scores = index.search(part, 1500)[0][:, [0, 9, 99, 999]]
                before = index.stats["rows_opened"]
                for radius in scores[::6].flatten().tolist():
                    index.range_search(part, radius)
                print(index.stats["rows_opened"] - before)
"""


@pytest.mark.no_asan
def test_instruction_sets_open_the_same_rows():
    """Those with 16 lanes have one bound: what they test before it loses no row that reaches it."""
    names = [isa for isa in ISAS[2:] if ISAS.index(isa) <= ISAS.index(_C.isa())]
    if len(names) < 2 or os.environ.get("KNNFAST_ISA"):
        pytest.skip(f"this machine's instruction sets of 16 lanes, unchosen: {names}")
    opened = [
        subprocess.run(
            [sys.executable, "-c", OPENED], env={**os.environ, "KNNFAST_ISA": isa},
            cwd=Path(__file__).parent, check=True, capture_output=True, text=True,
        ).stdout.split()
        for isa in names
    ]  # fmt: skip
    assert max(map(int, opened[0])) > 1000
    assert opened == opened[:1] * len(names)


@pytest.mark.no_asan
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa):
    """The tests marked `isa` under each set of kernels that this machine has."""
    names = ISAS[: ISAS.index(_C.isa()) + 1]
    if isa not in names:
        pytest.skip(f"this machine has {_C.isa()} at best")
    if os.environ.get("KNNFAST_ISA"):
        pytest.skip("already under a chosen instruction set")
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("topk", "codes", "filters")]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "isa", *files],
        env={**os.environ, "KNNFAST_ISA": isa}, check=True,
    )  # fmt: skip


@pytest.mark.no_asan
def test_unknown_instruction_set():
    """A clear error from the search and from the ops, which follow its choice."""
    code = (
        "from knnfast import _C\n"
        "for isa in (_C.isa, _C.ops_isa):\n"
        "    try: print(isa())\n"
        "    except ValueError as e: print(e)\n"
    )
    for isa, answer in (("sse9", "KNNFAST_ISA=sse9: this machine"), ("portable", "portable")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "KNNFAST_ISA": isa},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert len(lines) == 2
        assert all(line.startswith(answer) for line in lines), lines


@pytest.mark.parametrize("metric", METRICS)
def test_threads_and_batches(metric, seed):
    """One query at a time, many at once, on one thread or on more: the same bits."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((30_000, 96)) + 0.5).astype(np.float16)
    q = rng.standard_normal((300, 96)).astype(np.float32)
    answers = []
    before = _C.num_threads()
    try:
        for threads, scan in ((1, "auto"), (2, "fp16"), (3, "int8")):
            set_num_threads(threads)
            index = Index(96, metric, scan=scan)
            index.add(x)
            answers.append(index.search(q, 20))
            single = [index.search(row, 20) for row in q[:20]]
            assert all((single[i][1] == answers[-1][1][i]).all() for i in range(20))
    finally:
        set_num_threads(before)
    for scores, ids in answers[1:]:
        np.testing.assert_array_equal(ids, answers[0][1])
        np.testing.assert_array_equal(scores, answers[0][0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_scans_that_do_not_pay(metric, threads, seed):
    """Rows that tie drive scan="auto" from codes to canonical scores; others bring it back."""
    rng = np.random.default_rng(seed)
    d, k = 128, 10
    ties = rng.permuted(np.tile(np.repeat([1.0, 2.0], d // 2), (10_000, 1)), axis=1)
    others = 0.1 * rng.standard_normal((70_000, d)) - 1
    x = np.concatenate([ties, others]).astype(np.float16)
    ids = rng.permutation(len(x))
    q = (np.ones((5, d)) * [[1], [0.5], [2], [1e-3], [3]]).astype(np.float32)
    before = _C.num_threads()
    try:
        set_num_threads(threads)
        index = Index(d, metric)
        index.add(x, ids)
        for m in (1, 5):
            old = index.stats
            assert_topk(index, x, q[:m], k, torch.as_tensor(ids))
            chunks = {n: v - old[n] for n, v in index.stats.items() if n.startswith("chunks")}
            assert chunks["chunks_fp16"] > 0, chunks
            if threads == 1:  # of several, chance says which meets what
                assert chunks["chunks_canonical"] > 5, chunks
                assert chunks["chunks_int8"] > 10, chunks  # of the others, after a while
    finally:
        set_num_threads(before)


def shortlisted(q, x, k, metric, ids):
    """reference.topk where it would take minutes: of 10 k rows that plain float scores choose."""
    wide = x.astype(np.float32)
    found = []
    for row in q.astype(np.float32):
        s = wide @ row
        if metric == "cosine":
            s = s / np.linalg.norm(wide, axis=1)
        elif metric == "l2":
            s = 2 * s - np.einsum("nd,nd->n", wide, wide)
        short = np.sort(np.argpartition(-s, 10 * k)[: 10 * k])
        assert s[short].min() < np.sort(s)[-k] - 1e-3  # the margin holds the float error
        found.append(reference.topk(
            torch.as_tensor(row[None]), torch.as_tensor(x[short]), k, metric,
            torch.as_tensor(ids[short]),
        ))  # fmt: skip
    return torch.cat([s for s, _ in found]).numpy(), torch.cat([i for _, i in found]).numpy()


@pytest.mark.no_asan
@pytest.mark.slow
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("metric", METRICS)
def test_million_rows(metric, scan, seed):
    rng = np.random.default_rng(seed)
    n, d, k = 1_000_000, 64, 100
    x = rng.standard_normal((n, d), dtype=np.float32).astype(np.float16)
    q = rng.standard_normal((5, d)).astype(np.float32)
    index = Index(d, metric, scan=scan)
    index.add(x)
    scores, ids = index.search(q, k)
    want_scores, want_ids = shortlisted(q, x, k, metric, np.arange(n))
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize(
    "metric", ["ip", *(pytest.param(metric, marks=pytest.mark.no_asan) for metric in METRICS[1:])]
)
def test_segments(metric, tmp_path, seed):
    """Rows beyond a segment's capacity: ids run on, and so does all that is done to them."""
    rng = np.random.default_rng(seed)
    n, d, k = 2**20 + 5000, 16, 20
    x = rng.standard_normal((n, d), dtype=np.float32).astype(np.float16)
    q = rng.standard_normal((3, d)).astype(np.float32)
    index = Index(d, metric)
    cut = 2**20 - 1000
    ids = np.concatenate([index.add(x[:cut]), index.add(x[cut:])])
    np.testing.assert_array_equal(ids, np.arange(n))

    def check(index, kept, **options):
        scores, found = index.search(q, k, **options)
        want_scores, want_ids = shortlisted(q, x[kept], k, metric, ids[kept])
        np.testing.assert_array_equal(found, want_ids)
        np.testing.assert_array_equal(scores, want_scores)

    check(index, ids)
    best = index.search(q, 100)[1].ravel()
    check(index, np.setdiff1d(ids, best), deny=best)
    second = ids[2**20 :]
    check(index, second, allow=second)
    gone = np.concatenate([best, ids[2**20 - 50 : 2**20 + 50]])
    assert index.remove(gone) == len(np.unique(gone))
    kept = np.setdiff1d(ids, gone)
    check(index, kept)
    index.compact()
    assert len(index) == len(kept)
    np.testing.assert_array_equal(np.sort(index.ids), kept)
    check(index, kept)
    index.save(tmp_path)
    check(Index.open(tmp_path), kept)
    np.testing.assert_array_equal(index.vectors(kept[-1:]), x[kept[-1:]])
