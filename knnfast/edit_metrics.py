"""Measures of an edit: how much of the picture changed, and how well the rest was kept."""

from __future__ import annotations

import math

import numpy as np


def changed_region(
    before: np.ndarray, after: np.ndarray, threshold: float = 0.1, dilate: int = 2
) -> np.ndarray:
    """Pixels where some channel differs by more than `threshold`, dilated by a square.

    Args:
        before: [H, W, 3] uint8.
        after: [H, W, 3] uint8.
        threshold: of the difference, full scale 1.
        dilate: pixels by which the region grows to every side.

    Returns:
        [H, W] bool.
    """
    difference = np.abs(before.astype(np.float64) - after.astype(np.float64)).max(2) / 255
    changed = np.pad(difference > threshold, dilate)
    h, w = before.shape[:2]
    side = 2 * dilate + 1
    shifts = [changed[y : y + h, x : x + w] for y in range(side) for x in range(side)]
    return np.logical_or.reduce(shifts)


def pixels_of(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Spread cells [rows, columns] over the pixels they stand for: [H, W], H and W multiples."""
    return cells.repeat(shape[0] // cells.shape[0], 0).repeat(shape[1] // cells.shape[1], 1)


def psnr_outside(before: np.ndarray, after: np.ndarray, region: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the pixels outside a region; inf where they are equal.

    10 log10(1 / mean (before - after)^2), full scale 1; nan where nothing lies outside.
    """
    if region.all():
        return math.nan
    difference = (before.astype(np.float64) - after.astype(np.float64))[~region] / 255
    error = float(np.square(difference).mean())
    return math.inf if error == 0 else -10 * math.log10(error)
