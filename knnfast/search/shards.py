"""Row files of other tools: `.npy`, `.fbin`, `.f16bin` (uint32 rows, uint32 dim, the rows)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from knnfast.search.index import DamagedFile

_BIN: dict[str, Any] = {".fbin": np.dtype("<f4"), ".f16bin": np.dtype("<f2")}


def read_rows(path: str | os.PathLike[str], mmap: bool = True) -> np.ndarray:
    """The rows [n, d] of a `.npy`, `.fbin` or `.f16bin` file, mapped or read.

    Raises: ValueError for another suffix; DamagedFile naming the path and the reason.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if suffix == ".npy":
        try:
            rows = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedFile(f"{path}: {error}") from error
        if rows.ndim != 2 or rows.dtype.kind != "f" or rows.dtype.itemsize not in (2, 4):
            raise DamagedFile(f"{path}: rows must be [n, d] float16 or float32, "
                              f"got {list(rows.shape)} {rows.dtype}")  # fmt: skip
        return rows
    if suffix not in _BIN:
        raise ValueError(f"{path}: the suffix must be .npy, .fbin or .f16bin")
    size = os.path.getsize(path)
    if size < 8:
        raise DamagedFile(f"{path}: it has no header")
    n, d = (int(v) for v in np.fromfile(path, "<u4", 2))
    dtype = _BIN[suffix]
    if size != 8 + n * d * dtype.itemsize:
        raise DamagedFile(f"{path}: {n} rows of {d} should take "
                          f"{8 + n * d * dtype.itemsize} bytes, it has {size}")  # fmt: skip
    if n * d == 0:
        return np.empty((n, d), dtype)
    rows = np.memmap(path, dtype=dtype, mode="r", offset=8, shape=(n, d))
    return rows if mmap else np.array(rows)


def write_rows(path: str | os.PathLike[str], rows: np.ndarray) -> None:
    """Write rows [n, d] as `.npy` (their own dtype), `.fbin` (FP32) or `.f16bin` (FP16)."""
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if rows.ndim != 2:
        raise ValueError(f"rows must be [n, d], got shape {list(rows.shape)}")
    if suffix == ".npy":
        np.save(path, rows, allow_pickle=False)
        return
    if suffix not in _BIN:
        raise ValueError(f"{path}: the suffix must be .npy, .fbin or .f16bin")
    with open(path, "wb") as f:
        np.array(rows.shape, "<u4").tofile(f)
        np.ascontiguousarray(rows, _BIN[suffix]).tofile(f)
