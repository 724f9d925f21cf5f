"""Timing: warm up, repeat, report percentiles; and what machine it was."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def measure(call: Callable[[], Any], seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Milliseconds of `call`: p20, p50 and p80 of at least `least` runs over about `seconds`."""
    call()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < 10_000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p20, p50, p80, p99 = np.percentile(np.array(times) * 1e3, [20, 50, 80, 99])
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "p99_ms": p99, "runs": len(times)}


def machine() -> dict[str, Any]:
    """Processor, cores, kernels in use, versions, commit and date."""
    from knnfast import _C, __version__

    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((row.split(":")[1].strip() for row in f if "model name" in row), name)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": name, "cores": os.cpu_count(), "isa": _C.isa(), "threads": _C.num_threads(),
        "python": platform.python_version(), "numpy": np.__version__, "knnfast": __version__,
        "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
