"""Where the time of a CUDA search goes: each kernel's own, as torch's profiler sees it.

    python bench/kernels.py [--shape gpu-1m-512] [--json out/kernels.json]

Rows are isotropic and made on the GPU; both scans are forced in turn. bench/run.py times whole
searches and checks their answers; a profiler would slow those down, so this is a run of its own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shapes import SHAPES

from knnfast import _files
from knnfast.benchmark.machine import machine
from knnfast.search import Index

CALLS = 5
SCANS = ("topk_scan", "topk_tiled", "sm90_topk")  # the kernels of the three scans
USUAL = [name for name in SHAPES["topk"] if name.startswith("gpu-")]


def by_kernel(events: Iterable[Any], calls: int) -> dict[str, float]:
    """Milliseconds of one call in each of our kernels, from a profiler's averages."""
    found: dict[str, float] = {}
    for event in events:
        if name := re.search(r"\bknnfast::.*?\b(\w+)_kernel\b", event.key):
            part = "scan" if name[1] in SCANS else name[1].removeprefix("topk_")
            found[part] = found.get(part, 0.0) + event.self_device_time_total / 1e3 / calls
    return found


def profiled(call: Callable[[], Any]) -> dict[str, float]:
    """What `by_kernel` says of a call that has run before.

    Raises: RuntimeError where the profiler sees no kernels (it may need permissions).
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    if not (found := by_kernel(profiler.key_averages(), CALLS)):
        raise RuntimeError("torch's profiler saw no kernel of ours")
    return found


def measure(shape: str) -> Iterator[dict[str, Any]]:
    """One row for each batch, k and scan of a shape."""
    import torch

    size = SHAPES["topk"][shape]
    d = size["d"]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(n: int) -> Any:
        x = torch.randn(n, d, device="cuda", generator=generator)
        return x / x.norm(dim=1, keepdim=True)

    queries = draw(max(size["batches"]))
    for scan in ("fp16", "int8"):
        index = Index(d, device="cuda", scan=scan)
        for first in range(0, size["n"], 500_000):
            index.add(draw(min(500_000, size["n"] - first)).half())
        for batch in size["batches"]:
            for k in size["ks"]:
                plan, q = index.plan(batch, k), queries[:batch]
                plan(q)
                row = {"shape": shape, "batch": batch, "k": k, "scan": scan, "kernel": plan.kernel}
                yield row | {"ms": profiled(lambda plan=plan, q=q: plan(q))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES["topk"], help="repeatable")
    parser.add_argument("--json", type=Path, help="file to write, kept up to date row by row")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in args.shape or USUAL:
        for row in measure(shape):
            rows.append(row)
            times = ", ".join(f"{part} {ms:.4g}" for part, ms in row["ms"].items())
            print(f"{shape} batch {row['batch']}, k {row['k']} {row['scan']} "
                  f"({row['kernel']}): {times} ms", flush=True)  # fmt: skip
            if args.json:
                _files.write_json(args.json, {"machine": machine("cuda"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
