# SPDX-License-Identifier: Apache-2.0
"""Build the two databases: `animals`, and `stickers` with everything else (held-out ones too).

Rows are the encoder's embeddings of the stickers as rendered, named as Unicode names them.

Usage: python examples/stickers/databases.py [--data out/stickers] [--out knnfast/bundles/stickers]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from PIL import Image

from knnfast.database import Database
from knnfast.encoders import load_encoder


def main() -> None:
    """Build and save both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--out", type=Path, default=Path("knnfast/bundles/stickers"))
    args = parser.parse_args()
    start = time.perf_counter()
    encoder = load_encoder(args.out / "encoder")
    stickers = json.loads((args.data / "stickers.json").read_text(encoding="utf-8"))
    for name, animal in (("stickers", False), ("animals", True)):
        rows = [row for row in stickers if row["animal"] == animal]
        images = [Image.open(args.data / row["file"]).convert("RGB") for row in rows]
        database = Database(encoder.card, thumbnail_size=images[0].width)
        database.add(
            encoder.encode_images(images),
            images,
            names=[row["name"] for row in rows],
            groups=[row["group"] for row in rows],
            sources=["Noto Color Emoji, " + " ".join(row["codepoints"]) for row in rows],
        )
        folder = args.out / "databases" / name
        shutil.rmtree(folder, ignore_errors=True)
        database.save(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {len(database)} stickers, {size / 1e6:.2f} MB -> {folder}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
