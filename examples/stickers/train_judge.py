# SPDX-License-Identifier: Apache-2.0
"""Train the judge: a second encoder that only scores generated pictures.

A CLIP from scratch (Radford et al. 2021): a residual convolutional network and one learned vector
for each word of the names, no pretrained text model, no keywords, no appearance part. It shares
neither weights nor features nor architecture with the encoder that conditions the generator.

    loss = CE(image -> all names) + CE(name -> images of the batch)

It sees all stickers, animals included.

Usage: python examples/stickers/train_judge.py [--data out/stickers]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import Stickers, embed, text_report, train
from torch import nn
from torch.nn import functional as F

from knnfast.encoders import (
    ImageTower,
    SmallEncoder,
    WordTable,
    load_encoder,
    save_encoder,
    words_of,
)

EPOCHS = 50
BATCH = 128
RATE = 1.5e-3
DECAY = 0.05
SEED = 2
BITS = 8
TOWER = {
    "image_size": 64,
    "semantic_dim": 192,
    "resnet": {"widths": [40, 80, 160, 320]},
}


class Judge(nn.Module):
    """The image tower beside a vector for each word; a name is the sum of its words."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.tower = ImageTower(TOWER)
        self.words = sorted({word for name in names for word in words_of(name)})
        row = {word: i for i, word in enumerate(self.words)}
        bag = torch.zeros(len(names), len(self.words))
        for i, name in enumerate(names):
            for word in words_of(name):
                bag[i, row[word]] += 1
        self.register_buffer("bag", bag, persistent=False)
        # Common words start small, as a text's mean would weigh them.
        rarity = torch.log((1 + len(names)) / (1 + (bag > 0).sum(0))) / np.log(len(names))
        vectors = torch.randn(len(self.words), TOWER["semantic_dim"])
        self.vectors = nn.Parameter(F.normalize(vectors, dim=1) * rarity[:, None])
        self.log_scale = nn.Parameter(torch.tensor(np.log(14.0)))

    def names(self) -> torch.Tensor:
        """Return unit rows of all names."""
        return F.normalize(self.bag @ self.vectors, dim=-1)


def main() -> None:
    """Train, measure, save the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--out", type=Path, help="encoder folder; DATA/judge by default")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(SEED)
    out = args.out or args.data / "judge"
    stickers = Stickers(args.data)
    judge = Judge(stickers.names)

    def loss_of(rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = judge.tower.trunk(
                (images * 2 - 1).contiguous(memory_format=torch.channels_last)
            )
        s = F.normalize(judge.tower.head(features.float()), dim=-1)
        names = judge.names()
        scale = judge.log_scale.clamp(max=np.log(50.0)).exp()
        here = torch.from_numpy(rows)
        by_image = F.cross_entropy(scale * s @ names.T, here)
        by_name = F.cross_entropy(scale * names[here] @ s.T, torch.arange(len(rows)))
        return by_image + by_name

    judge.tower.to(memory_format=torch.channels_last)
    seconds = train(
        judge,
        loss_of,
        stickers,
        np.arange(len(stickers)),
        args.data / "judge.checkpoint.safetensors",
        epochs=args.epochs,
        batch=BATCH,
        rate=RATE,
        decay=DECAY,
        seed=SEED,
    )
    table = WordTable.quantise(judge.words, judge.vectors.detach().numpy(), BITS)
    save_encoder(out, "stickers-judge", {"tower": TOWER}, judge.tower, table, {})
    encoder = load_encoder(out)
    assert isinstance(encoder, SmallEncoder)
    report = text_report(stickers, table.encode, embed(encoder.tower.semantic, stickers.clean()))
    notes = {
        "training": {
            "script": "examples/stickers/train_judge.py",
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "epochs": args.epochs,
            "seen": "all stickers, animals too",
        },
        "quality": {key: round(value, 4) for key, value in report.items()},
        "purpose": "judging generated pictures only; never conditions the generator",
        "sources": {
            "pictures": "Noto Color Emoji (OFL-1.1)",
            "names": "Unicode emoji data (Unicode licence)",
        },
    }
    encoder.describe(notes)
    card = encoder.card
    print(json.dumps(report, indent=1))
    print(f"{card.name} {card.sha256[:12]}, {time.perf_counter() - start:.0f} s -> {out}")


if __name__ == "__main__":
    main()
