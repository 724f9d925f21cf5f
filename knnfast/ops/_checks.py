"""Argument checks shared by all backends: ValueError and TypeError that name the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOGIT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

# The one torch.library fragment of the ops; each op file defines its own ops in it.
library = torch.library.Library("knnfast", "FRAGMENT")


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless x is a tensor of one of the allowed types."""
    check_tensor(name, x)
    if x.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: dtype must be one of {names}, got {x.dtype}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless the value is a real number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: must be a number, got {value!r}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: must be finite, got {value}")


def check_whole(name: str, value: int) -> None:
    """Raise TypeError unless the value is a whole number."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: must be an integer, got {value!r}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless the tensor x has this shape (None: any size)."""
    check_tensor(name, x)
    if x.dim() != len(shape) or any(
        want is not None and got != want for got, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: shape must be [{wanted}], got {list(x.shape)}")


def check_schedule(schedule: object, num_codes: int) -> None:
    """Raise TypeError unless it has A, B and C, ValueError if it is of other codes."""
    if not all(hasattr(schedule, name) for name in "ABC"):
        raise TypeError(f"schedule: must have A, B and C, got {schedule!r}")
    lengths = [len(getattr(schedule, name)) for name in "ABC"]
    if len(set(lengths)) > 1 or lengths[0] < 2:
        raise ValueError(f"schedule: A, B and C must be of levels 0..T, T > 0, got {lengths}")
    check_whole("num_codes", num_codes)
    codes = getattr(schedule, "num_codes", num_codes)
    if codes != num_codes:
        raise ValueError(f"schedule: is of {codes} codes, not of {num_codes}")


def probabilities(schedule: Any) -> tuple[tuple[float, ...], ...]:
    """A, B and C of a schedule, in [0, 1]; ValueError where one is out of it by over 1e-9."""
    found = tuple(tuple(float(v) for v in getattr(schedule, name)) for name in "ABC")
    for name, values in zip("ABC", found, strict=True):
        if bad := [v for v in values if not -1e-9 <= v <= 1 + 1e-9]:  # NaN, too
            raise ValueError(f"schedule: {name} must be in [0, 1] at all levels, got {bad[0]}")
    return tuple(tuple(min(max(v, 0.0), 1.0) for v in values) for values in found)


def check_seed(seed: object, device: torch.device) -> None:
    """Raise unless it is the int64 of a Philox key: a number, or a tensor of one on the device."""
    if isinstance(seed, Tensor):
        check_dtype("seed", seed, (torch.int64,))
        check_device("seed", seed, device)
        if seed.numel() != 1:
            raise ValueError(f"seed: must have one element, got {seed.numel()}")
        return
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: must be an integer, got {seed!r}")
    if not -(2**63) <= seed.__index__() < 2**63:
        raise ValueError(f"seed: must be in [-2^63, 2^63), got {seed}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless x lies on the device."""
    if x.device != device:
        raise ValueError(f"{name}: must be on {device}, got {x.device}")


def rows(x: Tensor) -> Tensor:
    """Return x, or a copy, with last stride 1 and rows at one common distance."""
    if x.dim() < 2:
        return x.contiguous()
    if x.stride(-1) == 1 and all(
        x.stride(d) == x.stride(inner) * x.shape[inner] for d, inner in pairwise(_long(x))
    ):
        return x
    return x.contiguous()


def row_stride(x: Tensor) -> int:
    """Elements from row to row of a tensor that `rows` returned."""
    long = _long(x)
    return x.stride(long[-1]) if long else x.shape[-1]


def _long(x: Tensor) -> list[int]:
    """The dimensions along which rows lie; the stride of one of size 1 says nothing."""
    return [d for d in range(x.dim() - 1) if x.shape[d] != 1]


def pointer(x: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()
