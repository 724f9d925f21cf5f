"""Corruption schedules of discrete diffusion: how likely a code is kept, replaced, or masked.

Levels t = 0...T; t = 0 is data. A code is kept with probability A_t, replaced by each of the K
codes with probability B_t, masked with probability C_t: A_t + K B_t + C_t = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index

import numpy as np

NAMES = ("vq_diffusion", "mask_replace", "mask")


def even_levels(top: int, steps: int) -> list[int]:
    """The levels top...0 that `steps` even steps visit; above top, some of them twice."""
    return [round(top * (steps - i) / steps) for i in range(steps + 1)]


class Schedule:
    """Cumulative probabilities of a named schedule.

    Args:
        name: `vq_diffusion` (of Gu et al. 2022, as in their code: K B_t = 1e-6 at every level),
            `mask_replace` (0.9 masked and 0.1 uniform at T) or `mask` (no replacement).
        num_steps: T >= 1 (`vq_diffusion`: >= 2).
        num_codes: K >= 1 codes, the mask not counted.

    Attributes:
        A, B, C: [T + 1] float64, index 0 is data.
    Raises: ValueError another name, num_steps or num_codes below its least.
    """

    def __init__(self, name: str, num_steps: int = 100, num_codes: int = 512) -> None:
        if name not in NAMES:
            raise ValueError(f"schedule must be one of {', '.join(NAMES)}, got {name!r}")
        least = 2 if name == "vq_diffusion" else 1
        if num_steps < least:
            raise ValueError(f"num_steps must be >= {least} for {name}, got {num_steps}")
        if num_codes < 1:
            raise ValueError(f"num_codes must be >= 1, got {num_codes}")
        self.name, self.num_steps, self.num_codes = name, num_steps, num_codes
        progress = np.arange(1, num_steps + 1) / num_steps
        if name == "vq_diffusion":
            line = np.arange(num_steps) / (num_steps - 1)
            kept = 0.99999 + line * (0.000009 - 0.99999)
            masked = 0.000009 + line * (0.99999 - 0.000009)
        elif name == "mask_replace":
            kept, masked = 1.0 - progress, 0.9 * progress
        else:
            kept, masked = 1.0 - progress, progress
        self.A = np.concatenate([[1.0], kept])
        self.C = np.concatenate([[0.0], masked])
        replaced = np.zeros(num_steps + 1) if name == "mask" else 1.0 - self.A - self.C
        replaced[0] = 0.0
        self.B = replaced / num_codes
        for array in (self.A, self.B, self.C):
            array.setflags(write=False)

    def check_keeps(self) -> None:
        """Refuse what replaces codes: an edit could not keep those that it does not redraw."""
        if self.B[1:].any():
            raise ValueError(
                f"schedule: an editor needs 'mask', which keeps a code once it is drawn, "
                f"got {self.name!r}"
            )

    def levels(self, steps: int | Sequence[int], top: int | None = None) -> list[int]:
        """Levels a sampler visits, from T, or a lower `top`, down to 0.

        Args:
            steps: a number of steps (levels evenly spaced; fewer where top is less), or the levels
                themselves: strictly falling from top; a missing final 0 is added.
            top: the first level, in [1, T]; None: T.
        Raises: ValueError range; TypeError for anything else than whole numbers.
        """
        if top is not None and not 1 <= top <= self.num_steps:
            raise ValueError(f"top must be in [1, {self.num_steps}], got {top}")
        try:
            if isinstance(steps, bool):
                raise TypeError
            given = [index(v) for v in steps] if hasattr(steps, "__iter__") else index(steps)
        except TypeError:
            raise TypeError(f"steps: a whole number or a list of levels, got {steps!r}") from None
        if top is not None and isinstance(given, int) and 1 <= given <= self.num_steps:
            given = min(given, top)
        top = top or self.num_steps
        if isinstance(given, int):
            if not 1 <= given <= top:
                raise ValueError(f"steps must be in [1, {top}], got {given}")
            return even_levels(top, given)
        listed = given
        if listed and listed[-1] != 0:
            listed.append(0)
        falling = all(a > b for a, b in pairwise(listed))
        if len(listed) < 2 or listed[0] != top or not falling:
            raise ValueError(f"steps must fall strictly from {top} to 0, got {listed}")
        return listed

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, num_steps={self.num_steps}, num_codes={self.num_codes})"
