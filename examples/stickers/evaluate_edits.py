# SPDX-License-Identifier: Apache-2.0
"""Measure edits on held-out stickers, beside regenerating and a naive masked inpaint.

A pair is a held-out sticker i and a text: the words of another sticker's name that i's name has
not, the other one drawn from the 10 of i's group that look the most similar (encoder). Flags are
left out: their names say nothing of parts or looks. All by a fixed seed. Every method gives the
same number of candidates and keeps the one its own ranking prefers; the second encoder (judge),
which conditions nothing and ranks nothing, gives the scores and the identity, the cosine of the
picture before and after. What was kept is measured outside the cells that `edit` redrew, the same
cells for every method.

    edit        the editor, no mask
    regenerate  the plain denoiser from the text alone
    inpaint     the plain denoiser, a centred square of as many codes as the edit redrew

Usage: python examples/stickers/evaluate_edits.py [--out FILE.json] [--sheet FILE.webp]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from knnfast import _files
from knnfast.edit_metrics import changed_region, pixels_of, psnr_outside
from knnfast.encoders import Encoder, load_encoder
from knnfast.evaluate import bootstrap_interval, held_out
from knnfast.images import pictures_of
from knnfast.pipeline import KNNDiffusion, find_model

PAIRS, SHOWN, SEED = 200, 16, 0
CHUNK = 4  # pairs after which the results so far are written
SMALL_WORDS = {"a", "and", "at", "in", "of", "on", "or", "the", "to", "with", "without"}
METHODS = ("edit", "regenerate", "inpaint")


def make_pairs(pipe: KNNDiffusion, count: int, seed: int, unseen: bool) -> list[tuple[str, str]]:
    """(sticker, text) pairs; from held-out stickers, or for settling parameters from the others."""
    items = [item for item in pipe.databases["stickers"] if item.group != "Flags"]
    rows = pipe.databases["stickers"].vectors([item.id for item in items])
    names, groups = [item.name for item in items], np.array([item.group for item in items])
    rng = np.random.default_rng(seed)
    own = [i for i, name in enumerate(names) if held_out(name) == unseen]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        for i in rng.permutation(own).tolist():
            words = set(_words(names[i]))
            scores = np.where(groups == groups[i], rows @ rows[i], -2.0)
            near = np.argsort(-scores, kind="stable")[1:11]
            for j in rng.permutation(near).tolist():
                new = [w for w in _words(names[j]) if w not in words]
                if new:
                    pairs.append((names[i], " ".join(new)))
                    break
            if len(pairs) == count:
                break
    return pairs


def _words(name: str) -> list[str]:
    plain = name.lower().replace(":", " ").replace(",", " ").replace("\u201c", " ")
    words = plain.replace("\u201d", " ").split()
    return [w for w in words if w not in SMALL_WORDS and any(c.isalnum() for c in w)]


def inpaint(
    plain: KNNDiffusion, original: Image.Image, text: str, count: int, options: dict[str, Any]
) -> list[Image.Image]:
    """Redraw a centred square of about `count` codes by the text, with no editor."""
    rows, cols = plain.tokenizer.grid
    side = min(rows, max(1, round(math.sqrt(count))))
    top, left = (rows - side) // 2, (cols - side) // 2
    inside = torch.zeros(rows, cols, dtype=torch.bool)
    inside[top : top + side, left : left + side] = True
    pixels = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None].float() / 255
    codes = plain.tokenizer.encode(pixels)
    query = plain.encoder.encode_text([text])
    found = plain.database.search(query, options["k"])
    cond, mask = plain.condition(plain.database, query, found, options["k"])
    n, level = (
        options["num_images"],
        max(1, round(plain.denoiser.schedule.num_steps * side**2 / rows / cols)),
    )
    start = torch.where(inside.flatten(), plain.denoiser.schedule.num_codes, codes).repeat(n, 1)
    drawn = plain.denoiser.sample(
        cond.expand(n, -1, -1), mask.expand(n, -1), steps=options["steps"],
        guidance=options["guidance"], seed=options["seed"], start=(start, level),
    )  # fmt: skip
    return pictures_of(plain.tokenizer.decode(drawn))


@functools.cache
def load(model: str, base: str) -> tuple[KNNDiffusion, KNNDiffusion, Encoder]:
    """The editor, the plain model, the judge; once a process."""
    judge = load_encoder(find_model("stickers") / "judge")
    return KNNDiffusion.from_pretrained(model), KNNDiffusion.from_pretrained(base), judge


def work(task: tuple[str, str, list[tuple[int, str, str]], dict[str, Any], int]) -> list[dict]:
    """Edit some pairs, and do the same in the other ways."""
    model, base, pairs, options, baselines = task
    pipe, plain, judge = load(model, base)
    ids = {item.name: item.id for item in pipe.databases["stickers"]}
    rest = {k: v for k, v in options.items() if k in ("k", "steps", "guidance", "num_images")}
    out = []
    for number, name, text in pairs:
        picture = pipe.databases["stickers"].thumbnail(ids[name])
        seed = SEED * 1000 + number
        start = time.perf_counter()
        done = pipe.edit(picture, text, seed=seed, **options)
        seconds = time.perf_counter() - start
        best = {"edit": done.images[0]}
        if number < baselines:
            wanted = pipe.encoder.encode_text([text]).vectors[0]
            made = {
                "regenerate": plain(text, seed=seed, **rest).images,
                "inpaint": inpaint(
                    plain, done.original, text, int(done.region.sum()), {**rest, "seed": seed}
                ),
            }
            for method, images in made.items():
                scores = pipe.encoder.encode_images(images).vectors @ wanted
                best[method] = images[int(scores.argmax())]
        before = np.asarray(done.original)
        redrawn = pixels_of(done.region, before.shape[:2])
        seen = judge.encode_images([done.original, *best.values()]).vectors
        scores, identity = seen @ judge.encode_text([text]).vectors[0], seen @ seen[0]
        row: dict[str, Any] = {
            "name": name, "text": text, "seed": seed, "seconds": round(seconds, 2),
            "score_before": float(scores[0]), "region": float(done.region.mean()),
        }  # fmt: skip
        for place, (method, image) in enumerate(best.items(), 1):
            after = np.asarray(image)
            row[method] = {
                "score": float(scores[place]),
                "identity": float(identity[place]),
                "changed_area": float(changed_region(before, after).mean()),
                "psnr_outside": psnr_outside(before, after, redrawn),
            }
        row["images"] = [done.original, *best.values()]
        out.append(row)
    return out


def summary(rows: list[dict], method: str) -> dict[str, Any]:
    """What became of the pairs that a method was tried on, with bootstrap intervals."""
    rows = [row for row in rows if method in row]
    gains = np.array([row[method]["score"] - row["score_before"] for row in rows])
    mean, median = (
        {key: float(f([row[method][key] for row in rows])) for key in rows[0][method]}
        for f in (np.mean, np.median)
    )
    return {
        "pairs": len(rows),
        "score_up_share": float((gains > 0).mean()),
        "score_up_interval": list(bootstrap_interval((gains > 0).astype(float))),
        "mean_gain": float(gains.mean()),
        "mean_score": mean["score"],
        "mean_identity": mean["identity"],
        "median_changed_area": median["changed_area"],
        "median_psnr_outside_db": median["psnr_outside"],
    }


def draw_sheet(rows: list[dict]) -> Image.Image:
    """Before and after of some pairs, four to a line."""
    cell, gap, caption, across = 96, 6, 30, 4
    width, height = 2 * cell + 3 * gap, cell + caption + gap
    sheet = Image.new("RGB", (across * width, -(-len(rows) // across) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for n, row in enumerate(rows):
        x, y = n % across * width + gap, n // across * height + gap
        for place, image in enumerate(row["images"][:2]):
            big = image.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(big, (x + place * (cell + gap), y))
        draw.text((x, y + cell), row["name"][:36], "gray", font)
        draw.text((x, y + cell + 13), f"+ {row['text']}"[:36], "black", font)
    return sheet


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stickers-edit")
    parser.add_argument("--base", default="stickers")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seen", action="store_true", help="training stickers, to settle settings")
    parser.add_argument("--baselines", type=int, default=PAIRS, help="on the first N pairs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/edits.json"))
    parser.add_argument("--sheet", type=Path, default=Path("out/edits.webp"))
    parser.add_argument("--options", type=json.loads, default={}, help="of pipe.edit, as JSON")
    args = parser.parse_args()
    start = time.perf_counter()
    options = {"k": 10, "steps": 8, "guidance": 3.0, "num_images": 8, **args.options}  # defaults
    pipe = KNNDiffusion.from_pretrained(args.model)
    pairs = make_pairs(pipe, args.pairs, SEED + args.seen, not args.seen)
    numbered = [(n, name, text) for n, (name, text) in enumerate(pairs)]
    tasks = [
        (args.model, args.base, numbered[n : n + CHUNK], options, args.baselines)
        for n in range(0, len(pairs), CHUNK)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    images = []
    with multiprocessing.get_context("spawn").Pool(
        args.processes, torch.set_num_threads, (1,)
    ) as pool:
        for part in pool.imap(work, tasks):
            images += [row.pop("images") for row in part]
            rows += part
            seconds = round(time.perf_counter() - start, 1)
            print(f"{len(rows)} of {len(pairs)}, {seconds} s", flush=True)
            result = {
                "settings": {
                    "pairs": len(rows), "of": len(pairs), "seed": SEED,
                    "stickers": "training" if args.seen else "held out", "options": options,
                    "denoiser_sha256": _files.weights_hash(pipe.denoiser),
                    "judge": "stickers-judge", "threshold": 0.1, "dilate": 2,
                },
                "summary": {m: summary(rows, m) for m in METHODS if any(m in r for r in rows)},
                "score_before": float(np.mean([row["score_before"] for row in rows])),
                "seconds": seconds,
                "rows": rows,
            }  # fmt: skip
            _files.write_json(args.out, result)
            shown = np.random.default_rng(SEED).permutation(len(pairs))
            some = sorted([i for i in shown.tolist() if i < len(rows)][:SHOWN])
            draw_sheet([{**rows[i], "images": images[i]} for i in some]).save(
                args.sheet, quality=88
            )
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
