"""Every figure of README's tables and of docs/performance.md, on this machine: `make measure`.

    python bench/measure.py [--only NAME,...]

One measurement after the other goes to out/measure, and when it is done to bench/results as
NAME-ISA-DATE.json, in the place of the older one of this instruction set; in the end report.py
writes the pages anew. What fails leaves what was there; the exit code is 1 then. It takes about an
hour on two cores, the 20 runs of `gate`, which comes last, a third of it: let nothing else run
meanwhile. `make gpu` is for machines with a GPU.

FAISS's own copy of OpenBLAS may not know a new processor and take kernels of an old one: a result
names those it took, and OPENBLAS_CORETYPE (SkylakeX, say) chooses others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from knnfast import _files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
MADE = Path("out") / "measure"  # in ROOT
# What Python runs; {json} is the file to write, and what does not name it prints the result.
MEASUREMENTS = {
    "faiss-reference": "-m knnfast bench --n 1000000 --d 512 --batch 1,16,64 --k 10 "
                       "--seconds 240 --plot none --json",
    "topk-cpu": "bench/topk_cpu.py --json {json}",
    "load": "bench/load.py --json {json}",
    **{
        op: f"bench/run.py --op {op} --json {{json}}"
        for op in ("fold_neighbours", "neighbour_attention", "transition_step", "sample_head",
                   "transition_loss")
    },
    "sample": "bench/run.py --op sample --shape stickers-1 --shape stickers --turns 5 "
              "--json {json}",
    "sample-1024": "bench/run.py --op sample --shape sampling-1024 --turns 3 --json {json}",
    "end_to_end": "bench/run.py --op end_to_end --shape stickers --turns 5 --json {json}",
    "gate": "bench/regression.py --runs 20 --slowed 5 --json {json}",
}  # fmt: skip


def measure(name: str) -> bool:
    """Run one measurement; whether it ended well and its result is in bench/results."""
    made = MADE / f"{name}.json"
    (ROOT / made).unlink(missing_ok=True)
    words = MEASUREMENTS[name].format(json=made).split()
    prints = "{json}" not in MEASUREMENTS[name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE if prints else None, check=False,
    )  # fmt: skip
    ended = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    print(f"{name}: {ended} after {time.perf_counter() - start:.0f} s", flush=True)
    if done.returncode:
        return False
    if prints:
        _files.write_atomic(ROOT / made, done.stdout)
    install(name, ROOT / made)
    return True


def install(name: str, made: Path) -> None:
    """Move a result to bench/results; older ones of its instruction set go, with their plots."""
    result: dict[str, Any] = _files.read_json(made)
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    about = next(part["machine"] for part in parts if "machine" in part)
    target = RESULTS / f"{name}-{about['isa']}-{about['date']}.json"
    for old in RESULTS.glob(f"{name}-{about['isa']}-*.json"):
        old.unlink()
        (DOCS / f"{old.stem}.png").unlink(missing_ok=True)
    made.replace(target)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=lambda names: names.split(","), default=list(MEASUREMENTS),
        metavar="NAME,...", help="these alone",
    )  # fmt: skip
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(MEASUREMENTS)):
        parser.error(f"--only must be of {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
    (ROOT / MADE).mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.only if not measure(name)]
    subprocess.run([sys.executable, "bench/report.py"], cwd=ROOT, check=True)
    print(
        f"failed: {', '.join(failed)}" if failed else "README and docs/performance.md are written"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
