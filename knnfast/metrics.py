# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated images: plain functions on arrays, computed in FP64."""

from __future__ import annotations

import numpy as np


def r_precision(images: np.ndarray, texts: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Tell for each image whether its own text is among the k nearest of all texts.

    hit_i = [ #{j : <x_i, t_j> > <x_i, t_right(i)>} + #{j < right(i) : equal} < k ]

    Args:
        images: [N, D] unit rows.
        texts: [M, D] unit rows.
        right: [N] int64, the row of each image's own text.
        k: 1 <= k <= M.

    Returns:
        [N] float64 of 0 and 1; its mean is R-precision@k.
    """
    if not 1 <= k <= len(texts):
        raise ValueError(f"k must be between 1 and {len(texts)}, got {k}")
    scores = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    right = np.asarray(right, np.int64)
    own = scores[np.arange(len(scores)), right][:, None]
    earlier = np.arange(len(texts))[None, :] < right[:, None]
    rank = (scores > own).sum(1) + ((scores == own) & earlier).sum(1)
    return (rank < k).astype(np.float64)


def mean_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Average the cosines of pairs: (1/N) sum_i <x_i, t_i> for unit rows [N, D] and [N, D]."""
    products = np.asarray(images, np.float64) * np.asarray(texts, np.float64)
    return float(products.sum(1).mean())


def cmmd(x: np.ndarray, y: np.ndarray, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Measure the distance of two sets of embeddings (Jayasumana et al. 2024, Eq. 4).

    scale * [ mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j) ],
    k(a, b) = exp(-|a - b|^2 / (2 sigma^2)): the unbiased estimate of the squared maximum mean
    discrepancy, so two samples of one distribution give 0 on average, at times a little less.

    Args:
        x: [m, D], m >= 2.
        y: [n, D], n >= 2.
        sigma: the kernel's width; 10 is the paper's.
        scale: 1000 is the paper's.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"cmmd needs two rows on each side, got {len(x)} and {len(y)}")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
        return np.exp(-np.maximum(square, 0) / (2 * sigma**2))

    def within(a: np.ndarray) -> float:
        return float((kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)))

    return scale * (within(x) + within(y) - 2 * float(kernel(x, y).mean()))


def nearest_distance(x: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Return 1 - max_j <x_i, d_j> for unit rows [N, D] and [M, D]: [N], 0 for a copy."""
    return 1 - (np.asarray(x, np.float64) @ np.asarray(database, np.float64).T).max(1)


def pixel_distance(x: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Return each picture's smallest root mean square difference to any of a database's.

    Args:
        x: [N, H, W, 3] uint8.
        database: [M, H, W, 3] uint8.

    Returns:
        [N] float64 in [0, 1], full scale 1; 0 for a copy.
    """
    a = np.asarray(x).reshape(len(x), -1).astype(np.float64) / 255
    b = np.asarray(database).reshape(len(database), -1).astype(np.float64) / 255
    square = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0).min(1) / a.shape[1])


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, rounds: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of [N] independent values (Efron 1979)."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
