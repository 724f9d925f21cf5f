"""The sampler that the fused ops are measured against: the same network in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from knnfast import ops, reference


class PlainSampler:
    """A run of the network: dense head, K + 1 wide posterior, keys and values made at each step.

    What is the same in every run is made once, as `knnfast.diffusion.sampler.Sampler` does it.
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
        for level, weights in self.steps:
            own, null = self.denoiser(x.repeat(2, 1), level, cond, mask).chunk(2)
            x = self.step(x, own, null, weights)
        return x

    def step(
        self, x: torch.Tensor, own: torch.Tensor, null: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x_s from x_t, the logits with the condition and those without."""
        own, null = own.float(), null.float()
        logp = torch.log_softmax(null + self.guidance * (own - null), -1)
        p = reference.transition_distribution(logp, x, weights.float()).float()
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
