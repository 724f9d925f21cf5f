"""Measures an op against its peers, each answer checked: `python bench/run.py --op topk`.

A row holds the time, the time of merely reading the FP16 bytes, and every peer at its best thread
count of those tried. The result goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapes
from timing import machine, measure

from knnfast import _C
from knnfast.search import Index


def make_rows(n: int, d: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """FP16 rows and 256 FP32 queries of the same kind, made in pieces."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, d), dtype=np.float32)
    mean = rng.standard_normal(d, dtype=np.float32)

    def draw(m: int) -> np.ndarray:
        x = rng.standard_normal((m, d), dtype=np.float32)
        if kind == "ties":
            return np.repeat(centres[:1] / np.linalg.norm(centres[0]), m, 0)
        if kind == "clustered":
            x = centres[rng.integers(0, 1000, m)] + 0.5 * x
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x + 3 * mean / np.linalg.norm(mean) if kind == "mean" else x

    rows = np.empty((n, d), np.float16)
    for first in range(0, n, 65536):
        rows[first : first + 65536] = draw(min(65536, n - first))
    q = rng.standard_normal((256, d), dtype=np.float32) if kind == "mean" else draw(256)
    return rows, q


def peers(rows: np.ndarray, batch: int, k: int) -> Any:
    """Yields (name, search, set_threads) one at a time, so that only one is in memory."""
    n, d = rows.shape
    try:
        import faiss

        flat = faiss.IndexFlatIP(d)
        half = faiss.IndexScalarQuantizer(
            d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        half.is_trained = True
        for name, index in (("faiss-flat", flat), ("faiss-sqfp16", half)):
            if name == "faiss-sqfp16" and batch > 8:
                continue
            for first in range(0, n, 65536):
                index.add(rows[first : first + 65536].astype(np.float32))
            yield name, lambda q, index=index: index.search(q, k)[1], faiss.omp_set_num_threads
            index.reset()
    except ImportError:
        print("faiss is not installed")
    try:
        import torch

        x = torch.from_numpy(rows).float()
        if batch > 1 or n < 1_000_000:
            yield (
                "torch",
                lambda q, x=x: (torch.from_numpy(q) @ x.T).topk(k, dim=1).indices.numpy(),
                torch.set_num_threads,
            )
        del x
    except ImportError:
        print("torch is not installed")
    if batch == 1:
        try:
            from usearch.index import MetricKind, search

            threads = [1]
            yield (
                "usearch-exact",
                lambda q: search(
                    rows, q.astype(np.float16), k, MetricKind.IP, exact=True, threads=threads[0]
                ).keys.reshape(len(q), -1),
                lambda t: threads.__setitem__(0, t),
            )
        except ImportError:
            print("usearch is not installed")


def agree(rows: np.ndarray, q: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest amount by which their k-th best score exceeds ours, in FP64."""
    worst = -np.inf
    for i in range(len(q)):
        scores = [
            rows[ids].astype(np.float64) @ q[i].astype(np.float64) for ids in (ours[i], theirs[i])
        ]
        worst = max(worst, float(scores[1].min() - scores[0].min()))
    return worst


def topk(names: list[str], with_peers: bool) -> Iterator[dict[str, Any]]:
    """All rows of the named shapes, as they are measured."""
    threads = _C.num_threads()
    for name in names:
        n, d, batches, ks, kind = shapes.TOPK[name]
        rows, queries = make_rows(n, d, kind)
        index, plain = Index(d), Index(d, scan="fp16")
        index.add(rows)
        plain.add(rows)
        floor = measure(lambda: _C.read_bytes(rows))["p50_ms"]  # noqa: B023
        for batch in batches:
            for k in ks:
                q = queries[:batch]
                before = index.stats
                row: dict[str, Any] = {"op": "topk", "shape": name, "batch": batch, "k": k}
                row |= measure(lambda: index.search(q, k))  # noqa: B023
                after = index.stats
                searched = after["queries"] - before["queries"]
                row["rescored_per_query"] = round(
                    (after["rows_rescored"] - before["rows_rescored"]) / searched, 1
                )
                row["read_fp16_ms"] = floor
                ours = index.search(q, k)[1]
                if batch <= 8:
                    row["fp16_scan_ms"] = measure(lambda: plain.search(q, k), 0.3, 3)["p50_ms"]  # noqa: B023
                    assert (plain.search(q, k)[1] == ours).all()
                row["peers"] = {}
                if with_peers and k == ks[0]:
                    for peer, search, set_threads in peers(rows, batch, k):
                        best: dict[str, Any] = {}
                        for t in sorted({1, threads}):
                            set_threads(t)
                            ms = measure(lambda: search(q), 0.2, 2)["p50_ms"]  # noqa: B023
                            if not best or ms < best["p50_ms"]:
                                best = {"p50_ms": ms, "threads": t}
                        best["regret"] = agree(rows, q, ours, search(q)) if kind != "ties" else 0.0
                        assert best["regret"] < 1e-3, (peer, best)
                        row["peers"][peer] = best
                times = {"p99": row["p99_ms"], "read": floor, "fp16": row.get("fp16_scan_ms", 0)}
                times |= {name: peer["p50_ms"] for name, peer in row["peers"].items()}
                shown = ", ".join(f"{key} {ms:.2f}" for key, ms in times.items())
                print(f"{name} batch {batch} k {k}: {row['p50_ms']:.2f} ms ({shown})", flush=True)
                yield row


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", default="topk", choices=["topk"])
    parser.add_argument("--shape", action="append", choices=list(shapes.TOPK))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = machine()
    path = args.json
    if path is None:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"{args.op}-{about['isa']}-{about['date']}.json"
    rows = []
    for row in topk(args.shape or list(shapes.TOPK), not args.no_peers):
        rows.append(row)
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
