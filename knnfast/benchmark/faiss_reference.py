"""`faiss_reference`: the reader's own shape against FAISS, on the reader's machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnfast import _C, _files
from knnfast.benchmark.machine import ceilings, machine, share
from knnfast.benchmark.timing import Local, Timing, best_choice, interleave, ratio
from knnfast.benchmark.topk import (
    CPU_PEERS,
    GPU_PEERS,
    Peer,
    Truth,
    build_peers,
    faiss_module,
    make_rows,
    threads_for_all,
)
from knnfast.search import Index

OURS = "knnfast"


@dataclass
class FaissReport:
    """What `faiss_reference` measured.

    `rows` holds one dict for each contender, n and batch: p50_ms, p90_ms, p99_ms, runs, threads,
    options (BLAS), exact, recall, regret, ratio (their time over ours; above 1 ours is faster),
    ceiling_share.
    `skipped` says which peers were not measured, and why.
    """

    machine: dict[str, Any]
    ceilings: dict[str, float]
    shape: dict[str, Any]
    rows: list[dict[str, Any]]
    skipped: dict[str, str]

    def table(self) -> str:
        """The comparison as text, one line a row."""
        shape, limits = self.shape, self.ceilings
        about = self.machine
        where = about.get("gpu", about["cpu"])
        head = ("", "rows", "batch", "p50 ms", "p90 ms", "p99 ms", "threads", "answers", "vs ours",
                "of ceiling")  # fmt: skip
        lines = [head]
        for row in self.rows:
            answers = "exact" if row["exact"] else f"recall {row['recall']:.4f}"
            lines.append(
                (row["name"], f"{row['n']:,}", str(row["batch"]),
                 *(f"{row[f'p{p}_ms']:.4g}" for p in (50, 90, 99)),
                 way(row), answers,
                 "" if row["name"] == OURS else f"{row['ratio']:.2f}x",
                 f"{row['ceiling_share']:.0%}")
            )  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            f"d {shape['d']}, k {shape['k']}, {shape['metric']}, {where}, "
            f"{about['threads']} threads, {about['isa']}, {about['date']}",
            f"measured ceilings: read {limits['read_gb_s']:.4g} GB/s, copy "
            f"{limits['copy_gb_s']:.4g} GB/s, matmul {limits['matmul_tflop_s']:.4g} TFLOP/s",
            "",
        ]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join(cells).rstrip())
        text += [
            "",
            "of ceiling: time of reading the FP16 rows once (or of the matmul) over the time,",
            "above 100 % where fewer bytes are read; vs ours: the median over the turns, above 1x "
            "knnfast is faster",
        ]
        text += [f"not measured: {name} ({why})" for name, why in self.skipped.items()]
        text += [
            f"{name}={value} is set: libraries that read it may run slower than on this processor"
            for name, value in about.get("settings", {}).items()
        ]
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": "faiss_reference",
            "machine": self.machine,
            "ceilings": self.ceilings,
            "shape": self.shape,
            "rows": self.rows,
            "skipped": self.skipped,
        }

    def save_json(self, path: str | Path) -> None:
        """Write `to_dict()`, atomically."""
        _files.write_json(Path(path), self.to_dict())

    def save_plot(self, path: str | Path) -> None:
        """Write the plot: latency against batch and against n, log-log, with the roofline.

        Raises: ImportError naming the extra when matplotlib is missing.
        """
        from knnfast.benchmark.plot import save_plot

        save_plot(self, Path(path))


def faiss_reference(
    n: int = 1_000_000,
    d: int = 512,
    batch: Sequence[int] = (1, 16, 64),
    k: int = 10,
    *,
    metric: str = "ip",
    device: str = "cpu",
    threads: int | None = None,
    peers: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    queries: np.ndarray | None = None,
    seconds: float = 85.0,
    progress: Callable[[str], None] | None = None,
) -> FaissReport:
    """Measure `Index.search` beside FAISS and whatever other peer is installed.

    The machine's ceilings come first and last. A sample of the answers is judged in FP64 before any
    is timed, and every peer takes turns with ours in the way that is fastest here: with one thread
    or all, FAISS for few queries also over as many shards as threads, its flat index with BLAS or
    its own loops (above batch 32: BLAS), torch over all rows at once or by blocks. Latency against
    batch is taken at n rows; against the number of rows (n / 100, n / 10, n) at the first batch.

    Args:
        n, d: rows and their elements.
        batch: numbers of queries in one call.
        k: neighbours, 1 <= k <= n.
        metric: ip or l2 (cosine: normalise and use ip; FAISS has none).
        device: "cpu", or "cuda" for `Index(device="cuda")` beside GPU libraries.
        threads: at most so many for everybody; the machine's when None.
        peers: names (see `CPU_PEERS`, `GPU_PEERS`); all when None.
        rows: your own, [n, d] fp16 or fp32; random directions when None.
        queries: your own, [at least max(batch), d] fp32; required with rows.
        seconds: about how long it may take, > 0; what does not fit is skipped and listed.
        progress: called with a line of text before each step.
    Returns: FaissReport with `table()`, `save_plot(path)`, `save_json(path)`, `rows`.
    Raises: ValueError range or shape; ImportError without FAISS (extra `faiss`).
    Example: >>> print(knnfast.faiss_reference(n=100_000, d=256, batch=(1, 8)).table())
    """
    say = progress or (lambda _: None)
    if rows is not None:
        n, d = _checked(rows, queries, max(batch, default=0))
    check_arguments(n, d, batch, k, metric, device, threads, peers, seconds)
    known = CPU_PEERS if device == "cpu" else GPU_PEERS
    if device == "cpu" and (peers is None or any("faiss" in name for name in peers)):
        faiss_module()
    with threads_for_all(threads):
        chosen = list(known if peers is None else peers)
        return _measure(n, d, batch, k, metric, device, chosen, rows, queries, seconds, say)


@dataclass(frozen=True)
class _Ours:
    """What a peer is measured beside: rows and queries, our calls by size and batch, the truth."""

    rows: np.ndarray
    queries: np.ndarray
    k: int
    metric: str
    device: str
    calls: dict[tuple[int, int], Callable[[], Any]]
    truths: dict[int, Truth]


def _measure_peer(
    name: str, ours: _Ours, end: float, seconds: float, peers: int, say: Callable[[str], None]
) -> tuple[dict[tuple[int, int], tuple[Timing, Timing, dict[str, Any]]], str]:
    """Our time, the peer's and its verdict, by size and batch; and why the rest was not measured.

    Args:
        end: when the `seconds` of the whole run are over.
        peers: so many share what is left of them.
    """
    measured: dict[tuple[int, int], tuple[Timing, Timing, dict[str, Any]]] = {}
    built, peer, call = 0, None, None
    row_s = 0.0  # seconds for a query and a row in the cell before; larger ones take no more
    for size, b in ours.calls:
        where = f"from {size:,} rows, batch {b} on"
        if time.perf_counter() + 16 * row_s * size * b > end:  # 16: calls of a cell, about
            return measured, f"{where}: {seconds:.0f} s are too few"
        if size != built:
            say(f"{name}: {size:,} rows")
            peer = call = None  # only one is in memory
            (_, peer), *_ = build_peers([name], ours.rows[:size], ours.metric, ours.device)
            built = size
        if not isinstance(peer, Peer):
            return measured, str(peer)
        left = (end - time.perf_counter()) / peers / 2
        try:
            q = _on(ours.queries[:b], ours.device)
            call = _bound(peer, q, ours.k)
            fastest = best_choice(peer.choices(_C.num_threads(), b), call)
            verdict = ours.truths[size].judge(peer.search(q, ours.k))
            on_gpu = ours.device != "cpu"
            pair = interleave(
                {OURS: Local(ours.calls[size, b], on_gpu), name: Local(call, on_gpu)},
                budget=max(left, 0.0),
            )
        except Exception as error:  # a library may raise anything; the others are measured
            return measured, f"{where}: {type(error).__name__}: {error}"
        measured[size, b] = pair[OURS], pair[name], fastest | verdict
        row_s = pair[name].percentile(50) / 1e3 / b / size
    return measured, ""


def _measure(
    n: int,
    d: int,
    batch: Sequence[int],
    k: int,
    metric: str,
    device: str,
    chosen: list[str],
    rows: Any,
    queries: Any,
    seconds: float,
    say: Callable[[str], None],
) -> FaissReport:
    """What `faiss_reference` does once its arguments are checked."""
    start = time.perf_counter()
    about = machine(device)
    say("measuring what this machine can do")
    limits = ceilings(device)
    say(f"making {n:,} x {d} rows")
    if rows is None:
        rows, queries = make_rows(n, d, queries=max(batch))
    half = np.ascontiguousarray(rows, np.float16)
    queries = np.ascontiguousarray(queries, np.float32)
    sizes = sorted({max(k, n // 100), max(k, n // 10), n})
    cells = [(size, b) for size in sizes for b in (batch if size == n else batch[:1])]
    indexes, truths = {}, {}
    for size in sizes:
        say(f"indexing {size:,} rows")
        indexes[size] = Index(d, metric=metric, device=device)
        indexes[size].add(half[:size])
        truths[size] = Truth(half[:size], queries, k, metric, device=device)
    ours = {
        (size, b): _search(indexes[size], _on(queries[:b], device), k, device) for size, b in cells
    }
    verdicts = {cell: truths[cell[0]].judge(_host(call()[1])) for cell, call in ours.items()}
    timings: dict[tuple[int, int], list[Timing]] = {cell: [] for cell in cells}
    found: list[tuple[str, tuple[int, int], Timing, dict[str, Any]]] = []
    skipped: dict[str, str] = {}
    beside = _Ours(half, queries, k, metric, device, ours, truths)
    for done, name in enumerate(chosen):
        measured, why = _measure_peer(
            name, beside, start + seconds, seconds, max(1, len(chosen) - done), say
        )
        for cell, (us, them, verdict) in measured.items():
            timings[cell].append(us)
            verdict["ratio"] = ratio(them, us)
            found.append((name, cell, them, verdict))
        if why:
            skipped[name] = why
    # What else ran beside the first measurement of the ceilings need not run now.
    limits = {name: max(rate, limits[name]) for name, rate in ceilings(device).items()}
    report = []
    for cell in cells:
        if not timings[cell]:
            timings[cell] = [interleave({OURS: Local(ours[cell], device != "cpu")})[OURS]]
        every = Timing(*(np.concatenate([getattr(t, part) for t in timings[cell]])
                         for part in ("calls", "turns")))  # fmt: skip
        mine = _row(OURS, *cell, every, limits, d) | verdicts[cell] | {"threads": _C.num_threads()}
        report.append(mine)
        report += [
            _row(name, *cell, them, limits, d) | verdict
            for name, at, them, verdict in found if at == cell
        ]  # fmt: skip
    shape = {"n": n, "d": d, "batch": list(batch), "k": k, "metric": metric}
    return FaissReport(about, limits, shape, report, skipped)


def way(row: dict[str, Any]) -> str:
    """How a row's contender ran: its options and threads."""
    return " ".join(str(row[part]) for part in ("options", "threads") if part in row)


def _row(
    name: str, n: int, batch: int, timing: Timing, limits: dict[str, float], d: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "n": n, "batch": batch, **timing.row()}
    return row | share(2.0 * n * d, 2.0 * n * d * batch, timing.percentile(50), limits)


def _search(index: Any, q: Any, k: int, device: str) -> Callable[[], Any]:
    if device == "cpu":
        return lambda: index.search(q, k)
    plan = index.plan(len(q), k)
    return lambda: plan(q)


def _bound(peer: Peer, q: Any, k: int) -> Callable[[], Any]:
    return lambda: peer.call(q, k)


def _on(q: np.ndarray, device: str) -> Any:
    if device == "cpu":
        return q
    import torch

    return torch.from_numpy(q).to(device)


def _host(ids: Any) -> np.ndarray:
    return ids.cpu().numpy() if hasattr(ids, "cpu") else ids


def _checked(rows: Any, queries: Any, batch: int) -> tuple[int, int]:
    if getattr(rows, "ndim", 0) != 2:
        raise ValueError(f"rows must have shape [n, d], got {getattr(rows, 'shape', rows)!r}")
    if getattr(queries, "ndim", 0) != 2 or queries.shape[1] != rows.shape[1]:
        shape = getattr(queries, "shape", queries)
        raise ValueError(
            f"queries must have shape [at least {batch}, {rows.shape[1]}], got {shape!r}"
        )
    if len(queries) < batch:
        raise ValueError(f"queries must be at least max(batch) = {batch}, got {len(queries)}")
    return rows.shape


def check_arguments(
    n: int,
    d: int,
    batch: Sequence[int],
    k: int,
    metric: str,
    device: str,
    threads: int | None,
    peers: Sequence[str] | None,
    seconds: float,
) -> None:
    """Refuse what `faiss_reference` cannot measure."""
    if not batch or min(batch) < 1:
        raise ValueError(f"batch must hold numbers of at least 1, got {list(batch)}")
    if n < 1 or d < 1:
        raise ValueError(f"n and d must be at least 1, got {n} and {d}")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}")
    if metric not in ("ip", "l2"):
        raise ValueError(f"metric must be ip or l2, got {metric!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a finite number above 0, got {seconds}")
    Index(1, device=device)  # raises for a device that there is not
    known = CPU_PEERS if device == "cpu" else GPU_PEERS
    for name in peers or ():
        if name not in known:
            raise ValueError(f"peers must be of {tuple(known)}, got {name!r}")
