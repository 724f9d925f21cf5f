# SPDX-License-Identifier: Apache-2.0
"""Random changes that a sticker survives: place, size, turn, flip, colour, blur, noise."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

# Names whose picture must not be mirrored: directions, clocks, writing, flags.
ONE_WAY = re.compile(r"left|right|arrow|clock|thirty|button|flag|keycap|sign|letter|symbol|latin")


def may_flip(name: str) -> bool:
    """Tell whether a sticker's mirror image is still that sticker."""
    return ONE_WAY.search(name) is None


def augment(images: Tensor, flip: Tensor, generator: torch.Generator) -> Tensor:
    """Change images [B, 3, S, S] in [0, 1]; `flip` [B] bool says which may be mirrored."""
    B = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(B, generator=generator) * (high - low) + low

    angle = uniform(-math.pi / 15, math.pi / 15) * (uniform(0, 1) < 0.5)
    zoom = torch.exp(uniform(-0.08, 0.22))  # above 1: the sticker becomes smaller
    mirror = torch.where(flip & (uniform(0, 1) < 0.5), -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    matrix = torch.stack([cos * mirror, -sin, shift_x, sin * mirror, cos, shift_y], 1).view(B, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    out = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white outside

    contrast = uniform(0.85, 1.15).view(B, 1, 1, 1)
    tint = (torch.rand(B, 3, 1, 1, generator=generator) - 0.5) * 0.12
    ink = 1 - out.amin(1, keepdim=True)  # white stays white
    out = 1 - (1 - out) * contrast + tint * ink
    soft = uniform(0, 1) < 0.3  # what a tokenizer or a resize loses
    if soft.any():
        side = int(torch.randint(16, 48, (1,), generator=generator))
        small = F.interpolate(out[soft], size=side, mode="area")
        out[soft] = F.interpolate(small, size=out.shape[-1], mode="bilinear")
    grain = (uniform(0, 0.05) * (uniform(0, 1) < 0.3)).view(B, 1, 1, 1)
    return (out + grain * torch.randn(out.shape, generator=generator)).clamp(0, 1)
