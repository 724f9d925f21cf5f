"""`Index(device="cuda")`: the same index with its rows on a CUDA device."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import numpy as np

from knnfast import _C
from knnfast._device import device_number, is_cuda
from knnfast.search import interop
from knnfast.search.index import SCANS, Index, check_kind

_DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}


def _number_of(device: Any) -> int:
    """`cuda` or `cuda:N` as a device number.

    Raises: ValueError where this build or this machine has no such device.
    """
    if not getattr(_C, "has_cuda", False):
        raise ValueError(
            "device: must be cpu, this build has no CUDA (it needs KNNFAST_CUDA=ON), "
            f"got {str(device)!r}"
        )
    return device_number("device", device, _C.cuda_device_count(), "knnfast")


class _Rows(NamedTuple):
    """Where rows lie; `hold` keeps them there."""

    address: int
    dtype: int
    n: int
    stride: int
    single: bool
    on_device: bool
    stream: int
    hold: Any
    back: Any  # host results in the caller's framework


class CudaIndex(Index):
    """An `Index` on a CUDA device: same calls, same bits, results on the queries' device.

    A search with queries on the device only enqueues work on the caller's current stream (a filter
    waits for its upload). There a NaN or infinite query gives id -1 and NaN instead of an error.
    k is at most 2048 and dim at most 8192. `scan="auto"` keeps codes and scans them, but FP16 rows
    for batches above 32 where k exceeds a 50,000th of the rows. `segment_rows`: device memory is
    taken for so many rows at a time; 0, or more than that: for 256 MiB of them.
    """

    def __new__(cls, *_: Any, **__: Any) -> CudaIndex:
        """Of this class: what `Index` chose."""
        return object.__new__(cls)

    def __init__(
        self,
        dim: int,
        metric: str = "ip",
        device: str = "cuda",
        scan: str = "auto",
        segment_rows: int = 0,
    ) -> None:
        kind = check_kind(metric, scan)
        dim = interop.as_int(dim, "dim")
        if not is_cuda("device", device):
            raise ValueError(f"device: must be cuda or cuda:N, got {device!r}")
        self._number = _number_of(device)
        self._core = _C.CudaIndex(dim, *kind, self._number, segment_rows)

    @property
    def _joins(self) -> bool:
        return False

    @property
    def device(self) -> str:
        """Where the rows are."""
        return f"cuda:{self._number}"

    @property
    def stats(self) -> dict[str, int]:
        """Nothing is counted on a device: counting would cost a synchronisation."""
        return {}

    def add(self, vectors: Any, ids: Any = None) -> np.ndarray:
        """Append rows, from the host or a device, and return their ids; see `Index.add`."""
        rows = self._rows(vectors, "vectors")
        own = None
        if ids is not None:
            own = interop.as_ids(ids, "ids")
            if len(own) != rows.n:
                raise ValueError(f"ids must have one id a row: got {len(own)} for {rows.n} rows")
        return self._core.add(
            rows.address, rows.dtype, rows.n, rows.stride, own, rows.on_device, rows.stream
        )

    def search(
        self, queries: Any, k: int, allow: Any = None, deny: Any = None, out: Any = None
    ) -> tuple[Any, Any]:
        """Find the k best rows of every query; see `Index.search`.

        Raises: ValueError also while a CUDA graph is captured, which would not keep the rows that
            it reads: capture the call of a `plan` instead.
        """
        k = interop.as_k(k, _C.cuda_max_k, " on a CUDA device")
        if out is not None:
            interop.check_pair(out, "out")
        q = self._rows(queries, "queries")
        filters = interop.as_filter(allow, "allow"), interop.as_filter(deny, "deny")
        shape = (k,) if q.single else (q.n, k)
        if not q.on_device:
            if not np.isfinite(_as_float(q)).all():
                raise ValueError("queries must be finite, got NaN or infinity")
            if out is None:
                scores, found = np.empty(shape, np.float32), np.empty(shape, np.int64)
            else:
                scores, found = interop.as_out_pair(out, shape)
            self._core.search(
                q.address, q.dtype, q.stride, q.n, k, *filters,
                scores.ctypes.data, found.ctypes.data, 0, 0, False,
            )  # fmt: skip
            return (q.back(scores), q.back(found)) if out is None else tuple(out)
        if out is None:
            results = _empty(q.hold, shape)
        else:
            results = self._out(out[0], shape, "float32"), self._out(out[1], shape, "int64")
            first, second = map(_address, results)
            if first < second + 8 * q.n * k and second < first + 4 * q.n * k:
                raise ValueError("out: scores and ids must not share memory")
        self._core.search(
            q.address, q.dtype, q.stride, q.n, k, *filters,
            _address(results[0]), _address(results[1]), 0, q.stream, True,
        )  # fmt: skip
        return results if out is None else tuple(out)

    def _search_exact(self, queries: Any, k: int, allow: Any, deny: Any) -> tuple[Any, Any]:
        k = interop.as_k(k, _C.cuda_max_k, " on a CUDA device")
        q = self._rows(queries, "queries")
        scores, ids = _empty(q.hold, (q.n, k))
        exact = scores.double()
        filters = interop.as_filter(allow, "allow"), interop.as_filter(deny, "deny")
        self._core.search(
            q.address, q.dtype, q.stride, q.n, k, *filters,
            _address(scores), _address(ids), _address(exact), q.stream, True,
        )  # fmt: skip
        return exact, ids

    def range_search(
        self, queries: Any, radius: float, allow: Any = None, deny: Any = None
    ) -> tuple[Any, Any, Any]:
        """Find all rows better than `radius`; see `Index.range_search`. Waits for the device.

        Raises: as `Index.range_search`; ValueError queries on another device.
        """
        radius = interop.as_float(radius, "radius")
        if np.isnan(radius):
            raise ValueError("radius must be a number, got NaN")
        q = self._rows(queries, "queries")
        filters = interop.as_filter(allow, "allow"), interop.as_filter(deny, "deny")
        found = self._core.range_search(
            q.address, q.dtype, q.stride, q.n, radius, *filters, q.stream, q.on_device
        )
        if not q.on_device:
            return q.back(found[0]), q.back(found[1]), q.back(found[2])
        return _moved(found, q.hold)

    def vectors(self, ids: Any, out: Any = None) -> Any:
        """The stored FP16 rows of these ids: a numpy array, or into `out` on the host or device."""
        wanted = interop.as_ids(ids, "ids")
        shape = (len(wanted), self.dim)
        if out is None:
            out = np.empty(shape, np.float16)
        if _on_device(out):
            rows = self._out(out, shape, "float16")
            self._core.vectors(wanted, _address(rows), True, _stream(rows, self._number))
        else:
            rows = interop.as_out(out, shape, np.float16)
            self._core.vectors(wanted, _address(rows), False, 0)
        return out

    def plan(self, batch: int, k: int) -> Any:
        """A search of fixed shape into its own buffers; see `CudaPlan`."""
        return CudaPlan(self, batch, k)

    def to(self, device: str) -> Index:
        """Itself, or a copy on another device with the same ids."""
        if not is_cuda("device", device) or _number_of(device) != self._number:
            return copy_index(self, device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a folder, by way of the host."""
        self.to("cpu").save(path)

    def verify(self) -> None:
        """Nothing to check: rows on a device have no files."""

    def _rows(self, given: Any, name: str) -> _Rows:
        if not _on_device(given):
            rows = interop.as_rows(given, name)
            array = (
                rows.array if rows.array.flags.c_contiguous else np.ascontiguousarray(rows.array)
            )
            dtype = 1 if rows.bf16 else _DTYPES[array.dtype.name]
            _check_shape(array.shape, self.dim, name)
            single = array.ndim == 1
            n = 1 if single else len(array)
            return _Rows(array.ctypes.data, dtype, n, self.dim, single, False, 0, array, rows.back)
        given = _array(given, name, self._number)
        if _is_torch(given):
            given = interop.as_dense(sys.modules["torch"], given, name)
        dtype_name = str(given.dtype).removeprefix("torch.")
        if dtype_name not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {dtype_name}")
        _check_shape(tuple(given.shape), self.dim, name)
        self._check_device(given, name)
        single = given.ndim == 1
        strides = (
            given.stride() if _is_torch(given) else [s // given.itemsize for s in given.strides]
        )
        if strides[-1] != 1 and self.dim > 1:
            given = _packed(given)
            strides = [self.dim, 1]
        n = 1 if single else given.shape[0]
        stride = self.dim if single or n == 1 else strides[0]
        stream = _stream(given, self._number)
        return _Rows(
            _address(given), _DTYPES[dtype_name], n, stride, single, True, stream, given, None
        )

    def _out(self, given: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An `out` argument in the index's device memory, as torch or cupy sees it."""
        if not _on_device(given):
            raise ValueError(f"out must be on {self.device}, as the queries")
        out = _array(given, "out", self._number)
        self._check_device(out, "out")
        if tuple(out.shape) != shape or str(out.dtype).removeprefix("torch.") != dtype:
            raise ValueError(f"out must be {dtype} of shape {list(shape)}")
        if not _contiguous(out):
            raise ValueError("out must be contiguous")
        return out

    def _check_device(self, given: Any, name: str) -> None:
        number = given.device.index if _is_torch(given) else given.device.id
        if number != self._number:
            raise ValueError(f"{name} is on cuda:{number}, the index on {self.device}")


class CudaPlan:
    """A search of fixed shape: `plan(queries)` enqueues it and returns the plan's own buffers.

    No allocation and no synchronisation while the index stays the same; may be captured in a CUDA
    graph (capture again after the index has changed). Buffers are torch tensors if torch is loaded,
    else cupy arrays; the next call overwrites them. Belongs to one thread.
    """

    def __init__(self, index: CudaIndex, batch: int, k: int) -> None:
        batch = interop.as_int(batch, "batch")
        k = interop.as_k(k, _C.cuda_max_k, " on a CUDA device")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self._index, self._shape = index, (batch, k)
        self._core = _C.CudaPlan(index._core, batch, k)
        self.scores = _wrap(self._core, index._number, self._core.scores, (batch, k), "<f4")
        self.ids = _wrap(self._core, index._number, self._core.ids, (batch, k), "<i8")

    @property
    def scan(self) -> str:
        """What it scans: `fp16` or `int8`."""
        return SCANS[self._core.scan]

    @property
    def kernel(self) -> str:
        """Which scan runs: `stream`, `tiled` or `sm90`."""
        return self._core.kernel

    def __call__(self, queries: Any) -> tuple[Any, Any]:
        """Search for queries [batch, dim] that lie on the index's device."""
        q = self._index._rows(queries, "queries")
        if not q.on_device:
            raise ValueError(f"queries of a plan must be on {self._index.device}")
        if q.n != self._shape[0] or q.single:
            raise ValueError(f"queries must have shape [{self._shape[0]}, {self._index.dim}]")
        self._core.run(q.address, q.dtype, q.stride, q.stream)
        return self.scores, self.ids


def copy_index(index: Index, device: str) -> Index:
    """A copy of an index on a device: rows in the same order, their ids, the next automatic id."""
    twin = Index(index.dim, index.metric, device, index.scan)
    _C.copy_rows(index._core, twin._core)
    return twin


class _Buffer:
    """Device memory of a plan, as torch and cupy take it; keeps the plan alive."""

    def __init__(self, owner: Any, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def _wrap(owner: Any, number: int, address: int, shape: tuple[int, ...], typestr: str) -> Any:
    buffer = _Buffer(owner, address, shape, typestr)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.as_tensor(buffer, device=f"cuda:{number}")
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return buffer
    with cupy.cuda.Device(number):
        return cupy.asarray(buffer)


def _is_torch(given: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.Tensor)


def _on_device(given: Any) -> bool:
    if _is_torch(given):
        return given.is_cuda
    if hasattr(given, "__cuda_array_interface__"):
        return True
    place = getattr(given, "__dlpack_device__", None)
    return place is not None and not isinstance(given, np.ndarray) and place()[0] == 2


def _array(given: Any, name: str, number: int) -> Any:
    """A device array as torch or cupy sees it, never a copy."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if _is_torch(given) or (cupy is not None and isinstance(given, cupy.ndarray)):
        return given
    framework = torch or cupy
    if framework is None:
        raise TypeError(f"{name} lies on a CUDA device: import torch or cupy first")
    if hasattr(given, "__dlpack__"):
        return framework.from_dlpack(given)
    if torch is not None:
        seen = torch.as_tensor(given, device=f"cuda:{number}")
    else:
        with framework.cuda.Device(number):
            seen = framework.asarray(given)
    # Both copy what lies on another device.
    if 0 not in seen.shape and _address(seen) != given.__cuda_array_interface__["data"][0]:
        raise ValueError(f"{name} is not on cuda:{number}, where the index is")
    return seen


def _stream(given: Any, number: int) -> int:
    """The caller's current stream in the framework of `given`."""
    if _is_torch(given):
        return sys.modules["torch"].cuda.current_stream(number).cuda_stream
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(number):
        return cupy.cuda.get_current_stream().ptr


def _packed(given: Any) -> Any:
    """A contiguous copy on the same device."""
    if _is_torch(given):
        return given.contiguous()
    with given.device:
        return given.copy()


def _moved(found: tuple[Any, ...], like: Any) -> tuple[Any, ...]:
    """Host results on the device of `like`."""
    if _is_torch(like):
        torch = sys.modules["torch"]
        return tuple(torch.from_numpy(array).to(like.device) for array in found)
    with like.device:
        return tuple(sys.modules["cupy"].asarray(array) for array in found)


def _address(given: Any) -> int:
    if isinstance(given, np.ndarray):
        return given.ctypes.data
    return given.data_ptr() if _is_torch(given) else given.data.ptr


def _contiguous(given: Any) -> bool:
    return given.is_contiguous() if _is_torch(given) else given.flags.c_contiguous


def _empty(like: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    if _is_torch(like):
        torch = sys.modules["torch"]
        return (
            torch.empty(shape, dtype=torch.float32, device=like.device),
            torch.empty(shape, dtype=torch.int64, device=like.device),
        )
    cupy = sys.modules["cupy"]
    with like.device:
        return cupy.empty(shape, np.float32), cupy.empty(shape, np.int64)


def _as_float(rows: _Rows) -> np.ndarray:
    if rows.dtype == 1:  # bfloat16 words
        return (rows.hold.astype(np.uint32) << 16).view(np.float32)
    return rows.hold


def _check_shape(shape: tuple[int, ...], dim: int, name: str) -> None:
    if len(shape) not in (1, 2) or shape[-1] != dim:
        raise ValueError(f"{name} must have shape [n, {dim}] or [{dim}], got {list(shape)}")
