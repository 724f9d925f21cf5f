"""Command lines for Nsight Systems and Nsight Compute, and a torch profiler trace: `make profile`.

    python bench/nsight.py [--out out/profile] [--device cpu|cuda] [--run]

Prints the command lines for this machine, with the reason where a tool or a GPU is absent; `--run`
runs those that can. A trace of torch's profiler (chrome://tracing or Perfetto reads it) is always
written: it shows the same phases without Nsight. docs/profiling.md says how to read all of them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One short program for every tool: two calls, so that the first can be the warm-up.
PROGRAM = """
import sys
from knnfast import KNNDiffusion
pipe = KNNDiffusion.from_pretrained("stickers", device=sys.argv[1])
for seed in range(2):
    pipe("a red heart", num_images=4, seed=seed)
"""


def commands(out: Path, device: str) -> dict[str, list[str]]:
    """Nsys over the pipeline and over a top-k row; ncu over the search and the fused kernels."""
    program = [sys.executable, "-c", PROGRAM, device]
    rows = [sys.executable, "bench/run.py", "--op", "topk", "--shape", "service-100k", "--peers",
            "none", "--turns", "3", "--device", device]  # fmt: skip
    nsys = ["nsys", "profile", "--trace", "cuda,nvtx,osrt", "--force-overwrite", "true"]
    # With the clocks as they are, as bench/run.py measures; ncu would set the whole machine's.
    ncu = ["ncu", "--set", "full", "--clock-control", "none", "--launch-skip", "20",
           "--launch-count", "10", "--force-overwrite"]  # fmt: skip
    fused = "regex:(neighbour_attention|sample_head|transition)"
    return {
        "nsys, generation": [*nsys, "--output", str(out / "generate"), *program],
        "nsys, top-k": [*nsys, "--output", str(out / "topk"), *rows],
        "ncu, top-k kernels": [
            *ncu, "--kernel-name", "regex:topk_", "--export", str(out / "topk"), *rows,
        ],
        "ncu, fused kernels": [
            *ncu, "--kernel-name", fused, "--export", str(out / "fused"), *program,
        ],
    }  # fmt: skip


def why_not(tool: str, device: str) -> str | None:
    """Why a tool cannot run here."""
    if shutil.which(tool) is None:
        return f"{tool} is not on PATH (it comes with the CUDA toolkit)"
    if device == "cpu" and tool == "ncu":
        return "ncu measures GPU kernels: --device cuda"
    return None


def trace(path: Path, device: str) -> None:
    """Generate once under torch's profiler and export the trace."""
    import torch

    from knnfast import KNNDiffusion

    pipe = KNNDiffusion.from_pretrained("stickers", device=device)
    pipe("a red heart", steps=2, seed=0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        pipe("a red heart", seed=0)
    profiler.export_chrome_trace(str(path))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "profile")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where torch sees one")
    parser.add_argument("--run", action="store_true", help="run what can run")
    args = parser.parse_args()
    device = args.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    code = 0
    for name, words in commands(args.out, device).items():
        reason = why_not(words[0], device)
        print(f"# {name}" + (f": cannot run here, {reason}" if reason else ""))
        print(shlex.join(words) + "\n", flush=True)
        if args.run and reason is None:
            code |= subprocess.run(words, cwd=ROOT, check=False).returncode
    path = args.out / "trace.json"
    trace(path, device)
    print(f"# torch profiler: {path}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
