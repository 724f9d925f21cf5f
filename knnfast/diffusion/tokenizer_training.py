"""Training of the VQ autoencoder on images alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from knnfast import _files
from knnfast.diffusion.augment import PHOTOS, AugmentConfig, augment
from knnfast.diffusion.cache import check_recipe, digest
from knnfast.diffusion.tokenizer import NormSiLU, TokenizerConfig, VQTokenizer

STATE_FILE = "state.safetensors"


def _scale_shift(
    x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, 1/deviation and the affine form of GroupNorm, per sample and channel; x [B, N, C]."""
    batch, n, c = x.shape
    xf = x.float()
    mean, square = xf.sum(1), (xf * xf).sum(1)
    count = n * (c // groups)
    mean = mean.view(batch, groups, -1).sum(-1, keepdim=True) / count
    square = square.view(batch, groups, -1).sum(-1, keepdim=True) / count
    rstd = ((square - mean * mean).clamp_min(0.0) + eps).rsqrt()
    mean = mean.expand(batch, groups, c // groups).reshape(batch, c)
    rstd = rstd.expand(batch, groups, c // groups).reshape(batch, c)
    scale = rstd * w
    return mean, rstd, scale, b - mean * scale


def _apply(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    u = x.float() * scale[:, None] + shift[:, None]
    return (u * torch.sigmoid(u)).to(x.dtype)


def _grad_u(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    u = x.float() * scale[:, None] + shift[:, None]
    s = torch.sigmoid(u)
    return dy.float() * (s * (1.0 + u * (1.0 - s)))


def _grad_sums(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    du = _grad_u(dy, x, scale, shift)
    return du.sum(1), (du * x.float()).sum(1)


def _grad_x(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, a: Tensor, c: Tensor) -> Tensor:
    du = _grad_u(dy, x, scale, shift)
    return (du * scale[:, None] + x.float() * a[:, None] + c[:, None]).to(x.dtype)


class _Passes(NamedTuple):
    """The four passes over the activations."""

    scale_shift: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    apply: Callable[..., Tensor]
    grad_sums: Callable[..., tuple[Tensor, Tensor]]
    grad_x: Callable[..., Tensor]


_PLAIN = _Passes(_scale_shift, _apply, _grad_sums, _grad_x)


@cache
def _compiled() -> _Passes:
    """Each pass as one fused loop: torch's own GroupNorm takes three quarters of a training step in
    channels-last bfloat16 on a CPU."""
    passes: tuple[Any, ...] = tuple(torch.compile(f) for f in _PLAIN)
    return _Passes(*passes)


class _NormSiLU(torch.autograd.Function):
    """SiLU(GroupNorm(x)) for channels-last x, with a backward that recomputes the activation."""

    @staticmethod
    def forward(
        ctx: Any, passes: _Passes, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float
    ) -> Tensor:
        batch, c, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, c)
        mean, rstd, scale, shift = passes.scale_shift(rows, w, b, groups, eps)
        ctx.save_for_backward(rows, w, mean, rstd, scale, shift)
        ctx.passes, ctx.groups, ctx.shape = passes, groups, x.shape
        return passes.apply(rows, scale, shift).view(batch, height, width, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, mean, rstd, scale, shift = ctx.saved_tensors
        batch, c, height, width = ctx.shape
        count = height * width * (c // ctx.groups)
        dy = dy.permute(0, 2, 3, 1).reshape(rows.shape)
        sum_du, sum_dux = ctx.passes.grad_sums(dy, rows, scale, shift)
        sum_dun = (sum_dux - sum_du * mean) * rstd

        def group_mean(v: Tensor) -> Tensor:
            v = v.view(batch, ctx.groups, -1).sum(-1, keepdim=True) / count
            return v.expand(batch, ctx.groups, c // ctx.groups).reshape(batch, c)

        g1, g2 = group_mean(sum_du * w), group_mean(sum_dun * w)
        dx = ctx.passes.grad_x(
            dy, rows, scale, shift, -rstd * rstd * g2, rstd * (rstd * mean * g2 - g1)
        )
        dx = dx.view(batch, height, width, c).permute(0, 3, 1, 2)
        return None, dx, sum_dun.sum(0), sum_du.sum(0), None, None


def fuse_norms(model: VQTokenizer, on: bool, compile: bool = False) -> None:
    """Switch the training form of GroupNorm + SiLU on or off; `compile` fuses its passes."""
    passes = _compiled() if compile else _PLAIN
    for module in model.modules():
        if isinstance(module, NormSiLU):
            module.fused = partial(_NormSiLU.apply, passes) if on else None


def kmeans(rows: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from random rows; an empty cluster moves to a random row. [k, dim]."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:k]].clone()
    for _ in range(rounds):
        nearest = (centres.square().sum(1) - 2.0 * rows @ centres.T).argmin(1)
        count = torch.bincount(nearest, minlength=k).float()
        total = torch.zeros_like(centres).index_add_(0, nearest, rows)
        fresh = rows[torch.randint(len(rows), (k,), generator=generator)]
        centres = torch.where(count[:, None] > 0, total / count[:, None].clamp_min(1), fresh)
    return centres


@torch.no_grad()
def psnr(model: VQTokenizer, images: Tensor, batch: int = 64) -> Tensor:
    """PSNR in dB [N] of images [N, 3, S, S] uint8 after encoding and decoding."""
    device = next(model.parameters()).device
    parts = (x.to(device).float() / 255 for x in images.split(batch))
    errors = [(model.decode(model.encode(x)) - x).square().mean((1, 2, 3)) for x in parts]
    return -10.0 * torch.cat(errors).clamp_min(1e-10).log10()


@torch.no_grad()
def redundant(codebook: Tensor, counts: Tensor, error: float) -> Tensor:
    """Codes that stand closer to a more used code than the mean squared quantisation error, [K]."""
    distance = torch.cdist(codebook, codebook).square().fill_diagonal_(torch.inf)
    rank = counts.argsort(descending=True).argsort()
    return ((distance < error) & (rank[None, :] < rank[:, None])).any(1)


class _Codebook:
    """A codebook that follows the latents: moving averages of those that chose each code.

    Args:
        codes: [K, dim]; written to.
        decay: of the averages.

    Attributes:
        counts: how often each code is chosen, [K].
        sums: of the latents that chose it, [K, dim].
    """

    def __init__(self, codes: Tensor, decay: float) -> None:
        self.codes, self.decay = codes, decay
        self.counts, self.sums = torch.ones(len(codes), device=codes.device), codes.clone()

    def begin(self, rows: Tensor, g: torch.Generator) -> None:
        """The first codes: k-means of latents."""
        self.codes.copy_(kmeans(rows, len(self.codes), 15, g))
        self.sums.copy_(self.codes)

    def entropy(self) -> float:
        """Of the codes' use, in nats."""
        return float(torch.special.entr(self.counts / self.counts.sum()).sum())

    @torch.no_grad()
    def follow(
        self, rows: Tensor, nearest: Tensor, g: torch.Generator, thorough: bool, revive: bool
    ) -> None:
        """Move the codes to the latents that chose them.

        Args:
            rows: latents, [N, dim].
            nearest: the code of each, [N].
            g: draws the latents that unused codes move to.
            thorough: codes that stand by a more used one count as unused, too.
            revive: move unused codes.
        """
        k = len(self.codes)
        used = torch.bincount(nearest, minlength=k).float()
        total = torch.zeros_like(self.codes).index_add_(0, nearest, rows)
        self.counts.lerp_(used, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        error_of = (rows - self.codes[nearest]).square().sum(1)
        dead = self.counts < 0.02 * len(rows) / k
        if thorough:
            dead |= redundant(self.codes, self.counts, float(error_of.mean()))
        if revive and dead.any():
            revived = dead.nonzero()[: len(rows), 0]  # a latent for each
            chosen = error_of.cpu().multinomial(len(revived), generator=g)
            self.counts[revived], self.sums[revived] = len(rows) / k, rows[chosen] * (len(rows) / k)
        self.codes.copy_(self.sums / self.counts[:, None].clamp_min(1e-6))


class _State:
    """Everything a run needs to go on, in one file.

    Args:
        path: of the file.
        recipe: what the run is; another one is refused.
        model: the autoencoder.
        optimizer: of its trained parameters.
        codebook: what moves its codes.
        g: the run's random numbers.
    """

    def __init__(
        self, path: Path, recipe: dict[str, Any], model: VQTokenizer,
        optimizer: torch.optim.Optimizer, codebook: _Codebook, g: torch.Generator,
    ) -> None:  # fmt: skip
        self.path, self.recipe = path, json.loads(json.dumps(recipe))
        self.model, self.optimizer, self.g = model, optimizer, g
        self.tensors = {"counts": codebook.counts, "sums": codebook.sums}
        self.tensors |= {f"net.{n}": p.detach() for n, p in model.named_parameters()}

    def save(self, step: int, history: list[dict[str, Any]]) -> None:
        """Write the state after `step` steps; the old file stays until it is complete."""
        tensors = {**self.tensors, "generator": self.g.get_state()}
        for n, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{key}.{n}"] = value
        meta = {"step": step, "history": history, "recipe": self.recipe}
        _files.save_tensors(self.path, tensors, {k: json.dumps(v) for k, v in meta.items()})

    def load(self) -> tuple[int, list[dict[str, Any]]]:
        """Take over what `save` wrote; gives the steps done and the history, 0 and [] if none."""
        if not self.path.is_file():
            return 0, []
        try:
            with safe_open(self.path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
            saved = load_file(self.path)
        except (SafetensorError, AttributeError, ValueError) as e:
            raise ValueError(f"{self.path}: not a complete checkpoint ({e!r})") from None
        check_recipe(self.path, meta["recipe"], self.recipe)
        for name, value in self.tensors.items():
            value.copy_(saved[name])
        for n, p in self.model.named_parameters():
            if p.requires_grad:
                self.optimizer.state[p] = {
                    "step": saved[f"adam.step.{n}"].clone(),
                    "exp_avg": torch.empty_like(p).copy_(saved[f"adam.exp_avg.{n}"]),
                    "exp_avg_sq": torch.empty_like(p).copy_(saved[f"adam.exp_avg_sq.{n}"]),
                }
        self.g.set_state(saved["generator"])
        return int(meta["step"]), meta["history"]


def train_tokenizer(
    images: Tensor,
    held_out: Tensor,
    out: str | Path,
    config: TokenizerConfig,
    steps: int = 2000,
    batch: int = 32,
    lr: float = 2e-3,
    warmup: int = 150,
    commitment: float = 0.25,
    codebook_decay: float = 0.99,
    augmented: float = 0.5,
    augmentation: AugmentConfig = PHOTOS,
    eval_every: int = 250,
    start: VQTokenizer | None = None,
    compile: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a VQ autoencoder and write it to a folder in diffusers' format.

    The first `warmup` steps train without quantisation; k-means over latents then gives the
    codebook its first values, and moving averages of the latents that chose a code keep it up to
    date. Stopped or killed, a run goes on from its last measurement and ends with the same weights,
    bit for bit (same machine, same thread count, on a CPU).

    Args:
        images: [N, 3, S, S], uint8.
        held_out: [M, 3, S, S], uint8; only measured on.
        out: folder for the weights, `training.json` and, until the end, `state.safetensors`.
        config: sizes.
        steps: optimiser steps.
        batch: images a step.
        lr: peak learning rate (linear warm-up, cosine decay to 0).
        warmup: steps before quantisation starts.
        commitment: weight of the pull of latents towards their code.
        codebook_decay: of the codebook's moving average.
        augmented: share of images that are augmented.
        augmentation: how.
        eval_every: steps between measurements, and between checkpoints.
        start: continue from this tokenizer (`warmup` is then skipped).
        compile: fuse the passes of the normalisation with torch.compile.
        seed: of everything random.
        device: `cpu` or `cuda`; the images stay where they are.
        progress: show a progress bar.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        ValueError: images of another type or size, a setting out of range, or `out` holds the
            checkpoint of a run with other images or settings.
        FloatingPointError: the loss or its gradient is no longer finite; the last checkpoint is
            from before that.
    """
    size = config.sample_size
    for name, given in (("images", images), ("held_out", held_out)):
        if given.dtype != torch.uint8 or given.shape[1:] != (3, size, size) or not len(given):
            raise ValueError(
                f"{name}: must be uint8 [N, 3, {size}, {size}], N > 0, got {given.dtype} "
                f"{list(given.shape)}"
            )
    for name, value in (("steps", steps), ("batch", batch), ("eval_every", eval_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    recipe = {
        "config": config.to_dict(), "images": digest([images]), "held_out": digest([held_out]),
        "steps": steps, "batch": batch, "lr": lr, "warmup": warmup, "commitment": commitment,
        "codebook_decay": codebook_decay, "augmented": augmented,
        "augmentation": augmentation.to_dict(), "eval_every": eval_every, "seed": seed,
        "start": start and _files.weights_hash(start),
    }  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = VQTokenizer(config)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse_norms(model, True, compile)
    if start is not None:
        model.load_state_dict(start.state_dict())
        warmup = 0
    codes = model.quantize.embedding.weight.requires_grad_(False)
    codebook = _Codebook(codes, codebook_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    record: dict[str, Any] = {"steps": steps, "batch": batch, "seed": seed, "history": []}
    state = _State(folder / STATE_FILE, recipe, model, optimizer, codebook, g)
    first, record["history"] = state.load()
    seconds = record["history"][-1]["seconds"] if first else 0.0
    started = time.perf_counter() - seconds

    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)

    def rows_of(z: Tensor) -> Tensor:
        return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])

    bar = tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        disable=not progress,
        desc="tokenizer",
        mininterval=5,
    )
    for step in bar:
        x = images[torch.randint(len(images), (batch,), generator=g)].float() / 255
        n = int(batch * augmented)
        x = torch.cat([augment(x[:n], g, augmentation), x[n:]]) if n else x
        x = x.to(device).contiguous(memory_format=torch.channels_last)
        with autocast:
            z = model.latents(x).float()
        if step == warmup and start is None:
            pool = [rows_of(z.detach())]
            with torch.no_grad(), autocast:
                for _ in range(1 + 40 * len(codes) // pool[0].shape[0]):
                    y = images[torch.randint(len(images), (batch,), generator=g)].float() / 255
                    pool.append(rows_of(model.latents(y.to(device)).float()))
            codebook.begin(torch.cat(pool), g)
        pull = torch.zeros((), device=z.device)
        if step >= warmup:
            rows = rows_of(z)
            nearest = model.quantize.nearest(rows.detach())
            q = codes[nearest].reshape(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            pull = (z - q).square().mean()
            codebook.follow(rows.detach(), nearest, g, step % 20 == 0, step < 0.8 * steps)
            z = z + (q - z).detach()
        with autocast:
            y = model.pixels(z)
        error = y.float() - x
        loss = error.square().mean() * 5 + error.abs().mean()
        loss = loss + commitment * pull
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not math.isfinite(float(loss.detach() + norm)):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} and its gradient's norm {float(norm)} at step "
                f"{step + 1}; try a lower learning rate"
            )
        for group in optimizer.param_groups:
            ramp = min(1.0, (step + 1) / 100)
            group["lr"] = lr * ramp * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            fuse_norms(model, False)
            row = {
                "step": step + 1,
                "seconds": round(time.perf_counter() - started, 1),
                "loss": round(float(loss.detach()), 4),
                "grad": round(float(norm), 3),
                "psnr_held_out": round(float(psnr(model, held_out).mean()), 2),
                "code_entropy": round(codebook.entropy(), 3),
                "codes_used": int((codebook.counts > 0.02 * batch).sum()),
            }
            fuse_norms(model, True, compile)
            record["history"].append(row)
            bar.write(json.dumps(row))
            model.save(folder)
            state.save(step + 1, record["history"])
    fuse_norms(model, False)
    record["seconds"] = round(time.perf_counter() - started, 1)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["psnr_held_out"] = record["history"][-1]["psnr_held_out"]
    _files.write_json(folder / "training.json", record)
    state.path.unlink()
    return record
