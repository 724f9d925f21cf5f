"""Levels t of a training batch: uniform, or drawn by importance."""

from __future__ import annotations

import torch
from torch import Tensor

HITS = 10  # a level's loss is trusted after more than this many images
DECAY = 0.9


class Levels:
    """Draws levels in 1...T from uniform numbers, and learns which ones matter.

    By importance (Gu et al. 2022, from Nichol and Dhariwal 2021): p(t) is proportional to
    sqrt(E_t[loss^2]), a moving average over the images seen at t, and an image's loss is divided by
    T p(t), so that its expectation stays. Uniform until every level was seen more than HITS times.
    The first level takes the probability of the second.

    Args:
        num_steps: T.
        importance: draw by importance; else always uniformly.
    """

    def __init__(self, num_steps: int, importance: bool) -> None:
        self.num_steps, self.importance = num_steps, importance
        self.square = torch.zeros(num_steps, dtype=torch.float64)  # E_t[loss^2], t = 1...T
        self.hits = torch.zeros(num_steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Probability of each level, [T] float64, entry t - 1 that of t."""
        if not self.importance or int(self.hits.min()) <= HITS:
            return torch.full_like(self.square, 1.0 / self.num_steps)
        p = (self.square + 1e-10).sqrt() + 1e-4
        p[0] = p[min(1, self.num_steps - 1)]
        return p / p.sum()

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers into levels by the inverse of their distribution.

        Args:
            u: [B] float64 in [0, 1).

        Returns:
            t [B] int64, and 1 / (T p(t)) [B] float32.
        """
        p = self.probabilities()
        slot = torch.searchsorted(p.cumsum(0), u, right=True).clamp_max(self.num_steps - 1)
        return slot + 1, (1.0 / (self.num_steps * p[slot])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take in the losses [B] of images at levels t [B]; a level's count as one, their mean."""
        if not self.importance:
            return
        count = torch.bincount(t - 1, minlength=self.num_steps)
        total = torch.zeros_like(self.square)
        total.index_add_(0, t - 1, loss.double().square())
        seen = count > 0
        mean = total[seen] / count[seen]
        known = self.hits[seen] > 0
        self.square[seen] = torch.where(known, DECAY * self.square[seen] + (1 - DECAY) * mean, mean)
        self.hits += count

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        return {"levels.square": self.square, "levels.hits": self.hits}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.square.copy_(state["levels.square"])
        self.hits.copy_(state["levels.hits"])
