"""The sampler with the fused ops beside the same network and loop in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case, Rival, pick

from cases import plain
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.sampler import Sampler, SamplingGraph, sample
from knnfast.pipeline import find_model

GUIDANCE = 3.0


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    B, steps = size["B"], size["steps"]
    torch.manual_seed(0)
    if "bundle" in size:
        denoiser = Denoiser.from_folder(find_model(size["bundle"]) / "denoiser", device=device)
    else:
        config = DenoiserConfig(
            num_codes=size["K"], grid=size["grid"], patch=size["patch"], depth=size["depth"],
            schedule="vq_diffusion",
        )  # fmt: skip
        denoiser = Denoiser(config).eval().to(device)
    E, K = denoiser.config.embed_dim, denoiser.config.num_codes
    cond = torch.nn.functional.normalize(torch.randn(B, 11, E), dim=-1).to(device)
    mask = torch.ones(B, 11, dtype=torch.bool, device=device)
    exact = plain.ReferenceSampler(denoiser, B, steps, GUIDANCE)(cond, mask)

    def judge(codes: torch.Tensor) -> dict[str, Any]:
        """Codes are codes; how many differ says how far rounding carried a run from another."""
        differ = float((codes != exact).float().mean())
        valid = bool(((codes >= 0) & (codes < K)).all())
        return {"tokens_that_differ": differ, "ok": valid and differ <= 0.05}

    def in_plain_torch() -> Rival:
        sampler = plain.PlainSampler(denoiser, B, steps, GUIDANCE)
        return Rival(lambda: sampler(cond, mask))

    backends: dict[str, Any] = {
        "fused": lambda: sample(denoiser, denoiser.schedule, cond, mask, steps, GUIDANCE, seed=0)
    }
    if device != "cpu":  # the same loop, replayed as one graph
        graph = SamplingGraph(Sampler(denoiser, denoiser.schedule, steps, GUIDANCE), B, 11)
        backends = {"graph": lambda: graph(cond, mask, seed=0), **backends}

    yield Case(
        "sample", shape, f"{B} images, L {denoiser.config.length}, K {K}, {steps} steps",
        "float32",
        backends,
        judge,
        lambda names: pick({"torch-plain": in_plain_torch}, names),
        cuda=device != "cpu",
        graphs=True,
    )  # fmt: skip
