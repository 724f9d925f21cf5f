# SPDX-License-Identifier: Apache-2.0
"""What an encoder is: vectors with the card of the network that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from knnfast.images import upright

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EncoderCard:
    """Says which encoder made an embedding.

    Args:
        name: what the encoder is called.
        dim: length of its vectors.
        sha256: hash over its weights, words and architecture.
        image_size: side in pixels of the square it looks at.
    """

    name: str
    dim: int
    sha256: str
    image_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderCard:
        """Make a card from what `to_dict` gave."""
        try:
            return cls(
                name=str(values["name"]),
                dim=int(values["dim"]),
                sha256=str(values["sha256"]),
                image_size=int(values["image_size"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an encoder card: {error!r} in {values!r}") from None


@dataclass(frozen=True)
class Embeddings:
    """Vectors with the card of the encoder that made them.

    Args:
        vectors: [N, dim] float32, unit rows.
        card: whose they are.
    """

    vectors: np.ndarray
    card: EncoderCard

    def __len__(self) -> int:
        return len(self.vectors)


class Encoder:
    """Turns images and texts into unit float32 rows of one space."""

    card: EncoderCard

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.card.dim

    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Embeddings:
        """Encode PIL images of any size and mode, as `images.upright` shows them.

        Returns:
            Vectors [N, dim] float32, unit rows.
        """
        _check_batch(batch_size)
        rows = np.zeros((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            rows[start : start + len(part)] = self._image_rows(part)
        return Embeddings(rows, self.card)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Encode texts: vectors [N, dim] float32, unit rows; an unreadable text is a ValueError."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string")
        return Embeddings(self._text_rows(texts), self.card)

    def to(self, device: str | torch.device) -> Encoder:
        """Move the network to a device; returns itself."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> str | None:
        """Write the encoder into a folder, or return the name by which others can load it."""
        raise NotImplementedError

    def _image_rows(self, images: Sequence[Image.Image]) -> np.ndarray:
        raise NotImplementedError

    def _text_rows(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def pixels(images: Iterable[Image.Image], size: int) -> np.ndarray:
    """Bring images onto a white square without distorting them: uint8 [N, size, size, 3]."""
    out = []
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"images must be PIL images, got {type(image).__name__}")
        image = upright(image)
        if image.size != (size, size):
            scale = size / max(image.size)
            inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            small = image.resize(inner, Image.Resampling.LANCZOS)
            image = Image.new("RGB", (size, size), (255, 255, 255))
            image.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        out.append(np.asarray(image))
    return np.stack(out) if out else np.zeros((0, size, size, 3), np.uint8)


def fingerprint(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], words: Sequence[str]
) -> str:
    """Hash what decides an encoder's output, in a fixed order."""
    digest = hashlib.sha256()
    digest.update(json.dumps({"tower": config["tower"]}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    digest.update("\n".join(words).encode())
    return digest.hexdigest()
