# SPDX-License-Identifier: Apache-2.0
"""Train the sticker tokenizer: 64x64 pictures to 16x16 codes and back, about 15 CPU-minutes.

All stickers but the held-out ones are seen, animals included, and the skin-tone variants. Two
cycles: one from scratch, one that starts from its weights and clears the codebook of codes that
crowd round each other. The second is what ships.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import Stickers

from knnfast.diffusion.augment import STICKERS
from knnfast.diffusion.tokenizer import TokenizerConfig, VQTokenizer
from knnfast.diffusion.tokenizer_training import psnr, train_tokenizer

CONFIG = TokenizerConfig(
    block_out_channels=(32, 48, 64),
    latent_channels=16,
    vq_embed_dim=8,
    num_vq_embeddings=512,
    sample_size=64,
    norm_num_groups=16,
    mid_block_add_attention=False,
)
CYCLES = ((1000, 2e-3), (400, 1.5e-3))  # steps and peak learning rate
SEED = 0


def main() -> None:
    """Train both cycles; a cycle that is there already is not repeated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers/tokenizer"))
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile: slower steps")
    args = parser.parse_args()
    stickers = Stickers(args.data)
    held_out = torch.tensor([row["held_out"] for row in stickers.rows])
    seen = stickers.pixels[~held_out]
    images = torch.cat([seen, seen, seen, stickers.variant_pixels])  # variants of all
    start, folders = None, []
    for cycle, (steps, rate) in enumerate(CYCLES, start=1):
        out = args.data / ("tokenizer" if cycle == len(CYCLES) else f"tokenizer.cycle{cycle}")
        folders.append(out)
        if not (out / "training.json").exists():
            record = train_tokenizer(
                images,
                stickers.pixels[held_out],
                out,
                CONFIG,
                steps=steps,
                lr=rate,
                start=start,
                compile=not args.no_compile,
                augmented=0.5,
                augmentation=STICKERS,
                seed=SEED,
            )
            print(f"{out}: {record['psnr_held_out']} dB held out, {record['seconds']:.0f} s")
        start = VQTokenizer.from_folder(out)
    start.save(args.bundle, torch.float16)
    stored = VQTokenizer.from_folder(args.bundle)
    scores = psnr(stored, stickers.pixels[held_out])
    record = {
        "psnr_held_out_db": round(float(scores.mean()), 2),
        "parameters": sum(p.numel() for p in stored.parameters()),
        "cycles": [json.loads((f / "training.json").read_text(encoding="utf-8")) for f in folders],
    }
    text = json.dumps(record, indent=1) + "\n"
    (args.bundle / "training.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
