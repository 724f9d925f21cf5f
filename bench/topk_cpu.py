"""Every CPU target of the search engine, measured: `python bench/topk_cpu.py [--part NAME ...]`.

Each part times knnfast and its peers on the same rows, taking turns (knnfast.benchmark.timing),
checks the answers, and compares the times with targets: a value, its limit, and whether it is met.
Peers run in whichever way is fastest here: one thread or all, FAISS also with BLAS or without, in
shards, with any of its selectors.
Parts add up in one file of bench/results/, so that they can be run one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from options import check_json

from knnfast import _C, _files
from knnfast.benchmark.machine import fastest_read, machine, stolen_seconds
from knnfast.benchmark.timing import Choice, Local, Timing, best_choice, interleave, ratio
from knnfast.benchmark.topk import CPU_PEERS, Peer, Truth, faiss_module, make_rows
from knnfast.search import Index

N, D = 1_000_000, 512
# The peers that a batch is compared with, and how many times longer than us they must take.
LIMITS = {
    1: {"faiss-flat": 5, "faiss-sq-fp16": 3, "usearch-exact": 5},
    8: {"faiss-flat": 8},
    64: {"faiss-flat": 15, "torch-fp32": 6},
    256: {"faiss-flat": 4, "torch-fp32": 4},
}


def target(name: str, value: float, limit: float, at_least: bool = False) -> dict[str, Any]:
    """One target; `at_least`: the value must reach the limit instead of staying below it."""
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"  {'met' if met else 'MISSED'}  {name}: {value:.3g} ({sign} {limit})", flush=True)
    return {"target": name, "value": value, "limit": f"{sign} {limit}", "met": bool(met)}


def against(
    calls: dict[str, Callable[[], Any]], seconds: float = 6.0
) -> tuple[dict[str, Timing], Callable[[str, str], float]]:
    """Timings of calls that take turns for about so long, and (a, b) -> a's time over b's."""
    timings = interleave({name: Local(call) for name, call in calls.items()}, 0.1, 25, 5, seconds)
    for name, timing in timings.items():
        print(f"{name}: {timing.percentile(50):.3f} ms", flush=True)
    return timings, lambda a, b: ratio(timings[a], timings[b])


def undisturbed(call: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    """10,000 runs, in the round of all in which a virtual machine's host took the least away."""
    cells = []
    for _ in range(rounds):
        taken, start = stolen_seconds(), time.perf_counter()
        timing = Timing(np.array([Local(call).turn(0)[0] for _ in range(10_000)]), np.empty(0))
        share = (stolen_seconds() - taken) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        cells.append(timing.row() | {"stolen_share": share})
        print(f"  p99 {timing.percentile(99):.3f} ms, {share:.1%} stolen", flush=True)
    return min(cells, key=lambda cell: cell["stolen_share"])


def filled(rows: np.ndarray, **options: Any) -> Index:
    """An index of these rows."""
    index = Index(rows.shape[1], **options)
    index.add(rows)
    return index


def check(
    index: Index, rows: np.ndarray, queries: np.ndarray, batches: tuple[int, ...], kind: str
) -> None:
    """Refuse to time an index that answers wrongly.

    Where all scores are equal that takes their order: the lowest ids.
    """
    truth = Truth(rows, queries, 10)
    for batch in batches:
        ids = index.search(queries[:batch], 10)[1]
        assert truth.judge(ids)["exact"], (kind, batch)
        if kind in ("ties", "orthogonal"):
            assert (ids == np.arange(10)).all(), (kind, batch)


def sticker_embeddings(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Real embeddings: the bundled encoder's of n stickers, drawn from the bundle's 1,725 and each
    changed in its own way, and 256 more as queries. They take some minutes, and stay in out/."""
    path = Path("out") / f"sticker-embeddings-{n}.npy"
    if not path.exists():
        import torch
        from PIL import Image

        from knnfast import Database, encoders
        from knnfast.diffusion.augment import STICKERS, augmented
        from knnfast.pipeline import BUNDLES

        bundle = BUNDLES / "stickers"
        database = Database.open(bundle / "databases" / "stickers")
        encoder = encoders.load_encoder(bundle / "encoder")
        images = np.stack([np.asarray(database.thumbnail(i)) for i in database.ids])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        random = torch.Generator().manual_seed(0)
        vectors = np.empty((n + 256, encoder.dim), np.float16)
        for part in np.split(vectors, range(256, len(vectors), 256)):
            chosen = torch.randint(len(pixels), (len(part),), generator=random)
            changed = augmented(pixels[chosen], random, STICKERS)
            stickers = [Image.fromarray(x) for x in changed.permute(0, 2, 3, 1).numpy()]
            part[:] = encoder.encode_images(stickers).vectors
        path.parent.mkdir(exist_ok=True)
        np.save(path, vectors)
    vectors = np.load(path)
    return vectors[:n], vectors[n:].astype(np.float32)


def embeddings() -> dict[str, Any]:
    """100k real embeddings of 512 dimensions: of each sticker about 58 versions."""
    return versus("embeddings", sticker_embeddings(100_000), (1, 8, 64, 256))


def synthetic(kind: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """1M x 512 of one kind of data."""
    return versus(kind, make_rows(N, D, kind), batches)


def versus(
    kind: str, data: tuple[np.ndarray, np.ndarray], batches: tuple[int, ...]
) -> dict[str, Any]:
    """One kind of data against every peer, k = 10, and k = 100 against k = 10."""
    rows, queries = data
    index = filled(rows)
    truth = Truth(rows, queries, 100)
    times: dict[str, Any] = {}
    targets = []
    for batch in batches:
        q = queries[:batch]
        calls: dict[str, Callable[[], Any]] = {
            f"knnfast/{batch}/{k}": (lambda k=k: index.search(q, k))  # noqa: B023
            for k in (10, 100)
        }
        if batch == 1:
            calls["read_fp16"] = fastest_read(rows)
        for k in (10, 100):
            assert truth.judge(index.search(q, k)[1])["exact"], (kind, batch, k)
        timings, over = against(calls)
        times |= {name: timing.row() for name, timing in timings.items()}
        for k in (10, 100):
            before = index.stats
            index.search(q, k)
            after = index.stats
            for name in ("rows_stopped", "rows_opened", "rows_rescored"):
                times[f"knnfast/{batch}/{k}"][name] = (after[name] - before[name]) / batch
        if batch == 1:
            value = over("knnfast/1/10", "read_fp16")
            targets.append(target(f"{kind} batch 1 / reading the FP16 bytes", value, 0.7))
        value = over(f"knnfast/{batch}/100", f"knnfast/{batch}/10")
        targets.append(target(f"{kind} batch {batch}: k=100 / k=10", value, 1.4))
    for name in sorted({name for batch in batches for name in LIMITS[batch]}):
        peer: Peer | None = CPU_PEERS[name](rows, "ip")
        for batch in (batch for batch in batches if name in LIMITS[batch]):
            cell = times[f"{name}/{batch}/10"] = beside(name, peer, index, truth, queries[:batch])
            what = f"{kind} batch {batch}: {name} / knnfast"
            targets.append(target(what, cell["over_ours"], LIMITS[batch][name], at_least=True))
        peer = None  # one of them in memory at a time
    return {"times": times, "targets": targets}


def beside(name: str, peer: Peer, index: Index, truth: Truth, q: np.ndarray) -> dict[str, Any]:
    """A peer at its best, in turns with ours."""

    def call() -> Any:
        return peer.call(q, 10)

    fastest = best_choice(peer.choices(_C.num_threads(), len(q)), call)
    verdict = truth.judge(peer.search(q, 10))
    assert verdict["regret"] < 1e-3, (name, len(q), verdict)
    timings, over = against({"knnfast": lambda: index.search(q, 10), name: call})
    ours = {"over_ours": over(name, "knnfast"), "ours_p50_ms": timings["knnfast"].percentile(50)}
    return timings[name].row() | fastest | verdict | ours


def shapes_of_data() -> dict[str, Any]:
    """A shared mean against the same rows centred; ties everywhere against the FP16 scan."""
    times: dict[str, Any] = {}
    targets = []
    batches = (1, 8, 64)
    plain, queries = make_rows(N, D, "isotropic")
    indexes = {"isotropic": filled(plain), "fp16": filled(plain, scan="fp16")}
    for name, index in indexes.items():
        check(index, plain, queries, batches, name)
    for kind, base, limit in (
        ("mean", "isotropic", 1.05), ("ties", "fp16", 2), ("orthogonal", "fp16", 2)
    ):  # fmt: skip
        rows, q = make_rows(N, D, kind)
        indexes[kind] = filled(rows)
        check(indexes[kind], rows, q, batches, kind)
        del rows
        for batch in batches:
            timings, over = against(
                {base: lambda: indexes[base].search(queries[:batch], 10),  # noqa: B023
                 kind: lambda: indexes[kind].search(q[:batch], 10)},  # noqa: B023
            )  # fmt: skip
            for name, timing in timings.items():
                times[f"{name}/{batch}/10 beside {kind}"] = timing.row()
            targets.append(target(f"batch {batch}: {kind} / {base}", over(kind, base), limit))
        del indexes[kind]
    return {"times": times, "targets": targets}


def selecting(faiss: Any, flat: Peer, selectors: dict[str, Any]) -> Peer:
    """FAISS's flat index with one of some selectors, in any of the ways to run it."""
    chosen = list(selectors.values())[:1]

    def call(q: np.ndarray, k: int) -> np.ndarray:
        return flat.call(q, k, params=faiss.SearchParameters(sel=chosen[0]))

    def choose(selector: Any, way: Choice) -> None:
        chosen[0] = selector
        way.set()

    def choices(threads: int, batch: int) -> list[Choice]:
        return [
            Choice(partial(choose, selector, way), way.threads, f"{name} {way.options}".strip())
            for name, selector in selectors.items()
            # Not in shards: its selectors are of the ids of one index. Choices of two queries and
            # more have none.
            for way in flat.choices(threads, max(batch, threads))
        ]

    return Peer(call, call, choices)


RUNS = {"a thousandth in one run": 1000, "a tenth in one run": 10}


def filters() -> dict[str, Any]:
    """1M x 512 of which a filter allows some, at random or in one run, against all of them, and
    against FAISS with whichever of its selectors is fastest, as ours is with a bitset or a list."""
    rows, queries = make_rows(N, D, "isotropic")
    index = filled(rows)
    faiss = faiss_module()
    flat = CPU_PEERS["faiss-flat"](rows, "ip")
    order = np.random.default_rng(0).permutation(N)
    times: dict[str, Any] = {}
    targets = []
    shares = {"1 in 1,000": 1000, "1 in 100": 100, "1 in 10": 10, "1 in 2": 2}
    cases = {name: order[: N // share] for name, share in shares.items()}
    cases |= {name: np.arange(N // share) for name, share in RUNS.items()}
    for name, allowed in cases.items():
        allowed = np.sort(allowed)
        bits = np.packbits(np.isin(np.arange(N), allowed), bitorder="little")
        truth = Truth(rows[allowed], queries, 10)
        place = np.full(N, -1)
        place[allowed] = np.arange(len(allowed))
        for batch in (1, 64):
            q = queries[:batch]
            selectors = {"bitmap": faiss.IDSelectorBitmap(bits)}
            if len(allowed) * batch <= 10_000_000:  # of more rows it takes seconds
                selectors["array"] = faiss.IDSelectorArray(allowed)
            if name in RUNS:
                selectors["range"] = faiss.IDSelectorRange(0, len(allowed))
            peer = selecting(faiss, flat, selectors)
            allow = [bits]
            forms = [
                Choice(partial(allow.__setitem__, 0, form), _C.num_threads(), kind)
                for kind, form in {"bitset": bits, "ids": allowed}.items()
            ]
            calls = {
                "all rows": lambda: index.search(q, 10),  # noqa: B023
                "knnfast": lambda: index.search(q, 10, allow=allow[0]),  # noqa: B023
                "faiss-flat": lambda: peer.call(q, 10),  # noqa: B023
            }
            ours = best_choice(forms, calls["knnfast"])
            fastest = best_choice(peer.choices(_C.num_threads(), batch), calls["faiss-flat"])
            assert truth.judge(place[calls["knnfast"]()[1]])["exact"], (name, batch)
            verdict = truth.judge(place[calls["faiss-flat"]()])
            assert verdict["regret"] < 1e-3, (name, batch, verdict)
            timings, over = against(calls)
            for who, timing in timings.items():
                times[f"{who}/{batch}/10, {name}"] = timing.row()
            times[f"knnfast/{batch}/10, {name}"] |= ours
            times[f"faiss-flat/{batch}/10, {name}"] |= fastest | verdict
            what, costs = f"{name} allowed, batch {batch}", over("knnfast", "all rows")
            gains = over("faiss-flat", "knnfast")
            targets.append(target(f"{what}: knnfast / without a filter", costs, 1.1))
            targets.append(target(f"{what}: faiss-flat / knnfast", gains, 1, at_least=True))
    return {"times": times, "targets": targets}


def small() -> dict[str, Any]:
    """100k x 512 against reading its codes, with its tail; 1,000 x 64 against FAISS."""
    rows, queries = make_rows(100_000, D, "isotropic")
    index = filled(rows)
    check(index, rows, queries, (1,), "100k")
    codes = np.ones((100_000, D), np.uint8)
    calls = undisturbed(lambda: index.search(queries[:1], 10))
    timings, over_read = against(
        {"100k": lambda: index.search(queries[:1], 10), "read_codes": fastest_read(codes)}
    )
    few, q = make_rows(1000, 64, "isotropic")
    ours, peer = filled(few), CPU_PEERS["faiss-flat"](few, "ip")
    check(ours, few, q, (1,), "1k")
    assert (peer.search(q[:1], 10) == ours.search(q[:1], 10)[1]).all()
    fastest = best_choice(peer.choices(_C.num_threads(), 1), lambda: peer.call(q[:1], 10))
    pair, over = against(
        {"1k": lambda: ours.search(q[:1], 10), "faiss-flat": lambda: peer.call(q[:1], 10)}
    )
    times = {name: timing.row() for name, timing in {**timings, **pair}.items()}
    times["100k, 10,000 runs"] = calls
    times["faiss-flat"] |= fastest
    targets = [
        target("100k batch 1 / reading its int8 bytes", over_read("100k", "read_codes"), 1.8),
        target("100k batch 1: p99 / median of 10,000", calls["p99_ms"] / calls["p50_ms"], 2),
        target("1,000 x 64 batch 1 / FAISS flat", over("1k", "faiss-flat"), 1),
    ]
    return {"times": times, "targets": targets}


MEMORY = """
import json, pathlib, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from knnfast.search import Index

def kib(name):
    rows = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(r for r in rows if r.startswith(name)).split()[1])

n, d, folder, how = 1_000_000, 512, sys.argv[1], sys.argv[2]
rng = np.random.default_rng(0)
turn = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
turn *= np.arange(1, d + 1, dtype=np.float32)[:, None] ** -0.8  # embeddings' spectrum, about
x = np.empty((n, d), np.float16)
for first in range(0, n, 65536):
    part = rng.standard_normal((min(65536, n - first), d), dtype=np.float32)
    x[first : first + 65536] = part @ turn if how == "few directions" else part
ids = rng.permutation(4 * n)[:n] if how == "own ids" else None
scan = "fp16" if how == "fp16" else "auto"

def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

def filled():
    index = Index(d, scan=scan)
    index.add(x[:16]); index.remove(range(16)); index.compact()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    seconds = timed(lambda: index.add(x, ids))
    return index, seconds, kib("VmRSS") - before, kib("VmHWM") - before

# Memory that nobody used lately is the operating system's, on a virtual machine its host's, to find
# first: so the same bytes are also only written once, and added again to the memory of the first.
halves = [np.empty(n * d * (2 if scan == "fp16" else 3) // 2, np.uint8) for _ in range(2)]
touch_s = timed(lambda: list(ThreadPoolExecutor(2).map(lambda half: half.fill(1), halves)))
index, fresh_s, end, peak = filled()
del index, halves
index, add_s, _, _ = filled()
once = 4 * d * -(-n // 2**18)  # one mean of d floats for each segment of 256 MiB
once += (4 + 2) * d * d * (how == "few directions")  # the rotation, in floats and whole numbers
out = {"add_s": add_s, "fresh_add_s": fresh_s, "fresh_touch_s": touch_s,
       "bytes_per_row": (index.nbytes - once) / n, "peak": peak / end,
       "rss_per_row": end * 1024 / n}
if how == "automatic ids":
    index.save(folder)
    opens = []
    for _ in range(20):
        opens.append(timed(lambda: Index.open(folder)))
    out["open_ms"] = sorted(opens)[len(opens) // 2] * 1e3
print(json.dumps(out))
"""


def memory() -> dict[str, Any]:
    """Bytes a row, the peak while adding, the time to add and to open; one process each."""
    times, targets = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for how, limit in (("automatic ids", 3 * D + 16), ("own ids", 3 * D + 48),
                           ("fp16", 2 * D + 16), ("few directions", 3 * D + 16)):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, os.path.join(folder, "ix"), how],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            cell = times[how] = json.loads(done.stdout)
            targets += [
                target(
                    f"{how}: bytes a row, but for means and rotation", cell["bytes_per_row"], limit
                ),
                target(f"{how}: peak while adding / end", cell["peak"], 1.15),
                target(f"{how}: seconds to add 1M x 512", cell["add_s"], 3),
                target(
                    f"{how}: the same to memory that nobody used lately", cell["fresh_add_s"], 3
                ),
            ]
        targets.append(target("open with mmap, ms", times["automatic ids"]["open_ms"], 50))
    return {"times": times, "targets": targets}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "isotropic": lambda: synthetic("isotropic", (1, 8, 64)),
    "isotropic-256": lambda: synthetic("isotropic", (256,)),
    "clustered": lambda: synthetic("clustered", (1, 8, 64)),
    "clustered-256": lambda: synthetic("clustered", (256,)),
    "embeddings": embeddings,
    "data": shapes_of_data,
    "filters": filters,
    "small": small,
    "memory": memory,
}


def main() -> None:
    """Run the parts asked for and save each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_json(parser, args.json)
    about = machine()
    folder = Path(__file__).parent / "results"
    path = args.json or folder / f"topk-cpu-{about['isa']}-{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    saved = _files.read_json(path) if path.exists() else {}
    for name in args.part or list(PARTS):
        command = f"python bench/topk_cpu.py --part {name}"
        saved[name] = {"machine": about, "command": command} | PARTS[name]()
        _files.write_json(path, saved)
    missed = [t["target"] for part in saved.values() for t in part["targets"] if not t["met"]]
    print(f"{path}: {len(missed)} targets are missed", *missed, sep="\n  ")


if __name__ == "__main__":
    main()
