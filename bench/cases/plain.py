"""The sampler that the fused ops are measured against: the same network in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from knnfast import ops, reference


def sample(
    denoiser: Any, cond: torch.Tensor, mask: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """Dense head, K + 1 wide posterior, keys and values made anew at each step."""

    def step(x: torch.Tensor, own: torch.Tensor, null: torch.Tensor, w: torch.Tensor) -> Any:
        own, null = own.float(), null.float()
        logp = torch.log_softmax(null + guidance * (own - null), -1)
        p = reference.transition_distribution(logp, x, w.float()).float()
        noise = -torch.log(-torch.log(torch.rand_like(p).clamp(1e-30, 1 - 1e-7)))
        return (p.clamp_min(1e-30).log() + noise).argmax(-1)

    return _run(denoiser, cond, mask, steps, step)


def sample_reference(
    denoiser: Any, cond: torch.Tensor, mask: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """The same with the reference's step and random numbers: what our sampler should return."""

    def step(x: torch.Tensor, own: torch.Tensor, null: torch.Tensor, w: torch.Tensor) -> Any:
        return reference.transition_step(
            own.double(), x, w, seed=0, null_logits=null.double(), guidance=guidance
        )

    return _run(denoiser, cond, mask, steps, step)


@torch.inference_mode()
def _run(
    denoiser: Any, cond: torch.Tensor, mask: torch.Tensor, steps: int, step: Callable[..., Any]
) -> torch.Tensor:
    """The loop of both: step(x_t, logits, null logits, weights) gives x_s."""
    schedule = denoiser.schedule
    K, B, T = schedule.num_codes, len(cond), schedule.num_steps
    x = ops.sample_prior(schedule, T, K, (B, denoiser.config.length), seed=0).to(cond.device)
    cond = torch.cat([cond, torch.zeros_like(cond)])
    mask = torch.cat([mask, torch.zeros_like(mask)])
    for t, s in pairwise(schedule.levels(steps)):
        level = torch.full((2 * B,), t, device=cond.device)
        own, null = denoiser(x.repeat(2, 1), level, cond, mask).chunk(2)
        x = step(x, own, null, reference.transition_weights(schedule, t, s, K, device=cond.device))
    return x
