"""Timing that can be compared: contenders take turns in one run, and ratios come from the turns."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Thread pools of other libraries (OpenMP, OpenBLAS) spin for a while after a call, on the cores of
# whoever comes next; before each turn they get this long to fall asleep. Seconds.
SETTLE = 0.03

# Cycles for which a device waits before a call, while the host queues it: about a millisecond.
HEAD_START = 2_000_000

# In seconds: the wall's, or this process's CPU time alone, which other work hardly changes.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timing:
    """What one contender took: all its calls, and the median of each of its turns. Milliseconds."""

    calls: np.ndarray
    turns: np.ndarray

    def percentile(self, p: float) -> float:
        """p-th percentile of all calls, in milliseconds."""
        return float(np.percentile(self.calls, p))

    def row(self) -> dict[str, float | int]:
        """p50, p90 and p99 of the calls, and how many there were."""
        return {f"p{p}_ms": self.percentile(p) for p in (50, 90, 99)} | {"runs": len(self.calls)}


def ratio(theirs: Timing, ours: Timing) -> float:
    """How many times longer theirs takes: the median over the turns that both had."""
    turns = min(len(theirs.turns), len(ours.turns))
    return float(np.median(theirs.turns[:turns] / ours.turns[:turns]))


class Contender(Protocol):
    """Anything that can be timed for a while."""

    def turn(self, seconds: float) -> list[float]:
        """Call for about this long, at least once; milliseconds of every call."""


class Local:
    """A callable of this process.

    Args:
        call: what is timed; its result is thrown away.
        cuda: time on the device, between events, with a cold L2 cache (256 MiB are read before each
            call: nothing is left to be written back while it runs); otherwise on the host. The
            device is kept busy for a millisecond first: what the host needs to queue a call counts
            where it is longer than that.
        clock: of the host, in seconds: time.perf_counter, or time.process_time to count this
            process's CPU time alone, which other work on the machine hardly changes.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        cuda: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.call = call
        self.cuda = cuda
        self.clock = clock

    def turn(self, seconds: float) -> list[float]:
        """Call for about this long, at least once; milliseconds of every call."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        with _cuda_clock() if self.cuda else _host_clock(self.clock) as timed:
            while not times or time.perf_counter() < end:
                times.append(timed(self.call))
        return times


@contextmanager
def _host_clock(clock: Callable[[], float]) -> Iterator[Callable[[Callable[[], Any]], float]]:
    def timed(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        return (clock() - start) * 1e3

    yield timed


@contextmanager
def _cuda_clock() -> Iterator[Callable[[Callable[[], Any]], float]]:
    import torch

    flush = torch.zeros(32 << 20, dtype=torch.int64, device="cuda")

    def timed(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.max()
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    yield timed


def interleave(
    contenders: Mapping[str, Contender],
    seconds: float = 0.05,
    turns: int = 9,
    least: int = 3,
    budget: float = float("inf"),
) -> dict[str, Timing]:
    """Time contenders against each other: turn by turn, the order reversed every other turn.

    Every contender is called once before it counts, and what disturbs the machine for longer than
    a turn disturbs all of them.

    Args:
        contenders: by name.
        seconds: length of one turn; a call that takes longer is a turn of one call.
        turns: turns of each contender.
        least: turns that are taken even when the budget is spent.
        budget: seconds for all turns together.
    Returns: a Timing for each name.
    """
    calls: dict[str, list[float]] = {name: [] for name in contenders}
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.turn(0)
    start = time.perf_counter()
    order = list(contenders)
    for turn in range(turns):
        if turn >= least and time.perf_counter() - start > budget:
            break
        for name in order:
            time.sleep(SETTLE)
            times = contenders[name].turn(seconds)
            calls[name] += times
            medians[name].append(float(np.median(times)))
        order.reverse()
    return {name: Timing(np.array(calls[name]), np.array(medians[name])) for name in contenders}


@dataclass(frozen=True)
class Choice:
    """One way to run a peer: what sets it, its threads, and what else tells it from the others."""

    set: Callable[[], Any]
    threads: int
    options: str = ""

    def row(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"threads": self.threads} | ({"options": self.options} if self.options else {})


def thread_choices(set_threads: Callable[[int], Any], threads: int) -> list[Choice]:
    """One thread, and all of them."""
    return [Choice(partial(set_threads, n), n) for n in sorted({1, threads})]


def best_choice(choices: Sequence[Choice], call: Callable[[], Any]) -> dict[str, Any]:
    """Set a peer to the way in which it is fastest; returns the choice's row (none: {}).

    Those near the fastest are tried again, last one first: what ran before may have held up one.
    """

    def seconds(choice: Choice) -> float:
        choice.set()
        time.sleep(SETTLE)
        calls: list[float] = []
        # The first may have to start threads, and to find memory; short ones take many times.
        while len(calls) < 2 or sum(calls) < (0.6 if len(calls) < 3 else 0.02):
            start = time.perf_counter()
            call()
            calls.append(time.perf_counter() - start)
        return min(calls)

    taken = {choice: seconds(choice) for choice in choices}
    if not taken:
        return {}
    fastest = min(taken.values())
    for choice in reversed(choices):
        if taken[choice] < 2 * fastest:
            taken[choice] = min(taken[choice], seconds(choice))
    best = min(taken, key=taken.__getitem__)
    best.set()
    return best.row()


def keep_freed_memory() -> None:
    """From here on glibc's malloc keeps what is freed, up to 32 MiB a piece.

    Else it returns large pieces to the system, which clears every page of the next one: eager torch
    takes longer for it, and how much depends on what ran before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)


def peak_mib(call: Callable[[], Any], cuda: bool = False) -> float | None:
    """Memory that one call adds at its peak, in MiB.

    On the CPU: the growth of the resident set (Linux counts its peak; elsewhere None), after the
    allocator gave back what it held. On a GPU: of torch's allocator alone; what an index or another
    library takes there from a pool of its own is not seen.
    """
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def resident(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+)", status.read_text())
        return int(found[1]) if found else 0

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset.write_text("5")
    before = resident("VmRSS")
    call()
    return round((resident("VmHWM") - before) / 1024, 2)
