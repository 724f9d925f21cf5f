"""Sampling: from the prior down any list of levels, each step exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnfast._phases import phase
from knnfast.diffusion.schedule import Schedule
from knnfast.ops import sample_head, sample_prior, transition_weights

if TYPE_CHECKING:
    from knnfast.diffusion.denoiser import Condition, Denoiser


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    cond: Tensor,
    cond_mask: Tensor,
    steps: int | Sequence[int] = 25,
    guidance: float = 3.0,
    seed: int = 0,
    truncation: float = 1.0,
    top_k: int = 0,
    temperature: float = 1.0,
    image_indices: Tensor | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw codes.

    Args:
        denoiser: the network.
        schedule: of the corruption; may be another one than in training.
        cond: condition embeddings, [B, k+1, E], query first, then neighbours nearest first.
        cond_mask: which of them are on, [B, k+1] bool.
        steps: number of steps, or the levels to visit (falling from T); any list is exact.
        guidance: w in l = l_null + w (l_cond - l_null); 1 means none.
        seed: of the random numbers; with the image index it fixes an image, whatever the batch (on
            the CPU to the last bit; on a GPU up to the rounding of its matrix products).
        truncation: keep the most probable classes up to this mass; 1 keeps all.
        top_k: keep this many classes; 0 keeps all.
        temperature: divides the logits after guidance.
        image_indices: [B] int64, the images' indices in the random numbers; default 0...B-1.
        callback: called with (steps done, steps) after each step.

    Returns:
        Codes, [B, L] int64.

    Raises:
        ValueError: a bad list of steps, truncation or temperature, or another number of codes.
    """
    if not 0.0 < truncation <= 1.0:
        raise ValueError(f"truncation must be in (0, 1], got {truncation}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if schedule.num_codes != denoiser.config.num_codes:
        raise ValueError(
            f"the schedule's num_codes {schedule.num_codes} is not the denoiser's "
            f"{denoiser.config.num_codes}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    key = seed - 2**64 if seed >= 2**63 else seed  # the same 64 bits as an int64
    levels = schedule.levels(steps if isinstance(steps, int) else list(steps))
    k, length = schedule.num_codes, denoiser.config.length
    batch = len(cond)
    x = sample_prior(schedule, levels[0], k, (batch, length), seed=key, image_indices=image_indices)
    guided = guidance != 1.0
    # The fused attention wants one type throughout, which autocast does not keep.
    fold = not torch.is_autocast_enabled(cond.device.type)
    # On the CPU every image has the network to itself: a matrix product rounds by its shape, and an
    # image must not depend on its batch. A GPU needs the whole batch to be busy.
    size = 1 if cond.device.type == "cpu" else max(batch, 1)
    parts = [slice(i, i + size) for i in range(0, max(batch, 1), size)]

    def prepare(cond: Tensor, mask: Tensor) -> Condition:
        if guided:
            cond = torch.cat([cond, torch.zeros_like(cond)])
            mask = torch.cat([mask, torch.zeros_like(mask)])
        return denoiser.prepare(cond, mask, fold=fold)

    conditions = [prepare(cond[p].clone(), cond_mask[p]) for p in parts]
    for done, (t, s) in enumerate(pairwise(levels), start=1):
        both = []  # the rows of each part, and of its null pass
        with phase("sample.features"):
            for p, condition in zip(parts, conditions, strict=True):
                codes = torch.cat([x[p], x[p]]) if guided else x[p]
                level = torch.full((len(codes),), t, dtype=torch.int64, device=x.device)
                rows = denoiser.features(codes, level, condition).to(denoiser.head.weight.dtype)
                both.append(rows.unflatten(0, (-1, len(x[p]))))
        rows = torch.cat(both, 1)
        with phase("sample.head"):
            x = sample_head(
                rows[0],
                denoiser.head.weight,
                denoiser.head.bias,
                x,
                transition_weights(schedule, t, s, k, device=x.device),
                seed=key,
                image_indices=image_indices,
                null_features=rows[1] if guided else None,
                guidance=guidance,
                temperature=temperature,
                top_r=truncation,
                top_k=top_k,
            )
        if callback is not None:
            callback(done, len(levels) - 1)
    return x
