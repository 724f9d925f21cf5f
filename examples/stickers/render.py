# SPDX-License-Identifier: Apache-2.0
"""Render the sticker set: Noto Color Emoji as 64x64 pictures on white, with names and keywords.

Sources (Debian packages): fonts-noto-color-emoji (OFL-1.1) draws the pictures, unicode-data's
emoji-test.txt gives names and groups, unicode-cldr-core gives keywords. Writes into OUT:

    images/NAME.png          the stickers; no skin tones, no second copy of the same picture
    stickers.json            name, group, subgroup, keywords, file, codepoints, animal, held_out
    images.npy               the same pictures in the same order, uint8 [N, 64, 64, 3]
    variants.json, .npy      the skin-tone variants (for augmentation only), each with its `base`

`held_out` marks a fixed tenth of the stickers that are not animals, by a hash of the name.

Usage: python examples/stickers/render.py [--out out/stickers]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from knnfast.evaluate import held_out

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLDR = Path("/usr/share/unicode/cldr/common")
STRIKE = 109  # the font's only bitmap size; its glyphs are 136x128 pixels
CANVAS = 136
SIZE = 64
SKIN_TONES = range(0x1F3FB, 0x1F400)


def read_sequences(path: Path) -> list[dict]:
    """Read every fully qualified sequence of emoji-test.txt, in its order."""
    line_form = re.compile(r"^([0-9A-F ]+); fully-qualified\s+# \S+ E[0-9.]+ (.+)$")
    group = subgroup = ""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif match := line_form.match(line):
            codepoints = [int(c, 16) for c in match[1].split()]
            rows.append(
                {
                    "name": match[2],
                    "group": group,
                    "subgroup": subgroup,
                    "codepoints": [f"{c:x}" for c in codepoints],
                    "text": "".join(map(chr, codepoints)),
                }
            )
    return rows


def read_keywords(folder: Path) -> dict[str, list[str]]:
    """Read CLDR's English keywords by emoji (variation selectors removed)."""
    keywords: dict[str, list[str]] = {}
    for part in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(folder / part / "en.xml").iter("annotation"):
            if node.get("type") is None and node.text:
                words = [w.strip() for w in node.text.split("|")]
                keywords.setdefault(node.get("cp", ""), []).extend(words)
    return keywords


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draw one sequence on white, or None where the font has no single glyph for it."""
    if font.getlength(text) > CANVAS:  # falls apart into several glyphs
        return None
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
    left, top, right, bottom = font.getbbox(text)
    origin = ((CANVAS - (right - left)) // 2 - left, (CANVAS - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(origin, text, font=font, embedded_color=True)
    if canvas.getextrema()[3][1] == 0:
        return None
    white = Image.new("RGBA", canvas.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, canvas).convert("RGB")
    return flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def slug(name: str) -> str:
    """Turn a name into a file stem."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def is_animal(subgroup: str) -> bool:
    """Tell whether a subgroup belongs to the animals, which the denoiser never sees."""
    return subgroup.startswith("animal-") or subgroup in ("cat-face", "monkey-face")


def main() -> int:
    """Render everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/stickers"))
    out = parser.parse_args().out
    start = time.perf_counter()
    missing = [
        str(p) for p in (FONT, EMOJI_TEST, CLDR / "annotations" / "en.xml") if not p.exists()
    ]
    if missing:
        print(
            f"missing {', '.join(missing)}; on Debian: "
            "apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core",
            file=sys.stderr,
        )
        return 2

    (out / "images").mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(str(FONT), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    keywords = read_keywords(CLDR)
    plain: list[tuple[dict, np.ndarray]] = []
    toned: list[tuple[dict, np.ndarray]] = []
    base: dict[tuple[str, ...], str] = {}  # code points without skin tone -> name
    shortest: dict[bytes, str] = {}  # picture -> the shortest name that has it
    undrawn = []
    for row in read_sequences(EMOJI_TEST):
        text = row.pop("text")
        picture = draw(text, font)
        if picture is None:
            undrawn.append(row["name"])
            continue
        words = keywords.get(text.replace("\ufe0f", ""), [])
        row["keywords"] = [w for w in dict.fromkeys(words) if w != row["name"]]
        tones = [c for c in row["codepoints"] if int(c, 16) in SKIN_TONES]
        key = tuple(c for c in row["codepoints"] if c != "fe0f" and c not in tones)
        if tones:
            toned.append(({**row, "base": base.get(key)}, np.asarray(picture)))
            continue
        base[key] = row["name"]
        plain.append((row, np.asarray(picture)))
        pixels = picture.tobytes()
        shortest[pixels] = min(shortest.get(pixels, row["name"]), row["name"], key=len)

    kept: list[tuple[dict, np.ndarray]] = []
    twins = []
    stems: set[str] = set()
    for row, pixels in plain:
        if (twin := shortest[pixels.tobytes()]) != row["name"]:
            twins.append(f"{row['name']} = {twin}")
            continue
        stem = slug(row["name"])
        if not stem or stem in stems:
            stem = "-".join([stem or "sticker", *row["codepoints"]])
        stems.add(stem)
        row["file"] = f"images/{stem}.png"
        row["animal"] = is_animal(row["subgroup"])
        row["held_out"] = not row["animal"] and held_out(row["name"])
        Image.fromarray(pixels).save(out / row["file"])
        kept.append((row, pixels))

    for rows, table, array in (
        (kept, "stickers.json", "images.npy"),
        (toned, "variants.json", "variants.npy"),
    ):
        np.save(out / array, np.stack([pixels for _, pixels in rows]))
        text = json.dumps([row for row, _ in rows], ensure_ascii=False, indent=1)
        (out / table).write_text(text + "\n", encoding="utf-8")
    stickers = [row for row, _ in kept]
    print(
        f"{len(stickers)} stickers ({sum(r['animal'] for r in stickers)} animals, "
        f"{sum(r['held_out'] for r in stickers)} held out), {len(toned)} variants, "
        f"{len(undrawn)} sequences without a glyph, {len(twins)} with another's picture, "
        f"{time.perf_counter() - start:.1f} s -> {out}"
    )
    print("left out:", "; ".join(undrawn + twins))
    return 0


if __name__ == "__main__":
    sys.exit(main())
