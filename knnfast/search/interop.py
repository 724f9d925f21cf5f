"""Arrays of other frameworks as numpy views of their own memory, and results back again."""

from __future__ import annotations

import operator
import os
import sys
from array import array as typed_array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """What the C++ side takes: an array, and whether its 16-bit words are bfloat16."""

    array: np.ndarray
    bf16: bool
    back: Callable[[np.ndarray], Any]  # a result in the caller's framework


def _same(array: np.ndarray) -> np.ndarray:
    return array


def as_rows(given: Any, name: str) -> Rows:
    """View `given` as a numpy array without a copy where its memory is the host's.

    Raises: TypeError when it is no array, or of another type than float16, bfloat16, float32.
    """
    if isinstance(given, np.ndarray):
        unmasked(given, name)
        if given.dtype.name == "bfloat16":  # ml_dtypes
            return Rows(given.view(np.uint16), True, _same)
        return Rows(_checked(given, name), False, _same)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        return _from_torch(torch, given, name)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(given, cupy.ndarray):
        return Rows(_checked(cupy.asnumpy(given), name), False, cupy.asarray)
    if hasattr(given, "__cuda_array_interface__"):
        if cupy is None:
            raise TypeError(
                f"{name} lies on a CUDA device: import cupy or torch, or copy it to the host"
            )
        return Rows(_checked(cupy.asnumpy(cupy.asarray(given)), name), False, cupy.asarray)
    if hasattr(given, "__array_interface__") or hasattr(given, "__array__"):
        return as_rows(np.asarray(given), name)
    if hasattr(given, "__dlpack__"):
        try:
            return Rows(_checked(np.from_dlpack(given), name), False, _same)
        except (BufferError, RuntimeError) as error:
            if torch is None:
                raise TypeError(f"{name}: numpy cannot take this DLPack tensor: {error}") from error
            return _from_torch(torch, torch.from_dlpack(given), name)._replace(back=_same)
    raise TypeError(
        f"{name} must be an array (numpy, torch, cupy or DLPack) of float16, bfloat16 or float32, "
        f"got {type(given).__name__}"
    )


def unmasked(array: Any, name: str) -> Any:
    """The same; a TypeError for a masked array, whose values under the mask are none."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill or compress it first")
    return array


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4):
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {array.dtype}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_torch(torch: Any, given: Any, name: str) -> Rows:
    if given.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {given.dtype}")
    device = given.device
    host = _on_host(torch, given, name)
    bf16 = host.dtype == torch.bfloat16

    def back(array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(device)

    if bf16:
        host = (
            host.view(torch.int16) if host.is_contiguous() else host.contiguous().view(torch.int16)
        )
        return Rows(host.numpy().view(np.uint16), True, back)
    return Rows(host.numpy(), False, back)


def as_dense(torch: Any, given: Any, name: str) -> Any:
    """A tensor whose memory holds its values, outside autograd; a TypeError for another layout."""
    if given.is_meta or given.is_nested or given.layout != torch.strided:
        kinds = {given.is_meta: "a meta tensor", given.is_nested: "a nested tensor"}
        raise TypeError(f"{name} must be a dense tensor, got {kinds.get(True, given.layout)}")
    return given.detach().resolve_conj().resolve_neg()


def _on_host(torch: Any, given: Any, name: str) -> Any:
    return as_dense(torch, given, name).cpu()


def host_array(given: Any, name: str) -> np.ndarray:
    """`given` as a numpy array in the host's memory; a ValueError for lists of several lengths."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        given = _on_host(torch, given, name).numpy()
    elif hasattr(given, "__cuda_array_interface__") and "cupy" in sys.modules:
        given = sys.modules["cupy"].asnumpy(given)
    try:
        return np.asarray(unmasked(given, name))
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{name} must be flat: {error}") from error


def as_ids(given: Any, name: str) -> np.ndarray:
    """A flat int64 array of ids; other integers are widened, anything else is a TypeError."""
    if isinstance(given, bytes | bytearray):
        raise TypeError(f"{name} must hold integers, got {type(given).__name__}")
    array = host_array(given, name)
    if array.size == 0 and array.dtype.kind == "f":  # an empty list
        array = array.astype(np.int64)
    listed = array.dtype.kind == "f" and isinstance(given, list | tuple)
    if listed and all(isinstance(i, int) for i in given):  # no type of numpy's holds all of them
        raise ValueError(f"{name}: {max(given)} is no int64")
    if array.dtype.kind == "O":  # numpy found no number in it, or one that is none of its own
        raise TypeError(
            f"{name} must be a sequence of integers within int64, got {type(given).__name__}"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {array.max()} is no int64")
    if array.ndim > 1:
        raise ValueError(f"{name} must be flat, got shape {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.int64).reshape(-1)


_FILTERS = np.dtype(np.int64), np.dtype(np.uint8)


def as_filter(given: Any, name: str) -> np.ndarray | None:
    """`allow` or `deny`: ids, or a packed little-endian bitset over ids (uint8, or bytes)."""
    if given is None:
        return None
    if type(given) is np.ndarray and given.dtype in _FILTERS and given.ndim == 1:
        return np.ascontiguousarray(given)
    if isinstance(given, bytes | bytearray):
        given = np.frombuffer(given, np.uint8)
    elif isinstance(given, memoryview | typed_array):
        given = np.asarray(given)
    kind = str(getattr(given, "dtype", "")).removeprefix("torch.")
    if kind == "bool":
        raise TypeError(
            f"{name} must be ids, or a bitset as numpy.packbits(mask, bitorder='little') makes it, "
            "got bool"
        )
    if kind == "uint8":
        array = host_array(given, name)
        if array.ndim != 1:
            raise ValueError(f"{name} as a bitset must be flat, got shape {list(array.shape)}")
        return np.ascontiguousarray(array)
    return as_ids(given, name)


def as_int(given: Any, name: str) -> int:
    """A whole number that fits into int64; anything else is a TypeError or a ValueError."""
    value = _whole(given, name)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: {value} is no int64")
    return value


def as_k(given: Any, most: int = 2**31 - 1, where: str = "") -> int:
    """How many rows are wanted: a whole number from 1 on; else a TypeError or a ValueError."""
    k = _whole(given, "k")
    if not 1 <= k <= most:
        raise ValueError(f"k must be 1 to {most}{where}, got {k}")
    return k


def _whole(given: Any, name: str) -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {given!r}") from None


def as_float(given: Any, name: str) -> float:
    """A number; anything else is a TypeError."""
    try:
        if isinstance(given, bool | str):
            raise TypeError
        return float(given)
    except (TypeError, OverflowError):
        raise TypeError(f"{name} must be a number, got {given!r}") from None


def as_path(given: Any, name: str) -> str:
    """A path as text; a TypeError for anything else, a ValueError for one with a NUL byte."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{name} must be a str or an os.PathLike, got {type(given).__name__}")
    path = os.fsdecode(given)
    if not path:
        raise ValueError(f"{name} is empty")
    if "\0" in path:
        raise ValueError(f"{name} holds a NUL byte: {path!r}")
    return path


def check_pair(given: Any, name: str) -> None:
    """Refuse what is no pair of scores and ids, with a TypeError."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"{name} must be a pair (scores, ids), got {type(given).__name__}")


def as_out(given: Any, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """View an `out` argument in host memory as a numpy array; a ValueError where it is another."""
    if getattr(given, "requires_grad", False):
        raise ValueError("out must not require gradients")
    try:
        array = given.numpy() if hasattr(given, "numpy") else given
    except (TypeError, RuntimeError):  # torch: on a device, or of a type that numpy lacks
        array = None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = type(given).__name__
        if hasattr(given, "dtype") and hasattr(given, "shape"):
            got = f"{given.dtype} of shape {list(given.shape)}"
        raise ValueError(
            f"out must be {np.dtype(dtype)} of shape {list(shape)}, in host memory, got {got}"
        )
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError("out must be contiguous and writeable")
    return array


def as_out_pair(given: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`out` of a search in host memory: scores and ids, which must not overlap."""
    check_pair(given, "out")
    scores, ids = as_out(given[0], shape, np.float32), as_out(given[1], shape, np.int64)
    if np.may_share_memory(scores, ids):
        raise ValueError("out: scores and ids must not share memory")
    return scores, ids
