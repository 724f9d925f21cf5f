"""Targets beside what was measured: what is met, what is missed, what is lost to peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from regression import OPS, false_alarms, slower
from sections import OTHER_SERVICES, half_of_queue, joins, kernels, table, times
from topk_cpu import PARTS


@dataclass(frozen=True)
class Target:
    """What every row of some cases has to reach.

    Args:
        shapes: the names of its shapes.
        value: of a row: a share of the machine's ceiling, say, or a peer's time over ours; None
            where the row does not tell.
        unit: how the value is written.
        cases: how its cases begin.
    """

    text: str
    op: str
    backend: str
    shapes: tuple[str, ...]
    least: float
    value: Callable[[dict[str, Any]], float | None]
    unit: str = ".1f"
    cases: tuple[str, ...] = ("",)

    def judges(self, row: dict[str, Any]) -> bool:
        """Whether it is about this row."""
        ours = (row["op"], row["backend"]) == (self.op, self.backend)
        return ours and row["shape"] in self.shapes and row["case"].startswith(self.cases)

    def row(self, rows: list[dict[str, Any]], prefix: str = "", suffix: str = "") -> list[str]:
        """Its row of the table: the worst of those that it judges."""
        text = prefix + self.text + suffix
        values = [self.value(row) for row in rows if self.judges(row)]
        known = [value for value in values if value is not None]
        if not known:
            return [text, "", "not measured"]
        worst = min(known)
        seen = {
            (row["shape"], case)
            for row in rows if self.judges(row)
            for case in self.cases if row["case"].startswith(case)
        }  # fmt: skip
        whole = known == values and seen == set(product(self.shapes, self.cases))
        met = "no" if worst < self.least else "yes" if whole else "not all measured"
        return [text, f"{worst:{self.unit}}", met]


def over(peer: str, field: str = "") -> Callable[[dict[str, Any]], float | None]:
    """A peer's time over ours, or another figure of the peer's over ours."""

    def value(row: dict[str, Any]) -> float | None:
        theirs = row["peers"].get(peer, {})
        if not field:
            return theirs.get("ratio")
        known = theirs.get(field) is not None and row.get(field)
        return theirs[field] / row[field] if known else None

    return value


def of_ceiling(row: dict[str, Any]) -> float | None:
    """The time that the ceilings need over ours."""
    return row.get("ceiling_share")


CPU_TARGETS = (
    Target("neighbour attention: at least 4 times as fast as projections and SDPA in torch",
           "neighbour_attention", "fused", ("sampling-256",), 4, over("torch-sdpa")),
    Target("neighbour attention: at least 4 times as fast as these, compiled",
           "neighbour_attention", "fused", ("sampling-256",), 4, over("torch-compile-sdpa")),
    Target("transition step: at least 10 times as fast as diffusers'",
           "transition_step", "dense", ("sampling-1024",), 10, over("diffusers")),
    Target("head and transition step of a run of 100 steps: at least 30 times as fast as torch's "
           "head and diffusers' step",
           "sample_head", "sparse", ("sampling-1024",), 30, over("torch head + diffusers")),
    Target("transition loss with its gradient: at least 10 times as fast as VQ-Diffusion's "
           "formulation",
           "transition_loss", "fused", ("training-1024",), 10, over("torch-log-space")),
    Target("transition loss with its gradient: at most 1/8 of that formulation's peak memory "
           "(theirs over ours)",
           "transition_loss", "fused", ("training-1024",), 8, over("torch-log-space", "peak_mib")),
    Target("transition loss with its gradient: at least twice as fast as its closed form in torch",
           "transition_loss", "fused", ("training-1024",), 2, over("torch-closed-form")),
    Target("sampling with the sticker model: at least 1.15 times as fast as with plain forms",
           "sample", "fused", ("stickers", "stickers-1"), 1.15, over("torch-plain"), ".2f"),
    Target("sampling at K 4096, L 1024, 100 steps: at least 1.5 times as fast as with plain forms",
           "sample", "fused", ("sampling-1024",), 1.5, over("torch-plain"), ".2f"),
)  # fmt: skip
GPU_TARGETS = (
    Target("FP16 search of 1M and 10M rows at batch 1 and 16: at least 85 % of their bytes at the "
           "read rate",
           "topk", "graph fp16",
           ("gpu-1m-512", "gpu-1m-768", "gpu-10m-512", "gpu-10m-768"),
           0.85, of_ceiling, ".0%", ("batch 1,", "batch 16,")),
    Target("neighbour attention at B 16 and 64: at least 65 % of its floor",
           "neighbour_attention", "graph fused", ("gpu-16", "gpu-64"), 0.65, of_ceiling, ".0%"),
    Target("transition step at B 16 and 64: at least 80 % of one pass over the logits",
           "transition_step", "graph dense", ("gpu-16", "gpu-64"), 0.80, of_ceiling, ".0%"),
)  # fmt: skip


def lost(found: list[dict[str, Any]]) -> list[str]:
    """Every comparison in which a peer is faster."""
    lines = []
    for result in found:
        isa = kernels(result)
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
    return lines


WHY_LOST = (
    "The attention's rows here have more neighbours than folding is for (the paper's 10 give 11 "
    "embeddings): beyond 0.9 D scores the op itself takes the unfolded path, and near that the "
    "work of both forms is the same, which a library of matrix products does faster. Folding "
    "itself makes keys and values first and multiplies them into the weights: it always takes "
    "longer than they do alone, once in a run, and is repaid at every step."
)
WHY_MISSED = (
    "Ratios depend on the machine as much as on us. One query reads the codes once, a quarter of "
    "FP32's bytes and half of FP16's: where a peer gets all of the memory's rate, and rows have no "
    "structure by which a scan could stop early, the ratio ends near 4 and 2. A batch of 64 "
    "multiplies: against a BLAS at its full rate int8 gives the ratio of the two rates, 4 with "
    "VNNI and somewhat less with AVX2, times what the peer needs beside its products; AMX "
    "multiplies int8 another four times as fast. On clustered rows and on embeddings stops spare "
    "two thirds of that, and a larger k spares less: k rows near a query must have been seen "
    "before any can be passed over; the embeddings are of about 58 versions of each sticker, so "
    "the 100th neighbour is another sticker. Where a filter allows one run of a thousand rows, "
    "what a query costs before and after the scan (its codes and bounds, selection) takes longer "
    "than the scan itself, and FAISS's range selector hands the run to BLAS. Rows near a few "
    "directions, as embeddings are, are coded in rotated coordinates: d multiplications for each "
    "of d coordinates of every row."
)


def missed(found: list[dict[str, Any]]) -> list[str]:
    """Every target of the search engine that is missed."""
    return [
        f"- {target['target']} ({result['machine']['isa']}): {target['value']:.4g}, to be "
        f"{target['limit']}"
        for result in found if result["kind"] == "search_targets"
        for body in result["parts"].values()
        for target in body["targets"] if not target["met"]
    ]  # fmt: skip


def load_targets(result: dict[str, Any]) -> list[list[str]]:
    """What a service under load has to show, as rows of the targets."""
    isa, rows = result["machine"]["isa"], []
    if half := half_of_queue(result):
        others = [f"p99 is {half['p99_ms']:.1f} ms"]
        others += [
            f"{half[f'p99_over_{name}']:.2f} with the service {service}"
            for name, service in OTHER_SERVICES.items() if name in half
        ]  # fmt: skip
        others += [
            f"at half of what {row['clients']} clients get, {row['offered_qps']:,.0f}/s, "
            + ("more than such a queue can serve, " if row.get("of_queue", 0) >= 1 else "")
            + f"p99 is {row['p99_ms']:.1f} ms"
            for row in result["rows"] if row["server"] == "Index.search" and row is not half
            and abs(row.get("of_saturation", 0) - 0.5) < 0.01 and "p99_ms" in row
        ]  # fmt: skip
        if not joins(result):
            others.append("before searches that wait were joined")
        value = half["p99_over_queue"]
        text = f"{value:.2f} ({'; '.join(others)})"
        rows.append([
            f"p99 of search, {half['offered_qps']:,.0f}/s: half of what searches one by one "
            f"get; at most 1.3 times an M/D/c queue's, service measured back to back, {isa}",
            text, "yes" if value <= 1.3 else "no",
        ])  # fmt: skip
        ways = (", a thread each", " with a filter")
        for server in (f"Index.search{way}" for way in ways):
            if row := nearest_half(result, server):
                rows.append([
                    f"the same of {server}, {row['offered_qps']:,.0f}/s: {of_queue(row):.0%} of "
                    f"what the queue can serve, {isa}",
                    f"{row['p99_over_queue']:.2f} (p99 is {row['p99_ms']:.1f} ms)",
                    "yes" if row["p99_over_queue"] <= 1.3 else "no",
                ])  # fmt: skip
    closed = {(r["server"], r["clients"]): r["qps"] for r in result["rows"] if "qps" in r}
    clients = result["shape"]["clients"]
    servers = [(name, clients) for name in ("Index.search, one at a time", "Batcher")]
    if all(server in closed for server in servers):
        callers, batched = (closed[server] for server in servers)
        joined = closed["Index.search", clients]
        rows.append([
            f"Batcher: at least twice the throughput of {clients} threads that call Index.search "
            f"with a query each, {isa}",
            f"{batched / joined:.2f}x ({batched:,.0f}/s and {joined:,.0f}/s): search answers those "
            "that wait together by itself, and on a large CPU index the Batcher hands on to it",
            "yes" if batched >= 2 * joined else "no",
        ])  # fmt: skip
        rows.append([
            f"Batcher: at least twice that of {clients} threads whose searches of a query each run "
            f"one at a time ({callers:,.0f}/s), {isa}",
            f"{batched / callers:.2f}x; Index.search without a Batcher {joined / callers:.2f}x",
            "yes" if batched >= 2 * callers else "no",
        ])  # fmt: skip
    return rows


def of_queue(row: dict[str, Any]) -> float:
    """What is offered over what the queue can serve; in older results that is what search can."""
    return row.get("of_queue", row["of_saturation"])


def nearest_half(result: dict[str, Any], server: str) -> dict[str, Any] | None:
    """A server's row with a queue's prediction, offered about half of what that queue can serve."""
    judged = [
        row for row in result["rows"]
        if row["server"] == server and "p99_over_queue" in row
        and abs(of_queue(row) - 0.5) < 0.2
    ]  # fmt: skip
    return min(judged, key=lambda row: abs(of_queue(row) - 0.5), default=None)


def all_targets(found: list[dict[str, Any]]) -> str:
    """Targets beside what was measured, as a table."""
    rows = []

    def add(target: str, value: str, met: bool | None) -> None:
        rows.append([target, value, {True: "yes", False: "no", None: "not measured"}[met]])

    loads = [r for r in found if r["kind"] == "load"]
    for result in loads:
        rows += load_targets(result)
    if not loads:
        add("p99 of search at half of an M/D/c queue's rate at most 1.3 times the queue's", "",
            None)  # fmt: skip
    for result in (r for r in found if r["kind"] == "search_targets"):
        verdicts = [
            target["met"] for part in result["parts"].values() for target in part["targets"]
        ]
        text = f"{sum(verdicts)} of {len(verdicts)}"
        if missing := [name for name in PARTS if name not in result["parts"]]:
            text += f"; not measured: {', '.join(missing)}"
        met = "no" if not all(verdicts) else "not all measured" if missing else "yes"
        rows.append([f"every target of the search engine, {result['machine']['isa']}", text, met])
    for gate in (r for r in found if r["kind"] == "gate"):
        false = false_alarms(gate)
        add(
            "no false alarm of the gate in 20 unchanged runs",
            f"{false} in {len(gate['unchanged'])}",
            false == 0 and len(gate["unchanged"]) >= 20,
        )
        missing = {op for op in OPS for run in gate["slowed"] if op not in run}
        heard = [
            slower(ratios, gate["threshold"]) for run in gate["slowed"] for ratios in run.values()
        ]
        add(f"an alarm for every op slowed down by {gate['slowdown'] - 1:.0%}",
            f"{sum(heard)} of {len(heard) + len(missing)}", all(heard) and not missing)  # fmt: skip
    ops = [r for r in found if r["kind"] == "ops"]
    for target in CPU_TARGETS:
        judged = [r for r in ops if r["machine"]["device"] == "cpu"
                  and any(map(target.judges, r["rows"]))]  # fmt: skip
        rows += [target.row(r["rows"], suffix=f", {r['machine']['isa']}") for r in judged]
        if not judged:
            rows.append(target.row([]))
    failed = [row for r in ops for row in r.get("failed", [])]
    if failed:
        add("every op's answer right, none failing", f"{len(failed)} failed", False)
    on_gpu = [row for r in ops if r["machine"]["device"] != "cpu" for row in r["rows"]]
    rows += [target.row(on_gpu, "GPU: ") for target in GPU_TARGETS]
    return table(["target", "measured", "met"], rows)
