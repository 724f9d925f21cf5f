"""FAISS's flat indexes by their own names: `from knnfast import faiss_api as faiss`.

IndexFlat, IndexFlatIP, IndexFlatL2 and IndexIDMap over `knnfast.Index`, selectors of ids, and
`knn`. Rows are kept as FP16, scores are exact for those rows; files are knnfast's folders, not
FAISS's format. What FAISS has beyond this (quantizers, graphs, GPU resources) is not here, and its
names raise AttributeError.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from knnfast import _files
from knnfast.search import interop
from knnfast.search.index import Index

METRIC_INNER_PRODUCT = 0
METRIC_L2 = 1

_METRICS = {METRIC_INNER_PRODUCT: "ip", METRIC_L2: "l2"}
_KIND = "faiss_api.json"  # beside the index's files: which class it was
_FORMAT = "knnfast-faiss-api"

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "IDSelector",
    "IDSelectorAll",
    "IDSelectorAnd",
    "IDSelectorArray",
    "IDSelectorBatch",
    "IDSelectorBitmap",
    "IDSelectorNot",
    "IDSelectorOr",
    "IDSelectorRange",
    "IDSelectorXOr",
    "IndexFlat",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIDMap",
    "IndexIDMap2",
    "SearchParameters",
    "index_factory",
    "knn",
    "normalize_L2",
    "read_index",
    "write_index",
]


class IDSelector:
    """Which labels take part."""

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        raise NotImplementedError

    def is_member(self, id: int) -> bool:
        """Whether this one does."""
        return bool(self.members(np.array([interop.as_int(id, "id")]))[0])

    def filters(self, index: Index) -> dict[str, np.ndarray]:
        """`allow` or `deny` of this index's searches."""
        ids = index.ids
        return {"allow": ids[self.members(ids)]}


def _selector(name: str, given: Any) -> IDSelector:
    if not isinstance(given, IDSelector):
        raise TypeError(f"{name} must be an IDSelector, got {type(given).__name__}")
    return given


class IDSelectorAll(IDSelector):
    """All of them."""

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return np.ones(len(ids), bool)


class IDSelectorBatch(IDSelector):
    """Those in a list."""

    def __init__(self, ids: Any) -> None:
        self._ids = interop.as_ids(ids, "ids").copy()

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return np.isin(ids, self._ids)

    def filters(self, index: Index) -> dict[str, np.ndarray]:
        """`allow`: the list itself."""
        return {"allow": self._ids}


IDSelectorArray = IDSelectorBatch


class IDSelectorRange(IDSelector):
    """Those in [imin, imax). `assume_sorted`, FAISS's hint, changes nothing."""

    def __init__(self, imin: int, imax: int, assume_sorted: bool = False) -> None:
        self._imin, self._imax = interop.as_int(imin, "imin"), interop.as_int(imax, "imax")

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return (ids >= self._imin) & (ids < self._imax)


class IDSelectorBitmap(IDSelector):
    """Those whose bit is set: bit i % 8 of byte i // 8."""

    def __init__(self, bitmap: Any) -> None:
        if isinstance(bitmap, bytes | bytearray):
            bitmap = np.frombuffer(bitmap, np.uint8)
        self._bitmap = np.array(interop.host_array(bitmap, "bitmap"))
        if self._bitmap.dtype != np.uint8:
            raise TypeError(f"bitmap must be bytes (uint8), got {self._bitmap.dtype}")
        if self._bitmap.ndim != 1:
            raise ValueError(f"bitmap must be one row of bytes, got shape {self._bitmap.shape}")

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        inside = (ids >= 0) & (ids < 8 * len(self._bitmap))
        found = np.zeros(len(ids), bool)
        found[inside] = self._bitmap[ids[inside] // 8] >> ids[inside] % 8 & 1
        return found

    def filters(self, index: Index) -> dict[str, np.ndarray]:
        """`allow`: the bitmap itself."""
        return {"allow": self._bitmap}


class IDSelectorNot(IDSelector):
    """Those that another selector leaves out."""

    def __init__(self, sel: IDSelector) -> None:
        self._sel = _selector("sel", sel)

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return ~self._sel.members(ids)

    def filters(self, index: Index) -> dict[str, np.ndarray]:
        """The other one of `allow` and `deny`."""
        other = {"allow": "deny", "deny": "allow"}
        return {other[name]: ids for name, ids in self._sel.filters(index).items()}


class IDSelectorAnd(IDSelector):
    """Those that two selectors agree on."""

    def __init__(self, lhs: IDSelector, rhs: IDSelector) -> None:
        self._lhs, self._rhs = _selector("lhs", lhs), _selector("rhs", rhs)

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return self._lhs.members(ids) & self._rhs.members(ids)


class IDSelectorOr(IDSelectorAnd):
    """Those of either selector."""

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return self._lhs.members(ids) | self._rhs.members(ids)


class IDSelectorXOr(IDSelectorAnd):
    """Those of exactly one of two selectors."""

    def members(self, ids: np.ndarray) -> np.ndarray:
        """A bool for each id."""
        return self._lhs.members(ids) ^ self._rhs.members(ids)


class SearchParameters:
    """Options of one search: which labels take part."""

    def __init__(self, sel: IDSelector | None = None) -> None:
        self.sel = None if sel is None else _selector("sel", sel)


def _rows(name: str, x: Any, d: int | None = None) -> np.ndarray:
    x = interop.unmasked(x, name)
    try:
        x = np.asarray(x)
        if x.dtype.kind in "cMmSU":  # some of it would be lost, or made up
            raise TypeError(f"got {x.dtype}")
        rows = np.ascontiguousarray(x, dtype=np.float32)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a matrix of numbers: {error}") from error
    if rows.ndim != 2 or (d is not None and rows.shape[1] != d):
        wanted = "[n, d]" if d is None else f"[n, {d}]"
        raise ValueError(f"{name} must be a matrix {wanted}, got shape {list(rows.shape)}")
    return rows


def _metric(metric: int) -> str:
    if not isinstance(metric, int | np.integer) or metric not in _METRICS:
        raise ValueError(f"metric must be METRIC_INNER_PRODUCT or METRIC_L2, got {metric!r}")
    return _METRICS[metric]


def _into(**given: tuple[Any, np.ndarray]) -> list[np.ndarray]:
    """What was found, copied into the arrays that were given for it: all of them fit, or none is
    written."""
    for name, (out, found) in given.items():
        if out is None:
            continue
        if not isinstance(out, np.ndarray) or out.dtype != found.dtype:
            kind = getattr(out, "dtype", type(out).__name__)
            raise TypeError(f"{name} must be an array of {found.dtype}, got {kind}")
        if out.shape != found.shape:
            raise ValueError(f"{name} must have shape {found.shape}, got {out.shape}")
        if not interop.unmasked(out, name).flags.writeable:
            raise ValueError(f"{name} must be writeable")
    outs = [(name, out) for name, (out, _) in given.items() if out is not None]
    for (first, one), (second, other) in combinations(outs, 2):
        if np.may_share_memory(one, other):
            raise ValueError(f"{first} and {second} must not share memory")
    filled = []
    for out, found in given.values():
        if out is not None:
            out[:] = found
        filled.append(found if out is None else out)
    return filled


def _empty_like(index: Index) -> Index:
    return Index(index.dim, metric=index.metric, scan=index.scan)


def _filters(index: Index, params: SearchParameters | None) -> dict[str, np.ndarray]:
    if params is None:
        return {}
    if not isinstance(params, SearchParameters):
        raise TypeError(f"params must be SearchParameters(sel=...), got {type(params).__name__}")
    return {} if params.sel is None else _selector("params.sel", params.sel).filters(index)


def _search(
    index: Index, x: Any, k: int, params: SearchParameters | None
) -> tuple[np.ndarray, np.ndarray]:
    distances, labels = index.search(_rows("x", x, index.dim), k, **_filters(index, params))
    worst = np.finfo(np.float32).max * (-1 if index.metric == "ip" else 1)
    distances[labels < 0] = worst
    return distances, labels


def _vectors(index: Index, labels: np.ndarray) -> np.ndarray:
    return index.vectors(labels).astype(np.float32)


class _Flat:
    _index: Index

    @property
    def d(self) -> int:
        """Elements of a row."""
        return self._index.dim

    @property
    def ntotal(self) -> int:
        """Rows."""
        return len(self._index)

    @property
    def is_trained(self) -> bool:
        """Always: a flat index needs no training."""
        return True

    @property
    def metric_type(self) -> int:
        """METRIC_INNER_PRODUCT or METRIC_L2."""
        return METRIC_INNER_PRODUCT if self._index.metric == "ip" else METRIC_L2

    def train(self, x: Any) -> None:
        """Nothing to do."""

    def reset(self) -> None:
        """Remove all rows."""
        self._index = _empty_like(self._index)

    def search(
        self,
        x: Any,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: np.ndarray | None = None,
        I: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and labels of the k best rows, [n, k]; into D and I where they are given.

        Where there are fewer rows, label -1 and the float32 that is worst.
        """
        distances, labels = _search(self._index, x, k, params)
        into_d, into_i = _into(D=(D, distances), I=(I, labels))
        return into_d, into_i

    def assign(self, x: Any, k: int = 1, labels: np.ndarray | None = None) -> np.ndarray:
        """Labels of the k best rows, [n, k]; into `labels` where it is given."""
        return _into(labels=(labels, self.search(x, k)[1]))[0]

    def search_and_reconstruct(
        self,
        x: Any,
        k: int,
        *,
        params: SearchParameters | None = None,
        D: np.ndarray | None = None,
        I: np.ndarray | None = None,
        R: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances, labels and the rows themselves, [n, k, d]; into D, I and R where given.

        NaN where there is no row.
        """
        index = self._index  # one for labels and rows: remove_ids may put another in its place
        distances, labels = _search(index, x, k, params)
        rows = np.full((*labels.shape, index.dim), np.nan, np.float32)
        rows[labels >= 0] = index.vectors(labels[labels >= 0])
        into_d, into_i, into_r = _into(D=(D, distances), I=(I, labels), R=(R, rows))
        return into_d, into_i, into_r

    def range_search(
        self, x: Any, thresh: float, *, params: SearchParameters | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lims (uint64), distances and labels of all rows above (L2: below) the threshold."""
        index = self._index
        thresh = interop.as_float(thresh, "thresh")
        lims, distances, labels = index.range_search(
            _rows("x", x, index.dim), thresh, **_filters(index, params)
        )
        return lims.astype(np.uint64), distances, labels

    def reconstruct(self, key: int, x: np.ndarray | None = None) -> np.ndarray:
        """One stored row as float32; into x where it is given."""
        return _into(x=(x, self.reconstruct_batch([interop.as_int(key, "key")])[0]))[0]

    def reconstruct_batch(self, key: Any, x: np.ndarray | None = None) -> np.ndarray:
        """Stored rows as float32; into x where it is given."""
        return _into(x=(x, _vectors(self._index, interop.as_ids(key, "key"))))[0]

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: np.ndarray | None = None) -> np.ndarray:
        """Stored rows n0 to n0 + ni, in order, as float32; ni = -1: to the last one."""
        n0, ni = interop.as_int(n0, "n0"), interop.as_int(ni, "ni")
        index = self._index
        ids = index.ids
        end = len(ids) if ni == -1 else n0 + ni
        if not 0 <= n0 <= end <= len(ids):
            raise ValueError(f"n0 and ni: rows [{n0}, {end}) of {len(ids)}")
        return _into(x=(x, _vectors(index, ids[n0:end])))[0]

    def remove_ids(self, x: Any) -> int:
        """Remove rows by label: a list of labels or a selector."""
        index = self._index
        if isinstance(x, IDSelector):
            x = index.ids[x.members(index.ids)]
        return index.remove(interop.as_ids(x, "x"))


class IndexFlat(_Flat):
    """Exact search: squared Euclidean distance or inner product."""

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        self._index = Index(d, metric=_metric(metric))
        self._opened = False  # from a file, of which rows may have been removed at the end

    def add(self, x: Any) -> None:
        """Append rows; labels count up from 0."""
        rows = _rows("x", x, self.d)
        self._index.add(rows, self.ntotal + np.arange(len(rows)) if self._opened else None)

    def remove_ids(self, x: Any) -> int:
        """Remove rows; as in FAISS, the labels of those behind them move down."""
        index = self._index
        ids = index.ids
        if isinstance(x, IDSelector):
            gone = x.members(ids)
        else:
            gone = np.isin(ids, interop.as_ids(x, "x"))
        if gone.any():
            kept = _empty_like(index)
            kept.add(index.vectors(ids[~gone]))
            self._index = kept
        return int(gone.sum())


class IndexFlatIP(IndexFlat):
    """Exact inner product."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)


class IndexFlatL2(IndexFlat):
    """Exact squared Euclidean distance."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexIDMap(_Flat):
    """A flat index with labels of one's own. Takes over an empty flat index, its `index`."""

    def __init__(self, index: IndexFlat) -> None:
        if not isinstance(index, IndexFlat):
            raise TypeError(f"index must be a flat index, got {type(index).__name__}")
        if index.ntotal:
            raise ValueError(f"index must be empty, got {index.ntotal} rows")
        self.index = index

    @property
    def _index(self) -> Index:
        return self.index._index

    @_index.setter
    def _index(self, index: Index) -> None:
        self.index._index = index

    def add(self, x: Any) -> None:
        """Raises RuntimeError, as in FAISS: these rows need labels."""
        raise RuntimeError("an IndexIDMap takes rows by add_with_ids(x, ids)")

    def add_with_ids(self, x: Any, ids: Any) -> None:
        """Append rows under these unique labels."""
        self._index.add(_rows("x", x, self.d), interop.as_ids(ids, "ids"))

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: np.ndarray | None = None) -> np.ndarray:
        """Stored rows of the labels n0 to n0 + ni as float32; ni = -1: as many as there are rows.

        Raises: ValueError for a label that is not there.
        """
        n0, ni = interop.as_int(n0, "n0"), interop.as_int(ni, "ni")
        # Labels are unique: of one more than there are rows one is not there.
        count = self.ntotal - n0 if ni == -1 else min(ni, self.ntotal + 1)
        if n0 < 0 or count < 0:
            raise ValueError(f"n0 and ni: labels [{n0}, {n0 + count}) of {self.ntotal} rows")
        return self.reconstruct_batch(np.arange(n0, n0 + count), x)


IndexIDMap2 = IndexIDMap


def index_factory(d: int, description: str, metric: int = METRIC_L2) -> _Flat:
    """A flat index by its description: `Flat`, or with `IDMap` or `IDMap2` before or behind it."""
    parts = description.split(",") if isinstance(description, str) else []
    if parts == ["Flat"]:
        return IndexFlat(d, metric)
    if len(parts) == 2 and "Flat" in parts and {"IDMap", "IDMap2"} & set(parts):
        return IndexIDMap(IndexFlat(d, metric))
    raise ValueError(f"description must be Flat, IDMap,Flat or IDMap2,Flat, got {description!r}")


def knn(xq: Any, xb: Any, k: int, metric: int = METRIC_L2) -> tuple[np.ndarray, np.ndarray]:
    """Distances and positions of the k rows of xb that are best for each row of xq, [n, k]."""
    rows = _rows("xb", xb)
    index = IndexFlat(rows.shape[1], metric)
    index.add(rows)
    return index.search(_rows("xq", xq), k)


def write_index(index: _Flat, path: str | os.PathLike[str]) -> None:
    """Save to a folder (knnfast's format)."""
    if not isinstance(index, _Flat):
        raise TypeError(f"index must be one of this module's, got {type(index).__name__}")
    index._index.save(path)
    labels = "own" if isinstance(index, IndexIDMap) else "sequential"
    saved = _files.sha256_file(Path(path) / "manifest.json")
    _files.write_json(Path(path) / _KIND, {"format": _FORMAT, "labels": labels, "manifest": saved})


def read_index(path: str | os.PathLike[str]) -> _Flat:
    """Open what `write_index` or `knnfast.Index.save` wrote.

    An IndexIDMap stays one; so does any index whose labels are not 0, 1, 2, ... become one.

    Raises: ValueError for an Index with cosine, which FAISS has no metric for.
    """
    opened = Index.open(path)
    if opened.metric == "cosine":
        raise ValueError(f"{path}: FAISS has no cosine metric; open it with knnfast.Index.open")
    flat: Any = IndexFlatIP(opened.dim) if opened.metric == "ip" else IndexFlatL2(opened.dim)
    kind = Path(path) / _KIND
    said = _files.read_json(kind, _FORMAT) if kind.is_file() else {}
    saved = _files.sha256_file(
        Path(path) / "manifest.json"
    )  # another Index may have been saved since
    own = said.get("labels") == "own" and said.get("manifest", saved) == saved
    if own or not np.array_equal(opened.ids, np.arange(len(opened))):
        flat = IndexIDMap(flat)
    else:
        flat._opened = True
    flat._index = opened
    return flat


def normalize_L2(x: np.ndarray) -> None:
    """Scale the rows of x [n, d] float32 to length 1, in place; zero rows stay."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        raise TypeError(
            f"x must be an array of float32, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    interop.unmasked(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix [n, d], got shape {list(x.shape)}")
    if not x.flags.writeable:
        raise ValueError("x must be writeable")
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1)
