"""What a machine with a GPU can do for this project: `make gpu`.

    python bench/gpu.py [--out out/gpu] [--train] [--only STAGE ...]

Stages: build for the machine's architecture; the tests marked `gpu`; compute-sanitizer on the
search kernels; every benchmark with whichever peers import; training of the sticker models when it
is asked for. Each has a time limit, is skipped with a reason where it cannot run, and the script
goes on; all of it lands in one folder of small files, `summary.json` first. Exit code 1 when a
stage failed, 0 when all passed or were skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LOG_LIMIT = 256 << 10  # bytes kept of a stage's output: its end


def no_gpu() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch does not import: {error}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def no_nvcc() -> str | None:
    compiler = os.environ.get("CUDACXX", "nvcc")
    cuda = Path("/usr/local/cuda/bin/nvcc")
    if shutil.which(compiler) is None and not cuda.is_file():
        return "nvcc is not on PATH (and CUDACXX names none)"
    return None


def no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH"
    return None


def no_stickers() -> str | None:
    for name in ("stickers.json", "tokenizer", "encoder"):
        if not (ROOT / "out" / "stickers" / name).exists():
            return f"out/stickers/{name} is missing: run the steps of examples/stickers/README.md"
    return None


@dataclass
class Stage:
    """One step of the script.

    Args:
        command: run in the repository's root; `{out}` is the folder of results.
        limit: seconds after which it is stopped, with everything it started.
        needs: checks that return why it cannot run.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[Callable[[], str | None], ...] = ()
    environment: dict[str, str] | None = None

    def run(self, out: Path) -> dict[str, Any]:
        """Run or skip; the result says which, for how long and why."""
        for check in self.needs:
            if reason := check():
                return {"stage": self.name, "result": "skipped", "reason": reason}
        words = [word.format(out=out) for word in self.command]
        log = out / f"{self.name}.log"
        start = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | (self.environment or {}),
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=self.limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        text = log.read_bytes()
        if len(text) > LOG_LIMIT:
            log.write_bytes(b"[the beginning is left out]\n" + text[-LOG_LIMIT:])
        row: dict[str, Any] = {"stage": self.name, "seconds": round(time.perf_counter() - start, 1)}
        if code is None:
            return row | {"result": "stopped", "reason": f"longer than its {self.limit:.0f} s"}
        return row | ({"result": "passed"} if code == 0 else {"result": "failed", "code": code})


def stages(train: bool, scale: float) -> list[Stage]:
    """All stages; `scale` multiplies their time limits."""

    def pytest(*words: str) -> list[str]:
        return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]

    every = [
        Stage("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 600,
              (no_gpu, no_nvcc), {"KNNFAST_CUDA": "ON"}),
        Stage("tests", pytest("-m", "gpu"), 900, (no_gpu,)),
        Stage("tests-index", pytest("tests/test_cuda_index.py", "tests/test_cuda_build.py"), 600,
              (no_gpu,)),
        Stage("sanitizer", ["sh", "tests/cuda_sanitize.sh"], 900, (no_gpu, no_sanitizer),
              {"PYTHON": PYTHON}),
        *(
            Stage(f"bench-{op}", [PYTHON, "bench/run.py", "--op", op, "--device", "cuda",
                                  "--json", f"{{out}}/{op}.json"], 600, (no_gpu,))
            for op in SHAPES
        ),
        Stage("bench-faiss-reference",
              [PYTHON, "-c", "from knnfast.cli import main; main()", "bench", "--device", "cuda",
               "--plot", "{out}/bench.png"], 300, (no_gpu,)),
    ]  # fmt: skip
    if train:
        every.append(
            Stage("train", [PYTHON, "examples/stickers/train_denoiser.py",
                            "--bundle", "{out}/denoiser"], 7200, (no_gpu, no_stickers))
        )  # fmt: skip
    for stage in every:
        stage.limit *= scale
    return every


def device() -> dict[str, Any]:
    """What the results were taken on."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,compute_cap"
    try:
        found = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True,
                               text=True, check=True, timeout=30).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        found = f"nvidia-smi: {type(error).__name__}"
    return {"gpu": found, "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--train", action="store_true", help="train the sticker models, too")
    parser.add_argument("--only", nargs="+", help="these stages alone")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all time limits")
    args = parser.parse_args()
    todo = stages(args.train, args.scale)
    if args.only:
        names = [stage.name for stage in todo]
        if unknown := sorted(set(args.only) - set(names)):
            parser.error(f"--only must be of {', '.join(names)}, got {', '.join(unknown)}")
        todo = [stage for stage in todo if stage.name in args.only]
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"device": device(), "stages": []}
    for stage in todo:
        row = stage.run(out)
        summary["stages"].append(row)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    print(f"everything is in {out}")
    return int(any(row["result"] in ("failed", "stopped") for row in summary["stages"]))


if __name__ == "__main__":
    sys.exit(main())
