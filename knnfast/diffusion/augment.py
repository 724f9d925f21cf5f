"""Random changes of images that stay images of the same kind: mirror, move, turn, tint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knnfast.diffusion.settings import Settings

FILLS = ("mirror", "white")
# Rows: luma and the two axes of the hue plane (YIQ).
_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
)


@dataclass(frozen=True)
class AugmentConfig(Settings):
    """How images are changed at random. The defaults suit photographs; clip art takes more.

    Attributes:
        mirror: probability of a left-right mirror image; 0 where letters or sides matter.
        move: largest shift, as a share of the side.
        scale: largest change of size, up or down.
        turn: largest rotation, degrees.
        hue: probability of a rotation of the hue by any angle; the others turn by up to 5 degrees.
        light: largest change of brightness and of saturation.
        fill: what comes into view: `mirror`, the image mirrored at its edge, or `white`.
    """

    mirror: float = 0.5
    move: float = 0.06
    scale: float = 0.15
    turn: float = 0.0
    hue: float = 0.0
    light: float = 0.1
    fill: str = "mirror"

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"mirror": 1, "move": 1, "scale": 0.9, "turn": 180, "hue": 1, "light": 0.9}
        for name, high in limits.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in [0, {high}], got {getattr(self, name)}")
        if self.fill not in FILLS:
            raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {self.fill!r}")


PHOTOS = AugmentConfig()
# What the bundled models were trained with: a sticker of another colour is a sticker.
STICKERS = AugmentConfig(
    mirror=0.5, move=0.06, scale=0.15, turn=12.0, hue=0.5, light=0.15, fill="white"
)
KINDS = {"photos": PHOTOS, "stickers": STICKERS}


def augment(images: Tensor, generator: torch.Generator, config: AugmentConfig = PHOTOS) -> Tensor:
    """Change every image of a batch at random, each in its own way.

    Args:
        images: [B, 3, H, W], float in [0, 1].
        generator: source of the random numbers.
        config: how much.

    Returns:
        Images, [B, 3, H, W], float in [0, 1].
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, generator=generator)

    angle = uniform(-config.turn, config.turn) * (math.pi / 180)
    size = 1.0 / (1.0 + uniform(-config.scale, config.scale))
    flip = torch.where(uniform(0, 1) < config.mirror, -1.0, 1.0)
    cos, sin = angle.cos() * size, angle.sin() * size
    move = 2 * config.move
    theta = torch.stack(
        [
            torch.stack([cos * flip, -sin, uniform(-move, move)], 1),
            torch.stack([sin * flip, cos, uniform(-move, move)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # What lies outside is 0: white, once white is taken off.
    outside, white = ("zeros", 1.0) if config.fill == "white" else ("reflection", 0.0)
    out = F.grid_sample(images - white, grid, padding_mode=outside, align_corners=False) + white

    any_hue = torch.where(
        uniform(0, 1) < config.hue, uniform(-math.pi, math.pi), uniform(-0.09, 0.09)
    )
    gain = 1.0 + uniform(-config.light, config.light)
    zero, one = torch.zeros(b), torch.ones(b)
    c, s = any_hue.cos() * gain, any_hue.sin() * gain
    rotate = torch.stack(
        [
            torch.stack([one, zero, zero], 1),
            torch.stack([zero, c, -s], 1),
            torch.stack([zero, s, c], 1),
        ],
        1,
    )
    matrix = torch.linalg.inv(_TO_YIQ) @ rotate @ _TO_YIQ  # [B, 3, 3]
    out = torch.einsum("bij,bjhw->bihw", matrix, out).clamp(0.0, 1.0)
    # A power keeps white white and black black.
    return out ** (1.0 + uniform(-config.light, config.light))[:, None, None, None]


def augmented(
    images: Tensor, generator: torch.Generator, config: AugmentConfig = PHOTOS, batch: int = 256
) -> Tensor:
    """Images [N, 3, H, W] uint8, changed as `augment` does, `batch` at a time."""
    parts = [augment(x.float() / 255, generator, config) for x in images.split(batch)]
    return (torch.cat(parts) * 255).round().byte()
