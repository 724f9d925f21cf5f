"""Latency against batch and against rows, log-log, with the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnfast._checks import hint
from knnfast.benchmark.machine import floors_ms

if TYPE_CHECKING:
    from knnfast.benchmark.faiss_reference import FaissReport


def require_matplotlib() -> Any:
    """The class `matplotlib.figure.Figure`; ImportError that names the extra when it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the plot needs matplotlib ({error}): {hint('bench')}") from None
    return Figure


def check_suffix(name: str, path: str | Path) -> None:
    """Refuse a path whose ending matplotlib cannot write; `name` is the argument's.

    Raises:
        ValueError: another ending, or none. ImportError: matplotlib is missing.
    """
    known = require_matplotlib()().canvas.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{name}: must end in one of {', '.join(sorted(known))}, got {path}")


def save_plot(report: FaissReport, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG (or what the path's ending says) of two panels, with text of yours inside."""
    figure = require_matplotlib()(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=False)
    shape, limits = report.shape, report.ceilings
    names = list(dict.fromkeys(row["name"] for row in report.rows))
    n, d, first = shape["n"], shape["d"], shape["batch"][0]
    for panel, key, fixed in ((panels[0], "batch", ("n", n)), (panels[1], "n", ("batch", first))):
        for i, name in enumerate(names):
            rows = [r for r in report.rows if r["name"] == name and r[fixed[0]] == fixed[1]]
            rows.sort(key=lambda r: r[key])
            panel.plot(
                [r[key] for r in rows], [r["p50_ms"] for r in rows], color=f"C{i}",
                marker="o", linewidth=2.5 if i == 0 else 1.2, label=name,
            )  # fmt: skip
            panel.fill_between(
                [r[key] for r in rows], [r["p50_ms"] for r in rows], [r["p99_ms"] for r in rows],
                color=f"C{i}", alpha=0.12, linewidth=0,
            )  # fmt: skip
        at = np.array(sorted({r[key] for r in report.rows if r[fixed[0]] == fixed[1]}), float)
        lines = np.geomspace(at[0], at[-1], 50)
        sizes, batches = (n, lines) if key == "batch" else (lines, first)
        reading, working = floors_ms(2.0 * sizes * d, 2.0 * sizes * d * batches, limits)
        panel.plot(lines, np.maximum(reading, working), "k--", linewidth=1,
                   label="roofline: FP16 rows once, or matmul")  # fmt: skip
        panel.plot(lines, reading / 2 + 0 * lines, "k:", linewidth=1,
                   label="reading int8 codes once")  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(True, which="both", alpha=0.2)
        panel.set_ylabel("p50 (shaded to p99), ms")
    panels[0].set_xlabel(f"batch, at {n:,} rows")
    panels[1].set_xlabel(f"rows, at batch {first}")
    panels[0].legend(fontsize=8)
    about = report.machine
    figure.suptitle(
        f"top-{shape['k']}, d {d}, {shape['metric']}: {about.get('gpu', about['cpu'])}, "
        f"{about['threads']} threads, {about['date']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120, metadata=metadata)
