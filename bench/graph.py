"""Calls recorded as CUDA graphs: a replay costs the host one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Graph:
    """A call as one CUDA graph, recorded at its first use; every replay fills the same result.

    Args:
        call: on the current device; called four times, on a stream of its own.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.eager = call
        self.graph: Any = None

    def record(self) -> Graph:
        """Record it; returns itself.

        Raises: RuntimeError when it waits for the device or cannot be captured otherwise.
        """
        import torch

        call = self.eager
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled, tables and workspaces made
                call()
            # A capture that fails may leave the allocator and the random numbers in disorder.
            try:
                torch.cuda.set_sync_debug_mode("error")
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = call()
        self.graph = graph
        return self

    def __call__(self) -> Any:
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.result


def with_graphs(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, Callable[[], Any]]:
    """On CUDA each call as a graph, too, and first: Python is slower than a short kernel."""
    if device == "cpu":
        return calls
    return {f"graph {name}": Graph(call) for name, call in calls.items()} | calls


def eager(call: Callable[[], Any]) -> Callable[[], Any]:
    """What a graph was recorded from: a replay allocates nothing, its memory is this call's."""
    return call.eager if isinstance(call, Graph) else call
