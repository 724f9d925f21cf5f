"""A segment's int8 codes as `csrc/segment.h` defines them: every exact answer rests on them."""

import json

import numpy as np
import pytest

from knnfast.search import Index

DIMS = (1, 3, 4, 15, 16, 17, 31, 64, 100, 257, 512, 1000)


def make_rows(rng, n, d):
    """Rows of all sizes that FP16 has, with zeros, one large element, a shared mean."""
    x = rng.standard_normal((n, d))
    x *= 2.0 ** rng.integers(-24, 13, (n, 1))
    x[3] = 0
    x[5] = 6e4 * rng.choice([-1, 1], d)
    x[7, 0] = 6.5e4
    x[n // 2 :] += 4
    return x.astype(np.float16)


def stored(folder):
    """The one segment of a saved index: x, row_norm, mean, scale, bounds, norm, codes [n, d]."""
    index = json.loads((folder / "manifest.json").read_text())["index"]
    (segment,) = index["segments"]
    n, d = segment["rows"], index["dim"]
    x = np.fromfile(folder / segment["vectors"]["name"], np.float16).reshape(n, d)
    terms = np.fromfile(folder / segment["terms"]["name"], np.float32)
    parts = np.split(terms, np.cumsum([n, d, n, n]))
    groups = -(-d // 4)
    codes = np.fromfile(folder / segment["codes"]["name"], np.uint8)[: n * groups * 4]
    codes = codes.reshape(n // 16, groups, 16, 4).transpose(0, 2, 1, 3).reshape(n, groups * 4)
    return x, *parts, codes.astype(np.float64) - 128


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("d", DIMS)
def test_codes_keep_their_bound(tmp_path, seed, d, metric):
    x = make_rows(np.random.default_rng(seed), 64, d)
    index = Index(d, metric=metric, scan="int8")
    index.add(x)
    index.save(tmp_path / "index")
    kept, row_norm, mean, scale, bounds, norm, codes = stored(tmp_path / "index")
    bounds = bounds.view(np.uint32)
    residual = (bounds & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(kept, x)
    wide = x.astype(np.float64)
    size = np.sqrt((wide**2).sum(1))
    np.testing.assert_array_equal(row_norm, size.astype(np.float32))
    if metric == "cosine":
        wide /= np.where(size > 0, size, 1)[:, None]
    y = wide - mean.astype(np.float64)
    codes, filled_up = codes[:, :d], codes[:, d:]
    assert (filled_up == 0).all()
    assert (np.abs(codes) <= 127).all()
    left = np.sqrt(((y - scale.astype(np.float64)[:, None] * codes) ** 2).sum(1))
    length = np.sqrt((y**2).sum(1))
    assert (left <= residual).all()
    # No looser than rounding asks for: half a step for each element.
    step = 0.5 * scale.astype(np.float64) * np.sqrt(d)
    rounded = 1 + 2**-7 + 1e-4
    assert (residual <= (step + 4e-6 * length + 2e-6 + 2e-18 * d) * rounded).all()
    # What is left of a row behind each stop, in 255ths of its norm.
    groups = -(-d // 4)
    for stop, share in ((5, bounds >> 8 & 255), (10, bounds & 255)):
        first = -(-groups * stop // 64) * 4 if groups >= 32 else 0
        rest = np.sqrt((y[:, 4 * first :] ** 2).sum(1))
        size = norm.astype(np.float64) * (1 + 2**-18)
        assert ((rest <= share / 255 * size) | (share == 255)).all()
        assert ((share - 1) / 255 * norm <= (rest + residual) * (1 + 1e-5)).all()
    np.testing.assert_allclose(norm, length, rtol=2**-20, atol=1e-6 if metric == "cosine" else 0)
