# SPDX-License-Identifier: Apache-2.0
"""What the two encoder recipes share: data, the training loop, recall."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from augment import augment, may_flip
from everyday import EVERYDAY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


class Stickers:
    """The rendered stickers and their skin-tone variants (same label, drawn now and then)."""

    def __init__(self, folder: Path):
        self.rows = json.loads((folder / "stickers.json").read_text(encoding="utf-8"))
        self.pixels = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2)
        self.names = [row["name"] for row in self.rows]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.flip = torch.tensor([may_flip(name) for name in self.names])
        variants = json.loads((folder / "variants.json").read_text(encoding="utf-8"))
        base = np.array([self.index.get(row["base"], -1) for row in variants])
        self.variant_pixels = torch.from_numpy(np.load(folder / "variants.npy")).permute(0, 3, 1, 2)
        self.variants = {i: np.flatnonzero(base == i) for i in set(base[base >= 0].tolist())}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        """Return augmented images [B, 3, S, S] in [0, 1] of some rows."""
        images = self.pixels[rows]
        for place, row in enumerate(rows):
            if row in self.variants and rng.random() < 0.3:
                images[place] = self.variant_pixels[rng.choice(self.variants[row])]
        return augment(images.float() / 255, self.flip[rows], noise)

    def clean(self) -> Tensor:
        """Return all images [N, 3, S, S] in [0, 1] as they are."""
        return self.pixels.float() / 255


def hashed_share(text: str, salt: str, share: float) -> bool:
    """Pick a fixed share of all texts."""
    digest = hashlib.sha256(f"{salt}/{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


@torch.no_grad()
def embed(function: Callable[[Tensor], Tensor], images: Tensor, batch: int = 256) -> np.ndarray:
    """Apply a network to images in batches."""
    return np.concatenate([function(part).float().numpy() for part in images.split(batch)])


def recall(queries: np.ndarray, rows: np.ndarray, right: Sequence[set[int]], k: int) -> float:
    """Share of queries that find a right row among their k best by inner product."""
    top = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :k]
    return float(
        np.mean([bool(answers & set(t)) for answers, t in zip(right, top.tolist(), strict=True)])
    )


def text_report(
    stickers: Stickers, encode_text: Callable[[Sequence[str]], np.ndarray], images: np.ndarray
) -> dict[str, float]:
    """Measure names and everyday words against image embeddings, both [N, semantic dim]."""
    each = [{i} for i in range(len(stickers))]
    names = encode_text(stickers.names)
    words = list(EVERYDAY)
    right = [{stickers.index[name] for name in EVERYDAY[word]} for word in words]
    everyday = encode_text(words)
    return {
        "name_to_image@1": recall(names, images, each, 1),
        "name_to_image@10": recall(names, images, each, 10),
        "image_to_name@1": recall(images, names, each, 1),
        "image_to_name@10": recall(images, names, each, 10),
        f"everyday_{len(words)}@1": recall(everyday, images, right, 1),
        f"everyday_{len(words)}@5": recall(everyday, images, right, 5),
    }


def train(
    modules: nn.Module,
    loss_of: Callable[[np.ndarray, Tensor], Tensor],
    stickers: Stickers,
    rows: np.ndarray,
    checkpoint: Path,
    *,
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int,
) -> float:
    """Train with AdamW, warm-up and cosine decay, an average of the weights, and checkpoints.

    Resumes from `checkpoint` where it exists; leaves the averaged weights in `modules`.
    Returns the seconds of training, those before an interruption included.
    """
    average_decay = 0.995
    optimiser = torch.optim.AdamW(modules.parameters(), lr=rate, weight_decay=decay)
    names = [name for name, _ in modules.named_parameters()]
    parameters = [parameter for _, parameter in modules.named_parameters()]
    average = [p.detach().clone() for p in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    first, seconds = 0, 0.0
    if checkpoint.exists():
        stored = load_file(checkpoint)
        first, seconds = int(stored["epoch"]), float(stored["seconds"])
        with torch.no_grad():
            for name, p, a, m in zip(names, parameters, average, moments, strict=True):
                p.copy_(stored[f"weight.{name}"])
                a.copy_(stored[f"average.{name}"])
                m[0].copy_(stored[f"first.{name}"])
                m[1].copy_(stored[f"second.{name}"])
        print(f"resumed after epoch {first}")
    steps = len(rows) // batch
    for p, m in zip(parameters, moments, strict=True):
        optimiser.state[p] = {
            "step": torch.tensor(float(first * steps)),
            "exp_avg": m[0],
            "exp_avg_sq": m[1],
        }
    progress = tqdm(range(first, epochs), desc=checkpoint.stem, mininterval=10)
    for epoch in progress:
        start = time.perf_counter()
        rng = np.random.default_rng([seed, epoch])
        noise = torch.Generator().manual_seed(seed * 100003 + epoch)
        order = rng.permutation(rows)
        total = 0.0
        for step in range(steps):
            done = (epoch * steps + step) / (epochs * steps)
            factor = min(1.0, done / 0.05) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-3
            optimiser.param_groups[0]["lr"] = rate * factor
            chosen = order[step * batch : (step + 1) * batch]
            loss = loss_of(chosen, stickers.batch(chosen, rng, noise))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            total += float(loss)
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - average_decay)
        seconds += time.perf_counter() - start
        progress.set_postfix(loss=f"{total / steps:.3f}")
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            values = {"epoch": torch.tensor(epoch + 1), "seconds": torch.tensor(seconds)}
            for name, p, a, m in zip(names, parameters, average, moments, strict=True):
                values[f"weight.{name}"] = p.detach()
                values[f"average.{name}"] = a
                values[f"first.{name}"], values[f"second.{name}"] = m
            partial = checkpoint.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in values.items()}, partial)
            partial.replace(checkpoint)
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    return seconds
