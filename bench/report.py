"""README's and docs/performance.md's figures, from bench/results/*.json: `make report`.

    python bench/report.py [--check]

No figure is typed: what run.py, load.py, regression.py and `knnfast bench --json` wrote is the
source. `--check` writes nothing and exits with 1 when a page differs from what would be written.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from regression import slower  # noqa: E402
from shapes import SHAPES  # noqa: E402

from knnfast import _files  # noqa: E402
from knnfast.benchmark.faiss_reference import FaissReport, way  # noqa: E402
from knnfast.benchmark.plot import require_matplotlib, save_plot  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
# Shapes of sweeps and of CI: docs/performance.md has them, README does not.
SWEEPS = ("fold-", "small-", "service-1m-", "sampling-1024-")
SMALL_PRINT = {name for shapes in SHAPES.values() for name in shapes
               if name == "ci" or name.startswith(SWEEPS)}  # fmt: skip
START, END = "<!-- results -->", "<!-- end of results -->"
CPU_TIME = ", CPU time of one thread"  # what run.py --clock cpu says of a case
KINDS = ("faiss_reference", "ops", "claims", "load", "gate")


@dataclass(frozen=True)
class GpuTarget:
    """A share of the machine's ceiling that every row of these cases has to reach on a GPU."""

    text: str
    op: str
    backend: str
    cases: tuple[str, ...]  # how the cases begin, or the shapes' names
    least: float

    def judges(self, row: dict[str, Any]) -> bool:
        """Whether it is about this row."""
        ours = (row["op"], row["backend"]) == (self.op, self.backend)
        return ours and (row["case"].startswith(self.cases) or row["shape"] in self.cases)


GPU_TARGETS = (
    GpuTarget("FP16 search at batch 1 to 16: at least 85 % of the rows' bytes at the read rate",
              "topk", "graph fp16", ("batch 1,", "batch 8,", "batch 16,"), 0.85),
    GpuTarget("neighbour attention at B 16 and 64: at least 65 % of its floor",
              "neighbour_attention", "graph fused", ("gpu-16", "gpu-64"), 0.65),
    GpuTarget("transition step at B 16 and 64: at least 80 % of one pass over the logits",
              "transition_step", "graph dense", ("gpu-16", "gpu-64"), 0.80),
)  # fmt: skip


def results() -> list[dict[str, Any]]:
    """All results, each with `file`; sorted by kind and name."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        result = _files.read_json(path)
        if result and all("claims" in part for part in result.values() if isinstance(part, dict)):
            parts = {n: part for n, part in result.items() if isinstance(part, dict)}
            about = [part["machine"] for part in parts.values()]
            commits = ", ".join(dict.fromkeys(m["commit"] for m in about))  # each part has its own
            result = {
                "kind": "claims", "machine": about[0] | {"commit": commits}, "parts": parts,
            } | ({"note": result["note"]} if "note" in result else {})  # fmt: skip
        if result.get("kind") not in KINDS:
            raise ValueError(f"{path}: kind must be one of {KINDS}, got {result.get('kind')!r}")
        found.append(result | {"file": path.name})
    # the newest first, of each op; of one day the later file name (a better instruction set)
    found.sort(key=lambda r: (r["machine"]["date"], r["file"]), reverse=True)
    return sorted(found, key=lambda r: (KINDS.index(r["kind"]), r["file"].partition("-")[0]))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(ratio: float) -> str:
    """How many times longer they take; bold where we lose."""
    text = f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"
    return text if ratio >= 1 else f"**{text}**"


def where(result: dict[str, Any]) -> str:
    about = result["machine"]
    place = about.get("gpu", about["cpu"])
    versions = about["versions"]
    shown = ("python", "numpy", "torch", "faiss-cpu", "usearch", "diffusers")
    names = [f"{name} {versions[name]}" for name in shown if name in versions]
    names += about.get("blas", [])
    names += [f"{name}={value}" for name, value in about.get("settings", {}).items()]
    memory = f"{about['memory_gib']} GiB, " if "memory_gib" in about else ""
    return (
        f"{place}, {about['cores']} cores, {memory}kernels {about['isa']}, "
        f"{about['threads']} threads; {about['date']}, commit {about['commit']}; "
        + ", ".join(names)
        + (f".  \n{result['note'].rstrip('.')}" if "note" in result else "")
    )


def ceilings(result: dict[str, Any]) -> str:
    if "ceilings" not in result:
        return "Ceilings were not measured in this run."
    limits = result["ceilings"]
    torchs = ""
    if limits.get("torch_matmul_tflop_s", 1e9) < 0.8 * limits["matmul_tflop_s"]:
        torchs = f" (torch's own {limits['torch_matmul_tflop_s']:.3g}: its peers are slower for it)"
    return (
        f"Measured ceilings: read {limits['read_gb_s']:.3g} GB/s, copy {limits['copy_gb_s']:.3g} "
        f"GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s{torchs}."
    )


def verdict(row: dict[str, Any]) -> str:
    if "exact" in row:
        return "exact" if row["exact"] else f"recall {row['recall']:.4f}"
    if "tokens_that_differ" in row:
        return f"{row['tokens_that_differ']:.2%} of tokens differ"
    if "error" in row:
        return f"error {row['error']:.1e}"
    return row.get("checked", "another random stream")


def faiss_section(result: dict[str, Any], picture: str) -> str:
    shape = result["shape"]
    rows = [
        [row["name"], f"{row['n']:,}", str(row["batch"]), ms(row["p50_ms"]), ms(row["p90_ms"]),
         ms(row["p99_ms"]), way(row), verdict(row),
         "" if row["name"] == "knnfast" else times(row["ratio"]), f"{row['ceiling_share']:.0%}"]
        for row in result["rows"]
    ]  # fmt: skip
    batches = ",".join(map(str, shape["batch"]))
    return "\n\n".join(
        [
            "## Top-k beside FAISS: `knnfast bench`",
            f"`knnfast bench --n {shape['n']} --d {shape['d']} --batch {batches} --k {shape['k']}` "
            f"(results/{result['file']}).  \n{where(result)}.  \n{ceilings(result)}",
            table(["", "rows", "batch", "p50 ms", "p90", "p99", "threads", "answers",
                   "over ours", "of ceiling"], rows),
            f"![latency against batch and against rows]({picture})",
        ]
    )  # fmt: skip


def rival(name: str, peer: dict[str, Any], ours: float) -> str:
    """A peer in a row's last cell; with our time beside it where that was another one."""
    if "ratio" not in peer:
        return f"{name}: {peer['skipped']}"
    beside = peer.get("ours_p50_ms", ours)
    notes = [times(peer["ratio"])]
    if not 0.8 < beside / ours < 1.25:
        notes.append(f"ours took {ms(beside)} then")
    if peer.get("answers") == "differ":
        notes.append("other answers")
    return f"{name} {ms(peer['p50_ms'])} ({'; '.join(notes)})"


def ops_section(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        peers = [rival(name, peer, row["p50_ms"]) for name, peer in row["peers"].items()]
        share = f"{row['ceiling_share']:.0%}" if "ceiling_share" in row else ""
        peak = "" if row.get("peak_mib") is None else f"{row['peak_mib']:.3g}"
        rows.append(
            [f"{row['shape']}: {row['case']}", row["backend"], ms(row["p50_ms"]),
             ms(row.get("p90_ms")), ms(row.get("p99_ms")), share, peak, verdict(row),
             "<br>".join(peers)]
        )  # fmt: skip
    failed = [
        f"- {' '.join(row[part] for part in ('op', 'shape', 'case', 'backend') if part in row)}: "
        f"{row['failed']}" for row in result.get("failed", [])
    ]  # fmt: skip
    ops = sorted({row["op"] for row in [*result["rows"], *result.get("failed", [])]})
    # knnfast.benchmark.timing.peak_mib sees no more on a GPU
    memory = "peak MiB" if result["machine"]["device"] == "cpu" else "peak MiB of torch's allocator"
    return "\n\n".join(
        [
            f"## {', '.join(ops)}",
            f"`{result['command']}` (results/{result['file']}).  \n{where(result)}.  \n"
            + ceilings(result),
            table(["case", "backend", "p50 ms", "p90", "p99", "of ceiling", memory, "checked",
                   "peers: p50 ms (over ours)"], rows),
            *(["Failed, and not measured:", "\n".join(failed)] if failed else []),
        ]
    )  # fmt: skip


def claims_section(result: dict[str, Any]) -> str:
    rows = [
        [part, body["machine"]["commit"], claim["claim"], f"{claim['value']:.4g}", claim["limit"],
         "yes" if claim["holds"] else "**no**"]
        for part, body in result["parts"].items() for claim in body["claims"]
    ]  # fmt: skip
    commands = dict.fromkeys(body["command"] for body in result["parts"].values())
    return "\n\n".join(
        [
            "## Promises of the search engine",
            ", ".join(f"`{c}`" for c in commands)
            + f" (results/{result['file']}).  \n{where(result)}.",
            table(["part", "commit", "promise", "measured", "limit", "holds"], rows),
        ]
    )


def at_half(result: dict[str, Any]) -> str:
    """All rounds of our search at half of saturation, in words."""
    row = next(
        (r for r in result["rows"] if r["server"] == "Index.search" and r["loop"] == "open"
         and abs(r["of_saturation"] - 0.5) < 0.01), None,
    )  # fmt: skip
    if row is None:
        return ""
    each = ", ".join(
        f"{r['p99_over_queue']:.2f} with {r['stolen_share']:.1%} stolen" for r in row["rounds"]
    )
    return f" (Index.search at half of saturation, p99 over the queue's in each: {each})"


def load_section(result: dict[str, Any], picture: str) -> str:
    shape = result["shape"]
    rows = []
    for row in result["rows"]:
        loop = "closed" if row["loop"] == "closed" else f"{row['of_saturation']:.0%}"
        rate = row.get("qps", row.get("offered_qps"))
        cells = [row["server"], loop, str(row["clients"]), f"{rate:,.0f}"]
        if "skipped" in row:
            rows.append([*cells, "", "", "", "", row["skipped"], ""])
            continue
        queues = [
            f"{ms(row[name]['p99_ms'])} ({row[f'p99_over_{name}']:.2f}x)" if name in row else ""
            for name in ("queue", "paced_queue")
        ]
        taken = f"{row['stolen_share']:.0%}" if "stolen_share" in row else ""
        times = (ms(row[p]) for p in ("p50_ms", "p99_ms", "p999_ms"))
        rows.append([*cells, *times, taken, *queues])
    return "\n\n".join(
        [
            "## A service under load",
            f"`{result['command']}` (results/{result['file']}): {shape['n']:,} x {shape['d']}, "
            f"k {shape['k']}, single queries of {shape['clients']} client threads; Batcher with "
            f"a deadline of {shape['deadline_ms']:g} ms, {result['batch_mean']:g} queries a search "
            f"in the mean.  \n{where(result)}.",
            table(["server", "loop (share of own saturation)", "clients", "queries/s", "p50 ms",
                   "p99", "p99.9", "stolen", "M/D/c predicts p99 (ours over it)",
                   "with the service after pauses"], rows),
            "`stolen`: the part of the cores' time that this virtual machine's host gave to others "
            "meanwhile; no queue knows of it, so each open loop is that one of "
            f"{shape['rounds']} rounds in which it was least{at_half(result)}. The queue "
            "serves the same arrivals, each as long as a search takes back to back just before and "
            "after its stretch of the loop; every stretch begins with an empty queue, of which p99 "
            "at 90 % load is about a quarter less than in one long loop. After pauses like those "
            "between arrivals a search takes longer.",
            f"![p99 against offered load]({picture})",
        ]
    )  # fmt: skip


def false_alarms(result: dict[str, Any]) -> int:
    """Runs of the unchanged tree in which an op gave the alarm."""
    runs, threshold = result["unchanged"], result["threshold"]
    return sum(any(slower(ratios, threshold) for ratios in run.values()) for run in runs)


def gate_section(result: dict[str, Any]) -> str:
    threshold = result["threshold"]
    ops = list(result["unchanged"][0])

    def cells(runs: list[dict[str, list[float]]], op: str) -> list[str]:
        medians = [statistics.median(run[op]) for run in runs]
        alarms = sum(slower(run[op], threshold) for run in runs)
        return [f"{min(medians):.3f} to {max(medians):.3f}", f"{alarms} of {len(runs)}"]

    rows = [[op, *cells(result["unchanged"], op), *cells(result["slowed"], op)] for op in ops]
    runs = len(result["unchanged"])
    bound = 1 - 0.05 ** (1 / runs)
    false = false_alarms(result)
    rate = "a false alarm."
    if not false:
        rate = f"an alarm; that bounds the rate at about {bound:.0%} with 95 % confidence."
    return "\n\n".join(
        [
            "## The regression gate",
            f"`{result['command']}` (results/{result['file']}). An op raises the alarm when most "
            f"of up to {result['measurements']} measurements of ours over the base, each with new "
            f"processes, exceed {threshold:g}. Below, the medians of the runs of the unchanged "
            f"tree, then of those slowed down by {result['slowdown'] - 1:.0%}. {false} of {runs} "
            f"unchanged runs gave {rate}  \n{where(result)}.",
            table(["op", "unchanged", "alarms", "slowed down", "alarms"], rows),
        ]
    )  # fmt: skip


def lost(found: list[dict[str, Any]]) -> str:
    """Every comparison in which a peer is faster."""
    lines = []
    for result in found:
        isa = result["machine"]["isa"]
        for row in result.get("rows", []):
            if result["kind"] == "faiss_reference" and row.get("ratio", 1) < 1:
                lines.append(
                    f"- {row['name']} at {row['n']:,} rows, batch {row['batch']} ({isa}): "
                    f"{times(row['ratio'])}"
                )
            for name, peer in (row.get("peers") or {}).items():
                # Another backend of ours is no peer.
                if peer.get("ratio", 1) < 1 and not name.startswith("knnfast "):
                    lines.append(
                        f"- {row['op']} {row['shape']} ({row['case']}; {isa}), {name}: "
                        f"{times(peer['ratio'])}"
                    )
    return "\n".join(lines) or "None."


WHY_LOST = (
    "The attention's rows here have more neighbours than folding is for (the paper's 10 give 11 "
    "embeddings): beyond 0.9 D scores the op itself takes the unfolded path, and near that the "
    "work of both forms is the same, which a library of matrix products does faster."
)
WHY_BROKEN = (
    "Ratios depend on the machine as much as on us. One query reads the codes once, a quarter of "
    "FP32's bytes and half of FP16's: where a peer gets all of the memory's rate, and rows have no "
    "structure by which a scan could stop early, the ratio ends near 4 and 2. A batch of 64 "
    "multiplies: against a BLAS at its full rate int8 gives the ratio of the two rates, 4 with "
    "VNNI and somewhat less with AVX2, times what the peer needs beside its products; AMX "
    "multiplies int8 another four times as fast. On clustered rows and on embeddings stops spare "
    "two thirds of that, and a larger k costs more of it: k rows near a query must have been seen "
    "before any can be passed over."
)


def broken(found: list[dict[str, Any]]) -> str:
    """Every promise of the search engine that does not hold."""
    return "\n".join(
        f"- {claim['claim']} ({result['machine']['isa']}): {claim['value']:.4g}, promised "
        f"{claim['limit']}"
        for result in found if result["kind"] == "claims"
        for body in result["parts"].values()
        for claim in body["claims"] if not claim["holds"]
    ) or "None."  # fmt: skip


def load_rows(found: list[dict[str, Any]], server: str, loop: str) -> list[dict[str, Any]]:
    return [row | {"isa": r["machine"]["isa"]} for r in found if r["kind"] == "load"
            for row in r["rows"] if row["server"] == server and row["loop"] == loop]  # fmt: skip


def goals(found: list[dict[str, Any]]) -> str:
    """Targets beside what was measured."""
    rows = []

    def add(target: str, value: str, met: bool | None) -> None:
        rows.append([target, value, {True: "yes", False: "no", None: "not measured"}[met]])

    half = [
        r for r in load_rows(found, "Index.search", "open") if abs(r["of_saturation"] - 0.5) < 0.01
    ]
    for row in half:
        value = row["p99_over_queue"]
        add("p99 of search at half of saturation at most 1.3 times an M/D/c queue's, "
            + row["isa"], f"{value:.2f}", value <= 1.3)  # fmt: skip
    ours, batched = (
        [r for r in load_rows(found, server, "closed") if r["clients"] > 2]
        for server in ("Index.search", "Batcher")
    )
    for one, many in zip(ours, batched, strict=True):
        factor = many["qps"] / one["qps"]
        add("Batcher at least doubles the throughput of batch-1 callers at saturation, "
            + one["isa"], f"{factor:.2f}x", factor >= 2)  # fmt: skip
    for result in (r for r in found if r["kind"] == "claims"):
        claims = [claim for part in result["parts"].values() for claim in part["claims"]]
        held = sum(claim["holds"] for claim in claims)
        add(f"every promise of the search engine, {result['machine']['isa']}",
            f"{held} of {len(claims)}" + (", but see the note there" if "note" in result else ""),
            held == len(claims))  # fmt: skip
    for gate in (r for r in found if r["kind"] == "gate"):
        false = false_alarms(gate)
        add(
            "no false alarm of the gate in 20 unchanged runs",
            f"{false} in {len(gate['unchanged'])}",
            false == 0 and len(gate["unchanged"]) >= 20,
        )
        heard = all(
            slower(ratios, gate["threshold"]) for run in gate["slowed"] for ratios in run.values()
        )
        add(f"an alarm for every op slowed down by {gate['slowdown'] - 1:.0%}",
            "all" if heard else "not all", heard)  # fmt: skip
    on_gpu = [row for r in found if r["kind"] == "ops" and r["machine"]["device"] != "cpu"
              for row in r["rows"]]  # fmt: skip
    failed = [row for r in found if r["kind"] == "ops" for row in r.get("failed", [])]
    if failed:
        add("every op's answer right, none failing", f"{len(failed)} failed", False)
    for target in GPU_TARGETS:
        worst = min((row["ceiling_share"] for row in on_gpu if target.judges(row)), default=None)
        if worst is None:
            add(f"GPU: {target.text}", "", None)
        else:
            add(f"GPU: {target.text}", f"{worst:.0%} at worst", worst >= target.least)
    return table(["target", "measured", "met"], rows)


def gpu_note(found: list[dict[str, Any]]) -> str:
    if any(r["machine"]["device"] != "cpu" for r in found):
        return "Results with a GPU name in their machine line were taken on that GPU."
    return (
        "**Nothing on this page has run on a GPU.** The CUDA kernels are compiled for sm_80, "
        "sm_90a and sm_100 and run on an emulator in the tests, the Triton kernels in its "
        "interpreter; `make gpu` measures them where there is one."
    )


def performance(found: list[dict[str, Any]]) -> str:
    """docs/performance.md."""
    parts = [
        "# Performance",
        "Generated by `make report` from `bench/results/*.json`; a test fails when it differs.",
        "Every answer of ours was checked before it was timed; contenders took turns in one run; "
        "search peers had the better of one thread and all, FAISS's flat index also that of BLAS "
        "and its own loops (above batch 32: BLAS), torch's ops had all threads. Times are "
        "milliseconds; `x` is their time over ours, the median over the turns that the two took "
        "(above 1 ours is faster, **bold** where we lose); where ours took another time in these "
        "turns than the one printed, by a quarter or more, the cell says so. `other answers`: the "
        "peer's result is not the reference's, because it draws other random numbers or computes "
        "less precisely. Machines differ: run the commands on yours. " + gpu_note(found),
        "`of ceiling` is the time that the plain algorithm's bytes and operations need at the "
        "machine's measured rates, whichever is longer, over the time taken. For a search they are "
        "the FP16 rows, read from memory once, and 2 · rows · d · batch operations at the rate of "
        "an FP32 (GPU: FP16) matmul. It can exceed 100 %: the int8 scan reads half of these bytes, "
        "which makes up to 200 %, and multiplies int8; rows that fit into the caches do not come "
        "from memory; and where other work ran beside the measurement of the rates, they came out "
        "lower than what the machine gives at quieter moments.",
        "## Targets",
        goals(found),
        "## Rows we lose",
        WHY_LOST,
        lost(found),
        "## Promises that do not hold",
        WHY_BROKEN,
        broken(found),
    ]
    sections: dict[str, Callable[[dict[str, Any]], str]] = {
        "faiss_reference": lambda r: faiss_section(r, Path(r["file"]).stem + ".png"),
        "ops": ops_section,
        "claims": claims_section,
        "load": lambda r: load_section(r, Path(r["file"]).stem + ".png"),
        "gate": gate_section,
    }
    return "\n\n".join([*parts, *(sections[r["kind"]](r) for r in found)]) + "\n"


def embeddings(result: dict[str, Any]) -> list[str]:
    """Real embeddings beside the peers, as bench/topk_cpu.py timed them."""
    cells = result["parts"]["embeddings"]["times"]
    names = ["knnfast", *dict.fromkeys(n.split("/")[0] for n in cells if "over_ours" in cells[n])]
    batches = [n.split("/")[1] for n in cells if n.startswith("knnfast/") and n.endswith("/10")]

    def cell(name: str, batch: str) -> str:
        at = cells.get(f"{name}/{batch}/10")
        if at is None:
            return ""
        return ms(at["p50_ms"]) + (f" ({times(at['over_ours'])})" if "over_ours" in at else "")

    about = result["parts"]["embeddings"]["machine"]
    return [
        "The same for 100,000 real embeddings of 512 dimensions (images, by the bundled encoder), "
        f"where scans stop early; {about['cpu']}, {about['threads']} threads, {about['isa']}, "
        f"{about['date']}. Reading their FP16 bytes takes {ms(cells['read_fp16']['p50_ms'])} ms. "
        "On your machine: `python bench/topk_cpu.py --part embeddings`.",
        table(["batch", *names], [[b, *(cell(name, b) for name in names)] for b in batches]),
    ]


def summary(found: list[dict[str, Any]]) -> str:
    """The part of README between the markers: the newest run of each shape by the wall's clock."""
    parts = []
    for result in [r for r in found if r["kind"] == "faiss_reference"][:1]:
        shape = result["shape"]
        rows = [r for r in result["rows"] if r["n"] == shape["n"]]
        names = list(dict.fromkeys(r["name"] for r in rows))
        cell = {
            (r["name"], r["batch"]): f"{ms(r['p50_ms'])}"
            + ("" if r["name"] == "knnfast" else f" ({times(r['ratio'])})")
            for r in rows
        }
        about = result["machine"]
        place = about.get("gpu", about["cpu"])
        parts += [
            f"p50 in milliseconds (and its time over ours, median over rounds), {shape['n']:,} x "
            f"{shape['d']}, k {shape['k']}, answers checked, FAISS at its best threads and with "
            f"BLAS where faster; {place}, "
            f"{about['threads']} threads, {about['isa']}, {about['date']}. On your machine: "
            "`knnfast bench`.",
            table(["batch", *names],
                  [[str(b), *(cell.get((name, b), "") for name in names)] for b in shape["batch"]]),
        ]  # fmt: skip
    for result in [r for r in found if "embeddings" in r.get("parts", {})][:1]:
        parts += embeddings(result)
    lines, seen = [], set()
    for result in (r for r in found if r["kind"] == "ops"):
        for row in (row for row in result["rows"] if row["op"] != "topk"):  # has its own table
            rivals = {n: p["ratio"] for n, p in row["peers"].items()
                      if "ratio" in p and not n.startswith(("knnfast ", "base "))}  # fmt: skip
            shown = row["shape"] not in SMALL_PRINT and not row["case"].endswith(CPU_TIME)
            told = (row["op"], row["shape"], row["case"])
            if rivals and shown and told not in seen:
                seen.add(told)
                against = ", ".join(f"{times(v)} {n}" for n, v in rivals.items())
                case = f"{row['shape']}: {row['case']}"
                kernels = result["machine"]["isa"]
                lines.append([row["op"], case, kernels, ms(row["p50_ms"]), against])
    if lines:
        parts.append(table(["op", "shape", "kernels", "p50 ms", "peers' time over ours"], lines))
    parts.append(
        "All rows, and the service under load: "
        "[docs/performance.md](docs/performance.md). " + gpu_note(found)
    )
    return "\n\n".join(parts)


def readme(found: list[dict[str, Any]]) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"README.md must hold {START} and {END}")
    return f"{head}{START}\n{summary(found)}\n{END}{tail}"


def pages() -> dict[Path, str]:
    """Every generated page and its text."""
    found = results()
    return {ROOT / "README.md": readme(found), DOCS / "performance.md": performance(found)}


def source(file: str) -> str:
    """What a plot carries, to tell which results it shows."""
    return hashlib.sha256((RESULTS / file).read_bytes()).hexdigest()


def plots() -> dict[Path, dict[str, Any]]:
    """Every generated plot and its result."""
    return {
        DOCS / f"{Path(r['file']).stem}.png": r
        for r in results()
        if r["kind"] in ("faiss_reference", "load")
    }


def draw_load(result: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    figure = require_matplotlib()(figsize=(7, 4.4), layout="constrained")
    panel = figure.subplots()
    servers = list(dict.fromkeys(row["server"] for row in result["rows"]))
    for i, server in enumerate(servers):
        rows = [r for r in result["rows"]
                if r["server"] == server and r["loop"] == "open" and "p99_ms" in r]  # fmt: skip
        at = [r["offered_qps"] for r in rows]
        panel.plot(at, [r["p99_ms"] for r in rows], f"C{i}o-", label=f"{server}, p99")
        panel.plot(at, [r["p50_ms"] for r in rows], f"C{i}.:", label=f"{server}, p50")
        if queue := [r["queue"]["p99_ms"] for r in rows if "queue" in r]:
            panel.plot(at[: len(queue)], queue, f"C{i}--", alpha=0.6, label=f"{server}: M/D/c, p99")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("offered load, queries/s")
    panel.set_ylabel("latency from arrival, ms")
    panel.grid(True, which="both", alpha=0.2)
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata=metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when pages differ")
    args = parser.parse_args()
    differ = [p for p, text in pages().items() if not p.exists() or p.read_text("utf-8") != text]
    if args.check:
        print("\n".join(f"{p.relative_to(ROOT)} differs: make report" for p in differ))
        return int(bool(differ))
    for path, text in pages().items():
        _files.write_atomic(path, text.encode())
    for path, result in plots().items():
        metadata = {"Source": source(result["file"])}
        if result["kind"] == "load":
            draw_load(result, path, metadata)
        else:
            fields = ("machine", "ceilings", "shape", "rows", "skipped")
            save_plot(FaissReport(**{name: result[name] for name in fields}), path, metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
