"""A segment's int8 codes as csrc/search/segment.h defines them: exact answers rest on them."""

import ctypes
import json
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import rows_of_all_sizes

from knnfast import _C
from knnfast.search import Index

DIMS = (1, 3, 4, 15, 16, 17, 31, 64, 100, 257, 512, 1000)


def stored(folder):
    """The one segment of a saved index: x, row_norm, mean, scale, bounds, norm, codes, rotation."""
    index = json.loads((folder / "manifest.json").read_text())["index"]
    (segment,) = index["segments"]
    n, d = segment["rows"], index["dim"]
    x = np.fromfile(folder / segment["vectors"]["name"], np.float16).reshape(n, d)
    terms = np.fromfile(folder / segment["terms"]["name"], np.float32)
    whole = n // 16 * 16
    parts = np.split(terms, np.cumsum([n, d, whole, whole]))
    groups = -(-d // 4)
    codes = np.fromfile(folder / segment["codes"]["name"], np.uint8)[: whole * groups * 4]
    codes = codes.reshape(-1, groups, 16, 4).transpose(0, 2, 1, 3).reshape(whole, groups * 4)
    rotation = np.eye(d)
    if "rotation" in segment:
        rotation = np.fromfile(folder / segment["rotation"]["name"], np.float32)[:-1].reshape(d, d)
    return x, *parts, codes.astype(np.float64) - 128, rotation.astype(np.float64)


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("d", DIMS)
def test_codes_keep_their_bound(tmp_path, seed, d, metric):
    check_codes(tmp_path / "index", rows_of_all_sizes(np.random.default_rng(seed), 64, d), metric)


@pytest.mark.isa
@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("d", [128, 250, 768])
def test_rotated_codes_keep_their_bound(tmp_path, seed, d, metric):
    rng = np.random.default_rng(seed)
    d = max(d, 256) if _C.isa() == "avx2" else d  # it has no stops below
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = rng.standard_normal((max(16_384, 64 * d), d)) / np.arange(1, d + 1) @ basis
    x += rng.standard_normal(d)
    x[::9] *= 10.0 ** rng.uniform(-6, 3, (len(x[::9]), 1))
    x[5] = 0
    rotation, after = check_codes(tmp_path / "index", x.astype(np.float16), metric, extremes)
    assert np.linalg.norm(rotation.T @ rotation - np.eye(d)) <= 2**-19
    assert after < 0.3  # of the rows' squares; d / 16 * 11 before


def extremes(rotation, mean):
    """Rows whose products with the rotation's are as large as they can be: y lies along one of
    them, or along 64 elements of it, which are summed in 32 bits; and rows of one element."""
    d = len(rotation)
    parts = np.arange(d) // 64 == np.arange(-(-d // 64))[:, None]
    some = rotation[:: max(1, d // 128)]
    along = np.concatenate([some, -some, *(some * part for part in parts), np.eye(d)])
    return np.concatenate([mean + along, mean + 100 * along])


def check_codes(folder, x, metric, more=None):
    """Everything stored keeps what is promised of it; the rotation, and the share of the rows'
    squares that lies behind the first stop. `more`: rows to add then, of rotation and mean."""
    found, d = x.shape
    index = Index(d, metric=metric, scan="int8")
    index.add(x)
    index.save(folder)
    if more:
        later = more(stored(folder)[-1], stored(folder)[2].astype(np.float64)).astype(np.float16)
        index.add(later[: len(later) // 16 * 16])
        x = np.concatenate([x, later[: len(later) // 16 * 16]])
        index.save(folder)
    kept, row_norm, mean, scale, bounds, norm, codes, rotation = stored(folder)
    bounds = bounds.view(np.uint32)
    residual = (bounds & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(kept, x)
    wide = x.astype(np.float64)
    size = np.sqrt((wide**2).sum(1))
    np.testing.assert_array_equal(row_norm, size.astype(np.float32))
    if metric == "cosine":
        wide /= np.where(size > 0, size, 1)[:, None]
    straight = wide - mean.astype(np.float64)
    y = straight @ rotation.T
    rotated = not np.array_equal(rotation, np.eye(d))
    # How far q·y may be from (Rq)·(Ry), for q of norm 1.
    turned = np.linalg.norm(straight - y @ rotation, axis=1)
    codes, filled_up = codes[:, :d], codes[:, d:]
    assert (filled_up == 0).all()
    assert (np.abs(codes) <= 127).all()
    left = np.sqrt(((y - scale.astype(np.float64)[:, None] * codes) ** 2).sum(1))
    length = np.sqrt((straight**2).sum(1))
    assert (left + turned <= residual).all()
    # No looser than rounding asks for: half a step for each element.
    step = 0.5 * scale.astype(np.float64) * np.sqrt(d)
    rounded = 1 + 2**-7 + 1e-4
    rounding = 4e-6 + rotated * (2**-19 + 2.5e-5 * np.sqrt(d))
    assert (residual <= (step + rounding * length + 2e-6 + 2e-18 * d) * rounded).all()
    # What is left of a row behind each stop, in 255ths of its norm.
    groups = -(-d // 4)
    for stop, share in ((5, bounds >> 8 & 255), (10, bounds & 255)):
        first = -(-groups * stop // 64) * 4 if groups >= 32 else 0
        rest = np.sqrt((y[:, 4 * first :] ** 2).sum(1))
        size = norm.astype(np.float64) * (1 + 2**-18)
        assert (rest <= share / 255 * size + (2**-21 if metric == "cosine" else 0)).all()
        assert ((share - 1) / 255 * norm <= (rest + rounding * length + 2e-6) * (1 + 1e-5)).all()
    np.testing.assert_allclose(norm, length, rtol=2**-20, atol=1e-6 if metric == "cosine" else 0)
    first = -(-groups * 5 // 64) * 16 if groups >= 32 else 0
    y = y[:found]
    return rotation, (y[:, first:] ** 2).sum() / (y**2).sum()


ROTATE_ROWS = """
#include "search/rotation.h"
using namespace knnfast;
extern "C" void rotate_rows_of(const float* r, const float* y, const double* norms, int64_t n,
                               int64_t dim, float* out, double* off) {
  const auto rotation = Rotation::from_rows(r, dim);
  const int64_t pad = (dim + 63) / 64 * 64;
  RotatedRows rotated(*rotation, n);
  for (int64_t i = 0; i < n; ++i) rotated.put(i, y + i * pad, norms[i]);
  rotated.rotate();
  for (int64_t i = 0; i < n; ++i) {
    const float* row = rotated.take(i);
    std::copy(row, row + pad, out + i * pad);
    off[i] = rotated.off(i);
  }
}
"""
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
UNITS = {
    "portable": "", "avx2": AVX2, "avx512": AVX512, "avx512vnni": f"{AVX512} -mavx512vnni",
    "amx": f"{AVX512} -mavx512vnni -mamx-tile -mamx-int8",
}  # fmt: skip


@pytest.fixture(scope="module")
def rotate_rows_library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("rotate_rows")
    (folder / "run.cpp").write_text(ROTATE_ROWS)
    units = {f"isa/{isa}": flags for isa, flags in UNITS.items()}
    if platform.machine() != "x86_64":
        units = {"isa/portable": ""}
    names = ("search/rotation", "search/query_codes", "common/thread_pool", "isa/dispatch")
    units |= dict.fromkeys(names, "-DKNNFAST_X86" if len(units) > 1 else "")
    options = ["-std=c++17", "-O2", "-fopenmp-simd", "-ffp-contract=off", "-fPIC", "-pthread",
               f"-I{root / 'include'}", f"-I{root / 'csrc'}"]  # fmt: skip

    def compiled(unit):
        out = folder / f"{Path(unit).name}.o"
        source = root / "csrc" / f"{unit}.cpp"
        subprocess.run(
            ["c++", *options, *units[unit].split(), "-w", "-c", "-o", out, source], check=True
        )
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    library = folder / "run.so"
    subprocess.run(
        ["c++", *options, "-shared", "-o", library, folder / "run.cpp", *objects], check=True
    )
    return library


@pytest.fixture(params=UNITS)
def rotate_rows(request, rotate_rows_library, tmp_path, monkeypatch):
    """Rows y [n, d] times R [d, d], and how far each is off at most; under each instruction set."""
    if list(UNITS).index(request.param) > list(UNITS).index(_C.isa()):
        pytest.skip(f"this machine has {_C.isa()} at best")
    # A library chooses its kernels once: each set has its own copy.
    copy = shutil.copy(rotate_rows_library, tmp_path / "run.so")
    monkeypatch.setenv("KNNFAST_ISA", request.param)
    call = ctypes.CDLL(str(copy)).rotate_rows_of

    def run(rotation, y):
        (count, d), pad = y.shape, -(-y.shape[1] // 64) * 64
        n = -(-count // 16) * 16
        wide, out = np.zeros((n, pad), np.float32), np.full((n, pad), np.nan, np.float32)
        wide[:count, :d] = y
        norms, off = np.linalg.norm(wide.astype(np.float64), axis=1), np.full(n, np.nan)
        arrays = [np.ascontiguousarray(rotation, np.float32), wide, norms]
        a, b, c, e, f = [ctypes.c_void_p(x.ctypes.data) for x in (*arrays, out, off)]
        call(a, b, c, ctypes.c_int64(n), ctypes.c_int64(d), e, f)
        assert not out[:, d:].any()
        return out[:count, :d].astype(np.float64), off[:count]

    return run


@pytest.mark.parametrize("d", [125, 128, 250, 512])
def test_rotated_rows_are_as_near_as_they_say(rotate_rows, d, seed):
    """Those, too, that the rounded matrix moves most; the bound is less than twice of that."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
    exact = rotation.astype(np.float64)
    rounded = rotate_rows(rotation, np.eye(d))[0].T  # W's rows over w, to FP32
    most_moved = np.linalg.svd(exact - rounded)[2][:3]
    y = np.concatenate([
        rng.standard_normal((100, d)),
        rng.standard_normal((50, d)) * 2.0 ** rng.integers(-60, 60, (50, 1)),
        extremes(exact, 0), np.zeros((1, d)), np.full((1, d), 1e-30), most_moved,
    ]).astype(np.float32)  # fmt: skip
    out, off = rotate_rows(rotation, y)
    wrong = np.linalg.norm(out - y.astype(np.float64) @ exact.T, axis=1)
    assert (wrong <= off).all()
    assert (off[-3:] <= 2 * wrong[-3:]).all()
    # A matrix of whole numbers leaves the rounding of y alone.
    out, off = rotate_rows(np.eye(d)[::-1], y[:100])
    wrong = np.linalg.norm(out - y[:100, ::-1], axis=1)
    assert (wrong <= off).all()
    assert (off <= 1.1 * wrong + 5e-5 * np.linalg.norm(y[:100], axis=1)).all()
