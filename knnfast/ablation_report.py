# SPDX-License-Identifier: Apache-2.0
"""The report on ablations: a page with tables, and plots, from what `ablations.run` measured."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knnfast import _files
from knnfast._checks import hint

FORMAT = "knnfast-ablation"
COLUMNS = {
    "judge score": "judge's score",
    "judge r_precision@1": "judge R@1",
    "judge r_precision@10": "judge R@10",
    "encoder score": "encoder's score",
    "encoder r_precision@10": "encoder R@10",
    "judge cmmd_to_held_out": "judge CMMD",
    "encoder cmmd_to_held_out": "encoder CMMD",
    "judge nearest_distance": "nearest (judge)",
    "pixels nearest_pixel_distance": "nearest (pixels)",
}


def require_plots() -> Any:
    """The class `matplotlib.figure.Figure`; ImportError that names the extra when it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the plots need matplotlib ({error}): {hint('evaluate')}") from None
    return Figure


def write_report(out: Path, sources: Mapping[str, str]) -> Path:
    """Make `README.md` and one PNG for each ablation from the JSON files in a folder.

    Args:
        out: the folder, with NAME.json of some ablations.
        sources: what is said of each ablation, by name, in the report's order.

    Raises:
        ImportError: matplotlib is missing. ValueError: a file there is not an ablation's.
    """
    found = [out / f"{name}.json" for name in sources]
    results = [_files.read_json(path, FORMAT) for path in found if path.is_file()]
    for result in results:
        if any(entry["available"] for entry in result["settings"]):
            _plot(result, out / f"{result['name']}.png")
    page = out / "README.md"
    missing = [path.stem for path in found if not path.is_file()]
    _files.write_atomic(page, _page(results, missing, sources).encode())
    return page


def _page(
    results: Sequence[Mapping[str, Any]], missing: Sequence[str], sources: Mapping[str, str]
) -> str:
    lines = [
        "# Ablations",
        "",
        "Made by `knnfast evaluate MODEL --ablation NAME|all`. Every setting generates the same "
        "names with the same seeds; the names of a batch share their noise. Score: cosine of the "
        "image with its own name. R@n: its own name is among the n nearest of all names. CMMD: "
        "distance to the held-out real pictures, smaller is better. Nearest: distance to the "
        "nearest picture of the database, 0 for a copy (judge: 1 - cosine; pixels: root mean "
        "square). A claim is compared by the judge's score, image by image: agrees or disagrees "
        "when the 95 % bootstrap interval of the difference leaves out 0, undecided when not. The "
        "judge took no part in training the generator.",
        "",
        *_caveat(results),
        "| ablation | what is claimed | here | difference of the judge's score | names |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if not result["claims"]:
            lines.append(f"| [{result['name']}](#{result['name']}) | (no direction) | | | |")
        for claim in result["claims"]:
            low, high = claim["interval"]
            difference = f"{claim['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
            cells = [claim["claim"], f"**{claim['found']}**", difference, str(result["prompts"])]
            lines.append(f"| [{result['name']}](#{result['name']}) | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    for result in results:
        lines += [
            "",
            f"## {result['name']}",
            "",
            f"{result['title']}. {sources[result['name']]}",
            "",
        ]
        lines.append("| setting | " + " | ".join(COLUMNS.values()) + " |")
        lines.append("| --- |" + " --- |" * len(COLUMNS))
        for entry in result["settings"]:
            label = entry["setting"]["label"]
            if not entry["available"]:
                lines.append(f"| {label} | not available: no such model was given |")
                continue
            found = entry["metrics"]  # no CMMD where nothing was held out
            cells = [f"{found[key]:.3f}" if key in found else "" for key in COLUMNS]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if any(entry["available"] for entry in result["settings"]):
            lines += ["", f"![{result['title']}]({result['name']}.png)"]
        lines += [
            "",
            f"{result['prompts']} names ({result['held_out']} held out of the training, not of the "
            f"database), seed {result['seed']}, "
            + (f"batches of {result['batch']}, " if "batch" in result else "")
            + f"among {result['names']:,} names; denoiser `{result['denoiser_sha256'][:12]}`.",
        ]
    return "\n".join(lines) + "\n"


def _caveat(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """That the database holds what the names belong to, with the shares where they are measured."""
    lines = [
        "**The database holds the picture that a name belongs to**, of names held out of the "
        "training, too. What is measured is mostly whether that picture is found and drawn again, "
        'not what becomes of a prompt that has none. "Neighbours help" and "a larger index is '
        'better" are to be read so; the ablation `own` leaves that picture out.',
        "",
    ]
    result = next((r for r in results if "own_picture" in r), None)
    if result is not None:
        own = result["own_picture"]
        also = f" ({own['among_held_out']:.0%} of the held-out)" if "among_held_out" in own else ""
        lines[0] += (
            f" Of the {result['prompts']} names, {own['first']:.0%} find their own picture first, "
            f"{own['among']:.0%}{also} among the ten nearest."
        )
    return lines


def _plot(result: Mapping[str, Any], path: Path) -> None:
    """The judge's score with its interval: lines over an axis, or bars."""
    entries = [e for e in result["settings"] if e["available"]]
    score = np.array([e["metrics"]["judge score"] for e in entries])
    error = np.abs(np.array([e["interval"] for e in entries]).T - score)
    figure = require_plots()(figsize=(5.0, 3.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    if result["axis"]:
        label, places = result["axis"]
        for one in (False, True):
            line = [i for i, e in enumerate(entries) if e["setting"]["one_step"] == one]
            if line:
                axes.errorbar(
                    [places[i] for i in line], score[line], error[:, line], marker="o",
                    capsize=3, label="one-step posteriors" if one else "exact strides",
                )  # fmt: skip
        if any(e["setting"]["one_step"] for e in entries):
            axes.legend()
        axes.set_xlabel(label)
    else:
        labels = [textwrap.fill(e["setting"]["label"], 16) for e in entries]
        axes.bar(labels, score, yerr=error, capsize=3)
    axes.set_ylabel("judge's score")
    axes.set_title(result["title"], fontsize=10)
    figure.savefig(path, metadata={"Software": None})
