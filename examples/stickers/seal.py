# SPDX-License-Identifier: Apache-2.0
"""Seal the bundle: write model.json with every file's hash, check the sizes, load it once.

To be run after any file of the bundle has changed.

Usage: python examples/stickers/seal.py [--bundle knnfast/bundles/stickers]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from knnfast.pipeline import KNNDiffusion, write_manifest

WHOLE, FILE = 32e6, 16e6  # bytes at most


def main() -> int:
    """Write, check, load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers"))
    bundle = parser.parse_args().bundle
    write_manifest(bundle, "encoder", ["stickers", "animals"])
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
    pipe = KNNDiffusion.from_pretrained(bundle)
    print(pipe("a red heart", k=1, steps=1, seed=0).neighbours[0][0].item.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
