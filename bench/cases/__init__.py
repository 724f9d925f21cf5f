"""Every op's cases: `cases(op, shape, device)` yields them one after the other."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from case import Case
from shapes import SHAPES

OPS = tuple(SHAPES)


def cases(op: str, shape: str, device: str = "cpu") -> Iterator[Case]:
    """The cases of one op at one shape; data of a case may be shared with the next."""
    module = importlib.import_module(f"cases.{op}")
    yield from module.cases(shape, SHAPES[op][shape], device)
