"""A recorded sampling run, which the cases of the transition step replay."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from case import Rival

from knnfast import ops
from knnfast.diffusion.schedule import Schedule


class Run(NamedTuple):
    """Inputs of every step of one run: what the head reads, its weight, tokens and step weights."""

    features: torch.Tensor  # [B, L, D]
    weight: torch.Tensor  # [K, D]
    logits: torch.Tensor  # [B, L, K]
    levels: list[tuple[int, int]]
    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]

    def checked(self) -> list[int]:
        """Steps that are compared with the reference: first, middle, last."""
        return [0, len(self.levels) // 2, len(self.levels) - 1]


def record(size: dict[str, Any], device: str) -> Run:
    """A run of the shape with random features, the same logits at every step."""
    B, L, K, D, T, steps = (size[name] for name in ("B", "L", "K", "D", "T", "steps"))
    dtype = torch.float32 if device == "cpu" else torch.float16
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(B, L, D, generator=draw).to(device, dtype)
    weight = (torch.randn(K, D, generator=draw) / D**0.5 * 3).to(device, dtype)
    schedule = Schedule(size["schedule"], T, K)
    levels = list(pairwise(schedule.levels(steps)))
    x = ops.sample_prior(schedule, T, K, (B, L), seed=0).to(device)
    weights = [ops.transition_weights(schedule, t, s, K, device=device) for t, s in levels]
    tokens = []
    for w in weights:
        tokens.append(x)
        x = ops.sample_head(features, weight, None, x, w, seed=0)
    return Run(features, weight, features @ weight.T, levels, tokens, weights)


def drawn_rows(run: Run, num_codes: int) -> list[int]:
    """Rows of each step that need the network's distribution."""
    device = run.logits.device
    images = torch.arange(len(run.logits), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return [
        torch.ops.knnfast.transition_choose(x, w, images, seed, num_codes)[1].numel()
        for x, w in zip(run.tokens, run.weights, strict=True)
    ]


def judge_tokens(run: Run, exact: Callable[[int], torch.Tensor]) -> Callable[[Any], dict[str, Any]]:
    """Compares the tokens of all steps with `exact(i)`, what the reference draws in step i.

    Of the tokens that are drawn from the network's distribution one of a thousand may be another:
    two classes whose perturbed scores agree to a float's rounding.
    """
    drawn = drawn_rows(run, run.logits.shape[-1])

    def judge(tokens: list[torch.Tensor] | None) -> dict[str, Any]:
        if tokens is None:  # another stream of random numbers: tests compare its distribution
            return {"ok": False}
        wrong = sum(int((tokens[i] != exact(i)).sum()) for i in run.checked())
        share = wrong / max(1, sum(drawn[i] for i in run.checked()))
        return {"tokens_that_differ": share, "ok": share <= 1e-3}

    return judge


def diffusers_step(run: Run, size: dict[str, Any], head: Callable[[], Any] | None = None) -> Rival:
    """Diffusers' scheduler at five levels of the run; its time does not depend on the level.

    As its own model does, it is given log p [B, K, L] in one piece.

    With `head`, that is called before each step.
    """
    import diffusers

    theirs = diffusers.VQDiffusionScheduler(num_vec_classes=size["K"] + 1)
    theirs.set_timesteps(size["T"], device=run.logits.device)  # their tables go there, too
    logp = torch.log_softmax(run.logits.float(), -1).transpose(1, 2).contiguous()
    some = range(0, len(run.levels), max(1, len(run.levels) // 5))
    # Their level t is counted from 0.
    steps = [(torch.tensor(run.levels[i][0] - 1), run.tokens[i]) for i in some]

    def call() -> None:
        for t, x in steps:
            if head is not None:
                head()
            theirs.step(logp, t, x)

    return Rival(call, per=len(steps))
