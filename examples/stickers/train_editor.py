# SPDX-License-Identifier: Apache-2.0
"""Train the sticker editor on images alone: no animals, no held-out stickers, no names.

It starts from the bundle's denoiser. Stopped or killed, it continues from the last checkpoint when
started again. Needs OpenCV (extra `edit`).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import Stickers

from knnfast.diffusion.augment import STICKERS
from knnfast.diffusion.denoiser import Denoiser
from knnfast.diffusion.editing import (
    EditConfig,
    EditPairs,
    editor_from,
    make_edit_pairs,
    train_editor,
)
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import TrainConfig
from knnfast.encoders import load_encoder

WORLDS, NEIGHBOURS = 6, 3
CONDITION = EditConfig(
    k=10,
    semantic=256,  # what a text embedding fills; the other half describes a picture's looks
    text_like=0.8,
    noise=1.2,
    confuse=0.3,
    exclude=0.7,
    original=0.4,
)
CONFIG = TrainConfig(
    steps=40, batch=48, lr=1e-3, warmup=20, decay=0.0, ema=0.99, checkpoint_every=40, log_every=5,
    bf16=False, condition=CONDITION,
)  # fmt: skip


def main() -> None:
    """Align and encode the pictures once, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--start", type=Path, default=Path("knnfast/bundles/stickers/denoiser"))
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = VQTokenizer.from_folder(args.data / "tokenizer")
    encoder = load_encoder(args.data / "encoder")
    file = args.data / "edit-pairs.safetensors"
    if file.exists():
        pairs = EditPairs.load(file)
    else:
        stickers = Stickers(args.data)
        free = [not row["animal"] and not row["held_out"] for row in stickers.rows]
        seen = torch.tensor(free).nonzero()[:, 0]
        pairs, share = make_edit_pairs(
            stickers.pixels[seen].contiguous(), encoder, tokenizer, WORLDS, NEIGHBOURS,
            augmentation=STICKERS,
        )  # fmt: skip
        print(f"{share:.3f} of the alignments converged", flush=True)
        pairs.save(file)
    start = editor_from(Denoiser.from_folder(args.start))
    config = replace(CONFIG, steps=args.steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = train_editor(
        pairs, args.data / "editor", start, encoder, tokenizer, config, device=device
    )
    print(f"{record['images_seen']} images in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
