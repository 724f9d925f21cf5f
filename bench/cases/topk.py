"""Exact top-k beside FAISS, USearch, torch, and on a GPU cuVS and FlashLib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from case import Case, Rival, UnknownNameError
from graph import Graph

from knnfast.benchmark.machine import memory_bytes
from knnfast.benchmark.topk import CPU_PEERS, GPU_PEERS, Peer, Truth, build_peers, make_rows
from knnfast.search import Index


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    n, d, kind = size["n"], size["d"], size.get("kind", "isotropic")
    check_memory(shape, n * d, device)
    rows, queries = make_rows(n, d, kind, max(size["batches"]))
    indexes = {scan: Index(d, device=device, scan=scan) for scan in ("auto", "fp16")}
    for index in indexes.values():
        index.add(rows)
    truth = Truth(rows, queries, max(size["ks"]), device=device)
    built: dict[str, Peer | str] = {}

    def peers(names: Sequence[str] | None) -> Iterator[tuple[str, Peer | str]]:
        """On a GPU each is built once and stays; on the CPU one at a time is in memory."""
        if device == "cpu":
            yield from build_peers(names, rows, "ip")
            return
        for name in GPU_PEERS if names is None else names:
            if name not in built:
                (_, built[name]), *_ = build_peers([name], rows, "ip", device)
            yield name, built[name]

    for batch in size["batches"]:
        for k in size["ks"]:
            yield _case(shape, rows, queries[:batch], k, indexes, truth, peers, device)


def check_memory(shape: str, elements: int, device: str) -> None:
    """Refuse a shape of so many elements that this machine has no room for.

    FP16 rows on the host; where the search is, two indexes of FP16 rows, one with codes, and the
    peers' rows: FP32 of one at a time on the CPU, FP16 of each on a GPU.
    """
    rooms = [("memory", 2 + (2 + 3 + 4 if device == "cpu" else 0), memory_bytes())]
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()  # of the shape before
        free, _all = torch.cuda.mem_get_info(device)
        rooms.append(("GPU memory", 2 + 3 + 2 * len(GPU_PEERS), free))
    for name, width, room in rooms:
        if (needed := width * elements) > room:
            raise ValueError(f"{shape} needs {needed / 2**30:.3g} GiB of {name}")


def _case(
    shape: str,
    rows: np.ndarray,
    queries: np.ndarray,
    k: int,
    indexes: dict[str, Any],
    truth: Truth,
    built: Callable[[Sequence[str] | None], Iterator[tuple[str, Peer | str]]],
    device: str,
) -> Case:
    n, d = rows.shape
    batch = len(queries)
    cuda = device != "cpu"
    q: Any = queries
    if cuda:
        import torch

        q = torch.from_numpy(queries).to(device)
    ours = {scan: lambda index=index: index.search(q, k) for scan, index in indexes.items()}
    plans: dict[str, Any] = {}
    if cuda:
        plans = {scan: index.plan(batch, k) for scan, index in indexes.items()}
        ours = {f"graph {scan}": Graph(partial(plan, q)) for scan, plan in plans.items()} | ours
    before = indexes["auto"].stats

    def judge(result: Any) -> dict[str, Any]:
        ids = result[1] if isinstance(result, tuple) else result
        verdict = truth.judge(ids.cpu().numpy() if hasattr(ids, "cpu") else ids)
        return verdict | {"ok": verdict["exact"]}

    def peers(names: Sequence[str] | None) -> Iterator[tuple[str, Rival | str]]:
        known = CPU_PEERS if device == "cpu" else GPU_PEERS
        if unknown := sorted(set(names or ()) - set(known)):
            raise UnknownNameError(f"--peers must be of {tuple(known)}, got {unknown[0]!r}")
        for name, peer in built(names):
            if isinstance(peer, str):
                yield name, peer
            else:
                ids = partial(peer.search, q, k)
                ways = partial(peer.choices, batch=batch)
                yield name, Rival(partial(peer.call, q, k), ids, ways, capturable=peer.capturable)
                del ids, peer  # before the next one is built: only one is in memory

    def facts() -> dict[str, Any]:
        after = indexes["auto"].stats
        if not after:  # a device counts nothing
            return {"scans": {name: f"{plan.scan}, {plan.kernel}" for name, plan in plans.items()}}
        searched = max(1, after["queries"] - before["queries"])
        rescored = after["rows_rescored"] - before["rows_rescored"]
        return {"rescored_per_query": round(rescored / searched, 1)}

    return Case(
        "topk", shape, f"batch {batch}, k {k}", "fp16", ours, judge, peers,
        bytes=2.0 * n * d, flops=2.0 * n * d * batch, cuda=cuda, graphs=True, facts=facts,
    )  # fmt: skip
