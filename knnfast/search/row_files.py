"""Row files of other tools: `.npy`, `.fbin`, `.f16bin` (uint32 rows, uint32 dim, the rows)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from knnfast import _files
from knnfast.search.index import DamagedFile

_PIECE = 1 << 16  # rows converted at a time
_BIN: dict[str, Any] = {".fbin": np.dtype("<f4"), ".f16bin": np.dtype("<f2")}


def read_rows(path: str | os.PathLike[str], mmap: bool = True) -> np.ndarray:
    """The rows [n, d] of a `.npy`, `.fbin` or `.f16bin` file, mapped or read.

    Raises: ValueError for another suffix; DamagedFile naming the path and the reason.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if suffix == ".npy":
        with open(path, "rb") as f:
            if f.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:  # an archive, say
                raise DamagedFile(f"{path}: it is no .npy file")
        try:
            with np.errstate(over="raise"):  # of an absurd shape; a map is no larger than the file
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, ArithmeticError) as error:
            raise DamagedFile(f"{path}: {error}") from error
        if rows.ndim != 2 or not _is_half_or_single(rows.dtype):
            raise DamagedFile(f"{path}: rows must be [n, d] float16 or float32, "
                              f"got {list(rows.shape)} {rows.dtype}")  # fmt: skip
        return rows if mmap else np.array(rows)
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
    """Write rows [n, d], FP16 or FP32, atomically: `.npy` (their own type), `.fbin` or `.f16bin`.

    Raises: ValueError shape, suffix, a value that FP16 cannot hold in a `.f16bin`; TypeError dtype.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if suffix != ".npy" and suffix not in _BIN:
        raise ValueError(f"{path}: the suffix must be .npy, .fbin or .f16bin")
    if not isinstance(rows, np.ndarray) or not _is_half_or_single(rows.dtype):
        found = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise TypeError(f"rows must be a numpy array of float16 or float32, got {found}")
    if rows.ndim != 2:
        raise ValueError(f"rows must be [n, d], got shape {list(rows.shape)}")
    with _files.replacing(Path(path)) as part, open(part, "wb") as f:
        if suffix == ".npy":
            np.save(f, rows, allow_pickle=False)
            return
        np.array(rows.shape, "<u4").tofile(f)
        for first in range(0, len(rows), _PIECE):
            given = rows[first : first + _PIECE]
            with np.errstate(over="ignore"):
                piece = np.ascontiguousarray(given, _BIN[suffix])
            if suffix == ".f16bin" and (np.isinf(piece) & np.isfinite(given)).any():
                raise ValueError(f"{path}: rows hold a value beyond FP16's 65504; use .fbin")
            piece.tofile(f)


def _is_half_or_single(dtype: np.dtype) -> bool:
    return dtype.kind == "f" and dtype.itemsize in (2, 4)
