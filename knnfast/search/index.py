"""`Index`: exact top-k over resident FP16 rows."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from knnfast import _C
from knnfast._device import is_cuda
from knnfast.search import interop

METRICS = ("ip", "cosine", "l2")
SCANS = ("fp16", "int8", "auto")

DamagedFile = _C.DamagedFile


def set_num_threads(n: int | None) -> None:
    """Use at most n threads for a search, an add, an op on the CPU.

    Args:
        n: 1 to 1024; None: one for each core, as in the beginning.
    Raises: ValueError another number; TypeError no whole number.
    """
    _C.set_num_threads(_C.cores() if n is None else interop.as_int(n, "n"))


def num_threads() -> int:
    """How many threads a search, an add, an op on the CPU uses at most."""
    return _C.num_threads()


def check_kind(metric: str, scan: str) -> tuple[int, int]:
    """Metric and scan as numbers; a ValueError where there are no such."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {SCANS}, got {scan!r}")
    return METRICS.index(metric), SCANS.index(scan)


class Index:
    """Exact nearest rows: the answer depends on the data alone, bit for bit.

    score = x·q (ip), x·q / (‖x‖‖q‖) (cosine) or ‖q - x‖² (l2, smaller is nearer), in FP64 over 32
    lanes and a fixed tree; equal scores order by id. Rows are kept as FP16, and with `scan="int8"`
    or `"auto"` (from 16 dimensions on) also as int8 codes whose certified bounds prove most rows
    out unread.

    Args:
        dim: elements of a row, 1 to 65536.
        metric: "ip", "cosine" or "l2".
        device: "cpu", "cuda" or "cuda:N".
        scan: "fp16", "int8", or "auto", which leaves int8 where it does not pay.
    Raises: ValueError dim, metric, scan or device out of what is allowed, a CUDA device that is not
        there; TypeError dim that is no whole number.
    Any number of threads may search while one writes; a search sees one snapshot.
    Example: >>> ix = Index(2); _ = ix.add(np.eye(2, dtype=np.float32))
             >>> ix.search(np.array([1, 0], np.float32), k=1)
    """

    def __new__(
        cls, dim: int = 1, metric: str = "ip", device: str = "cpu", scan: str = "auto"
    ) -> Index:
        """An index on a CUDA device is a `CudaIndex`."""
        if cls is Index and is_cuda("device", device):
            from knnfast.search.cuda_index import CudaIndex

            cls = CudaIndex
        return super().__new__(cls)

    def __init__(
        self, dim: int, metric: str = "ip", device: str = "cpu", scan: str = "auto"
    ) -> None:
        kind = check_kind(metric, scan)
        self._core: Any = _C.Index(interop.as_int(dim, "dim"), *kind)

    @classmethod
    def _wrap(cls, core: Any) -> Index:
        index = cls.__new__(cls)
        index._core = core
        return index

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self._core.dim

    @property
    def metric(self) -> str:
        """`ip`, `cosine` or `l2`."""
        return METRICS[self._core.metric]

    @property
    def scan(self) -> str:
        """`fp16`, `int8` or `auto`."""
        return SCANS[self._core.scan]

    @property
    def device(self) -> str:
        """Where the rows are."""
        return "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes in use: rows, codes, ids and tables."""
        return self._core.nbytes

    @property
    def _joins(self) -> bool:
        """Whether searches of one kind that wait are answered together."""
        return self._core.joins

    @property
    def stats(self) -> dict[str, int]:
        """Counters of all searches so far (docs/search.md).

        searches, and of these searches_joined, which waited and were answered with another's;
        queries, and how often one was searched again, queries_repeated; pairs of a row and a
        query: rows_scanned, rows_stopped, rows_opened, rows_rescored; chunks_int8, chunks_fp16 and
        chunks_canonical, by the scan that went through them.
        """
        return self._core.stats()

    @property
    def ids(self) -> np.ndarray:
        """The ids of all rows, int64, in the order in which the rows lie."""
        return self._core.ids()

    def __len__(self) -> int:
        return self._core.size

    def __contains__(self, id: object) -> bool:
        """Whether a row has this id.

        Raises: TypeError an id that is no integer; ValueError one beyond int64.
        """
        return self._core.contains(interop.as_int(id, "id"))

    def __repr__(self) -> str:
        return (
            f"Index(dim={self.dim}, metric={self.metric!r}, device={self.device!r}, "
            f"scan={self.scan!r}, rows={len(self)})"
        )

    def add(self, vectors: Any, ids: Any = None) -> np.ndarray:
        """Append rows and return their ids.

        Args:
            vectors: [n, dim] or [dim], fp16 | bf16 | fp32; kept as FP16.
            ids: [n] unique non-negative integers; automatic ones count up and are never reused.
        Raises: ValueError shape, a value that is NaN or beyond ±65504, an id that is taken or
            negative; TypeError dtype. A rejected call changes nothing.
        """
        rows = interop.as_rows(vectors, "vectors")
        own = None
        if ids is not None:
            own = interop.as_ids(ids, "ids")
            n = 1 if rows.array.ndim < 2 else len(rows.array)
            if len(own) != n:
                raise ValueError(f"ids must have one id a row: got {len(own)} for {n} rows")
        return self._core.add(rows.array, rows.bf16, own)

    def search(
        self, queries: Any, k: int, allow: Any = None, deny: Any = None, out: Any = None
    ) -> tuple[Any, Any]:
        """Find the k best rows of every query.

        Args:
            queries: [M, dim] or [dim], fp16 | bf16 | fp32.
            k: rows wanted, k >= 1; more than there are pads with id -1 and -inf (l2: +inf).
            allow, deny: ids (integers), or a packed little-endian bitset over ids (uint8, bytes);
                with both, rows that are allowed and not denied. Ids of no row are passed over.
            out: (scores float32, ids int64) of the result's shape to fill and return.
        Returns: scores [M, k] float32 and ids [M, k] int64, best first ([k] for one query), in the
            framework and on the device of the queries.
        Raises: ValueError shape, k, NaN or infinity, an `out` of another shape, dtype or device or
            whose arrays overlap; TypeError dtype, k no whole number, filters that are neither ids
            nor a bitset, an `out` that is no pair.
        """
        if type(k) is not int or not 0 < k < 2**31:
            k = interop.as_k(k)
        if type(queries) is np.ndarray and queries.dtype == np.float32 and out is None:
            if allow is None and deny is None:
                return self._core.search(queries, k, False, None, None, None)
            back, bf16, array = None, False, queries
        else:
            array, bf16, back = interop.as_rows(queries, "queries")
        if out is not None:
            host = interop.as_out_pair(out, (*array.shape[:-1], k))
        found = self._core.search(
            array,
            k,
            bf16,
            interop.as_filter(allow, "allow"),
            interop.as_filter(deny, "deny"),
            None if out is None else host,
        )
        if out is not None:
            return tuple(out)
        return found if back is None else (back(found[0]), back(found[1]))

    def _search_exact(self, queries: Any, k: int, allow: Any, deny: Any) -> tuple[Any, Any]:
        """`search` for a torch tensor [M, dim], with the FP64 scores that decide the order."""
        array, bf16, back = interop.as_rows(queries, "queries")
        k = interop.as_k(k)
        exact = np.empty((len(array), k), np.float64)
        filters = interop.as_filter(allow, "allow"), interop.as_filter(deny, "deny")
        ids = self._core.search(array, k, bf16, *filters, None, exact)[1]
        return back(exact), back(ids)

    def range_search(
        self, queries: Any, radius: float, allow: Any = None, deny: Any = None
    ) -> tuple[Any, Any, Any]:
        """Find all rows scoring above `radius` (l2: nearer than it), strictly.

        Scores are compared in FP64, before they are rounded to what is returned: a row may be found
        whose returned score equals `radius`.

        Args:
            queries: [M, dim] or [dim], fp16 | bf16 | fp32.
            radius: a score; of l2 a squared distance.
            allow, deny: as in `search`.
        Returns: lims [M + 1], scores float32 and ids int64: query i owns entries lims[i] to
            lims[i + 1], best first; in the framework and on the device of the queries.
        Raises: ValueError shape, NaN or infinity in queries, a radius that is NaN; TypeError dtype,
            radius no number, filters that are neither ids nor a bitset.
        """
        array, bf16, back = interop.as_rows(queries, "queries")
        filters = interop.as_filter(allow, "allow"), interop.as_filter(deny, "deny")
        radius = interop.as_float(radius, "radius")
        found = self._core.range_search(array, radius, bf16, *filters)
        return back(found[0]), back(found[1]), back(found[2])

    def vectors(self, ids: Any, out: Any = None) -> np.ndarray:
        """The stored FP16 rows of these ids, [n, dim].

        Args:
            ids: [n] integers.
            out: float16 [n, dim] in host memory to fill and return.
        Raises: ValueError an id that is not in the index, another `out`; TypeError ids that are no
            integers.
        """
        wanted = interop.as_ids(ids, "ids")
        if out is not None:
            out = interop.as_out(out, (len(wanted), self.dim), np.float16)
        return self._core.vectors(wanted, out)

    def remove(self, ids: Any) -> int:
        """Remove rows by id; returns how many were found. `compact` gives their memory back.

        Raises: TypeError ids that are no integers; ValueError ids that are not flat.
        """
        return self._core.remove(interop.as_ids(ids, "ids"))

    def compact(self) -> None:
        """Drop the removed rows from memory. Ids stay; searches that run keep their snapshot."""
        self._core.compact()

    def plan(self, batch: int, k: int) -> Plan:
        """A search of fixed shape into its own buffers; see `Plan`.

        Raises: ValueError batch or k below 1; TypeError no whole number.
        """
        return Plan(self, batch, k)

    def to(self, device: str) -> Index:
        """Itself on the CPU, or a copy on a CUDA device with the same ids.

        Raises: ValueError no name of a device, a build without CUDA, or no CUDA device here.
        """
        if not is_cuda("device", device):
            return self
        from knnfast.search.cuda_index import copy_index

        return copy_index(self, device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a folder, atomically: a kill leaves the old index there or the new one.

        Args:
            path: a new or empty folder, or one that holds an index, which is replaced.
        Raises: ValueError a folder of other files; OSError it cannot be written.
        """
        self._core.save(os.fsencode(interop.as_path(path, "path")))

    @classmethod
    def open(cls, path: str | os.PathLike[str], device: str = "cpu", mmap: bool = True) -> Index:
        """Open a saved index; with `mmap` its rows stay in the files until they are touched.

        Raises: FileNotFoundError and other OSErrors; DamagedFile (a ValueError) naming the path;
            ValueError a file in the folder's place, a device that is not there.
        """
        on_cuda = is_cuda("device", device)
        path = interop.as_path(path, "path")
        if os.path.isfile(path):
            raise ValueError(f"{path} is a file; an index is a folder (of FAISS's: from_faiss)")
        if not os.path.isfile(os.path.join(path, "manifest.json")):
            raise FileNotFoundError(f"{path} holds no index (no manifest.json)")
        index = Index._wrap(_C.Index.open(os.fsencode(path), mmap))
        return index.to(device) if on_cuda else index

    def verify(self) -> None:
        """Check every payload file against its checksum.

        Raises: DamagedFile naming the damaged ones; FileNotFoundError where the folder was saved
            anew since, and they are gone.
        """
        if damaged := self._core.verify():
            raise DamagedFile("damaged: " + ", ".join(damaged))

    @classmethod
    def from_faiss(cls, index: Any) -> Index:
        """An Index with the rows of a FAISS flat index (Flat, SQ fp16, IDMap over them).

        Raises: TypeError another index, another metric; ValueError rows or ids that `add` refuses;
            ImportError without faiss.
        """
        from knnfast.search import faiss_bridge

        return faiss_bridge.from_faiss(index)

    def to_faiss(self) -> Any:
        """A FAISS IndexFlat, in an IndexIDMap2 where ids are not 0, 1, 2, ...

        Raises: ValueError for cosine, which FAISS lacks; ImportError without faiss.
        """
        from knnfast.search import faiss_bridge

        return faiss_bridge.to_faiss(self)


class Plan:
    """A search of fixed shape: `plan(queries)` fills and returns the plan's own buffers.

    Belongs to one thread; the buffers are overwritten by the next call. Follows the index as it
    grows.

    Args:
        index: what is searched.
        batch: queries in a call, at least 1.
        k: rows wanted for each, at least 1.
    Raises: ValueError batch or k below 1; TypeError no whole number.
    """

    def __init__(self, index: Index, batch: int, k: int) -> None:
        batch, k = interop.as_int(batch, "batch"), interop.as_k(k)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self._index = index
        self.scores = np.empty((batch, k), np.float32)
        self.ids = np.empty((batch, k), np.int64)

    def __call__(self, queries: Any) -> tuple[np.ndarray, np.ndarray]:
        """The plan's scores [batch, k] and ids [batch, k] for queries [batch, dim].

        Raises: ValueError shape, NaN or infinity; TypeError dtype.
        """
        array, bf16, _ = interop.as_rows(queries, "queries")
        batch, k = self.scores.shape
        if array.shape != (batch, self._index.dim):
            raise ValueError(
                f"queries must have shape [{batch}, {self._index.dim}], got {list(array.shape)}"
            )
        return self._index._core.search(array, k, bf16, None, None, (self.scores, self.ids))
