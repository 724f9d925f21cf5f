"""Data-parallel training: the processes that `torchrun` starts, or the one process there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Long enough for one process to encode or index a large collection while the others wait.
TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """One training process among `count`.

    Attributes:
        rank: number of this process, in [0, count).
        count: processes.
        device: where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    _wrapped: list[DistributedDataParallel] = field(default_factory=list, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: int) -> tuple[int, int]:
        """Images [start, stop) of a global batch that are for this process.

        Raises:
            ValueError: the batch cannot be shared out evenly.
        """
        if batch % self.count:
            raise ValueError(f"batch: {batch} images cannot be shared by {self.count} processes")
        size = batch // self.count
        return self.rank * size, (self.rank + 1) * size

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the processes in the backward pass."""
        if self.count == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        self._wrapped.append(DistributedDataParallel(module, device_ids=ids))
        return self._wrapped[-1]

    def gather(self, rows: Tensor) -> Tensor:
        """Every process's `rows` [n, ...], in the order of the ranks: [count * n, ...]."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the group: wrapped modules are of no more use, and its threads have ended.

        They end with the last reference to the group. A module that held it to the end of the
        process would leave a thread that lets go of a tensor while Python itself ends: it aborts.
        """
        for module in self._wrapped:
            for name in ("reducer", "logger", "process_group"):
                setattr(module, name, None)
        self._wrapped.clear()
        dist.destroy_process_group()


_joined: Processes | None = None  # what the outermost `processes` lends


@contextmanager
def processes(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """Join the processes that `torchrun` started; without it, be the only one.

    A group that the caller has initialised is taken as it is, and stays. Within another `processes`
    the same object is lent again.

    Args:
        device: `cpu` (gloo) or `cuda` (NCCL, the GPU of the local rank).
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    theirs = dist.is_available() and dist.is_initialized()
    if theirs:
        count, rank = dist.get_world_size(), dist.get_rank()
    else:
        count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = torch.device(device)
    if count == 1:
        yield Processes(device=chosen)
        return
    if chosen.type == "cuda":
        local = os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count()))
        chosen = torch.device("cuda", int(local))
        torch.cuda.set_device(chosen)
    if not theirs:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    these = _joined = Processes(rank, count, chosen)
    try:
        yield these
    finally:
        _joined = None
        if not theirs:
            these.leave()


def has_bf16(device: str | torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 itself, so that it pays."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
