"""One denoising step from logits to tokens, mean over a whole run, beside diffusers' scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case, pick
from graph import with_graphs

from cases.runs import diffusers_step, drawn_rows, judge_tokens, record
from knnfast import ops, reference


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    run = record(size, device)
    steps = list(zip(run.tokens, run.weights, strict=True))
    logits = run.logits
    drawn = sum(drawn_rows(run, size["K"])) / len(steps)  # in the mean

    def ours() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [ops.transition_step(logits, x, w, seed=0) for x, w in steps]

    def exact(i: int) -> torch.Tensor:
        return reference.transition_step(logits.double(), *steps[i], seed=0)

    yield Case(
        "transition_step", shape, f"{size['schedule']}, {size['steps']} steps",
        str(logits.dtype).removeprefix("torch."), with_graphs({"dense": ours}, device),
        judge_tokens(run, exact),
        lambda names: pick({"diffusers": lambda: diffusers_step(run, size)}, names),
        # One pass over all logits; rows that are not drawn from need not be read.
        bytes=float(logits.nbytes), flops=2.0 * logits.numel(),
        per=len(steps), cuda=device != "cpu", graphs=True,
        facts=lambda: {"rows_drawn": drawn / logits[..., 0].numel()},
    )  # fmt: skip
