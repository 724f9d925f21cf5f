"""Targets beside what was measured: what is met, what is lost, what does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regression import false_alarms, slower
from sections import SERVICES, table, times


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
        for name, service in SERVICES.items():
            if name in row:
                value = row[f"p99_over_{name}"]
                add("p99 of search at half of saturation at most 1.3 times an M/D/c queue's, "
                    f"service measured {service}, {row['isa']}", f"{value:.2f}",
                    value <= 1.3)  # fmt: skip
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
