"""The k best rows of a tensor for every query: `knnfast.Index` for one call."""

from __future__ import annotations

import torch
from torch import Tensor

from knnfast.search import Index


def topk(
    q: Tensor, x: Tensor, k: int, metric: str = "ip", ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k best rows of x for every query, bit for bit as `reference.topk`.

    Copies x into an index for this one call: keep an `Index` where rows are searched twice.

    Args:
        q: queries, [M, D], fp16 | bf16 | fp32.
        x: rows, [N, D], fp16 | bf16 | fp32, taken as FP16.
        k: neighbours, k >= 1; more than N pads with id -1.
        ids: unique ids of the rows, [N] int64; None: row numbers.

    Returns:
        scores [M, k] fp32 and ids [M, k] int64, best first, ties by the lower id.
    Raises: ValueError shape, range; TypeError dtype.
    """
    if q.ndim != 2 or x.ndim != 2 or q.shape[1] != x.shape[1]:
        raise ValueError(f"q and x must be [M, D] and [N, D], got {list(q.shape)}, {list(x.shape)}")
    index = Index(x.shape[1], metric=metric, scan="fp16")
    if len(x):
        index.add(x, ids)
    scores, found = index.search(q, k)
    return torch.as_tensor(scores), torch.as_tensor(found)
