"""FAISS's own names: code for its flat indexes gets the same results from ours."""

import re

import numpy as np
import pytest

from knnfast import faiss_api
from knnfast.search import Index


def test_faiss_names(tmp_path):
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float16).astype(np.float32)
    for name in ("IndexFlatIP", "IndexFlatL2"):
        results = []
        for module in (faiss, faiss_api):
            index = getattr(module, name)(16)
            index.add(x)
            removed = index.remove_ids(np.array([0, 7]))
            _, ids = index.search(x[:9], 4)
            lims, _, inside = index.range_search(x[:2], 5.0)
            rows = index.reconstruct_n(3, 5), index.reconstruct(2)
            results.append((removed, index.ntotal, ids, lims, np.sort(inside[: lims[1]]), *rows))
            assert index.remove_ids(np.array([297])) == 1
            path = str(tmp_path / f"{module.__name__}-{name}")
            module.write_index(index, path)
            again = module.read_index(path)
            again.add(x[:2])
            assert again.ntotal == 299
            np.testing.assert_array_equal(again.reconstruct_n(296, 3), x[[298, 0, 1]])
        for theirs, ours in zip(*results, strict=True):
            np.testing.assert_array_equal(theirs, ours)
    mapped = faiss_api.IndexIDMap(faiss_api.IndexFlatIP(16))
    mapped.add_with_ids(x, np.arange(300) + 1000)
    assert mapped.search(x[:1], 1)[1] >= 1000
    assert mapped.remove_ids([1000, 1]) == 1
    faiss_api.write_index(mapped, tmp_path / "mapped")
    assert faiss_api.read_index(tmp_path / "mapped").ntotal == 299
    found = []
    for module in (faiss, faiss_api):
        mapped = module.IndexIDMap(module.IndexFlatIP(16))
        mapped.add_with_ids(x[:5], np.arange(5))  # labels as a flat index gives them
        path = str(tmp_path / f"{module.__name__}-mapped")
        module.write_index(mapped, path)
        again = module.read_index(path)
        again.add_with_ids(x[5:6], np.array([77]))
        assert again.remove_ids(np.array([1])) == 1  # and the labels behind it stay
        found.append(again.search(x[5:6], 5)[1])
    np.testing.assert_array_equal(*found)


def use_flat(module, x):
    """What code for FAISS's flat indexes does, beyond the basics: everything that comes back."""
    flat = module.index_factory(16, "Flat", module.METRIC_INNER_PRODUCT)
    flat.add(x[:20])
    odd = module.IDSelectorBatch(np.arange(1, 20, 2))
    inner = module.IDSelectorRange(4, 9, True)
    bits = module.IDSelectorBitmap(np.packbits(np.arange(24) % 3 == 0, bitorder="little"))
    out = np.empty((2, 3), np.float32), np.empty((2, 3), np.int64)
    results = [*flat.search(x[:2], 3, D=out[0], I=out[1]), *out, flat.assign(x[:3], 2)]
    for sel in (odd, inner, bits, module.IDSelectorNot(odd), module.IDSelectorAll(),
                module.IDSelectorAnd(odd, inner), module.IDSelectorOr(bits, inner),
                module.IDSelectorXOr(bits, inner)):  # fmt: skip
        results += flat.search(x[:3], 8, params=module.SearchParameters(sel=sel))
        results += [sel.is_member(5), sel.is_member(6)]
    lims, _, labels = flat.range_search(x[:1], 0.0, params=module.SearchParameters(sel=odd))
    results += [lims, lims.dtype, np.sort(labels)]
    labels, row = np.empty((3, 2), np.int64), np.empty(16, np.float32)
    results += [flat.assign(x[:3], 2, labels), labels, flat.reconstruct(4, row), row]
    rows = np.empty((2, 16), np.float32), np.empty((3, 16), np.float32)
    results += [
        flat.reconstruct_batch(np.array([7, 2]), rows[0]),
        flat.reconstruct_n(1, 3, rows[1]),
    ]
    D, I, R = (np.empty((2, 3, *more), t) for t, more in (("f4", ()), ("i8", ()), ("f4", (16,))))
    results += [*rows, *flat.search_and_reconstruct(x[:2], 3, D=D, I=I, R=R), D, I, R]
    few = module.IndexFlat(16)
    few.add(x[:3])
    assert few.metric_type == module.METRIC_L2
    results += [*few.search(x[5:7], 5), *few.search_and_reconstruct(x[5:7], 5)]
    results += module.knn(x[:4], x[4:40], 6)
    results += module.knn(x[:4], x[4:40], 6, metric=module.METRIC_INNER_PRODUCT)
    mapped = module.IndexIDMap(module.IndexFlatL2(16))
    mapped.add_with_ids(x[:10], np.arange(10) * 10)
    results += [mapped.remove_ids(module.IDSelectorRange(15, 45)), mapped.search(x[:2], 7)[1]]
    results += [mapped.index.ntotal, module.index_factory(16, "IDMap,Flat").metric_type]
    mapped.reset()
    named = module.IndexIDMap2(module.IndexFlatIP(16))
    named.add_with_ids(x[:9], np.arange(9)[::-1].copy())
    results += [named.reconstruct_n(2, 3), named.reconstruct_n(0, 9)]
    return [*results, mapped.ntotal, mapped.index.ntotal]


def test_faiss_names_beyond_the_basics():
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(1).standard_normal((60, 16)).astype(np.float16).astype(np.float32)
    for theirs, ours in zip(use_flat(faiss, x), use_flat(faiss_api, x), strict=True):
        if isinstance(theirs, np.ndarray) and theirs.dtype == np.float32:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_faiss_names_with_bad_input():
    flat = faiss_api.IndexFlatL2(4)
    flat.add(np.ones((3, 4)))
    for bad in (np.ones(4), np.ones((2, 5))):
        message = re.escape(f"x must be a matrix [n, 4], got shape {list(bad.shape)}")
        for call in (flat.add, lambda x: flat.search(x, 1), lambda x: flat.range_search(x, 1.0)):
            with pytest.raises(ValueError, match=message):
                call(bad)
    with pytest.raises(ValueError, match="x must be a matrix of numbers: "):
        flat.add([[1.0], [1.0, 2.0]])
    for bad in ([[{}]], [["1"] * 4], np.ones((1, 4), complex), np.ones((1, 4), "M8[s]")):
        with pytest.raises(TypeError, match="x must be a matrix of numbers: "):
            flat.add(bad)
    assert flat.ntotal == 3
    with pytest.raises(TypeError, match="thresh must be a number, got 'a'"):
        flat.range_search(np.ones((1, 4)), "a")
    with pytest.raises(TypeError, match=r"key must be a whole number, got 1\.5"):
        flat.reconstruct(1.5)
    with pytest.raises(TypeError, match="key must hold integers, got float64"):
        flat.reconstruct_batch([1.5])
    with pytest.raises(ValueError, match=r"n0 and ni: rows \[2, 4\) of 3"):
        flat.reconstruct_n(2, 2)
    named = faiss_api.IndexIDMap(faiss_api.IndexFlatL2(4))
    named.add_with_ids(np.ones((3, 4)), np.arange(3))
    with pytest.raises(RuntimeError, match=r"takes rows by add_with_ids\(x, ids\)"):
        named.add(np.ones((3, 4)))
    with pytest.raises(TypeError, match="ids must be a sequence of integers"):
        named.add_with_ids(np.ones((3, 4)), None)
    for index in (flat, named):
        with pytest.raises(TypeError, match="n0 must be a whole number, got 'a'"):
            index.reconstruct_n("a")
        with pytest.raises(TypeError, match=r"ni must be a whole number, got 1\.5"):
            index.reconstruct_n(0, 1.5)
    with pytest.raises(ValueError, match=r"n0 and ni: labels \[4, 3\) of 3 rows"):
        named.reconstruct_n(4)
    with pytest.raises(ValueError, match=r"I must have shape \(1, 2\), got \(2, 1\)"):
        flat.search(np.ones((1, 4)), 2, I=np.zeros((2, 1), np.int64))
    with pytest.raises(TypeError, match="I must be an array of int64, got uint8"):
        flat.search(np.ones((1, 4)), 2, I=np.zeros((1, 2), np.uint8))
    fixed = np.zeros((1, 2), np.int64)
    fixed.flags.writeable = False
    distances = np.full((1, 2), 7, np.float32)
    with pytest.raises(ValueError, match="I must be writeable"):
        flat.search(np.ones((1, 4)), 2, D=distances, I=fixed)
    shared = np.full(4, 7, np.float32)
    with pytest.raises(ValueError, match="D and I must not share memory"):
        flat.search(
            np.ones((1, 4)), 2, D=shared[:2].reshape(1, 2), I=shared.view(np.int64).reshape(1, 2)
        )
    with pytest.raises(TypeError, match="D is a masked array"):
        flat.search(np.ones((1, 4)), 2, D=np.ma.masked_array(distances))
    assert (distances == 7).all()  # none is written
    assert (shared == 7).all()
    with pytest.raises(TypeError, match="D must be an array of float32, got list"):
        flat.search(np.ones((1, 4)), 2, D=[[0, 0]])
    with pytest.raises(TypeError, match=r"params must be SearchParameters\(sel=...\), got int"):
        flat.search(np.ones((1, 4)), 2, params=5)
    with pytest.raises(TypeError, match="sel must be an IDSelector, got list"):
        faiss_api.SearchParameters(sel=[1])
    params = faiss_api.SearchParameters()
    params.sel = [1]
    with pytest.raises(TypeError, match=r"params\.sel must be an IDSelector, got list"):
        flat.search(np.ones((1, 4)), 2, params=params)
    with pytest.raises(TypeError, match=r"bitmap must be bytes \(uint8\), got int64"):
        faiss_api.IDSelectorBitmap([300])
    with pytest.raises(TypeError, match="bitmap is a masked array"):
        faiss_api.IDSelectorBitmap(np.ma.masked_array([1], mask=[1], dtype=np.uint8))
    with pytest.raises(ValueError, match="bitmap must be flat"):
        faiss_api.IDSelectorBitmap([[1, 2], [3]])
    with pytest.raises(ValueError, match="x must be writeable"):
        faiss_api.normalize_L2(np.broadcast_to(np.float32(1), (2, 2)))
    with pytest.raises(TypeError, match="x must be an array of float32, got float16"):
        faiss_api.normalize_L2(np.ones((3, 2), np.float16))
    with pytest.raises(ValueError, match=r"x must be a matrix \[n, d\], got shape \[2\]"):
        faiss_api.normalize_L2(np.ones(2, np.float32))
    with pytest.raises(TypeError, match="x must be an array of float32, got float64"):
        flat.reconstruct(0, np.ones(4))
    with pytest.raises(ValueError, match=r"labels must have shape \(1, 1\), got \(2, 1\)"):
        flat.assign(np.ones((1, 4)), 1, np.zeros((2, 1), np.int64))
    with pytest.raises(TypeError, match="index must be one of this module's, got int"):
        faiss_api.write_index(5, "nowhere")
    with pytest.raises(ValueError, match="index must be empty, got 3 rows"):
        faiss_api.IndexIDMap(flat)
    with pytest.raises(TypeError, match="index must be a flat index, got int"):
        faiss_api.IndexIDMap(4)
    for metric in (2, [0]):
        message = f"metric must be METRIC_INNER_PRODUCT or METRIC_L2, got {metric}"
        with pytest.raises(ValueError, match=re.escape(message)):
            faiss_api.IndexFlat(4, metric)
    for bad in ("HNSW32", "IDMap,IDMap2", "Flat,Flat", "IDMap", None):
        with pytest.raises(ValueError, match=f"description must be Flat, .* got {bad!r}"):
            faiss_api.index_factory(4, bad)


def test_faiss_names_of_a_map_before_or_behind():
    for description in ("IDMap,Flat", "IDMap2,Flat", "Flat,IDMap", "Flat,IDMap2"):
        assert type(faiss_api.index_factory(4, description)) is faiss_api.IndexIDMap


def test_faiss_names_keep_the_scan(tmp_path):
    """Of an index without codes: with them it would take half as much memory again."""
    index = Index(4, scan="fp16")
    index.add(np.eye(4, dtype=np.float32))
    index.save(tmp_path)
    for forget in (lambda flat: flat.remove_ids([2]), lambda flat: flat.reset()):
        flat = faiss_api.read_index(tmp_path)
        forget(flat)
        faiss_api.write_index(flat, tmp_path / "changed")
        assert Index.open(tmp_path / "changed").scan == "fp16"


def test_files_that_are_no_folders(tmp_path):
    (tmp_path / "theirs.index").write_bytes(b"IxFI")
    with pytest.raises(ValueError, match=r"theirs\.index is a file; an index is a folder"):
        faiss_api.read_index(tmp_path / "theirs.index")


def test_faiss_names_go_on_from_an_index_whose_last_rows_are_gone(tmp_path):
    """A flat index counts labels by its rows, an Index never gives one again."""
    x = np.arange(44, dtype=np.float32).reshape(11, 4)
    index = Index(4)
    index.add(x[:10])
    index.remove([9])
    index.save(tmp_path / "ix")
    flat = faiss_api.read_index(tmp_path / "ix")
    flat.add(x[10:])
    np.testing.assert_array_equal(flat.reconstruct(9), x[10])


def test_faiss_names_forget_the_kind_of_an_index_that_is_there_no_more(tmp_path):
    mapped = faiss_api.IndexIDMap(faiss_api.IndexFlatIP(4))
    mapped.add_with_ids(np.eye(4), np.arange(4))
    faiss_api.write_index(mapped, tmp_path)
    assert isinstance(faiss_api.read_index(tmp_path), faiss_api.IndexIDMap)
    with pytest.raises(ValueError, match="4 is not in the index"):
        mapped.reconstruct_n(2, 9)
    index = Index(4)
    index.add(np.eye(4, dtype=np.float32))
    index.save(tmp_path)
    assert isinstance(faiss_api.read_index(tmp_path), faiss_api.IndexFlatIP)


def test_faiss_names_have_no_cosine(tmp_path):
    Index(4, "cosine").save(tmp_path / "cosine")
    with pytest.raises(ValueError, match="cosine: FAISS has no cosine metric"):
        faiss_api.read_index(tmp_path / "cosine")


def test_selectors_keep_what_they_were_given():
    ids, bits = np.array([1, 2]), np.array([6], np.uint8)
    selectors = faiss_api.IDSelectorBatch(ids), faiss_api.IDSelectorBitmap(bits)
    ids[:], bits[:] = 7, 255
    for sel in (*selectors, faiss_api.IDSelectorBitmap(b"\x06")):
        assert [sel.is_member(i) for i in (1, 2, 7)] == [True, True, False]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: faiss_api.IDSelectorNot(None), TypeError, "sel must be an IDSelector, got None"),
        (lambda: faiss_api.IDSelectorAnd([1], faiss_api.IDSelectorAll()), TypeError, "lhs must be"),
        (lambda: faiss_api.IDSelectorOr(faiss_api.IDSelectorAll(), 1), TypeError, "rhs must be"),
        (lambda: faiss_api.IDSelectorRange(1.5, 3), TypeError, "imin must be a whole number"),
        (lambda: faiss_api.IDSelectorRange(0, 2**64), ValueError, "imax"),
        (lambda: faiss_api.IDSelectorBatch([1.5]), TypeError, "ids must hold integers, got float"),
        (lambda: faiss_api.IDSelectorBatch([True]), TypeError, "ids must hold integers, got bool"),
        (lambda: faiss_api.IDSelectorBitmap(np.zeros((2, 2), np.uint8)), ValueError, "bitmap must"),
        (lambda: faiss_api.IDSelectorAll().is_member("a"), TypeError, "id must be a whole number"),
    ],
)
def test_selectors_reject(make, error, message):
    with pytest.raises(error, match=message):
        make()
