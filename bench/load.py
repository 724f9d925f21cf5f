"""A service under load: latency of small queries against offered load, many threads at once.

    python bench/load.py --json bench/results/NAME.json

Closed loop: every client asks again as soon as it is answered; the throughput of all clients is the
server's saturation. Open loop: queries arrive by a Poisson process at a given rate whatever the
server does, the clients serve as its threads, and a query's latency counts from its arrival
(nothing is left out when the server is late). Servers: `Index.search` (searches take turns and
share all cores; those that wait are answered together), the same and FAISS with one thread a search
(a server per core), `Index.search` with a filter that denies a row of a hundred; in closed loops
alone `knnfast.Batcher`, which hands on to it, what as many clients get from searches that none
joins, one at a time, and FAISS's flat index where a few lines of Python join its searches as ours
are (`loops.Joiner`). FAISS, which serves less, is offered shares of what it serves itself and those
of our rates that it can serve, for a round of `--peer-least` queries.

Every answer of a loop is kept, and compared after it with that of a search alone, which FP64 agreed
with: ours must have its bits, a peer's the best rows (`exact`).

Beside the open-loop rows stands what an M/D/c queue predicts for the same arrivals: c servers,
first come first served, a search at a time each, every service equally long. `of_queue` is the
offered load as a share of what c clients get back to back. A queue that is offered more than it can
serve has no end, and no prediction. How long a service is, is measured in the same minute: an open
loop is cut into `--stretches`, before and after each of which c clients search back to back. A
service is as long as the median of these searches' medians (`queue`), or of the medians of those
searches of the stretches themselves that found a server free (`loaded_queue`). The second is
longer: between arrivals the rows leave the caches that they hardly fit into, and 16 clients that
wake take their time from the searches. Every stretch begins with an empty queue, in truth as in the
prediction; at high load that makes p99 less than an endless loop's.

An open loop is run `--rounds` times: the row is the round in the middle by p99 over the queue's (by
p99 where there is no queue), and `rounds` holds p99, p99 over the queue's of all, and
`stolen_share`, the part of the cores' time that the host of a virtual machine says it gave to
others meanwhile, of which no queue knows.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from answers import Answer, Expected, Search
from loops import Joiner, closed_loop, open_loop
from options import above, at_least, check_json
from queueing import poisson, queue, service_under_load
from run import tidy

from knnfast import _C, Batcher, Index, _files
from knnfast.benchmark.machine import machine, stolen_seconds
from knnfast.benchmark.timing import Choice, best_choice
from knnfast.benchmark.topk import CPU_PEERS, Peer, faiss_module, make_rows


def percentiles(latencies: np.ndarray) -> dict[str, Any]:
    p50, p99, p999 = np.percentile(latencies * 1e3, [50, 99, 99.9])
    return {"p50_ms": p50, "p99_ms": p99, "p999_ms": p999, "queries": len(latencies)}


def cores() -> int:
    return os.cpu_count() or 1


@contextmanager
def one_thread_a_search() -> Iterator[None]:
    before = _C.num_threads()
    _C.set_num_threads(1)
    try:
        yield
    finally:
        _C.set_num_threads(before)


@dataclass
class Server:
    """What answers queries, and what is known about it."""

    name: str
    search: Search
    judge: Callable[[list[Answer]], bool]  # whether they are exact
    queue: int | None = None  # searches at a time of the queue beside it; None: it has none
    peer: bool = False


def offer(
    server: Server,
    queries: np.ndarray,
    args: argparse.Namespace,
    rate: float,
    seed: int,
    predicted: bool,
) -> dict[str, Any]:
    """One open loop in stretches, and what the queues predict for its arrivals."""
    answers: list[Answer] = []
    clients = server.queue or 1

    def back_to_back() -> float:
        latencies, _, got = closed_loop(server.search, queries, clients, args.seconds / 20)
        answers.extend(got)
        return float(np.median(latencies))

    least = args.peer_least if server.peer else args.least
    seconds = max(args.seconds, least / rate) / args.stretches
    latencies, stolen, passed = [], 0.0, 0.0
    stretches = [poisson(rate, seconds, seed * args.stretches + i) for i in range(args.stretches)]
    services: dict[str, list[float]] = {"queue": [], "loaded_queue": []}
    for arrivals in stretches:
        if predicted:
            services["queue"].append(back_to_back())
        taken, start = stolen_seconds(), time.perf_counter()
        taken_by_each, spans, got = open_loop(server.search, queries, args.clients, arrivals)
        stolen += stolen_seconds() - taken
        passed += time.perf_counter() - start
        latencies.append(taken_by_each)
        answers.extend(got)
        if predicted:
            services["loaded_queue"].append(service_under_load(spans, clients))
    row = percentiles(np.concatenate(latencies)) | {"stolen_share": stolen / passed / cores()}
    if predicted:
        services["queue"].append(back_to_back())
        for name, each in services.items():
            service = float(np.nanmedian(each))
            if not rate * service < clients:  # it could not serve all
                continue
            expected = [queue(arrivals, service, clients) for arrivals in stretches]
            row[name] = percentiles(np.concatenate(expected))
            row[name] |= {"servers": clients, "service_ms": service * 1e3}
            row[f"p99_over_{name}"] = row["p99_ms"] / row[name]["p99_ms"]
    return row | {"exact": server.judge(answers)}


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round in the middle, of an even number the later one; those without a queue come last."""
    by = sorted(rounds, key=lambda each: (each.get("p99_over_queue", np.inf), each["p99_ms"]))
    return by[len(by) // 2]


def measure(
    server: Server, queries: np.ndarray, args: argparse.Namespace, rates: list[float] | None
) -> Iterator[dict[str, Any]]:
    """Closed loop with one client, with as many as its queue serves and with all; then open loops.

    `rates` None: no open loops; empty: `--loads` of what the queue can serve, then of what the
    server can. A peer: those of `rates` that it can serve, and `--loads` of that.
    """
    rows = {}
    for clients in sorted({1, server.queue or 1, args.clients}):
        closed_loop(server.search, queries, clients, 0.3)
        latencies, rate, answers = closed_loop(server.search, queries, clients, args.seconds)
        rows[clients] = {"server": server.name, "loop": "closed", "clients": clients, "qps": rate}
        rows[clients] |= percentiles(latencies) | {"exact": server.judge(answers)}
        yield rows[clients]
    if rates is None:
        return
    saturation = rows[args.clients]["qps"]
    capacity = rows[server.queue or args.clients]["qps"]
    if server.peer:
        rates = [rate for rate in rates if rate <= 0.95 * saturation]
    if server.peer or not rates:
        tops = [saturation] if server.peer else [capacity, saturation]
        rates = [*rates, *(share * most for most in tops for share in args.loads)]
        rates = [
            rate for i, rate in enumerate(rates) if not np.isclose(rate, rates[:i], 0.05).any()
        ]
    for rate in sorted(rates):
        row = {"server": server.name, "loop": "open", "clients": args.clients,
               "offered_qps": rate, "of_saturation": rate / saturation}  # fmt: skip
        if server.queue is not None:
            row["of_queue"] = rate / capacity
        if rate > 0.95 * saturation:
            yield row | {"skipped": f"saturates at {saturation:.0f} queries/s"}
            continue
        predicted = server.queue is not None and not server.peer and rate < capacity
        seeds = range(1 if server.peer else args.rounds)
        rounds = [offer(server, queries, args, rate, seed, predicted) for seed in seeds]
        told = ("stolen_share", "p99_ms", "p99_over_queue", "p99_over_loaded_queue")
        row |= middle(rounds)
        row["exact"] = all(each["exact"] for each in rounds)
        yield row | {"rounds": [{name: r[name] for name in told if name in r} for r in rounds]}


def options() -> argparse.Namespace:
    """The script's options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loop")
    parser.add_argument("--least", type=int, default=2000, help="queries of an open loop")
    parser.add_argument("--peer-least", type=int, default=200, help="queries of FAISS's open loops")
    parser.add_argument("--stretches", type=int, default=10, help="of an open loop")
    parser.add_argument("--rounds", type=int, default=3, help="of each open loop but FAISS's")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9],
                        help="shares of what the queue, then the server can serve")  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = ("n", "d", "k", "clients", "least", "peer_least", "stretches", "rounds")
    at_least(parser, 1, **{name: getattr(args, name) for name in names})
    above(parser, 0, seconds=args.seconds)
    for load in args.loads:
        if not 0 < load <= 1:
            parser.error(f"--loads must be above 0 and at most 1, got {load:g}")
    if args.k > (most := int(not_denied(args.n).sum())):
        parser.error(f"--k must be at most the {most} rows that the filter allows, got {args.k}")
    check_json(parser, args.json)
    return args


def not_denied(n: int) -> np.ndarray:
    return np.random.default_rng(0).random(n) >= 0.01


def main() -> None:
    args = options()
    try:
        faiss = faiss_module()
    except ImportError as error:
        raise SystemExit(f"load.py: {error}") from None
    index = Index(args.d)
    vectors, queries = make_rows(args.n, args.d)
    index.add(vectors)
    allowed = not_denied(args.n)
    denied = np.packbits(~allowed, bitorder="little")
    lock = threading.Lock()
    report: dict[str, Any] = {
        "kind": "load", "machine": machine(),
        "command": shlex.join(["python", "bench/load.py", *sys.argv[1:]]),
        "shape": {"n": args.n, "d": args.d, "k": args.k, "clients": args.clients,
                  "rounds": args.rounds, "round": "middle", "stretches": args.stretches},
        "rows": [],
    }  # fmt: skip

    def ours(q: np.ndarray) -> Any:
        return index.search(q, args.k)

    def filtered(q: np.ndarray) -> Any:
        return index.search(q, args.k, deny=denied)

    def one_at_a_time(q: np.ndarray) -> Any:
        with lock:
            return index.search(q, args.k)

    def batched(q: np.ndarray) -> Any:
        return batcher.search(q, args.k)

    def record(server: Server, rates: list[float] | None) -> list[dict[str, Any]]:
        rows = []
        for row in measure(server, queries, args, rates):
            rows.append(tidy(row))
            print(json.dumps(rows[-1]), flush=True)
        report["rows"] += rows
        if args.json:
            _files.write_json(args.json, report)
        return rows

    right = Expected(ours, vectors, queries, args.k)
    rows = record(Server("Index.search", ours, right.same, 1), [])
    rates = [row["offered_qps"] for row in rows if row["loop"] == "open"]
    with one_thread_a_search():
        record(Server("Index.search, a thread each", ours, right.same, cores()), rates)
    for name in ("faiss-flat", "faiss-sq-fp16"):
        peer = CPU_PEERS[name](vectors, "ip")

        def theirs(q: np.ndarray, peer: Peer = peer) -> Any:
            faiss.omp_set_num_threads(1)  # of the calling thread alone
            return peer.call(q[None], args.k)

        record(Server(name, theirs, right.best, cores(), peer=True), rates)
        if name == "faiss-flat":
            ways = peer.choices(cores(), args.clients)
            best = best_choice(ways, lambda peer=peer: peer.call(queries[: args.clients], args.k))
            way = next(way for way in ways if way.row() == best)

            def together(q: np.ndarray, peer: Peer = peer, way: Choice = way) -> Any:
                way.set()  # OpenMP's threads are those of the calling thread alone
                return peer.call(q, args.k)

            joiner = Joiner(together)
            record(Server(f"{name}, joined", joiner.search, right.best), None)
            del joiner, together
        del peer, theirs
    record(Server("Index.search, one at a time", one_at_a_time, right.same), None)
    with Batcher(index) as batcher:
        record(Server("Batcher", batched, right.same), None)
    right = Expected(filtered, vectors, queries, args.k, allowed)
    record(Server("Index.search with a filter", filtered, right.same, 1), rates)


if __name__ == "__main__":
    main()
