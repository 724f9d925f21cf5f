"""The sampler that the fused ops are measured against: the same network in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from knnfast import ops, reference
from knnfast.ops.reference import MASK_P, MASK_U, REAL_P, REAL_U0, REAL_U1


def posterior(logp: torch.Tensor, x_t: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """p(x_s | x_t) over K + 1 classes as `reference.transition_distribution`, in logp's type."""
    p, w = logp.exp(), weights.to(logp.dtype)
    K = p.shape[-1]
    masked = x_t == K
    p_i = p.gather(-1, x_t.clamp(max=K - 1)[..., None])[..., 0]
    w_p = torch.where(masked, w[MASK_P], w[REAL_P])
    w_u = torch.where(masked, w[MASK_U], w[REAL_U0] * (1 - p_i) + w[REAL_U1] * p_i)
    out = torch.nn.functional.pad(w_p[..., None] * p + w_u[..., None] / K, (0, 1))
    return out.scatter_add_(-1, x_t[..., None], (1 - w_p - w_u)[..., None])


class PlainSampler:
    """A run of the network: dense head, K + 1 wide posterior, keys and values made at each step.

    What is the same in every run is made once, and what is the same in every step once a run, as
    `knnfast.diffusion.sampler.Sampler` does it.
    """

    def __init__(self, denoiser: Any, batch: int, steps: int, guidance: float) -> None:
        schedule = denoiser.schedule
        K, T, device = schedule.num_codes, schedule.num_steps, denoiser.head.weight.device
        prior = ops.sample_prior(schedule, T, K, (batch, denoiser.config.length), seed=0)
        self.denoiser, self.guidance, self.prior = denoiser, guidance, prior.to(device)
        self.steps = [
            (
                torch.full((2 * batch,), t, device=device),
                reference.transition_weights(schedule, t, s, K, device=device),
            )
            for t, s in pairwise(schedule.levels(steps))
        ]

    @torch.inference_mode()
    def __call__(self, cond: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Codes [B, L] for a condition [B, k + 1, E]."""
        x = self.prior
        cond = torch.cat([cond, torch.zeros_like(cond)])
        mask = torch.cat([mask, torch.zeros_like(mask)])
        condition = self.denoiser.prepare(cond, mask)
        for level, weights in self.steps:
            features = self.denoiser.features(x.repeat(2, 1), level, condition)
            own, null = self.denoiser.head(features).chunk(2)
            x = self.step(x, own, null, weights)
        return x

    def step(
        self, x: torch.Tensor, own: torch.Tensor, null: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x_s from x_t, the logits with the condition and those without."""
        own, null = own.float(), null.float()
        logp = torch.log_softmax(null + self.guidance * (own - null), -1)
        p = posterior(logp, x, weights)
        noise = -torch.log(-torch.log(torch.rand_like(p).clamp(1e-30, 1 - 1e-7)))
        return (p.clamp_min(1e-30).log() + noise).argmax(-1)


class ReferenceSampler(PlainSampler):
    """With the reference's step and random numbers: what our sampler should return."""

    def step(
        self, x: torch.Tensor, own: torch.Tensor, null: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x_s from x_t, the logits with the condition and those without."""
        return reference.transition_step(
            own.double(), x, weights, seed=0, null_logits=null.double(), guidance=self.guidance
        )
