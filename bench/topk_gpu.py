"""Exact top-k on a GPU: time, share of the machine's roofline, and every peer that is installed.

    python bench/topk_gpu.py [--quick] [--out bench/results/NAME.json]

Each row: the answer is checked against a float64 ranking of a shortlist, then timed (CUDA events,
graph replay for knnfast, median of repeats, the L2 cache flushed in between). The roofline uses
this machine's measured copy bandwidth and FP16 matrix rate. Rows that lose stay in. No number of
this file has been taken yet: it has never run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import knnfast


def timed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def machine() -> dict[str, float]:
    """Measured ceilings: copy bandwidth in GB/s, FP16 matrix rate in TFLOP/s."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = timed(lambda: y.copy_(x))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    matmul = timed(lambda: a @ a)
    return {"gb_per_s": 2 * x.numel() / copy / 1e6, "tflop_per_s": 2 * 8192**3 / matmul / 1e9}


def right(x: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> bool:
    """Do `ids` hold the best k by FP64 score? Judged on a shortlist with a wide margin."""
    k = ids.shape[1]
    for m in range(min(4, len(q))):
        rough = torch.cat([q[m] @ part.float().T for part in x.split(1 << 20)])
        short = rough.topk(min(4 * k + 64, len(x))).indices
        exact = x[short].double() @ q[m].double()
        best = exact.sort(descending=True, stable=True).values[:k]
        got = x[ids[m]].double() @ q[m].double()
        if not torch.allclose(got, best, rtol=1e-12, atol=0):
            return False
    return True


def peers(x: torch.Tensor, q: torch.Tensor, k: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Every peer that is installed and takes the shape: name -> call that returns ids."""

    def torch_ids() -> torch.Tensor:
        best = None
        for begin in range(0, len(x), 1 << 20):
            scores, ids = (q.half() @ x[begin : begin + (1 << 20)].T).topk(k)
            ids = ids + begin
            if best is not None:
                scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids], 1)
                scores, at = scores.topk(k)
                ids = ids.gather(1, at)
            best = scores, ids
        return best[1]  # type: ignore[index]

    calls: dict[str, Callable[[], torch.Tensor]] = {"torch fp16": torch_ids}
    try:
        import faiss
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        flat = faiss.GpuIndexFlatIP(resources, x.shape[1], config)
        for part in x.split(1 << 20):
            flat.add(part.float())
        calls["faiss gpu flat fp16"] = lambda: flat.search(q, k)[1]
    except (ImportError, AttributeError) as error:
        print(f"faiss gpu: {error}", file=sys.stderr)
    try:
        from cuvs.neighbors import brute_force

        built = brute_force.build(x, metric="inner_product")
        half = q.half()
        calls["cuvs brute force fp16"] = lambda: torch.as_tensor(
            brute_force.search(built, half, k)[1], device="cuda"
        )
    except ImportError as error:
        print(f"cuvs: {error}", file=sys.stderr)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape per kernel")
    parser.add_argument("--out", help="write the rows to this JSON file")
    args = parser.parse_args()
    ceilings = machine()
    rows: list[dict[str, Any]] = []
    sizes = [200_000] if args.quick else [1_000_000, 10_000_000]
    for n in sizes:
        for dim in [512] if args.quick else [512, 768]:
            generator = torch.Generator("cuda").manual_seed(0)
            x = torch.empty(n, dim, dtype=torch.float16, device="cuda")
            for part in x.split(1 << 20):
                part.copy_(torch.randn(part.shape, device="cuda", generator=generator))
            indexes = {}
            for scan in ("fp16", "int8"):
                indexes[scan] = knnfast.Index(dim, device="cuda", scan=scan)
                indexes[scan].add(x)
            for batch in [1, 64, 256] if args.quick else [1, 16, 128, 1024]:
                q = torch.randn(batch, dim, device="cuda", generator=generator)
                for k in [10, 100]:
                    for scan, index in indexes.items():
                        plan = index.plan(batch, k)
                        ids = plan(q)[1].clone()
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            plan(q)
                        rows.append(
                            row(f"knnfast {scan}", x, q, k, timed(graph.replay), ids, ceilings)
                            | {"kernel": plan.kernel}
                        )
                        print(json.dumps(rows[-1]), flush=True)
                    for name, call in peers(x, q, k).items():
                        rows.append(row(name, x, q, k, timed(call, 7), call(), ceilings))
                        print(json.dumps(rows[-1]), flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "host": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "knnfast": knnfast.__version__,
        **ceilings,
        "rows": rows,
    }
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


def row(
    name: str,
    x: torch.Tensor,
    q: torch.Tensor,
    k: int,
    ms: float,
    ids: torch.Tensor,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """One line of the table; the floor is max(FP16 bytes / bandwidth, operations / rate)."""
    n, dim = x.shape
    floor = max(
        2e-6 * n * dim / ceilings["gb_per_s"], 2e-9 * n * dim * len(q) / ceilings["tflop_per_s"]
    )
    return {
        "name": name, "n": n, "dim": dim, "batch": len(q), "k": k, "ms": round(ms, 4),
        "fp16_roofline_share": round(floor / ms, 3), "right": right(x, q, ids),
    }  # fmt: skip


if __name__ == "__main__":
    main()
