# SPDX-License-Identifier: Apache-2.0
"""The image side of the embedded encoder.

The vector has two parts, each of unit norm before weighting:

    image:  e = [ sqrt(w) s | sqrt(1 - w) a ]       text:  e = [ s | 0 ]

s, the *semantic* part, comes from a small network trained against sentence embeddings of names
and keywords. a, the *appearance* part, is a linear code of a 16x16 thumbnail: it makes
neighbours carry colour and shape, on pictures of any kind. A text says nothing of appearance, so
cosine(text, image) = sqrt(w) cos(s_text, s_image) and ranks images by meaning alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
