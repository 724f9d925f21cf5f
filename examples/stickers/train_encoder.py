# SPDX-License-Identifier: Apache-2.0
"""Train the embedded encoder: pictures and words in one space, no text model at run time.

Image side: a small ViT gives the semantic part, a linear code of the 16x16 thumbnail the
appearance part (see knnfast/encoders/image_tower.py). Text side: the word table of words.py, 4
bits a value. The ViT learns to match each sticker's name and keywords as the table encodes them:

    loss = CE(names) + CE(keywords, all of a sticker's equally right) + 1 - cos(s, mean text)

`--trial` leaves a tenth of the stickers and a fifth of the keywords out and measures on them;
the final run sees all stickers, animals included.

Usage: python examples/stickers/train_encoder.py [--data out/stickers] [--trial]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import Stickers, embed, hashed_share, recall, text_report, train
from torch.nn import functional as F

from knnfast.encoders import (
    ImageTower,
    SmallEncoder,
    WordTable,
    load_encoder,
    save_encoder,
    words_of,
)

CYCLES = (  # epochs, batch, peak rate; the second starts from the first one's average
    (60, 128, 1.2e-3),
    (40, 64, 8e-4),
)
DECAY = 0.05
TEMPERATURE = 0.05
SEED = 1
BITS = 4
TOWER = {
    "image_size": 64,
    "semantic_dim": 256,
    "appearance_dim": 256,
    "thumbnail": 16,
    "semantic_share": 0.5,
    "vit": {"width": 160, "depth": 6, "heads": 5},
}
FLATTEN = 0.4  # 0: plain principal components, 1: all components equally strong


def fit_appearance(tower: ImageTower, images: torch.Tensor) -> None:
    """Fit the linear appearance code to images [N, 3, S, S]: principal components of thumbnails.

    Components are partly whitened, so that fine layout counts beside the overall silhouette.
    """
    small = F.adaptive_avg_pool2d(images, tower.thumbnail).flatten(1).double()
    mean = small.mean(0)
    strength, axes = torch.linalg.eigh(torch.cov(small.T))
    strength, axes = strength.flip(0), axes.flip(1)
    n = tower.appearance_dim
    basis = (axes[:, :n] * (strength[:n] / strength[0]) ** (-FLATTEN / 2)).T
    basis /= ((small - mean) @ basis.T).norm(dim=1).mean()
    tower.appearance_mean.copy_(mean)
    tower.appearance_basis.copy_(basis)


def appearance_psnr(tower: ImageTower, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of thumbnails rebuilt from the unit appearance code."""
    small = F.adaptive_avg_pool2d(images, tower.thumbnail).flatten(1)
    with torch.no_grad():
        code = tower.appearance(images)
    rebuilt = tower.appearance_mean + code @ torch.linalg.pinv(tower.appearance_basis).T
    return float(-10 * torch.log10(((rebuilt.clamp(0, 1) - small) ** 2).mean()))


def read_trial(data: Path) -> dict:
    """Return what a trial run measured on stickers and keywords that it had not seen."""
    path = data / "encoder-trial" / "encoder.json"
    if not path.exists():
        return {}
    notes = json.loads(path.read_text(encoding="utf-8"))["notes"]
    unseen = {key: value for key, value in notes["quality"].items() if key.startswith("unseen")}
    return {"cycles": notes["training"]["cycles"], **unseen}


def main() -> None:
    """Train, measure, save the folder and the embeddings of all stickers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--out", type=Path, help="encoder folder; DATA/encoder by default")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--cycles", type=int, default=len(CYCLES), help="stop after so many")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(SEED)
    name = "encoder-trial" if args.trial else "encoder"
    out = args.out or args.data / name
    stickers = Stickers(args.data)
    distilled = np.load(args.data / "words.npz")
    table = WordTable.quantise(distilled["words"].tolist(), distilled["vectors"], BITS)

    keywords = sorted({k for row in stickers.rows for k in row["keywords"] if words_of(k)})
    hidden = {k for k in keywords if args.trial and hashed_share(k, "keyword", 0.2)}
    shown = [k for k in keywords if k not in hidden]
    place = {k: i for i, k in enumerate(shown)}
    unseen = np.array([args.trial and hashed_share(n, "trial", 0.1) for n in stickers.names])
    names = torch.from_numpy(table.encode(stickers.names))
    bank = torch.from_numpy(table.encode(shown))
    right = torch.zeros(len(stickers), len(shown))
    for i, row in enumerate(stickers.rows):
        known = [place[k] for k in row["keywords"] if k in place]
        right[i, known] = 1 / max(len(known), 1)
    target = F.normalize(names + right @ bank, dim=-1)

    tower = ImageTower(TOWER)
    fit_appearance(tower, stickers.clean()[~unseen])

    def loss_of(rows: np.ndarray, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = tower.trunk(images * 2 - 1)
        s = F.normalize(tower.head(features.float()), dim=-1)
        by_name = F.cross_entropy(s @ names.T / TEMPERATURE, torch.from_numpy(rows))
        by_keyword = F.cross_entropy(s @ bank.T / TEMPERATURE, right[rows])
        return by_name + by_keyword + (1 - (s * target[rows]).sum(1)).mean()

    seconds = 0.0
    for cycle, (epochs, batch, rate) in enumerate(CYCLES[: args.cycles], start=1):
        seconds += train(
            tower,
            loss_of,
            stickers,
            np.flatnonzero(~unseen),
            args.data / f"{name}.cycle{cycle}.checkpoint.safetensors",
            epochs=epochs,
            batch=batch,
            rate=rate,
            decay=DECAY,
            seed=SEED + 10 * cycle - 10,
        )

    # Measure what was stored, not what was trained: weights and words are rounded.
    config = {"tower": TOWER}
    save_encoder(out, f"stickers-{name}", config, tower, table, {})
    encoder = load_encoder(out)
    assert isinstance(encoder, SmallEncoder)
    tower = encoder.tower
    images = embed(tower.semantic, stickers.clean())
    report = text_report(stickers, table.encode, images)
    report["appearance_psnr_db"] = appearance_psnr(tower, stickers.clean()[~unseen])
    if args.trial:
        each = [{i} for i in range(len(stickers))]
        own = [each[i] for i in np.flatnonzero(unseen)]
        report["unseen_images"] = int(unseen.sum())
        report["unseen_image_to_name@10"] = recall(images[unseen], names.numpy(), own, 10)
        report["unseen_name_to_image@10"] = recall(names.numpy()[unseen], images, own, 10)
        report["unseen_appearance_psnr_db"] = appearance_psnr(tower, stickers.clean()[unseen])
        asked = sorted(hidden)
        answers = [
            {i for i, row in enumerate(stickers.rows) if k in row["keywords"]} for k in asked
        ]
        report["unseen_keywords"] = len(asked)
        report["unseen_keyword_to_image@10"] = recall(table.encode(asked), images, answers, 10)

    notes = {
        "training": {
            "script": "examples/stickers/train_encoder.py",
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cycles": CYCLES[: args.cycles],
            "seen": "nine tenths of the stickers" if args.trial else "all stickers, animals too",
        },
        "quality": {key: round(value, 4) for key, value in report.items()},
        "trial": read_trial(args.data) if not args.trial else {},
        "sources": {
            "pictures": "Noto Color Emoji (OFL-1.1)",
            "names and keywords": "Unicode emoji data and CLDR (Unicode licence)",
            "word vectors": "distilled from all-MiniLM-L6-v2 (Apache-2.0) and WordNet 3.0 glosses",
        },
    }
    encoder.describe(notes)
    np.save(out.parent / f"{name}-embeddings.npy", embed(tower, stickers.clean(), 64))
    card = encoder.card
    print(json.dumps(report, indent=1))
    print(f"{card.name} {card.sha256[:12]}, {time.perf_counter() - start:.0f} s -> {out}")


if __name__ == "__main__":
    main()
