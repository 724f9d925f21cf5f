"""FAISS's flat indexes by their own names: `from knnfast import faiss_api as faiss`.

IndexFlatIP, IndexFlatL2 and IndexIDMap over `knnfast.Index`. Rows are kept as FP16, scores are
exact for those rows; files are knnfast's folders, not FAISS's format.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from knnfast import _files
from knnfast.search.index import Index

METRIC_INNER_PRODUCT = 0
METRIC_L2 = 1

_KIND = "faiss_api.json"  # beside the index's files: which class it was
_FORMAT = "knnfast-faiss-api"

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIDMap",
    "IndexIDMap2",
    "normalize_L2",
    "read_index",
    "write_index",
]


def _rows(x: Any) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.float32)


class _Flat:
    metric = "ip"

    def __init__(self, d: int) -> None:
        self._index = Index(d, metric=self.metric)

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
        self._index = Index(self.d, metric=self._index.metric)

    def search(self, x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and labels of the k best rows, [n, k]."""
        return self._index.search(_rows(x), k)

    def range_search(self, x: Any, thresh: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lims, distances and labels of all rows above (L2: below) the threshold."""
        return self._index.range_search(_rows(x), thresh)

    def reconstruct(self, key: int) -> np.ndarray:
        """One stored row as float32."""
        return self.reconstruct_batch([key])[0]

    def reconstruct_batch(self, keys: Any) -> np.ndarray:
        """Stored rows as float32."""
        return self._index.vectors(keys).astype(np.float32)

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> np.ndarray:
        """Stored rows n0 to n0 + ni, in order, as float32."""
        ids = self._index.ids
        return self.reconstruct_batch(ids[n0 : len(ids) if ni < 0 else n0 + ni])


class _Sequential(_Flat):
    def add(self, x: Any) -> None:
        """Append rows; labels count up from 0."""
        self._index.add(_rows(x))

    def remove_ids(self, ids: Any) -> int:
        """Remove rows; as in FAISS, the labels of those behind them move down."""
        removed = self._index.remove(ids)
        if removed:
            kept = self._index.vectors(self._index.ids)
            self.reset()
            self._index.add(kept)
        return removed


class IndexFlatIP(_Sequential):
    """Exact inner product."""


class IndexFlatL2(_Sequential):
    """Exact squared Euclidean distance."""

    metric = "l2"


class IndexIDMap(_Flat):
    """A flat index with labels of one's own. Takes over an empty IndexFlatIP or IndexFlatL2."""

    def __init__(self, index: _Flat) -> None:
        if index.ntotal:
            raise ValueError("index must be empty")
        self._index = index._index

    def add_with_ids(self, x: Any, ids: Any) -> None:
        """Append rows under these unique labels."""
        self._index.add(_rows(x), ids)

    def remove_ids(self, ids: Any) -> int:
        """Remove rows by label."""
        return self._index.remove(ids)


IndexIDMap2 = IndexIDMap


def write_index(index: _Flat, path: str | os.PathLike[str]) -> None:
    """Save to a folder (knnfast's format)."""
    index._index.save(path)
    kind = {"format": _FORMAT, "labels": "own" if isinstance(index, IndexIDMap) else "sequential"}
    _files.write_json(Path(path) / _KIND, kind)


def read_index(path: str | os.PathLike[str]) -> _Flat:
    """Open what `write_index` or `knnfast.Index.save` wrote.

    An IndexIDMap stays one; so does any index whose labels are not 0, 1, 2, ... become one.

    Raises: ValueError for an Index with cosine, which FAISS has no metric for.
    """
    opened = Index.open(path)
    if opened.metric == "cosine":
        raise ValueError(f"{path}: FAISS has no cosine metric; open it with knnfast.Index.open")
    flat: _Flat = IndexFlatIP(opened.dim) if opened.metric == "ip" else IndexFlatL2(opened.dim)
    kind = Path(path) / _KIND
    own = kind.is_file() and _files.read_json(kind, _FORMAT).get("labels") == "own"
    if own or not np.array_equal(opened.ids, np.arange(len(opened))):
        flat = IndexIDMap(flat)
    flat._index = opened
    return flat


def normalize_L2(x: np.ndarray) -> None:
    """Scale the rows of x to length 1, in place; zero rows stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x /= np.where(norms > 0, norms, 1)
