"""Optimiser of the denoiser's training: Muon for matrices, Adam for everything else."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalize(x: Tensor, rounds: int = 5, bf16: bool = True) -> Tensor:
    """Push the singular values of each matrix of x [n, r, c] towards 1 (Newton-Schulz)."""
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    y = y.bfloat16() if bf16 else y
    for _ in range(rounds):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ y
    return (y.mT if tall else y).float()


class Muon:
    """Muon (Jordan 2024) for the matrices of the layers, Adam for vectors, embeddings and the head.

    Both parts share one learning rate: an orthogonalised update is scaled to the root mean square
    that Adam's updates have (0.2 sqrt of the larger side).

    Args:
        model: whose parameters are trained.
        lr: learning rate.
        momentum: of Muon, in Nesterov's form.
        betas: of Adam.
        weight_decay: decoupled, on matrices.
        bf16: compute Muon's updates in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        bf16: bool = True,
    ) -> None:
        self.lr, self.momentum, self.weight_decay, self.bf16 = lr, momentum, weight_decay, bf16
        matrices: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        others = []
        for name, p in model.named_parameters():
            if name.startswith("layers.") and name.endswith(".weight"):
                matrices[tuple(p.shape)].append((name, p))
            else:
                others.append((name, p))
        self.matrices, self.others = dict(matrices), others
        self.buffers = {n: torch.zeros_like(p) for ps in matrices.values() for n, p in ps}
        self.adam = torch.optim.Adam([p for _, p in others], lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update from the gradients that are there, and clear them."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr
        self.adam.step()
        self.adam.zero_grad()
        for shape, named in self.matrices.items():
            params: list[Tensor] = [p for _, p in named]
            grads = [p.grad for p in params if p.grad is not None]
            buffers = [self.buffers[n] for n, _ in named]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            stack = torch.stack(list(ahead))
            # A stacked projection (query, key, value) is three matrices.
            parts = shape[0] // shape[1] if shape[0] == 3 * shape[1] else 1
            flat = stack.view(-1, shape[0] // parts, shape[1])
            update = orthogonalize(flat, bf16=self.bf16).view(stack.shape)
            scale = 0.2 * max(flat.shape[1:]) ** 0.5
            torch._foreach_mul_(params, 1 - self.lr * self.weight_decay)
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-self.lr * scale)
            for p in params:
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        out = {f"muon.{n}": b for n, b in self.buffers.items()}
        for n, p in self.others:
            for key, value in self.adam.state[p].items():
                out[f"adam.{key}.{n}"] = value
        return out

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for n, buffer in self.buffers.items():
            buffer.copy_(state[f"muon.{n}"])
        for n, p in self.others:
            self.adam.state[p] = {"step": state[f"adam.step.{n}"].to(p.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):  # the fused step reads memory in p's own order
                self.adam.state[p][key] = torch.empty_like(p).copy_(state[f"adam.{key}.{n}"])
