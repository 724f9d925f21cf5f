"""A service under load: latency of small queries against offered load, many threads at once.

    python bench/load.py --json bench/results/NAME.json

Closed loop: every client asks again as soon as it is answered; the throughput of all clients is the
server's saturation. Open loop: queries arrive by a Poisson process at a given rate whatever the
server does, the clients serve as its threads, and a query's latency counts from its arrival
(nothing is left out when the server is late). Servers: `Index.search` (searches take turns and
share all cores; those that wait are answered together), the same and FAISS with one thread a search
(a server per core); and with a filter, a bitset that denies a row of a hundred, `Index.search`,
which then answers one after another, and `knnfast.Batcher`.

Beside the open-loop rows stands what an M/D/c queue predicts for the same arrivals: c servers,
first come first served, a search at a time each, every service equally long. `of_queue` is the
offered load as a share of what c clients get back to back. A queue that is offered more than it can
serve has no end, and no prediction. How long a service is, is measured, since a machine that others
use too is faster and slower by the second: an open loop is cut into `--stretches`, and a service in
a stretch is as long as the median of c clients back to back just before and just after it
(`queue`), or as the median of those searches of the stretch itself that found a server free
(`loaded_queue`). The second is longer: between arrivals the rows leave the caches that they hardly
fit into, and 16 clients that wake take their time from the searches. Every stretch begins with an
empty queue, in truth as in the prediction; at high load that makes p99 less than an endless loop's.

`stolen_share` is the part of the cores' time that the host of a virtual machine gave to others
meanwhile, of which no queue knows: so an open loop is run `--rounds` times, the row is the round
with the least of it, and `rounds` holds the stolen share, p99 and p99 over the queue's of all.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from run import tidy

from knnfast import _C, Batcher, Index, _files
from knnfast.benchmark.machine import machine, stolen_seconds
from knnfast.benchmark.topk import Truth, faiss_module, make_rows

Search = Callable[[np.ndarray], Any]  # one query [d] -> ids [k]


def percentiles(latencies: np.ndarray) -> dict[str, Any]:
    p50, p99, p999 = np.percentile(latencies * 1e3, [50, 99, 99.9])
    return {"p50_ms": p50, "p99_ms": p99, "p999_ms": p999, "queries": len(latencies)}


def in_threads(clients: int, work: Callable[[int], None]) -> None:
    """Runs work(i) in as many threads; the first exception is raised here."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def closed_loop(
    search: Search, queries: np.ndarray, clients: int, seconds: float
) -> tuple[np.ndarray, float]:
    """Latencies in seconds, and queries per second."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    end = time.perf_counter() + seconds

    def work(i: int) -> None:
        at = i
        while (begin := time.perf_counter()) < end or not latencies[i]:
            search(queries[at % len(queries)])
            latencies[i].append(time.perf_counter() - begin)
            at += clients

    start = time.perf_counter()
    in_threads(clients, work)
    every = np.concatenate([np.array(each) for each in latencies])
    return every, len(every) / (time.perf_counter() - start)


def open_loop(
    search: Search, queries: np.ndarray, clients: int, arrivals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Latencies in seconds, counted from the arrivals (seconds from the start).

    Also when each search began and ended, [queries, 2].
    """
    spans = np.full((len(arrivals), 2), np.nan)
    lock = threading.Lock()
    todo = iter(range(len(arrivals)))
    start = time.perf_counter() + 0.05

    def work(_: int) -> None:
        while True:
            with lock:
                i = next(todo, None)
            if i is None:
                return
            due = start + arrivals[i]
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            spans[i, 0] = time.perf_counter()
            search(queries[i % len(queries)])
            spans[i, 1] = time.perf_counter()

    in_threads(clients, work)
    return spans[:, 1] - start - arrivals, spans


def cores() -> int:
    return os.cpu_count() or 1


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Arrival times of a Poisson process."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, max(1, int(rate * seconds))))


def queue(arrivals: np.ndarray, service: float, servers: int) -> np.ndarray:
    """Latencies of an M/D/c queue, first come first served, for these arrivals."""
    free = [0.0] * servers
    latencies = np.empty(len(arrivals))
    for i, arrival in enumerate(arrivals):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        latencies[i] = end - arrival
    return latencies


def service_under_load(spans: np.ndarray, servers: int) -> float:
    """Median seconds of the searches that found a server free; NaN where none did."""
    begins, ends = np.sort(spans, axis=0).T
    others = np.searchsorted(begins, spans[:, 0]) - np.searchsorted(ends, spans[:, 0], "right")
    free = (spans[:, 1] - spans[:, 0])[others < servers]
    return float(np.median(free)) if len(free) else float("nan")


@contextmanager
def one_thread_a_search() -> Iterator[None]:
    before = _C.num_threads()
    _C.set_num_threads(1)
    try:
        yield
    finally:
        _C.set_num_threads(before)


def offer(
    search: Search,
    queries: np.ndarray,
    args: argparse.Namespace,
    rate: float,
    seed: int,
    servers: int | None,
) -> dict[str, Any]:
    """One open loop in stretches, and what the queues predict for its arrivals."""

    def back_to_back() -> float:
        return float(np.median(closed_loop(search, queries, servers or 1, args.seconds / 20)[0]))

    seconds = max(args.seconds, args.least / rate) / args.stretches
    latencies, stolen, passed = [], 0.0, 0.0
    services: dict[str, list[float]] = {"queue": [], "loaded_queue": []}
    expected: dict[str, list[np.ndarray]] = {"queue": [], "loaded_queue": []}
    before = back_to_back() if servers is not None else 0.0
    for i in range(args.stretches):
        arrivals = poisson(rate, seconds, seed * args.stretches + i)
        taken, start = stolen_seconds(), time.perf_counter()
        taken_by_each, spans = open_loop(search, queries, args.clients, arrivals)
        latencies.append(taken_by_each)
        stolen += stolen_seconds() - taken
        passed += time.perf_counter() - start
        if servers is not None:
            after = back_to_back()
            loaded = service_under_load(spans, servers)
            measured = {"queue": (before + after) / 2, "loaded_queue": loaded}
            before = after
            for name, service in measured.items():
                services[name].append(service)
                expected[name].append(queue(arrivals, service, servers))
    row = percentiles(np.concatenate(latencies)) | {"stolen_share": stolen / passed / cores()}
    if servers is not None:
        for name, each in expected.items():
            if not rate * max(services[name]) < servers:  # in some stretch it could not serve all
                continue
            row[name] = percentiles(np.concatenate(each))
            row[name] |= {"servers": servers, "service_ms": float(np.mean(services[name])) * 1e3}
            row[f"p99_over_{name}"] = row["p99_ms"] / row[name]["p99_ms"]
    return row


def measure(
    name: str,
    search: Search,
    queries: np.ndarray,
    args: argparse.Namespace,
    rates: list[float],
    servers: int | None,
) -> Iterator[dict[str, Any]]:
    """Closed loop with one client, with `servers` of them and with all; then the open loops.

    Without `rates`: `--loads` of what the queue can serve, then of what the server can.
    """
    rows = {}
    for clients in sorted({1, servers or 1, args.clients}):
        closed_loop(search, queries, clients, 0.3)
        latencies, rate = closed_loop(search, queries, clients, args.seconds)
        rows[clients] = {"server": name, "loop": "closed", "clients": clients, "qps": rate}
        rows[clients] |= percentiles(latencies)
        yield rows[clients]
    saturation = rows[args.clients]["qps"]
    capacity = rows[servers or args.clients]["qps"]
    if not rates:
        rates = [share * most for most in (capacity, saturation) for share in args.loads]
        rates = [
            rate for i, rate in enumerate(rates) if not np.isclose(rate, rates[:i], 0.05).any()
        ]
    for rate in sorted(rates):
        row = {"server": name, "loop": "open", "clients": args.clients, "offered_qps": rate,
               "of_saturation": rate / saturation}  # fmt: skip
        if servers is not None:
            row["of_queue"] = rate / capacity
        if rate > 0.95 * saturation:
            yield row | {"skipped": f"saturates at {saturation:.0f} queries/s"}
            continue
        queued = servers if rate < capacity else None
        rounds = [offer(search, queries, args, rate, seed, queued) for seed in range(args.rounds)]
        told = ("stolen_share", "p99_ms", "p99_over_queue", "p99_over_loaded_queue")
        row |= min(rounds, key=lambda each: each["stolen_share"])
        yield row | {"rounds": [{name: r[name] for name in told if name in r} for r in rounds]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loop")
    parser.add_argument("--least", type=int, default=2000, help="queries of an open loop")
    parser.add_argument("--stretches", type=int, default=10, help="of an open loop")
    parser.add_argument("--rounds", type=int, default=3, help="of each open loop")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9],
                        help="shares of what the queue, then Index.search can serve")  # fmt: skip
    parser.add_argument("--deadline-ms", type=float, default=1.0, help="the Batcher's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    vectors, queries = make_rows(args.n, args.d)
    index = Index(args.d)
    index.add(vectors)
    allowed = np.random.default_rng(0).random(args.n) >= 0.01
    denied = np.packbits(~allowed, bitorder="little")
    faiss = faiss_module()
    flat = faiss.IndexFlatIP(args.d)
    flat.add(vectors.astype(np.float32))
    faiss.omp_set_num_threads(1)
    report: dict[str, Any] = {
        "kind": "load", "machine": machine(),
        "command": shlex.join(["python", "bench/load.py", *sys.argv[1:]]),
        "shape": {"n": args.n, "d": args.d, "k": args.k, "clients": args.clients,
                  "deadline_ms": args.deadline_ms, "rounds": args.rounds,
                  "stretches": args.stretches},
        "rows": [],
    }  # fmt: skip

    def ours(q: np.ndarray) -> Any:
        return index.search(q, args.k)

    def theirs(q: np.ndarray) -> Any:
        return flat.search(q[None], args.k)

    def filtered(q: np.ndarray) -> Any:
        return index.search(q, args.k, deny=denied)

    def record(*arguments: Any, among: Any = slice(None)) -> list[dict[str, Any]]:
        search = arguments[1]
        got = np.stack([np.asarray(search(q)[1]).reshape(-1) for q in queries[:8]])
        place = np.full(args.n, -1)  # of a row among those that may be found
        place[among] = np.arange(len(place[among]))
        verdict = Truth(vectors[among], queries, args.k).judge(place[got])
        rows = []
        for row in measure(*arguments):
            rows.append(tidy(row | {"exact": verdict["exact"]}))
            print(json.dumps(rows[-1]), flush=True)
        report["rows"] += rows
        if args.json:
            _files.write_json(args.json, report)
        return rows

    rows = record("Index.search", ours, queries, args, [], 1)
    rates = [row["offered_qps"] for row in rows if row["loop"] == "open"]
    with one_thread_a_search():
        record("Index.search, a thread each", ours, queries, args, rates, cores())
        record("faiss-flat", theirs, queries, args, rates, cores())
    record("Index.search with a filter", filtered, queries, args, rates, 1, among=allowed)
    with Batcher(index, deadline_ms=args.deadline_ms) as batcher:

        def batched(q: np.ndarray) -> Any:
            return batcher.search(q, args.k, deny=denied)

        record("Batcher with a filter", batched, queries, args, rates, None, among=allowed)
        stats = batcher.stats
    report["batch_mean"] = round(stats["queries"] / stats["searches"], 2)
    if args.json:
        _files.write_json(args.json, report)


if __name__ == "__main__":
    main()
