# SPDX-License-Identifier: Apache-2.0
"""Make the bundle `stickers-edit`: the editor's averaged weights as FP16, its card, its manifest.

It holds a denoiser alone; encoder, tokenizer and databases are those of the bundle beside it.
`--card` only writes card and manifest anew, after evaluation.json has changed.

Usage: python examples/stickers/seal_editor.py [--run out/stickers/editor] [--card]
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from knnfast import _files
from knnfast.diffusion.denoiser import Denoiser
from knnfast.pipeline import KNNDiffusion, write_part_manifest

FILE = 16e6  # bytes at most

CARD = """# The sticker editor

Changes a 64x64 sticker as a text says, without a mask: `pipe.edit`, `knnfast edit`. Made by
`examples/stickers/train_editor.py` from the denoiser of the bundle `stickers`, whose encoder,
tokenizer and databases it uses. Method: KNN-Diffusion (arXiv 2204.02849), section on manipulation;
`docs/editing.md` says what is done and how well it works.

## Data and licences

As the bundle `stickers`: Noto Color Emoji (OFL-1.1), Unicode names for measuring only. The editor
has seen no word, no animal and no held-out sticker.

## Training

"""


def export(run: Path, bundle: Path) -> None:
    """Write the last checkpoint's averaged weights, with what the run was."""
    Denoiser.from_folder(run / "denoiser").save(bundle / "denoiser")
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    if (run / "history.json").is_file():
        record |= json.loads((run / "history.json").read_text(encoding="utf-8"))
    with (run / "log.csv").open(encoding="utf-8", newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    record["log"] = [row for row in rows if row["step"] % 20 == 0]
    _files.write_json(bundle / "denoiser" / "training.json", record)


def write_card(bundle: Path) -> None:
    """Write MODEL_CARD.md from the records."""
    record = json.loads((bundle / "denoiser" / "training.json").read_text(encoding="utf-8"))
    lines = [f"- {k}: {v}" for k, v in record.items() if isinstance(v, str | int | float)]
    lines += ["", "## Quality", ""]
    file = bundle / "evaluation.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        settings = found["settings"]
        now = _files.weights_hash(Denoiser.from_folder(bundle / "denoiser"))
        if settings["denoiser_sha256"] != now:
            lines.append("These figures are of an **earlier checkpoint**.")
        lines += [
            f"{settings['pairs']} pairs of a {settings['stickers']} sticker and a text, judged by "
            "an encoder that neither conditions nor ranks "
            "(`python examples/stickers/evaluate_edits.py`). Identity: its cosine of the picture "
            "before and after. PSNR outside: of the pixels outside the cells that the edit redrew, "
            "the same cells for every method (inpaint redraws about as many, in a centred square).",
            "",
            "| | pairs | score up | mean gain | identity, mean | changed area, median "
            "| PSNR outside, median |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method, x in found["summary"].items():
            low, high = x["score_up_interval"]
            lines.append(
                f"| {method} | {x['pairs']} | "
                f"{x['score_up_share']:.1%} ({low:.1%} to {high:.1%}) | "
                f"{x['mean_gain']:+.3f} | {x['mean_identity']:.3f} | "
                f"{x['median_changed_area']:.1%} | "
                f"{x['median_psnr_outside_db']:.1f} dB |"
            )
    else:
        lines.append("Not measured.")
    (bundle / "MODEL_CARD.md").write_text(CARD + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Export, describe, seal, load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("out/stickers/editor"))
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers-edit"))
    parser.add_argument("--base", type=Path, default=Path("knnfast/bundles/stickers"))
    parser.add_argument("--card", action="store_true")
    args = parser.parse_args()
    args.bundle.mkdir(parents=True, exist_ok=True)
    if not args.card:
        export(args.run, args.bundle)
    write_card(args.bundle)
    write_part_manifest(args.bundle, args.base)
    sizes = {p.name: p.stat().st_size for p in args.bundle.rglob("*") if p.is_file()}
    if max(sizes.values()) > FILE:
        raise SystemExit(f"a file is larger than {FILE / 1e6:.0f} MB: {sizes}")
    KNNDiffusion.from_pretrained(args.bundle)
    print(f"{sum(sizes.values()) / 1e6:.1f} MB, largest {max(sizes.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
