"""Measures an op beside its peers, every answer checked first.

    python bench/run.py --op topk --shape service-1m --json bench/results/NAME.json
    python bench/run.py --op transition_loss --base main --peers none

Order: the machine's ceilings (copy, read, matmul); then for each case: check against the
reference, warm up, take turns with the peers, count the memory, free. A row holds op, shape, case,
dtype, backend, p50/p90/p99, GB/s or TFLOP/s and its share of the measured ceiling, peak memory (on
a GPU that of torch's allocator alone), exactness or error, and each peer with its time, its
verdict, and its ratio to ours in the turns that the two took (above 1: ours is faster;
`ours_p50_ms` is our time in them). Search peers get the better number of threads, FAISS's flat
index the better of BLAS and its own loops (above batch 32: BLAS). On CUDA short kernels are timed
as CUDA graphs, ours and the peers that can be captured (`timed` says which). Rows we lose stay.
`--base REF` builds that commit beside this one and measures it in the same turns. A backend of
ours whose answer is wrong or that raises is not measured, nor is the rest of a shape that cannot go
on: they are listed under `failed`, everything else is measured, and the exit code is 1.

`--op topk` serves GPUs and the regression gate; on the CPU `knnfast bench` measures a shape of the
reader's own, and topk_cpu.py the search engine's targets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from base import Base, build
from case import Case, Rival, UnknownNameError
from cases import OPS, cases
from graph import Graph, eager
from options import at_least, check_json
from shapes import SHAPES

from knnfast import _C, _files
from knnfast._device import check_torch_device
from knnfast.benchmark.machine import ceilings, machine, share
from knnfast.benchmark.timing import (
    CLOCKS,
    Local,
    Timing,
    best_choice,
    interleave,
    keep_freed_memory,
    peak_mib,
    ratio,
)


def tidy(value: Any) -> Any:
    """Six significant digits: more would be noise. JSON has no infinity or NaN: words."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: tidy(v) for name, v in value.items()}
    if isinstance(value, list):
        return [tidy(v) for v in value]
    return value


def scaled(timing: Timing, per: int) -> Timing:
    """Times of one step where a call makes `per` of them."""
    return Timing(timing.calls / per, timing.turns / per)


def warm(case: Case) -> bool:
    """Whether all steps of a call but the first find in a device's second cache what they read."""
    if not case.cuda or case.per == 1 or case.bytes == 0:
        return False
    import torch

    return case.bytes <= torch.cuda.get_device_properties("cuda").L2_cache_size


def beside(case: Case, ours: Local, rival: Rival, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's part of the row: its times and verdict, and ours in the turns that the two took."""
    way = best_choice(rival.choices(args.threads), rival.call)
    call, note = recorded(case, rival)
    verdict = case.judge((rival.result or call)())
    verdict |= {} if verdict.pop("ok") else {"answers": "differ"}
    local = Local(call, case.cuda, ours.clock)
    pair = interleave({"ours": ours, "theirs": local}, args.seconds, args.turns)
    mine, theirs = scaled(pair["ours"], case.per), scaled(pair["theirs"], rival.per or case.per)
    return (
        theirs.row()
        | {"ratio": ratio(theirs, mine), "ours_p50_ms": mine.percentile(50)}
        | way
        | note
        | {"peak_mib": peak_mib(rival.call, case.cuda)}
        | verdict
    )


def recorded(case: Case, rival: Rival) -> tuple[Any, dict[str, str]]:
    """A peer's call as a graph where the case's are, else as it is, with a note that says why."""
    if not (case.cuda and case.graphs):
        return rival.call, {}
    if not rival.capturable:
        return rival.call, {"timed": "eager: its library works on streams of its own"}
    try:
        return Graph(rival.call).record(), {"timed": "graph"}
    except Exception as error:  # whatever it is, the peer is measured
        text = str(error).strip().splitlines() or [""]
        return rival.call, {"timed": f"eager: no graph ({type(error).__name__}: {text[0]})"}


def measure(
    case: Case, args: argparse.Namespace, limits: dict[str, float], base: Base | None
) -> Iterator[dict[str, Any]]:
    """One row for each backend of the case; of one that fails it says why under `failed`."""
    names = list(case.ours)
    if args.backend:
        names = [name for name in names if name in args.backend]
        if not names:
            raise UnknownNameError(f"--backend must be of {list(case.ours)}, got {args.backend}")
    verdicts = {}
    for name in names:
        try:
            verdict = case.judge(case.ours[name]())
        except Exception as error:
            verdict = {"ok": False} | raised(error)
        if verdict.pop("ok"):
            verdicts[name] = verdict
        else:
            yield {"op": case.op, "shape": case.shape, "case": case.label, "backend": name,
                   "failed": verdict}  # fmt: skip
    names = list(verdicts)
    if not names:
        return
    clock = CLOCKS[args.clock]
    said = ", CPU time of one thread" if args.clock == "cpu" else ""
    contenders: dict[str, Any] = {name: Local(case.ours[name], case.cuda, clock) for name in names}
    if base is not None:
        contenders[base.name] = base.contender(names[0])
    timings = {
        name: scaled(timing, case.per)
        for name, timing in interleave(contenders, args.seconds, args.turns).items()
    }
    main = names[0]
    peers: dict[str, Any] = {}
    if base is not None:
        peers[base.name] = timings[base.name].row() | {
            "ratio": ratio(timings[base.name], timings[main])
        }
    rows = []  # before a peer can take the device with it
    for name in names:
        timing = timings[name]
        row = {"op": case.op, "shape": case.shape, "case": case.label + said, "dtype": case.dtype,
               "backend": name, **timing.row(), **verdicts[name]}  # fmt: skip
        if args.clock == "wall" and warm(case):
            row["cache"] = "warm but for the first step"
        elif case.bytes and args.clock == "wall":
            row |= share(case.bytes, case.flops, timing.percentile(50), limits)
        row["peak_mib"] = peak_mib(eager(case.ours[name]), case.cuda)
        if name == main:
            row |= case.facts() | {"peers": peers}
        else:
            row["peers"] = {
                f"knnfast {main}": timings[main].row() | {"ratio": ratio(timings[main], timing)}
            }
        rows.append(row)
    with contextlib.closing(case.peers(args.peers)) as rivals:
        for name, rival in rivals:
            if isinstance(rival, str):
                peers[name] = {"skipped": rival}
                continue
            try:
                peers[name] = beside(case, Local(case.ours[main], case.cuda, clock), rival, args)
            except Exception as error:  # a peer that fails is a row of the table, not our end
                peers[name] = {"skipped": f"{type(error).__name__}: {error}"}
            del rival  # before the next one is built: only one is in memory
    yield from rows


def measure_shape(
    shape: str, args: argparse.Namespace, limits: dict[str, float], base: Base | None
) -> Iterator[dict[str, Any]]:
    """The rows of all cases of a shape; the last one says it where they could not go on."""
    try:
        if base is not None:
            base.open(args.op, shape)
        for case in cases(args.op, shape, args.device):
            if base is not None:
                base.advance()
            yield from measure(case, args, limits, base)
    except UnknownNameError:
        raise
    except Exception as error:  # the other shapes are measured
        traceback.print_exc()
        yield {"op": args.op, "shape": shape, "failed": raised(error)}


def raised(error: Exception) -> dict[str, str]:
    return {"raised": f"{type(error).__name__}: {error}"}


def shown(row: dict[str, Any]) -> str:
    """One line for a row."""
    if "failed" in row:
        return " ".join(map(str, row.values()))
    peers = ", ".join(
        f"{name} {peer['p50_ms']:.4g} ({peer['ratio']:.2f}x)" if "p50_ms" in peer
        else f"{name}: {peer['skipped']}" for name, peer in row["peers"].items()
    )  # fmt: skip
    percent = f", {row['ceiling_share']:.0%} of the ceiling" if "ceiling_share" in row else ""
    return (
        f"{row['op']} {row['shape']} {row['case']} {row['backend']}: "
        f"{row['p50_ms']:.4g} ms{percent}; {peers}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--shape", action="append", help="repeatable; all of the op by default")
    parser.add_argument("--backend", action="append", help="repeatable; all of the case by default")
    parser.add_argument("--peers", help="names, separated by commas; none; all by default")
    parser.add_argument("--base", help="a commit to build and to measure beside this one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: this process's CPU time, for a machine that others use, with --threads 1",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to write, kept up to date row by row")
    args = parser.parse_args()
    for shape in args.shape or []:
        if shape not in SHAPES[args.op]:
            parser.error(f"--shape must be of {', '.join(SHAPES[args.op])}, got {shape!r}")
    if args.clock == "cpu" and (args.base or args.device != "cpu" or args.threads != 1):
        parser.error("--clock cpu is for --device cpu with --threads 1 and no --base")
    if args.peers is not None:
        args.peers = [name for name in args.peers.split(",") if name != "none"]
    at_least(parser, 1, threads=args.threads, turns=args.turns)
    try:
        check_torch_device("--device", args.device)
    except ValueError as error:
        parser.error(str(error))
    check_json(parser, args.json)
    try:
        return measure_all(args)
    except UnknownNameError as error:
        parser.error(str(error))


def measure_all(args: argparse.Namespace) -> int:
    """The ceilings, then every shape; 1 where something of ours failed."""
    keep_freed_memory()
    _C.set_num_threads(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    limits = ceilings(args.device)
    report = {
        "kind": "ops", "machine": machine(args.device), "ceilings": limits,
        "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]), "rows": [], "failed": [],
    }  # fmt: skip
    print(json.dumps(limits), flush=True)
    with contextlib.ExitStack() as stack:
        base = None
        if args.base is not None:
            base = stack.enter_context(Base(build(args.base), args.device, args.threads))
        usual = [
            name for name in SHAPES[args.op]
            if name != "ci" and (args.device != "cpu" or not name.startswith("gpu-"))
        ]  # fmt: skip
        for shape in args.shape or usual:
            for row in measure_shape(shape, args, limits, base):
                report["failed" if "failed" in row else "rows"].append(tidy(row))
                print(shown(row), flush=True)
                if args.json:
                    _files.write_json(args.json, report)
    return int(bool(report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
