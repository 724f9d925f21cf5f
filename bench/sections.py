"""The sections of docs/performance.md: a kind of result each, as a table and where it was taken.

Also how the pages write a table, a time and a ratio.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from measure import MEASUREMENTS
from regression import false_alarms, slower

from knnfast.benchmark.faiss_reference import way
from knnfast.benchmark.machine import PEERS_ON_GPU


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


def kernels(result: dict[str, Any]) -> str:
    """What it ran on, in a word or two: the GPU, or the CPU's instruction set."""
    return result["machine"].get("gpu", result["machine"]["isa"])


CI = Path(__file__).resolve().parent.parent / ".ci" / "run"
TITLES = {
    "faiss_reference": "Top-k beside FAISS",
    "search_targets": "Targets of the search engine",
    "load": "A service under load",
    "gate": "The regression gate",
}


def measurement(result: dict[str, Any]) -> str:
    """What was measured: its file's name without machine and date."""
    return result["file"].removesuffix(".json").partition(f"-{result['machine']['isa']}-")[0]


def title(result: dict[str, Any]) -> str:
    """A section's heading, which no other section has."""
    return f"{TITLES.get(result['kind'], measurement(result))} ({kernels(result)})"


def command(result: dict[str, Any], words: str = "") -> str:
    """What makes the result anew, in Markdown: on a CPU measure.py, which puts it in its place."""
    name, json = measurement(result), r" --json \S+"
    usual = "python " + re.sub(json, "", MEASUREMENTS.get(name, ""))
    found = re.sub(json, "", words or result["command"])
    if result["machine"]["device"] == "cpu" and name in MEASUREMENTS and (words or found == usual):
        return f"`make measure ONLY={name}`, that is `{found}`"
    return f"`{found}`"


def where(result: dict[str, Any]) -> str:
    about = result["machine"]
    place = about.get("gpu", about["cpu"])
    versions = about["versions"]
    shown = ("python", "numpy", "torch", "faiss-cpu", "usearch", "diffusers", *PEERS_ON_GPU)
    names = [f"{name} {versions[name]}" for name in shown if name in versions]
    names += about.get("blas", [])
    names += [f"{name}={value}" for name, value in about.get("settings", {}).items()]
    memory = f"{about['memory_gib']} GiB, " if "memory_gib" in about else ""
    return (
        f"{place}, {about['cores']} cores, {memory}kernels {about['isa']}, "
        f"{about['threads']} threads; {about['date']}, commit {about['commit']}; "
        + ", ".join(names)
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


def skipped(result: dict[str, Any]) -> list[str]:
    """Why peers are missing, where some are."""
    if not result["skipped"]:
        return []
    return [
        "Not measured: " + "; ".join(f"{n} {why}" for n, why in result["skipped"].items()) + "."
    ]


def faiss_section(result: dict[str, Any], picture: str) -> str:
    shape = result["shape"]
    rows = [
        [row["name"], f"{row['n']:,}", str(row["batch"]), f"{row['runs']:,}", ms(row["p50_ms"]),
         ms(row["p90_ms"]), ms(row["p99_ms"]), way(row), verdict(row),
         "" if row["name"] == "knnfast" else times(row["ratio"]), f"{row['ceiling_share']:.0%}"]
        for row in result["rows"]
    ]  # fmt: skip
    batches = ",".join(map(str, shape["batch"]))
    words = f"knnfast bench --n {shape['n']} --d {shape['d']} --batch {batches} --k {shape['k']}"
    if result["machine"]["device"] != "cpu":
        words += " --device cuda"
    return "\n\n".join(
        [
            f"{command(result, words)} (results/{result['file']}).  \n{where(result)}.  \n"
            + ceilings(result),
            table(["", "rows", "batch", "runs", "p50 ms", "p90", "p99", "threads", "answers",
                   "over ours", "of ceiling"], rows),
            *skipped(result),
            f"![latency against batch and against rows]({picture})",
        ]
    )  # fmt: skip


def noted(ratio: float, beside: float | None, ours: float) -> str:
    """A ratio, with our time in the turns that it is of where that was another one."""
    if beside is None or 0.8 < beside / ours < 1.25:
        return times(ratio)
    return f"{times(ratio)}; ours took {ms(beside)} then"


def rival(name: str, peer: dict[str, Any], ours: float) -> str:
    """A peer in a row's last cell; with our time beside it where that was another one."""
    if "ratio" not in peer:
        return f"{name}: {peer['skipped']}"
    notes = [noted(peer["ratio"], peer.get("ours_p50_ms"), ours)]
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
            [f"{row['shape']}: {row['case']}", row["backend"], str(row.get("runs", "")),
             ms(row["p50_ms"]), ms(row.get("p90_ms")), ms(row.get("p99_ms")), share, peak,
             verdict(row), "<br>".join(peers)]
        )  # fmt: skip
    failed = [
        f"- {' '.join(row[part] for part in ('op', 'shape', 'case', 'backend') if part in row)}: "
        f"{row['failed']}" for row in result.get("failed", [])
    ]  # fmt: skip
    # knnfast.benchmark.timing.peak_mib sees no more on a GPU
    memory = "peak MiB" if result["machine"]["device"] == "cpu" else "peak MiB of torch's allocator"
    return "\n\n".join(
        [
            f"{command(result)} (results/{result['file']}).  \n{where(result)}.  \n"
            + ceilings(result),
            table(["case", "backend", "runs", "p50 ms", "p90", "p99", "of ceiling", memory,
                   "checked", "peers: p50 ms (over ours)"], rows),
            *(["Failed, and not measured:", "\n".join(failed)] if failed else []),
        ]
    )  # fmt: skip


def search_targets_section(result: dict[str, Any]) -> str:
    rows = [
        [part, body["machine"]["commit"], target["target"],
         f"{target['value']:.4g}" + behind(body["times"], target["target"]),
         target["limit"], "yes" if target["met"] else "**no**"]
        for part, body in result["parts"].items() for target in body["targets"]
    ]  # fmt: skip
    return "\n\n".join(
        [
            command(result, "python bench/topk_cpu.py [--part PART]")
            + f" (results/{result['file']}).  \n{where(result)}.",
            table(["part", "commit", "target", "measured", "limit", "met"], rows),
        ]
    )


def behind(cells: dict[str, Any], target: str) -> str:
    """What is behind a figure: of a ratio to a peer both times of the turns that it is of, and how
    the peer ran; of an index' size what its process grew by."""
    how, _, rest = target.partition(": ")
    if rest.startswith("bytes a row"):
        return f" (its process grew by {cells[how]['rss_per_row']:,.0f})"
    found = re.fullmatch(r"\S+ batch (\d+): (\S+) / knnfast", target)
    cell = cells.get(f"{found[2]}/{found[1]}/10", {}) if found else {}
    if "ours_p50_ms" not in cell:
        return ""
    return f" ({ms(cell['p50_ms'])} over {ms(cell['ours_p50_ms'])} ms; {way(cell)} threads)"


def joins(result: dict[str, Any]) -> bool:
    """Whether searches that wait were answered together; in older results each was for itself."""
    return any("of_queue" in row for row in result["rows"])


def half_of_queue(result: dict[str, Any]) -> dict[str, Any] | None:
    """Our searches at half of what those can serve that are answered one by one.

    In older results all were: that was the server's saturation.
    """
    return next(
        (row for row in result["rows"] if row["server"] == "Index.search" and row["loop"] == "open"
         and abs(row.get("of_queue", row["of_saturation"]) - 0.5) < 0.01
         and "p99_over_queue" in row), None,
    )  # fmt: skip


def at_half(result: dict[str, Any]) -> str:
    """All rounds of that row, in words."""
    row = half_of_queue(result)
    if row is None:
        return ""
    over = [
        f"{r['p99_over_queue']:.2f}" if "p99_over_queue" in r else "no prediction"
        for r in row["rounds"]
    ]
    return f" (Index.search at half of the queue's rate, p99 over the queue's: {', '.join(over)})"


# Queues other than the one that serves as long as searches take back to back, and how their service
# was measured; the first is of older results.
OTHER_SERVICES = {"paced_queue": "after pauses", "loaded_queue": "under that load"}


def legend(result: dict[str, Any], peers: bool) -> list[str]:
    """What the columns of a service under load mean, as a list."""
    shape = result["shape"]
    middle = shape.get("round") == "middle"
    return [
        "- `a thread each`: with `set_num_threads(1)`, a search on each core. `one at a time`: a "
        "lock keeps searches from being joined. `joined`: a few lines of Python answer those that "
        "wait with one search of FAISS.",
        "- The clients, in Python, run on the same cores as the searches.",
        f"- Each open loop is run {shape['rounds']} times; the table has the one "
        + ("in the middle by p99 over the queue's" if middle else
           "in which `stolen` was least, of equals the first (an older run)")
        + f"{at_half(result)}.",
        "- `stolen`: the part of the cores' time that this virtual machine's host says it gave to "
        "others meanwhile. Where it is always 0 the host may not tell.",
        "- The M/D/c queue has a server for all cores, or one a thread, and serves the same "
        "arrivals one by one, each for as long as a search takes back to back "
        + ("between the stretches of the loop (the median)" if middle else
           "just before and just after its stretch")
        + "; `busy` follows from that service. The queue's rate is what so many clients got back "
        "to back, once before all loops. Where more is offered than it can serve it predicts "
        "nothing"
        + (", while searches that wait are answered together." if joins(result) else "."),
        "- Between arrivals the rows leave the caches that they hardly fit into, so a search takes "
        "longer than back to back: the last column has the queue of such searches.",
        "- Every stretch begins with an empty queue, which at high load makes its p99 less than "
        "that of an endless one.",
        "- " + ("FAISS is offered shares of its own saturation, and of our rates those that it can "
                "serve, for one round, with no queue beside it." if peers else
                "In this older run FAISS's clients had all of OpenMP's threads each, for which it "
                "is slower."),
        "- p99 is of 100 queries or more, p99.9 of 1,000.",
    ]  # fmt: skip


def load_section(result: dict[str, Any], picture: str) -> str:
    shape = result["shape"]
    own = "loaded_queue" if any("loaded_queue" in row for row in result["rows"]) else "paced_queue"
    rows = []
    for row in result["rows"]:
        loop = "closed" if row["loop"] == "closed" else f"{row['of_saturation']:.0%}"
        rate = row.get("qps", row.get("offered_qps"))
        name = row["server"] if row.get("exact", True) else f"{row['server']}, **inexact**"
        cells = [name, loop, str(row["clients"]), f"{rate:,.0f}"]
        if "skipped" in row:
            rows.append([*cells, "", "", "", "", "", "", row["skipped"], ""])
            continue
        use = {
            name: row["offered_qps"] * row[name]["service_ms"] / 1e3 / row[name]["servers"]
            for name in ("queue", own) if name in row
        }  # fmt: skip
        queues = [
            f"{ms(row[name]['p99_ms'])} ({row[f'p99_over_{name}']:.2f}x; {use[name]:.0%} busy)"
            if use.get(name, 1) < 1 else "" for name in ("queue", own)
        ]  # fmt: skip
        unpredicted = row["server"].startswith(("Batcher", "faiss"))
        if row["loop"] == "open" and not any(queues) and not unpredicted:
            queues[0] = "none: more than it can serve"
        load = f"{row['of_queue']:.0%}" if "of_queue" in row else ""
        taken = f"{row['stolen_share']:.0%}" if "stolen_share" in row else ""
        least = {"p50_ms": 1, "p99_ms": 100, "p999_ms": 1000}  # queries that such a share needs
        times = (ms(row[p]) if row["queries"] >= n else "" for p, n in least.items())
        rows.append([*cells, f"{row['queries']:,}", *times, taken, load, *queues])
    peers = any(row["server"].startswith("faiss") and row["loop"] == "open" and "p99_ms" in row
                for row in result["rows"])  # fmt: skip
    return "\n\n".join(
        [
            f"{command(result)} (results/{result['file']}): {shape['n']:,} x {shape['d']}, "
            f"k {shape['k']}, single queries of {shape['clients']} client threads.  \n"
            f"{where(result)}.",
            table(["server", "loop (share of own saturation)", "clients", "queries/s", "queries",
                   "p50 ms", "p99", "p99.9", "stolen", "share of the queue's rate",
                   "M/D/c predicts p99 (ours over it)", f"with the service {OTHER_SERVICES[own]}"],
                  rows),
            "\n".join(legend(result, peers)),
            f"![p99 against offered load]({picture})",
        ]
    )  # fmt: skip


def gate_section(result: dict[str, Any]) -> str:
    threshold = result["threshold"]
    ops = list(result["unchanged"][0])

    def cells(runs: list[dict[str, list[float]]], op: str) -> list[str]:
        medians = [statistics.median(run[op]) for run in runs]
        alarms = sum(slower(run[op], threshold) for run in runs)
        return [f"{min(medians):.3f} to {max(medians):.3f}", f"{alarms} of {len(runs)}"]

    rows = [[op, *cells(result["unchanged"], op), *cells(result["slowed"], op)] for op in ops]
    runs = len(result["unchanged"])
    ci = float(re.search(r"THRESHOLD=([\d.]+)", CI.read_text())[1])
    heard = [slower(ratios, ci) for run in result["slowed"] for ratios in run.values()]
    bound = 1 - 0.05 ** (1 / runs)
    at = [slower(ratios, threshold) for run in result["slowed"] for ratios in run.values()]
    found, sure = sum(at), ""
    if all(at):
        sure = f", which bounds the rate of those missed at about {1 - 0.05 ** (1 / len(at)):.0%}"
    false = false_alarms(result)
    rate = "a false alarm."
    if not false:
        rate = f"an alarm; that bounds the rate at about {bound:.0%} with 95 % confidence."
    return "\n\n".join(
        [
            f"{command(result)} (results/{result['file']}). An op raises the alarm when most "
            f"of up to {result['measurements']} measurements of ours over the base, each with new "
            f"processes, exceed {threshold:g}. Below, the medians of the runs of the unchanged "
            f"tree, then of those slowed down by {result['slowdown'] - 1:.0%}. {false} of "
            f"{runs} unchanged runs gave {rate} Of the {len(heard)} slowed ops {found} gave the "
            f"alarm{sure}. CI allows {ci:g}: above that are {sum(heard)} of "
            f"the {len(heard)} slowed ops. An op is timed at its small shape, in one thread's CPU "
            f"time: what is lost by waiting or by threads the gate does not see.  \n"
            f"{where(result)}.",
            table(["op", "unchanged", "alarms", "slowed down", "alarms"], rows),
        ]
    )  # fmt: skip
