"""What a machine with a GPU can do for this project: `make gpu`.

    python bench/gpu.py [--out out/gpu] [--budget SECONDS] [--only STAGE,...] [--train]

Stages, the most telling first: build for this machine's GPU alone; the tests marked `gpu`, then the
others of the index; the search kernels' own times; the benchmark of top-k and of every other op,
each beginning with the shapes that are meant for a GPU, with whichever peers import; what its
Triton makes of the kernels, in registers and spills; compute-sanitizer on the search kernels;
`knnfast bench`; training of the sticker denoiser when it is asked for. Each has a time limit, is
skipped with a reason where it cannot run or no longer fits into the budget, and the script goes on.
All of it lands in one folder of small files, `summary.json` first, and in one archive beside it,
out/gpu.tar.gz, both written before anything else, anew before each stage and at the end. SIGTERM
and Ctrl-C end the running stage with everything it started. Exit code 1 when a stage failed or was
stopped, 0 when all passed or were skipped. Where git knows no commit of this tree (a copy of its
files, say), results name the one that KNNFAST_COMMIT holds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
GRACE = 10  # seconds in which a stage that is stopped may say what it has found
LEAST = 20  # seconds that a stage must have to be worth its start
CANNOT = 77  # exit code of a stage that found out it cannot run here; its last line says why
CUDA_TOOLS = "/usr/local/cuda/bin"
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 3))  # of the tests; each may take another core
FEW_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
LIMITS = {"topk": 300, "neighbour_attention": 240}  # seconds; torch compiles a peer for each shape
QUICK = ("--turns", "5", "--seconds", "0.05")  # a device that nobody else uses needs few turns


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
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None:
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
        environment: gives what it finds there beside ours; asked when it starts.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[Callable[[], str | None], ...] = ()
    environment: Callable[[], dict[str, str]] = dict

    def run(self, out: Path, left: float = float("inf")) -> dict[str, Any]:
        """Run or skip; the result says which, for how long and why. `left`: of the budget."""
        for check in self.needs:
            if reason := check():
                return {"stage": self.name, "result": "skipped", "reason": reason}
        limit = min(self.limit, left - GRACE)
        if limit < min(self.limit, LEAST):
            reason = f"{max(left, 0):.0f} s of the budget are left"
            return {"stage": self.name, "result": "skipped", "reason": reason}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | self.environment()
        place = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # results name it
        words = [word.format(out=place) for word in self.command]
        log = out / f"{self.name}.log"
        start = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | own,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGINT)  # pytest reports the failures so far
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
            finally:
                end_session(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):  # one stuck in the driver
                    process.wait(timeout=GRACE)
        text = log.read_bytes()
        if len(text) > LOG_LIMIT:
            log.write_bytes(b"[the beginning is left out]\n" + text[-LOG_LIMIT:])
        row: dict[str, Any] = {"stage": self.name, "seconds": round(time.perf_counter() - start, 1)}
        if code is None:
            return row | {"result": "stopped", "reason": f"longer than its {limit:.0f} s"}
        if code == CANNOT:
            last = (text.decode(errors="replace").strip().splitlines() or [""])[-1]
            return row | {"result": "skipped", "reason": last}
        return row | ({"result": "passed"} if code == 0 else {"result": "failed", "code": code})


def end_session(leader: int) -> None:
    """Kill a process that leads a session, its group, and (Linux) whatever else is left in it:
    `timeout` makes a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            _state, _parent, _group, session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(session) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def architecture() -> dict[str, str]:
    """CUDAARCHS of the GPU that is there, where it is not set; Hopper's kernel needs the `a`."""
    if "CUDAARCHS" in os.environ or no_gpu():
        return {}
    import torch

    number = "{}{}".format(*torch.cuda.get_device_capability())
    return {"CUDAARCHS": f"{number}a-real" if number == "90" else f"{number}-real"}


def shapes(op: str) -> list[str]:
    """All shapes of an op but the tests' own; those of a GPU's size first."""
    names = [name for name in SHAPES[op] if name != "ci"]
    return sorted(names, key=lambda name: not name.startswith(("coco-", "gpu-")))


def stages(train: bool, scale: float) -> list[Stage]:
    """All stages, the most telling first; `scale` multiplies their time limits."""

    def pytest(*words: str) -> list[str]:
        # Warnings of other versions fail no test here; a kernel that hangs fails its own alone.
        options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--maxfail", "20"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", "45", "--timeout-method", "thread"]
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(WORKERS), "--max-worker-restart", "6"]
        return [PYTHON, "-m", "pytest", *options, *words]

    def bench(op: str) -> list[str]:
        named = [word for shape in shapes(op) for word in ("--shape", shape)]
        return [PYTHON, "bench/run.py", "--op", op, *named, "--device", "cuda", *QUICK,
                "--json", f"{{out}}/{op}.json"]  # fmt: skip

    every = [
        # With a runtime newer than the driver it would see no device, and tests would be skipped.
        Stage("build",
              ["sh", "-c", '"$0" setup.py -q build_ext --inplace && "$0" -c "$1"', PYTHON,
               "from knnfast import _C; assert _C.cuda_device_count() > 0, 'no CUDA device'"], 240,
              (no_gpu, no_nvcc), lambda: {"KNNFAST_CUDA": "ON"} | architecture()),
        # Registers, spills and products that are waited for, with the Triton that is here.
        Stage("tests-compile",
              pytest("-m", "compile", "-k", "90 or not_waited", "tests/test_compile.py"), 120,
              (no_gpu,), lambda: {"TRITON_INTERPRET": "0"}),
        Stage("bench-kernels", [PYTHON, "bench/kernels.py", "--json", "{out}/kernels.json"], 90,
              (no_gpu,)),
        Stage("tests-index", pytest("-m", "not gpu", "tests/test_cuda_index.py"), 120, (no_gpu,),
              lambda: FEW_THREADS),
        Stage("tests", pytest("-m", "gpu"), 240, (no_gpu,), lambda: FEW_THREADS),
        *(
            Stage(f"bench-{op}", bench(op), LIMITS.get(op, 120), (no_gpu,))
            for op in SHAPES  # topk is the first
        ),
        Stage("sanitizer", ["sh", "tests/cuda_sanitize.sh"], 660, (no_gpu, no_sanitizer),
              lambda: {"PYTHON": PYTHON}),
        Stage("bench-faiss-reference",
              ["sh", "-c", '"$0" -m knnfast bench --device cuda --seconds 60 '
               '--plot "$1.png" --json > "$1.json"', PYTHON, "{out}/faiss-reference"], 150,
              (no_gpu,)),
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


def ours(out: Path) -> bool:
    """Whether a folder is empty or holds an earlier run's results."""
    if not out.is_dir():
        return False
    try:
        return {"device", "stages"} == set(json.loads((out / "summary.json").read_text()))
    except FileNotFoundError:
        return not any(out.iterdir())
    except (ValueError, TypeError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--train", action="store_true", help="train the sticker denoiser, too")
    parser.add_argument(
        "--only", type=lambda names: names.split(","), metavar="STAGE,...",
        help="these stages alone",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="for all stages"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all time limits")
    args = parser.parse_args()
    if not args.budget > 0:
        parser.error(f"--budget must be above 0, got {args.budget}")
    end = time.monotonic() + args.budget
    os.environ["PATH"] += os.pathsep + CUDA_TOOLS
    todo = stages(args.train, args.scale)
    if args.only:
        names = [stage.name for stage in todo]
        if unknown := sorted(set(args.only) - set(names)):
            parser.error(
                f"--only must be of {', '.join(names)}, got {', '.join(map(repr, unknown))}"
            )
        todo = [stage for stage in todo if stage.name in args.only]
    out = args.out.resolve()
    try:
        if out.exists():
            if not ours(out):
                parser.error(f"--out must be a new folder or an earlier run's, got {out}")
            shutil.rmtree(out)
        out.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be made, got {out}: {error.strerror}")
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"device": {}, "stages": rows}

    def write() -> str:
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        made = shutil.make_archive(f"{out}.part", "gztar", out.parent, out.name)
        return str(Path(made).replace(f"{out}.tar.gz"))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):
        write()
        summary["device"] = device()
        for stage in todo:
            rows.append({"stage": stage.name, "result": "stopped", "reason": "interrupted"})
            write()
            rows[-1] = stage.run(out, end - time.monotonic())
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    print(f"everything is in {out} and in {write()}")
    return int(any(row["result"] in ("failed", "stopped") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
