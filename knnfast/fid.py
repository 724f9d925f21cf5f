# SPDX-License-Identifier: Apache-2.0
"""Frechet Inception distance, through torchmetrics."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from knnfast._checks import hint

WEIGHTS = "weights-inception-2015-12-05-6d726d74.pth"  # as torch-fidelity publishes them


def weights_at(inception: str | Path | None = None) -> Path:
    """The file of Inception's weights; all else that `fid` needs is there, too.

    Raises:
        ImportError, FileNotFoundError: something is missing.
    """
    path = Path(inception or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS)
    if not path.is_file():
        place = path if inception else f"{WEIGHTS} in torch's hub folder"  # reports are published
        raise FileNotFoundError(f"FID: no Inception weights at {place} (see --inception)")
    _require("torchmetrics")
    _require("torch_fidelity")
    return path


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"FID: {package} is missing: {hint('evaluate')}")


def fid(
    images: np.ndarray,
    real: np.ndarray,
    inception: str | Path | None = None,
    features: nn.Module | None = None,
    batch: int = 50,
) -> float:
    """Measure the Frechet distance of the features of two sets of pictures (Heusel et al. 2017).

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) for their means m and covariances S. Compare figures
    of equal numbers of pictures only: with few of them it is biased upwards by far.

    Args:
        images: [N, H, W, 3] uint8, N >= 2.
        real: [M, H, W, 3] uint8, M >= 2.
        inception: file of the Inception weights; by default WEIGHTS in torch's hub folder. Nothing
            is downloaded.
        features: another network in Inception's place: uint8 [B, 3, H, W] to [B, D].
        batch: pictures at a time.

    Raises:
        ImportError: torchmetrics, or for Inception torch-fidelity, is missing.
        FileNotFoundError: no weights.
    """
    if features is not None:
        _require("torchmetrics")
        options: dict[str, Any] = {"feature": features}
    else:
        options = {"feature_extractor_weights_path": str(weights_at(inception))}
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(**options)
    metric.set_dtype(torch.float64)
    for pictures, known in ((images, False), (real, True)):
        for start in range(0, len(pictures), batch):
            part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch]))
            metric.update(part.permute(0, 3, 1, 2), real=known)
    return float(metric.compute())
