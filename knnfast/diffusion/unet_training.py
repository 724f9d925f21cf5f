"""Training of the continuous backbone on images alone: its loss, and how it begins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knnfast.diffusion.distributed import Processes
from knnfast.diffusion.pairs import ConditionSampler, Pairs
from knnfast.diffusion.trainer import Objective, TrainConfig, Trainer
from knnfast.diffusion.unet import UNetConfig, UNetDenoiser


class VelocityObjective(Objective):
    """Mean squared error of v = alpha eps - sigma x_0 (Salimans and Ho 2022, section 4).

    Weighted by 1 for every level, which in terms of x_0 is a weight of SNR + 1.

    Args:
        net: the network, with its codebook.
        bf16: matrix products in bfloat16.
    """

    def __init__(self, net: UNetDenoiser, bf16: bool = False) -> None:
        super().__init__()
        self.net: UNetDenoiser = net
        self.num_levels = net.config.num_steps
        self.bf16 = bf16

    def noise(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """Standard normal eps, [B, C, h, w], for codes x0 [B, L]."""
        cfg = self.net.config
        return torch.randn(len(x0), cfg.code_dim, *cfg.grid, generator=g)

    def forward(
        self, x0: Tensor, t: Tensor, factor: Tensor, noise: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss; x0 are codes, `inputs` the condition embeddings and which of them are on."""
        net, index = self.net, t - 1
        clean = net.vectors(x0)
        alpha, sigma = (v[index].view(-1, 1, 1, 1) for v in (net.alpha, net.sigma))
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bf16):
            v = net(alpha * clean + sigma * noise, index, *inputs)
        image = (v.float() - (alpha * noise - sigma * clean)).square().mean((1, 2, 3))
        return (factor * image).mean(), image.detach()


@torch.no_grad()
def begin(
    net: UNetDenoiser, codebook: Tensor, pairs: Pairs, ridge: float = 1e-2, batch: int = 4096
) -> None:
    """Give a new network what needs no gradient steps: its code vectors and its paintings.

    What an embedding paints begins as the ridge regression of x_0 on embeddings, over every version
    of the targets, and s^2 as the mean square of what that leaves.

    Args:
        net: a new network.
        codebook: the tokenizer's code vectors, [K, C].
        pairs: what it is trained on.
        ridge: penalty of the regression, as a share of an embedding number's variance.
        batch: targets that are in memory at a time.
    """
    cfg = net.config
    versions = range(len(pairs.codes))
    parts = [(version, ids) for version in versions for ids in pairs.targets.split(batch)]
    used = torch.zeros(cfg.num_codes, dtype=torch.int64)
    for version, ids in parts:
        used += torch.bincount(pairs.codes[version, ids].flatten(), minlength=cfg.num_codes)
    net.set_codebook(codebook, used)
    inputs = 1 + cfg.embed_dim
    gram = torch.zeros(inputs, inputs, dtype=torch.float64)
    cross = torch.zeros(inputs, cfg.code_dim * cfg.length, dtype=torch.float64)
    square = 0.0
    for version, ids in parts:
        rows = pairs.embeddings[version, ids].double() * math.sqrt(cfg.embed_dim)
        x = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), rows], 1)
        y = net.vectors(pairs.codes[version, ids].long()).flatten(1).double()
        gram += x.T @ x
        cross += x.T @ y
        square += float(y.square().sum())
    count = len(versions) * len(pairs.targets)
    penalty = torch.full((inputs,), ridge * count, dtype=torch.float64)
    penalty[0] = 0.0
    fitted = torch.linalg.solve(gram + penalty.diag(), cross)
    left = square - 2 * float((fitted * cross).sum()) + float((fitted * (gram @ fitted)).sum())
    net.canvas.bias.copy_(fitted[0])
    net.canvas.weight.copy_(fitted[1:].T)
    spread = left / (count * cfg.code_dim * cfg.length)
    net.log_spread.fill_(math.log(max(spread, 1e-3)))


def unet_trainer(
    model: UNetConfig, config: TrainConfig, pairs: Pairs, codebook: Tensor,
    processes: Processes | None = None, candidates: Tensor | None = None,
) -> Trainer:  # fmt: skip
    """A trainer of a new U-Net, by Adam.

    Args:
        model: sizes of the U-Net.
        config: how it is trained; `auxiliary` and `compile` are the discrete backbone's.
        pairs: what it is trained on.
        codebook: the tokenizer's code vectors, [K, C].
        processes: the processes that share each batch.
        candidates: what `nearest` returned for these pairs; None searches at every step.
    """
    pairs.check_sizes(model.length, model.embed_dim)
    config = config.with_lr(1e-3)
    if config.compile:
        raise ValueError("compile: of the discrete backbone alone")
    torch.manual_seed(config.seed)
    net = UNetDenoiser(model)
    begin(net, codebook, pairs)
    sampler = ConditionSampler(pairs, config.condition, candidates)
    return Trainer(
        VelocityObjective(net, config.bf16), config, sampler, processes,
        made_from={"data": pairs.digest()},
    )  # fmt: skip
