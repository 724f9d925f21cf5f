# SPDX-License-Identifier: Apache-2.0
"""The embedded small encoder: an image tower and a word table in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from knnfast import _files
from knnfast.encoders.base import Encoder, EncoderCard, fingerprint, pixels
from knnfast.encoders.image_tower import ImageTower
from knnfast.encoders.word_table import WordTable

FORMAT = "knnfast-encoder"
CONFIG_FILE = "encoder.json"
WEIGHTS_FILE = "encoder.safetensors"
WORDS_FILE = "words.txt"


def _pack(tensors: dict[str, np.ndarray], key: str, value: np.ndarray) -> None:
    """Store a weight: matrices as int8 with one FP16 scale for each row, all else as FP16."""
    if value.ndim < 2:
        tensors[f"tower.{key}"] = value.astype(np.float16)
        return
    rows = value.reshape(len(value), -1)
    scale = np.maximum(np.abs(rows).max(1) / 127, 1e-7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(rows / scale[:, None]), -127, 127).astype(np.int8)
    tensors[f"tower.{key}"] = codes.reshape(value.shape)
    tensors[f"scale.{key}"] = scale.astype(np.float16)


def _unpack(tensors: Mapping[str, np.ndarray], key: str) -> Tensor:
    """Return a weight in FP32 as `_pack` stored it."""
    value = torch.from_numpy(tensors[f"tower.{key}"].astype(np.float32))
    if f"scale.{key}" in tensors:
        scale = torch.from_numpy(tensors[f"scale.{key}"].astype(np.float32))
        value *= scale.view(-1, *[1] * (value.ndim - 1))
    return value


def save_encoder(
    folder: str | Path,
    name: str,
    config: Mapping[str, Any],
    tower: ImageTower,
    table: WordTable | None,
    notes: Mapping[str, Any],
) -> EncoderCard:
    """Write an encoder folder: JSON, int8 and FP16 safetensors, the words; return its card.

    Args:
        folder: where to; made if missing.
        name: what the card calls it.
        config: {"tower": ImageTower's config}.
        tower: the image side.
        table: the text side, or None for an encoder of images alone.
        notes: what a reader of encoder.json should know (training, data, licences, quality).
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for key, value in tower.state_dict().items():
        _pack(tensors, key, value.detach().cpu().float().numpy())
    words: list[str] = []
    if table is not None:
        tensors |= {"text.codes": table.codes, "text.scales": table.scales}
        words = table.words
    card = EncoderCard(name, tower.dim, fingerprint(config, tensors, words), tower.image_size)
    description = {
        "format": FORMAT,
        "card": card.to_dict(),
        "tower": dict(config["tower"]),
        "words": len(words),
        "notes": dict(notes),
    }
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS_FILE)
    _files.write_atomic(folder / WORDS_FILE, "".join(f"{w}\n" for w in words).encode())
    _files.write_json(folder / CONFIG_FILE, description)
    return card


class SmallEncoder(Encoder):
    """An encoder from a folder: encoder.json, encoder.safetensors, words.txt."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not folder.is_dir():
            raise FileNotFoundError(f"no encoder folder at {folder}")
        self.folder = folder
        self.device = torch.device(device)
        try:
            self.config = _files.read_json(folder / CONFIG_FILE, FORMAT)
            self.card = EncoderCard.from_dict(self.config["card"])
            tensors = load_file(folder / WEIGHTS_FILE)
            words = (folder / WORDS_FILE).read_text(encoding="utf-8").split()
            if len(words) != self.config["words"]:
                raise ValueError(f"{len(words)} words, expected {self.config['words']}")
            found = fingerprint(self.config, tensors, words)
            if found != self.card.sha256:
                raise ValueError(f"weights hash to {found}, the card says {self.card.sha256}")
            self.tower = ImageTower(self.config["tower"])
            keys = [key.removeprefix("tower.") for key in tensors if key.startswith("tower.")]
            self.tower.load_state_dict({key: _unpack(tensors, key) for key in keys})
            if (self.tower.dim, self.tower.image_size) != (self.card.dim, self.card.image_size):
                raise ValueError("the card's sizes are not the network's")
            self.table = None
            if words:
                self.table = WordTable(words, tensors["text.codes"], tensors["text.scales"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"cannot load the encoder in {folder}: {reason}") from error
        self.tower.eval().requires_grad_(False).to(self.device)

    def to(self, device: str | torch.device) -> SmallEncoder:
        """Move the network to a device; returns itself."""
        self.device = torch.device(device)
        self.tower.to(self.device)
        return self

    def describe(self, notes: Mapping[str, Any]) -> None:
        """Replace the notes in encoder.json; the weights and their hash stay."""
        self.config["notes"] = dict(notes)
        _files.write_json(self.folder / CONFIG_FILE, self.config)

    def save(self, folder: str | Path) -> None:
        """Copy the encoder's files into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE, WORDS_FILE):
            shutil.copyfile(self.folder / name, folder / name)

    def _image_rows(self, images: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.from_numpy(pixels(images, self.card.image_size)).to(self.device)
        with torch.inference_mode():
            return self.tower(batch.permute(0, 3, 1, 2).float() / 255).cpu().numpy()

    def _text_rows(self, texts: Sequence[str]) -> np.ndarray:
        if self.table is None:
            raise ValueError(f"the encoder {self.card.name} has no text side")
        rows = np.zeros((len(texts), self.dim), np.float32)
        rows[:, : self.table.dim] = self.table.encode(texts)
        return rows
