"""Random changes of images that stay images of the same kind: mirror, move, turn, tint."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows: luma and the two axes of the hue plane (YIQ).
_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
)


def augment(
    images: Tensor,
    generator: torch.Generator,
    mirror: float = 0.5,
    move: float = 0.06,
    scale: float = 0.15,
    turn: float = 12.0,
    hue: float = 0.5,
    light: float = 0.15,
    background: float = 1.0,
) -> Tensor:
    """Change every image of a batch at random, each in its own way.

    Args:
        images: [B, 3, H, W], float in [0, 1].
        generator: source of the random numbers.
        mirror: probability of a left-right mirror image.
        move: largest shift, as a share of the side.
        scale: largest change of size, up or down.
        turn: largest rotation, degrees.
        hue: probability of a rotation of the hue by any angle; the others turn by up to 5 degrees.
        light: largest change of brightness and of saturation.
        background: grey level of what comes into view.

    Returns:
        Images, [B, 3, H, W], float in [0, 1].
    """
    b = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, generator=generator)

    angle = uniform(-turn, turn) * (math.pi / 180)
    size = 1.0 / (1.0 + uniform(-scale, scale))
    flip = torch.where(uniform(0, 1) < mirror, -1.0, 1.0)
    cos, sin = angle.cos() * size, angle.sin() * size
    theta = torch.stack(
        [
            torch.stack([cos * flip, -sin, uniform(-2 * move, 2 * move)], 1),
            torch.stack([sin * flip, cos, uniform(-2 * move, 2 * move)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images - background, grid, align_corners=False) + background

    turn_hue = torch.where(uniform(0, 1) < hue, uniform(-math.pi, math.pi), uniform(-0.09, 0.09))
    gain = 1.0 + uniform(-light, light)
    zero, one = torch.zeros(b), torch.ones(b)
    c, s = turn_hue.cos() * gain, turn_hue.sin() * gain
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
    return out ** (1.0 + uniform(-light, light))[:, None, None, None]
