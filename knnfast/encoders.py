# SPDX-License-Identifier: Apache-2.0
"""Encoders: images and texts become unit vectors of one space.

`load_encoder` takes a folder (the embedded small encoder and anything saved by `save_encoder`) or
an open_clip name. Every encoder has a card with a hash of its weights; whatever is stored beside
embeddings keeps that card, so that vectors of different encoders never mix.

The embedded encoder splits its vector in two, each part of unit norm before weighting:

    image:  e = [ sqrt(w) s | sqrt(1 - w) a ]       text:  e = [ s | 0 ]

s, the *semantic* part, comes from a small network trained against sentence embeddings of names
and keywords. a, the *appearance* part, is a linear code of a 16x16 thumbnail: it makes
neighbours carry colour and shape, on pictures of any kind. A text says nothing of appearance, so
cosine(text, image) = sqrt(w) cos(s_text, s_image) and ranks images by meaning alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from knnfast import _files

FORMAT = "knnfast-encoder"
CONFIG_FILE = "encoder.json"
WEIGHTS_FILE = "encoder.safetensors"
WORDS_FILE = "words.txt"

__all__ = [
    "Embeddings",
    "Encoder",
    "EncoderCard",
    "ImageTower",
    "WordTable",
    "load_encoder",
    "pixels",
    "save_encoder",
]


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
        """Encode PIL images of any size and mode: vectors [N, dim] float32, unit rows."""
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


# -- pictures -----------------------------------------------------------------------------------


def pixels(images: Iterable[Image.Image], size: int) -> np.ndarray:
    """Bring images onto a white square without distorting them: uint8 [N, size, size, 3]."""
    out = []
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"images must be PIL images, got {type(image).__name__}")
        if image.mode != "RGB":
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, rgba).convert("RGB")
        if image.size != (size, size):
            scale = size / max(image.size)
            inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            small = image.resize(inner, Image.Resampling.LANCZOS)
            image = Image.new("RGB", (size, size), (255, 255, 255))
            image.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        out.append(np.asarray(image))
    return np.stack(out) if out else np.zeros((0, size, size, 3), np.uint8)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, width] to the same shape."""
        B, L, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Plain products: torch's fused attention takes 4x as long backwards on a CPU (2.13, bf16).
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(B, L, W))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A convolutional stem (8 pixels to a token) under a plain transformer, mean-pooled."""

    def __init__(self, image_size: int, width: int, depth: int, heads: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn((image_size // 8) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [-1, 1] to features [B, width]."""
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with group normalisation."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, after)
        self.skip = nn.Conv2d(before, after, 1, stride) if (before, stride) != (after, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, before, H, W] to [B, after, H/stride, W/stride]."""
        y = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        return F.gelu(y + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    """A residual convolutional network, mean-pooled."""

    def __init__(self, image_size: int, widths: Sequence[int]):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        blocks = []
        for i, width in enumerate(widths):
            blocks.append(ConvBlock(widths[max(i - 1, 0)], width, 1 if i == 0 else 2))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [-1, 1] to features [B, widths[-1]]."""
        return self.blocks(self.stem(x)).mean((2, 3))


class ImageTower(nn.Module):
    """The image side: a trained semantic part and a linear appearance part.

    Args:
        config: image_size, semantic_dim; `vit` {width, depth, heads} or `resnet` {widths};
            optionally appearance_dim, thumbnail (its side) and semantic_share (w).
    """

    appearance_mean: Tensor
    appearance_basis: Tensor

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.image_size = int(config["image_size"])
        self.semantic_dim = int(config["semantic_dim"])
        self.appearance_dim = int(config.get("appearance_dim", 0))
        self.share = float(config.get("semantic_share", 1.0))
        if "vit" in config:
            self.trunk: nn.Module = ViT(self.image_size, **config["vit"])
            features = int(config["vit"]["width"])
        else:
            self.trunk = ResNet(self.image_size, **config["resnet"])
            features = int(config["resnet"]["widths"][-1])
        self.head = nn.Linear(features, self.semantic_dim)
        self.thumbnail = int(config.get("thumbnail", 0))
        if self.appearance_dim:
            inputs = 3 * self.thumbnail**2
            self.register_buffer("appearance_mean", torch.zeros(inputs))
            self.register_buffer("appearance_basis", torch.zeros(self.appearance_dim, inputs))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.semantic_dim + self.appearance_dim

    def semantic(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [0, 1] to unit semantic rows [B, semantic_dim]."""
        return F.normalize(self.head(self.trunk(images * 2 - 1)), dim=-1)

    def appearance(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [0, 1] to unit appearance rows [B, appearance_dim]."""
        small = F.adaptive_avg_pool2d(images, self.thumbnail).flatten(1)
        return F.normalize((small - self.appearance_mean) @ self.appearance_basis.T, dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in [0, 1] to unit embeddings [B, dim]."""
        semantic = self.semantic(images)
        if not self.appearance_dim:
            return semantic
        shares = math.sqrt(self.share), math.sqrt(1 - self.share)
        return torch.cat([shares[0] * semantic, shares[1] * self.appearance(images)], dim=-1)


# -- words --------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words of Latin letters and digits, accents removed."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("\u2019", "'")).replace("'", "")
    return re.findall(r"[a-z0-9]+", "".join(c for c in plain if not unicodedata.combining(c)))


def grams(word: str) -> list[str]:
    """Cut a word into its character pairs and triples, ends marked.

    Spellings of one sound count as one (ph and f, ck and k, y and i), doubled letters as single.
    """
    sound = word.replace("ph", "f").replace("ck", "k").replace("y", "i")
    marked = "^" + re.sub(r"(.)\1", r"\1", sound) + "$"
    return [marked[i : i + n] for n in (2, 3) for i in range(len(marked) - n + 1)]


class WordTable:
    """A text is the weighted mean of its words' vectors, normalised.

    The table keeps 4 or 8 bits a value with one scale a word; a word's weight is folded into its
    vector. A word outside the table is answered by the words that share its letters (cosine of
    their counts of character pairs and triples, rare ones counting more): misspellings, plurals
    and compounds land near what they are made of, and weigh less the less they share.

    Args:
        words: the vocabulary, without duplicates.
        codes: [V, dim] int8 (8 bits), or [V, dim / 2] uint8 (two 4-bit values each, low first).
        scales: [V] float16.
    """

    NEIGHBOURS = 4
    FLOOR = 0.25

    def __init__(self, words: Sequence[str], codes: np.ndarray, scales: np.ndarray):
        if len(words) != len(codes) or len(words) != len(scales):
            raise ValueError(f"{len(words)} words, {len(codes)} codes and {len(scales)} scales")
        self.words = list(words)
        self.codes = codes
        self.scales = scales
        self.row = {word: i for i, word in enumerate(self.words)}
        if len(self.row) != len(self.words):
            raise ValueError("the vocabulary holds a word twice")
        self._letters: tuple[dict[str, list[int]], list[float]] | None = None

    @classmethod
    def quantise(cls, words: Sequence[str], vectors: np.ndarray, bits: int) -> WordTable:
        """Round float vectors [V, dim] to `bits` a value, the scale fitted for each word."""
        top = {4: 7, 8: 127}[bits]
        peak = np.abs(vectors).max(1, keepdims=True)
        best, error = np.zeros_like(peak), np.full(peak.shape, np.inf)
        for clip in (1.0,) if bits == 8 else (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            scale = np.maximum(peak * clip / top, 1e-6).astype(np.float16).astype(np.float32)
            rounded = np.clip(np.rint(vectors / scale), -top, top) * scale
            miss = ((rounded - vectors) ** 2).sum(1, keepdims=True)
            best, error = np.where(miss < error, scale, best), np.minimum(miss, error)
        codes = np.clip(np.rint(vectors / best), -top, top).astype(np.int8)
        if bits == 4:
            nibbles = (codes + 8).astype(np.uint8)
            codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        return cls(words, codes, best[:, 0].astype(np.float16))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.codes.shape[1] * (2 if self.codes.dtype == np.uint8 else 1)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the stored vectors of some rows, float32 [len(rows), dim]."""
        index = np.asarray(rows, dtype=np.int64)
        codes = self.codes[index]
        if codes.dtype == np.uint8:
            pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
            codes = pairs.astype(np.int8) - np.int8(8)
        return codes.astype(np.float32) * self.scales[index].astype(np.float32)[:, None]

    def similar(self, word: str) -> list[tuple[int, float]]:
        """Find up to NEIGHBOURS rows that share the word's letters, with their cosines."""
        if self._letters is None:
            self._letters = self._index_letters()
        postings, lengths = self._letters
        shared: dict[int, float] = defaultdict(float)
        own = 0.0
        for gram in set(grams(word)):
            rows = postings.get(gram, [])
            weight = self._rarity(len(rows))
            own += weight
            for row in rows:
                shared[row] += weight
        cosines = [(s / math.sqrt(own * lengths[row]), row) for row, s in shared.items()]
        best = sorted(cosines, key=lambda pair: (-pair[0], pair[1]))[: self.NEIGHBOURS]
        return [(row, min(float(cosine), 1.0)) for cosine, row in best if cosine >= self.FLOOR]

    def _index_letters(self) -> tuple[dict[str, list[int]], list[float]]:
        """Return which rows hold each letter group, and each row's squared length in them."""
        postings: dict[str, list[int]] = defaultdict(list)
        pieces = [set(grams(word)) for word in self.words]
        for row, groups in enumerate(pieces):
            for gram in groups:
                postings[gram].append(row)
        weight = {gram: self._rarity(len(rows)) for gram, rows in postings.items()}
        return dict(postings), [sum(weight[g] for g in groups) for groups in pieces]

    def _rarity(self, count: int) -> float:
        """Weigh a letter group by the squared logarithm of its inverse frequency."""
        return math.log((2 + len(self.words)) / (1 + count)) ** 2

    def parts(self, text: str) -> list[tuple[int, float]]:
        """Return the (row, weight) pairs whose weighted sum is the text."""
        found: list[tuple[int, float]] = []
        for word in words_of(text):
            if word in self.row:
                found.append((self.row[word], 1.0))
                continue
            near = self.similar(word)
            total = sum(cosine**4 for _, cosine in near)
            found += [(row, cosine**4 / total * near[0][1]) for row, cosine in near]
        return found

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts to unit rows, float32 [N, dim]."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            parts = self.parts(text)
            if parts:
                weights = np.array([weight for _, weight in parts], np.float32)
                out[i] = weights @ self.vectors([row for row, _ in parts])
            norm = float(np.linalg.norm(out[i]))
            if norm < 1e-6:
                raise ValueError(
                    f"text {i} ({text!r}) holds no word this encoder can read "
                    "(it reads English words in Latin letters, and digits)"
                )
            out[i] /= norm
        return out


# -- the small encoder --------------------------------------------------------------------------


def _fingerprint(
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
    card = EncoderCard(name, tower.dim, _fingerprint(config, tensors, words), tower.image_size)
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
            found = _fingerprint(self.config, tensors, words)
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


# -- open_clip ----------------------------------------------------------------------------------


class OpenClipEncoder(Encoder):
    """A model of open_clip (extra `clip`), by name and pretrained tag, or from a local folder."""

    def __init__(self, spec: str, device: str | torch.device = "cpu"):
        self.spec = spec
        body = spec.removeprefix("open_clip:")
        local = body.startswith("local-dir:")
        model, slash, pretrained = body.partition("/")
        if not local and not (model and slash and pretrained):
            raise ValueError(
                f"{spec!r} should read open_clip:MODEL/PRETRAINED or open_clip:local-dir:PATH"
            )
        if local and not Path(body.removeprefix("local-dir:")).is_dir():
            raise FileNotFoundError(f"no open_clip folder at {body.removeprefix('local-dir:')}")
        open_clip = _import_open_clip()
        name, tag = (body, None) if local else (model, pretrained)
        if not local and (model, pretrained) not in open_clip.list_pretrained():
            raise ValueError(f"open_clip knows no weights {pretrained!r} of a model {model!r}")
        try:
            network, _, self._preprocess = open_clip.create_model_and_transforms(
                name, pretrained=tag, device=str(device)
            )
            self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a download, a file or a configuration: whatever it was
            reason = str(error).strip().splitlines()
            raise OSError(
                f"the weights of {spec} cannot be loaded: {reason[0] if reason else repr(error)}"
            ) from error
        self._network = network.eval().requires_grad_(False)
        self.device = torch.device(device)
        size = network.visual.image_size
        dim = int(self._text_features(["a"]).shape[1])
        state = {key: _raw(value) for key, value in network.state_dict().items()}
        digest = _fingerprint(
            {"tower": {"open_clip": name if not local else "local-dir"}}, state, ()
        )
        label = "open_clip:local-dir" if local else spec
        self.card = EncoderCard(
            label, dim, digest, int(size[0] if isinstance(size, tuple) else size)
        )

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            tokens = self._tokenizer(list(texts)).to(self.device)
            return F.normalize(self._network.encode_text(tokens).float(), dim=-1)

    def save(self, folder: str | Path) -> str:
        """Return the name to load it by; the weights stay where open_clip keeps them."""
        return self.spec

    def _image_rows(self, images: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            rows = self._network.encode_image(batch.to(self.device)).float()
        return F.normalize(rows, dim=-1).cpu().numpy()

    def _text_rows(self, texts: Sequence[str]) -> np.ndarray:
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {i} is empty")
        rows = [
            self._text_features(texts[i : i + 256]).cpu().numpy() for i in range(0, len(texts), 256)
        ]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)


def _raw(value: Tensor) -> np.ndarray:
    """View a tensor as bytes numpy can hash (numpy has no bfloat16)."""
    value = value.detach().cpu().contiguous()
    return (
        value.view(torch.uint8).numpy()
        if value.ndim
        else value.reshape(1).view(torch.uint8).numpy()
    )


_schemas: list[Any] = []  # torch.library.Library objects undo their definitions when collected


def _import_open_clip() -> Any:
    """Import open_clip, also beside a torchvision that was built for another torch.

    Such a torchvision fails at import, because its C++ operators cannot be loaded. open_clip uses
    its image transforms alone, so it is enough that the operators' schemas exist.
    """
    try:
        found = importlib.util.find_spec("torchvision")
        if found is not None and found.origin is not None and not _schemas:
            for path in Path(found.origin).parent.glob("_C*.so"):
                try:
                    torch.ops.load_library(path)
                except OSError:
                    library = torch.library.Library("torchvision", "FRAGMENT")
                    for op in ("nms", "qnms"):
                        library.define(f"{op}(Tensor dets, Tensor scores, float iou) -> Tensor")
                    _schemas.append(library)
        import open_clip
    except Exception as error:
        raise ImportError(
            f"open_clip cannot be imported ({error}); install it with: pip install 'knnfast[clip]'"
        ) from error
    return open_clip
