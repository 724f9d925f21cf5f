# SPDX-License-Identifier: Apache-2.0
"""Train the sticker denoiser on images alone: no animals, no held-out stickers, no names.

The names in stickers.json are read for one thing: which pictures are skin-tone variants of the
same sticker. Stopped or killed, it continues from the last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Stickers
from torch import Tensor

from knnfast.diffusion.augment import STICKERS, augmented
from knnfast.diffusion.data import make_pairs
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.pairs import ConditionConfig, Pairs
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import TrainConfig
from knnfast.diffusion.training import train
from knnfast.encoders import load_encoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = 12
CONDITION = ConditionConfig(
    k=10,
    semantic=256,  # what a text embedding fills; the other half describes a picture's looks
    text_like=0.7,
    noise=1.5,  # cosine 0.55 at the most: prompts and pictures of one name have 0.59 in the median
    confuse=0.5,
    exclude=0.3,  # the wanted sticker is usually in the database when somebody asks for it
    original=0.3,
)
# CPUs without AMX multiply bfloat16 slower than float32.
CPU = Path("/proc/cpuinfo")
AMX = CPU.exists() and "amx_bf16" in CPU.read_text(encoding="ascii")
CONFIG = TrainConfig(
    steps=1400, batch=128, lr=3e-3, decay=0.4, compile=True, checkpoint_every=100,
    bf16=AMX or DEVICE == "cuda", condition=CONDITION,
)  # fmt: skip
# The wanted sticker never among the neighbours, on top of the shipped weights (see README.md).
TRIAL = replace(
    CONFIG, steps=300, lr=1.5e-3, warmup=40, decay=0.9, seed=1, checkpoint_every=60,
    condition=replace(CONDITION, exclude=1.0, no_neighbours=0.2),
)  # fmt: skip


def versions(stickers: Stickers, count: int) -> Iterator[Tensor]:
    """The stickers as they are, then augmented; there 7 in 10 people get another skin tone."""
    yield stickers.pixels
    for version in range(1, count):
        rng, g = np.random.default_rng(version), torch.Generator().manual_seed(1000 + version)
        images = stickers.pixels.clone()
        for i in range(len(stickers)):
            if i in stickers.variants and rng.random() < 0.7:
                images[i] = stickers.variant_pixels[rng.choice(stickers.variants[i])]
        yield augmented(images, g, STICKERS)


def export(run: Path, bundle: Path) -> None:
    """Write the last checkpoint's averaged weights as FP16, with what the run was."""
    Denoiser.from_folder(run / "denoiser").save(bundle)
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    with (run / "log.csv").open(encoding="utf-8", newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    record["log"] = [row for row in rows if row["step"] % 100 == 0]
    text = json.dumps(record, indent=1) + "\n"
    (bundle / "training.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Encode the pictures once, train, and put the result into the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers/denoiser"))
    parser.add_argument("--export", action="store_true", help="export the last checkpoint, only")
    parser.add_argument("--trial", action="store_true", help="train the trial's weights, only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.export:
        export(args.data / "denoiser", args.bundle)
        return
    torch.set_num_threads(args.threads)
    tokenizer = VQTokenizer.from_folder(args.data / "tokenizer")
    file = args.data / "pairs.safetensors"
    if file.exists():
        pairs = Pairs.load(file)
    else:
        stickers = Stickers(args.data)
        free = [not row["animal"] and not row["held_out"] for row in stickers.rows]
        seen = torch.tensor(free).nonzero()[:, 0]
        encoder = load_encoder(args.data / "encoder")
        pairs = make_pairs(versions(stickers, VERSIONS), encoder, tokenizer, seen, seen)
        pairs.save(file)
    if args.trial:
        start = Denoiser.from_folder(args.bundle)
        out = args.data / "denoiser-trial"
        train(pairs, out, tokenizer, config=TRIAL, start=start, device=DEVICE)
        return
    out = args.data / "denoiser"
    record = train(pairs, out, tokenizer, model=DenoiserConfig(), config=CONFIG, device=DEVICE)
    export(out, args.bundle)
    print(f"{record['images_seen']} images in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
