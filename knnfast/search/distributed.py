"""`ShardedIndex`: the rows of many processes searched as one index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from knnfast.search import interop
from knnfast.search.index import METRICS, Index


class ShardedIndex:
    """Every process's rows as one index: the same answer, bit for bit, however they are spread.

    Each process searches its own rows; the k best of each are gathered and merged by the score
    before it is rounded to FP32, ties by the lower id. 16·k bytes a query and process are moved.

    Args:
        index: this process's rows, on the CPU (gloo) or on a CUDA device (NCCL). Ids must differ
            between processes: `add(rows, ids)` with ids of your own.
        group: the process group of torch.distributed; None: the default one.
    Raises: RuntimeError without torch.distributed; ValueError where dim or metric differ.
    Example: >>> shards = ShardedIndex(ix); scores, ids = shards.search(queries, k=10)
    """

    def __init__(self, index: Index, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("ShardedIndex needs torch.distributed.init_process_group first")
        self._index, self._group = index, group
        shapes = self._gather(self._tensor([index.dim, METRICS.index(index.metric)])).tolist()
        if any(shape != shapes[0] for shape in shapes):
            found = [(dim, METRICS[metric]) for dim, metric in shapes]
            raise ValueError(f"every process's index must have one dim and metric, got {found}")

    def __len__(self) -> int:
        """Rows of all processes; every process must ask."""
        return int(self._gather(self._tensor([len(self._index)])).sum())

    def search(self, queries: Any, k: int, allow: Any = None, deny: Any = None) -> tuple[Any, Any]:
        """Find the k best rows of all processes; see `Index.search`.

        Every process must call it, with the same queries and k, and gets the whole answer. Filters
        hold ids of any process.

        Raises: what `Index.search` raises; ValueError for an id that two processes hold (on a CUDA
            device, where that would cost a synchronisation, it is not looked for).
        """
        rows = None
        if isinstance(queries, Tensor):
            q = queries
        else:
            rows = interop.as_rows(queries, "queries")
            q = torch.from_numpy(np.array(rows.array, order="C"))
            q = q.view(torch.bfloat16) if rows.bf16 else q
        home = q.device
        single = q.ndim == 1
        if single:
            q = q[None]
        q = q.to(self._index.device)
        exact, ids = self._index._search_exact(q, k, allow, deny)
        larger = -exact if self._index.metric == "l2" else exact
        keys = self._gather(larger).transpose(0, 1).flatten(1)  # [M, processes · k]
        ids = self._gather(ids).transpose(0, 1).flatten(1)
        ids, by_id = ids.sort(dim=1)
        if ids.device.type == "cpu":
            twice = ids[:, 1:][(ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)]
            if len(twice):
                raise ValueError(f"ids: {twice[0]} is held by more than one process")
        best = keys.gather(1, by_id).sort(dim=1, descending=True, stable=True)
        scores, found = best.values[:, :k], ids.gather(1, best.indices[:, :k])
        scores = (-scores if self._index.metric == "l2" else scores).float()
        if single:
            scores, found = scores[0], found[0]
        scores, found = scores.to(home), found.to(home)
        if rows is None:
            return scores, found
        return rows.back(scores.numpy()), rows.back(found.numpy())

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._index.device)

    def _gather(self, mine: Tensor) -> Tensor:
        """[processes, ...]: every process's tensor, in the order of the ranks."""
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine.contiguous(), group=self._group)
        return torch.stack(parts)
