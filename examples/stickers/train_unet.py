# SPDX-License-Identifier: Apache-2.0
"""Train the sticker U-Net, the continuous backbone, on the images that train_denoiser.py encoded.

No animals, no held-out stickers, no names. Stopped or killed, it continues from the last checkpoint
when started again.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch

from knnfast.diffusion.pairs import ConditionConfig, Pairs
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import TrainConfig
from knnfast.diffusion.training import train
from knnfast.diffusion.unet import UNetConfig, UNetDenoiser

CONFIG = TrainConfig(
    steps=9000, batch=32, lr=1e-3, decay=0.4, checkpoint_every=500, log_every=50, bf16=False,
    # As in the discrete backbone's training.
    condition=ConditionConfig(
        k=10, semantic=256, text_like=0.7, noise=1.5, confuse=0.5, exclude=0.3, original=0.3
    ),
)  # fmt: skip


def export(run: Path, bundle: Path) -> None:
    """Write the last checkpoint's averaged weights as FP16, with what the run was."""
    UNetDenoiser.from_folder(run / "unet").save(bundle)
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    model, config = record.pop("model"), record.pop("config")
    with (run / "log.csv").open(encoding="utf-8", newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    log = [row for row in rows if row["step"] % 500 == 0 and row["step"] <= record["steps"]]
    record |= {"model": model, "config": config, "log": log}
    text = json.dumps(record, indent=1) + "\n"
    (bundle / "training.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train, and put the result into the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--bundle", type=Path, default=Path("knnfast/bundles/stickers/unet"))
    parser.add_argument("--export", action="store_true", help="export the last checkpoint, only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if not args.export:
        torch.set_num_threads(args.threads)
        file = args.data / "pairs.safetensors"
        if not file.exists():
            parser.error(f"{file} is missing; train_denoiser.py makes it")
        tokenizer = VQTokenizer.from_folder(args.data / "tokenizer")
        pairs = Pairs.load(file)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        out = args.data / "unet"
        record = train(pairs, out, tokenizer, model=UNetConfig(), config=CONFIG, device=device)
        print(f"{record['images_seen']} images in {record['seconds']:.0f} s")
    export(args.data / "unet", args.bundle)


if __name__ == "__main__":
    main()
