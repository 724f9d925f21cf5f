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
