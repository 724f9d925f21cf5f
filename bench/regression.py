"""The regression gate: this commit over another one, both measured in one run.

Machines differ and are noisy, so no time is compared with a stored time. The base is built beside
this commit and runs in its own process; the two take turns (knnfast.benchmark.timing), and the
figure is the median over the turns of ours / base, in CPU time with one thread: other work on the
machine hardly changes it (and it does not see threads that wait for each other). Both stay on one
core, for a core whose neighbour works is slower. What a process happened to get (pages, layout)
biases all of its turns, so where the first measurement is more than half of the way from 1 to the
threshold both sides are made anew and measured again, until most of MEASUREMENTS are on one side of
the threshold: the alarm is a median above it.

    python bench/regression.py --runs 20 --json bench/results/NAME.json

counts false alarms over runs of an unchanged tree (20 without one bound their rate at about 15 %
with 95 % confidence), then alarms with each op slowed down by 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from base import Base, build
from cases import OPS, cases
from options import above, at_least, check_json
from run import tidy

from knnfast import _C, _files
from knnfast.benchmark.machine import machine
from knnfast.benchmark.timing import CLOCKS, Local, interleave, keep_freed_memory, ratio

THRESHOLD = 1.10
SLOWDOWN = 1.20
MEASUREMENTS = 7
CLOCK = CLOCKS["cpu"]


def slowed(call: Callable[[], Any], factor: float) -> Callable[[], Any]:
    """The call followed by a busy wait of factor - 1 times the median that it takes without one.

    The harness's own way to slow an op down: nothing of the product knows about it. (A share of
    what each call took would be more: after a wait the call itself is slower.)
    """
    wait = (factor - 1) * statistics.median(Local(call, clock=CLOCK).turn(0.2)) / 1e3

    def call_and_wait() -> Any:
        result = call()
        end = CLOCK() + wait
        while CLOCK() < end:
            pass
        return result

    return call_and_wait


def start(tree: Path) -> Base:
    """A process of the base, counted as ours is; both stay on one core from now on."""
    keep_freed_memory()  # as the base does
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return Base(tree, threads=1, clock="cpu")


def measure(op: str, base: Base, slow: bool = False) -> tuple[float, Callable[[], Any]]:
    """Ours over the base for the op's first case at the shape `ci`; and what was timed."""
    _C.set_num_threads(1)
    torch.set_num_threads(1)
    case = next(iter(cases(op, "ci")))
    base.open(op, "ci")
    base.advance()
    name, call = next(iter(case.ours.items()))
    verdict = case.judge(call())
    if not verdict["ok"]:
        raise AssertionError(f"{op}: wrong before it is timed: {verdict}")
    if slow:
        call = slowed(call, SLOWDOWN)
    contenders = {"ours": Local(call, clock=CLOCK), "base": base.contender(name)}
    timings = interleave(contenders, seconds=0.02, turns=35, least=9, budget=4.0)
    return ratio(timings["ours"], timings["base"]), call


def undecided(ratios: list[float], threshold: float) -> bool:
    """Whether another measurement could change the answer, and there is reason to take it."""
    if len(ratios) == 1 and ratios[0] <= 1 + (threshold - 1) / 2:
        return False
    above = sum(value > threshold for value in ratios)
    return max(above, len(ratios) - above) <= MEASUREMENTS // 2


def slower(ratios: list[float], threshold: float) -> bool:
    """The alarm: most measurements are above the threshold."""
    return statistics.median(ratios) > threshold


def false_alarms(result: dict[str, Any]) -> int:
    """Runs of the unchanged tree in which an op gave the alarm."""
    runs, threshold = result["unchanged"], result["threshold"]
    return sum(any(slower(ratios, threshold) for ratios in run.values()) for run in runs)


def gate(
    op: str, base: Base, fresh: Callable[[], Base], threshold: float, slow: bool = False
) -> tuple[list[float], Callable[[], Any]]:
    """Ratios of all the measurements that were needed: an alarm when `slower` says so.

    Args:
        fresh: makes a new process of the base for each further measurement.
    """
    value, call = measure(op, base, slow)
    ratios = [value]
    while undecided(ratios, threshold):
        with fresh() as other:
            value, call = measure(op, other, slow)
        ratios.append(value)
    return ratios, call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, help="of the unchanged tree")
    parser.add_argument("--slowed", type=int, default=1, help="runs with each op slowed down")
    parser.add_argument("--threshold", type=float, default=THRESHOLD)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    at_least(parser, 1, runs=args.runs, slowed=args.slowed)
    above(parser, 1, threshold=args.threshold)
    check_json(parser, args.json)
    tree = build("HEAD")
    report: dict[str, Any] = {
        "kind": "gate", "machine": machine(), "threshold": args.threshold, "slowdown": SLOWDOWN,
        "measurements": MEASUREMENTS,
        "command": shlex.join(["python", "bench/regression.py", *sys.argv[1:]]),
        "unchanged": [], "slowed": [],
    }  # fmt: skip
    if args.json and args.json.exists():  # go on where an earlier call stopped
        before = _files.read_json(args.json)
        if before["machine"]["commit"] != report["machine"]["commit"]:
            raise SystemExit(f"{args.json} is of another commit: {before['machine']['commit']}")
        report |= {"unchanged": before["unchanged"], "slowed": before["slowed"]}
    for name, count in (("unchanged", args.runs), ("slowed", args.slowed)):
        while len(report[name]) < count:
            with start(tree) as base:
                ratios = {
                    op: gate(op, base, lambda: start(tree), args.threshold, name == "slowed")[0]
                    for op in OPS
                }
            report[name].append({op: tidy(values) for op, values in ratios.items()})
            print(name, json.dumps(tidy(ratios)), flush=True)
            if args.json:
                _files.write_json(args.json, report)


if __name__ == "__main__":
    main()
