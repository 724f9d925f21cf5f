"""What machine it is, and what it can do at most: measured, before anything is compared with it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from knnfast import _C
from knnfast.benchmark.timing import Local, interleave

# Variables that hold a library to other kernels or fewer threads than it would choose here.
KERNEL_SETTINGS = (
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR",
    "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "FAISS_SIMD_LEVEL", "NPY_DISABLE_CPU_FEATURES",
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "KNNFAST_ISA",
)  # fmt: skip
PEERS_ON_GPU = ("faiss-gpu", "faiss-gpu-cu12", "cuvs-cu12", "cuvs-cu13", "flashlib", "xformers")
PACKAGES = ("numpy", "torch", "triton", "faiss-cpu", "usearch", "diffusers", *PEERS_ON_GPU)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, kernels in use, versions, commit and date; no name of the host.

    `settings` holds those of `KERNEL_SETTINGS` that are set: FAISS under OPENBLAS_CORETYPE, say, is
    not the FAISS that a user has. `blas` holds the kernels that the loaded BLAS libraries chose
    (with the package threadpoolctl).
    """
    about: dict[str, Any] = {
        "cpu": processor(), "cores": os.cpu_count(), "isa": _C.isa(), "threads": _C.num_threads(),
        "memory_gib": round(memory_bytes() / 2**30), "device": device,
        "settings": {name: os.environ[name] for name in KERNEL_SETTINGS if name in os.environ},
        "blas": _blas(),
    }  # fmt: skip
    if device != "cpu":
        import torch

        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = properties.name
        about["gpu_memory_gib"] = round(properties.total_memory / 2**30)
        about["cuda"] = torch.version.cuda
        about |= _driver()
    versions = {"python": platform.python_version()}
    for package in ("knnfast", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    from knnfast import __version__

    versions["knnfast"] = __version__
    return about | {"versions": versions, "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def processor() -> str:
    """The processor's name, and on x86 its family and model: some hosts hide the rest."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    pairs = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    first = {key.strip(): value.strip() for key, value in pairs}
    name = first.get("model name", platform.machine())
    if "cpu family" not in first:
        return name
    return f"{name} (family {first['cpu family']} model {first['model']})"


def stolen_seconds() -> float:
    """Core seconds that the host of this virtual machine gave to others so far; 0 elsewhere."""
    file = Path("/proc/stat")
    if not file.is_file():
        return 0.0
    return int(file.read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def commit() -> str | None:
    """Commit of the checkout that the package lies in, `-dirty` when its code was changed.

    In a wheel, or a copy without its history: what the variable KNNFAST_COMMIT holds, or None.
    """
    root = Path(__file__).resolve().parents[2]
    given = os.environ.get("KNNFAST_COMMIT")
    if not (root / ".git").exists() or not (root / "CMakeLists.txt").is_file():
        return given

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)

    try:
        name = git("rev-parse", "--short", "HEAD")
        # Results and the pages made of them, which a measurement changes, are no code.
        code = (".", ":!bench/results", ":!docs", ":!*.md")
        same = git("diff", "--quiet", "HEAD", "--", *code)
    except OSError:
        return given
    if name.returncode:
        return given
    return name.stdout.strip() + ("" if same.returncode == 0 else "-dirty")


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fastest_read(block: np.ndarray) -> Callable[[], Any]:
    """A call that reads all of an array once, in as many streams side by side as is fastest."""
    calls = {n: partial(_C.read_bytes, block, n) for n in (1, 2, 4)}
    timings = interleave({str(n): Local(call) for n, call in calls.items()}, turns=3)
    return min(calls.items(), key=lambda item: timings[str(item[0])].percentile(20))[1]


def ceilings(device: str = "cpu", scale: int = 1) -> dict[str, float]:
    """What no kernel can beat on this machine, each the best of several runs.

    Args:
        scale: divides the sizes that are used (256 MiB and 2048 x 2048 on the CPU).
    Returns: `read_gb_s` (reading memory once; on a GPU the copy's rate where that is higher),
        `copy_gb_s` (bytes read plus bytes written), `matmul_tflop_s` (FP32 on the CPU, FP16 on a
        GPU, 2 operations a multiply-add), on the CPU that of numpy's BLAS or torch's, whichever is
        faster, and `torch_matmul_tflop_s`.
    """
    import torch

    if device == "cpu":
        block = np.ones((256 << 20) // scale, np.uint8)
        source = torch.from_numpy(block)
        size, kind = 2048 // scale, torch.float32
        reads: Callable[[], Any] = fastest_read(block)
    else:
        source = torch.ones((2 << 30) // scale, dtype=torch.uint8, device=device)
        size, kind = 8192 // scale, torch.float16
        words = source.view(torch.int64)
        reads = words.max
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device).to(kind)
    out = torch.empty_like(a)
    cuda = device != "cpu"
    calls: dict[str, Callable[[], Any]] = {
        "read": reads,
        "copy": lambda: target.copy_(source),
        "torch": lambda: torch.matmul(a, a, out=out),
    }
    if not cuda and torch.get_num_threads() == os.cpu_count():  # numpy's BLAS takes all cores
        x, product = a.numpy(), out.numpy()
        calls["numpy"] = lambda: np.matmul(x, x, out=product)
    timings = interleave({name: Local(call, cuda) for name, call in calls.items()}, turns=5)
    best = {name: float(timing.calls.min()) for name, timing in timings.items()}
    matmul = min(best[name] for name in ("torch", "numpy") if name in best)
    limits = {
        "read_gb_s": round(source.nbytes / best["read"] / 1e6, 2),
        "copy_gb_s": round(2 * source.nbytes / best["copy"] / 1e6, 2),
        "matmul_tflop_s": round(2 * size**3 / matmul / 1e9, 4),
    }
    if cuda:  # the reduction that reads may be slower than the memory
        limits["read_gb_s"] = max(limits["read_gb_s"], limits["copy_gb_s"])
    else:
        limits["torch_matmul_tflop_s"] = round(2 * size**3 / best["torch"] / 1e9, 4)
    return limits


def floors_ms(nbytes: Any, flops: Any, limits: dict[str, float]) -> tuple[Any, Any]:
    """Milliseconds of reading so many bytes, and of so many operations, at the measured rates."""
    return nbytes / limits["read_gb_s"] / 1e6, flops / limits["matmul_tflop_s"] / 1e9


def share(
    nbytes: float, flops: float, milliseconds: float, limits: dict[str, float]
) -> dict[str, float | str]:
    """GB/s or TFLOP/s, whichever binds, and its share of the measured ceiling.

    The floor is max(bytes / read bandwidth, operations / matmul rate); the share is floor / time.
    """
    reading, working = floors_ms(nbytes, flops, limits)
    row: dict[str, float | str] = {"bytes": nbytes, "flops": flops}
    if reading >= working:
        row |= {"bound": "read", "gb_s": nbytes / milliseconds / 1e6}
    else:
        row |= {"bound": "matmul", "tflop_s": flops / milliseconds / 1e9}
    return row | {"ceiling_share": max(reading, working) / milliseconds}


def _blas() -> list[str]:
    """Name, version and kernels of each BLAS that numpy, FAISS and torch brought along."""
    with contextlib.suppress(ImportError):
        import faiss  # noqa: F401
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    names = ("internal_api", "version", "architecture")
    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return sorted(" ".join(str(pool[n]) for n in names if pool.get(n)) for pool in found)


def _driver() -> dict[str, str]:
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.splitlines()[0].split(", ")  # fmt: skip
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(("driver", "clock_sm", "clock_memory"), found, strict=True))
