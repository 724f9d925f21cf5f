# SPDX-License-Identifier: Apache-2.0
"""Encoders: images and texts become unit vectors of one space.

`load_encoder` takes a folder (the embedded small encoder and anything saved by `save_encoder`) or
an open_clip name. Every encoder has a card with a hash of its weights; whatever is stored beside
embeddings keeps that card, so that vectors of different encoders never mix.
"""

from __future__ import annotations

from pathlib import Path

import torch

from knnfast.encoders.base import Embeddings, Encoder, EncoderCard, pixels
from knnfast.encoders.image_tower import ImageTower
from knnfast.encoders.openclip import OpenClipEncoder
from knnfast.encoders.small import SmallEncoder, save_encoder
from knnfast.encoders.word_table import WordTable, words_of

__all__ = [
    "Embeddings",
    "Encoder",
    "EncoderCard",
    "ImageTower",
    "WordTable",
    "load_encoder",
    "pixels",
    "save_encoder",
    "words_of",
]


def load_encoder(spec: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """Load an encoder.

    Args:
        spec: a folder saved by `save_encoder`; `open_clip:MODEL/PRETRAINED`, for example
            `open_clip:ViT-B-32/laion2b_s34b_b79k`; or `open_clip:local-dir:PATH`, a folder with
            open_clip_config.json and its weights.
        device: where the network runs; vectors come back as numpy arrays in any case.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged, altered or foreign folder, or a malformed name.
        ImportError: open_clip is not installed, or its torchvision cannot be used.
        OSError: open_clip cannot get or read the weights.
    """
    if isinstance(spec, str) and spec.startswith("open_clip:"):
        return OpenClipEncoder(spec, device)
    return SmallEncoder(Path(spec), device)
