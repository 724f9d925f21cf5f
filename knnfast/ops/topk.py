"""The k best rows of a tensor for every query: `knnfast.Index` for one call."""

from __future__ import annotations

import torch
from torch import Tensor

from knnfast.ops._checks import LOGIT_TYPES, check_device, check_dtype, check_shape, library
from knnfast.search import Index
from knnfast.search.cuda_index import CudaIndex
from knnfast.search.index import METRICS
from knnfast.search.interop import as_k


def topk(
    q: Tensor, x: Tensor, k: int, metric: str = "ip", ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k best rows of x for every query, bit for bit as `reference.topk`.

    Copies x into an index for this one call: keep an `Index` where rows are searched twice.

    Args:
        q: queries, [M, D], fp16 | bf16 | fp32.
        x: rows, [N, D], fp16 | bf16 | fp32, on the device of q; taken as FP16.
        k: neighbours, k >= 1; more than N pads with id -1. On CUDA k <= 2048 and D <= 8192.
        metric: "ip", "cosine" or "l2" (squared, smaller is nearer).
        ids: unique ids of the rows, [N] int64; None: row numbers.

    Returns:
        scores [M, k] fp32 and ids [M, k] int64, best first, ties by the lower id.
    Raises: ValueError shape, range, a device that the extension was built without; TypeError dtype.
    Differentiable: no.  Memory: one FP16 copy of x.
    """
    for name, given in (("q", q), ("x", x)):
        check_dtype(name, given, LOGIT_TYPES)
        check_shape(name, given, (None, None))
    if q.shape[1] != x.shape[1]:
        raise ValueError(f"q and x must have one width, got {q.shape[1]} and {x.shape[1]}")
    check_device("x", x, q.device)
    if ids is not None:
        check_shape("ids", ids, (len(x),))
    k = as_k(k)
    if metric not in METRICS:
        raise ValueError(f"metric: must be one of {METRICS}, got {metric!r}")
    return torch.ops.knnfast.topk(q.detach(), x.detach(), k, metric, ids)


library.define(
    "topk(Tensor q, Tensor x, int k, str metric='ip', Tensor? ids=None) -> (Tensor, Tensor)"
)


def _topk(
    q: Tensor, x: Tensor, k: int, metric: str = "ip", ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if x.is_cuda:  # memory for these rows alone
        index: Index = CudaIndex(x.shape[1], metric, str(x.device), "fp16", segment_rows=len(x))
    else:
        index = Index(x.shape[1], metric, "cpu", "fp16")
    if len(x):
        index.add(x, ids)
    return index.search(q, k)


library.impl("topk", _topk, "CPU")
library.impl("topk", _topk, "CUDA")


@torch.library.register_fake("knnfast::topk", lib=library)
def _(q, x, k, metric="ip", ids=None):
    shape = q.shape[0], k
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.int64)
