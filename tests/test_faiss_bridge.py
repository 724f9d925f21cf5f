"""FAISS's flat indexes as ours and back."""

import numpy as np
import pytest

from knnfast.search import Index


def test_faiss_round_trip():
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16).astype(np.float32)
    ids = np.arange(500) * 3 + 1
    flat = faiss.IndexFlatL2(16)
    mapped = faiss.IndexIDMap2(flat)
    mapped.add_with_ids(x, ids)
    half = faiss.IndexScalarQuantizer(16, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    half.train(x)
    half.add(x)
    for theirs in (mapped, half):
        ours = Index.from_faiss(theirs)
        np.testing.assert_array_equal(ours.search(x[:20], 5)[1], theirs.search(x[:20], 5)[1])
        back = ours.to_faiss()
        np.testing.assert_array_equal(back.search(x[:20], 5)[1], theirs.search(x[:20], 5)[1])
    with pytest.raises(TypeError, match="HNSW"):
        Index.from_faiss(faiss.IndexHNSWFlat(16))
    with pytest.raises(TypeError, match=r"index must be a faiss\.Index, got int"):
        Index.from_faiss(3)


def test_a_row_that_does_not_fit_is_named(monkeypatch):
    """By its place in FAISS's index, not in the piece that was read."""
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatIP(1 << 16)  # 256 rows a piece
    x = np.zeros((260, 1 << 16), np.float32)
    for bad in (np.nan, np.inf, -65520.0):
        x[258, 5] = bad
        flat.reset()
        flat.add(x)
        with pytest.raises(ValueError, match=r"index: row 258 holds NaN or a value beyond ±65504"):
            Index.from_faiss(flat)
    x[258, 5] = 65519.0
    flat.reset()
    flat.add(x)
    assert len(Index.from_faiss(flat)) == 260
