# SPDX-License-Identifier: Apache-2.0
"""Seal the bundle: write the model card and model.json with every file's hash, check the sizes.

To be run after any file of the bundle has changed. The card's figures come from the files that the
recipes left and from evaluation.json, the output of `knnfast evaluate stickers --json`, and
evaluation-continuous.json, that of `... --backbone continuous`.

Usage: python examples/stickers/seal.py [--bundle knnfast/bundles/stickers]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from knnfast import _files
from knnfast.diffusion.backbone import Backbone
from knnfast.evaluate import report
from knnfast.pipeline import BACKBONES, KNNDiffusion, write_manifest

WHOLE, FILE = 64e6, 16e6  # bytes at most


CARD = """# The sticker model

Text to 64x64 stickers by retrieval, made by `examples/stickers` (KNN-Diffusion, arXiv 2204.02849).
Trained on pictures alone: denoiser and U-Net have seen no word, no animal and no held-out sticker
(a tenth of the others). Encoder and judge have seen all stickers, the tokenizer all but the
held-out tenth.

## Data and licences

Pictures: Noto Color Emoji, SIL Open Font License 1.1. Names and keywords: Unicode data files and
CLDR, Unicode licence. Word vectors: distilled from all-MiniLM-L6-v2, Apache-2.0, and from WordNet
3.0, WordNet licence. Weights: Apache-2.0, as far as they are ours.

## Training

"""


def read(path: Path) -> dict:
    """Read a JSON file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_card(bundle: Path) -> None:
    """Write MODEL_CARD.md from what the recipes recorded."""
    lines = []
    for part in ("encoder", "judge"):
        notes = read(bundle / part / "encoder.json")["notes"]
        lines.append(
            f"- {part}: {notes['training']['seconds']} s on one CPU thread; stored weights:"
        )
        lines += [f"  - {key}: {value}" for key, value in notes["quality"].items()]
        trial = {k: v for k, v in notes.get("trial", {}).items() if k != "cycles"}
        if trial:
            lines.append("  - a trial (first cycle only) on stickers and keywords not seen:")
            lines += [f"    - {key}: {value}" for key, value in trial.items()]
    kinds = backbones(bundle)
    for part in ("tokenizer", *(kind.folder for kind in kinds)):
        record = read(bundle / part / "training.json")
        plain = {k: v for k, v in record.items() if isinstance(v, str | int | float)}
        lines.append(f"- {part}:" if plain else f"- {part}: no training record")
        lines += [f"  - {key}: {value}" for key, value in plain.items()]
    lines += ["", "## Quality", ""]
    lines.append(
        "`nearest` and `pixels` are distances to the nearest database picture: 0 is a copy, "
        "the tokenizer's row is what a picture drawn from its own codes gets. Where a model's "
        "rows come close to `nearest_picture`, it mostly redraws what it has retrieved."
    )
    for kind in kinds:
        lines += ["", f"### The {kind.backbone} backbone", "", *quality(bundle, kind)]
    (bundle / "MODEL_CARD.md").write_text(CARD + "\n".join(lines) + "\n", encoding="utf-8")


def backbones(bundle: Path) -> list[type[Backbone]]:
    """Which backbones the bundle holds, the default first."""
    return [kind for kind in BACKBONES.values() if (bundle / kind.folder).is_dir()]


def quality(bundle: Path, kind: type[Backbone]) -> list[str]:
    """What the card says of a backbone's measured quality."""
    suffix = "" if kind.backbone == "discrete" else f"-{kind.backbone}"
    evaluation = read(bundle / f"evaluation{suffix}.json")
    if not evaluation:
        return ["Not measured."]
    measured = evaluation["settings"].pop("denoiser_sha256")
    now = _files.weights_hash(kind.from_folder(bundle / kind.folder))
    settings = {k: v for k, v in evaluation["settings"].items() if not isinstance(v, dict)}
    lines = [f"Settings: {json.dumps(settings)}."]
    if measured != now:
        lines.append("These figures are of an **earlier checkpoint**.")
    return [*lines, "", "```", report(evaluation), "```"]


def main() -> int:
    """Write, check, load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers"))
    bundle = parser.parse_args().bundle
    write_card(bundle)
    names = [kind.backbone for kind in backbones(bundle)]
    write_manifest(bundle, "encoder", ["stickers", "animals"], names)
    sizes = {path: path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
    largest = max(sizes, key=lambda path: sizes[path])
    print(
        f"{sum(sizes.values()) / 1e6:.1f} MB, largest {largest.name} {sizes[largest] / 1e6:.1f} MB"
    )
    if sum(sizes.values()) > WHOLE or sizes[largest] > FILE:
        print(
            f"too large: {WHOLE / 1e6:.0f} MB in all, {FILE / 1e6:.0f} MB a file", file=sys.stderr
        )
        return 1
    for name in names:
        pipe = KNNDiffusion.from_pretrained(bundle, backbone=name)
        print(name, pipe("a red heart", k=1, steps=1, seed=0).neighbours[0][0].item.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
