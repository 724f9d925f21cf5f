"""From features to tokens with the head run on drawn rows alone, mean over a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case, Rival, pick
from graph import with_graphs

from cases.runs import diffusers_step, drawn_rows, judge_tokens, record
from knnfast import ops, reference


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    run = record(size, device)
    steps = list(zip(run.tokens, run.weights, strict=True))
    K, D = run.weight.shape
    drawn = sum(drawn_rows(run, K))

    def ours() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [ops.sample_head(run.features, run.weight, None, x, w, seed=0) for x, w in steps]

    def dense() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [
                ops.transition_step(run.features @ run.weight.T, x, w, seed=0) for x, w in steps
            ]

    def exact(i: int) -> torch.Tensor:
        return reference.sample_head(
            run.features.double(), run.weight.double(), None, *steps[i], seed=0
        )

    bytes_each = run.weight.element_size()
    yield Case(
        "sample_head", shape, f"{size['schedule']}, {size['steps']} steps",
        str(run.features.dtype).removeprefix("torch."),
        with_graphs({"sparse": ours}, device),
        judge_tokens(run, exact),
        lambda names: pick(
            {
                "torch head + transition_step": lambda: Rival(dense),
                "torch head + diffusers": lambda: diffusers_step(
                    run, size, lambda: run.features @ run.weight.T
                ),
            },
            names,
        ),
        bytes=bytes_each * D * (K + drawn / len(steps)), flops=2.0 * K * D * drawn / len(steps),
        per=len(steps), cuda=device != "cpu", graphs=True,
        facts=lambda: {"rows_drawn": drawn / (len(steps) * run.features[..., 0].numel())},
    )  # fmt: skip
