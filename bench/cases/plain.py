"""The sampler that the fused ops are measured against: the same network in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from knnfast import ops, reference


@torch.inference_mode()
def sample(
    denoiser: Any, cond: torch.Tensor, mask: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """Dense head, K + 1 wide posterior, keys and values made anew at each step."""
    schedule = denoiser.schedule
    K, B, T = schedule.num_codes, len(cond), schedule.num_steps
    x = ops.sample_prior(schedule, T, K, (B, denoiser.config.length), seed=0).to(cond.device)
    cond = torch.cat([cond, torch.zeros_like(cond)])
    mask = torch.cat([mask, torch.zeros_like(mask)])
    for t, s in pairwise([T - i * T // steps for i in range(steps)] + [0]):
        level = torch.full((2 * B,), t, device=cond.device)
        logits = denoiser(x.repeat(2, 1), level, cond, mask).float()
        logp = torch.log_softmax(logits[B:] + guidance * (logits[:B] - logits[B:]), -1)
        w = reference.transition_weights(schedule, t, s, K, device=cond.device).float()
        p = reference.transition_distribution(logp, x, w).float()
        noise = -torch.log(-torch.log(torch.rand_like(p).clamp(1e-30, 1 - 1e-7)))
        x = (p.clamp_min(1e-30).log() + noise).argmax(-1)
    return x


@torch.inference_mode()
def sample_reference(
    denoiser: Any, cond: torch.Tensor, mask: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """The same with the reference's step and random numbers: what our sampler should return."""
    schedule = denoiser.schedule
    K, B, T = schedule.num_codes, len(cond), schedule.num_steps
    x = ops.sample_prior(schedule, T, K, (B, denoiser.config.length), seed=0).to(cond.device)
    cond = torch.cat([cond, torch.zeros_like(cond)])
    mask = torch.cat([mask, torch.zeros_like(mask)])
    for t, s in pairwise([T - i * T // steps for i in range(steps)] + [0]):
        level = torch.full((2 * B,), t, device=cond.device)
        logits = denoiser(x.repeat(2, 1), level, cond, mask).double()
        w = reference.transition_weights(schedule, t, s, K, device=cond.device)
        x = reference.transition_step(
            logits[:B], x, w, seed=0, null_logits=logits[B:], guidance=guidance
        )
    return x
