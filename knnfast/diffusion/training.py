"""Training of the denoiser on images alone."""

from __future__ import annotations

import csv
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from knnfast.diffusion.augment import augment
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.optim import Muon
from knnfast.diffusion.pairs import ConditionConfig, ConditionSampler, Pairs
from knnfast.diffusion.sampler import sample
from knnfast.diffusion.schedule import Schedule
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.ops import transition_loss

if TYPE_CHECKING:
    from knnfast.database import Database

STATE_FILE = "state.safetensors"
LOG_FILE = "log.csv"
PAIRS_FILE = "pairs.safetensors"


class ImageEncoder(Protocol):
    """The side of an encoder that training uses: images in, unit rows out."""

    def encode_images(self, images: list[Image.Image], batch_size: int = 64) -> Any:
        """Give an object whose `vectors` is [N, E] float32."""


@dataclass(frozen=True)
class TrainConfig:
    """How the denoiser is trained.

    Attributes:
        steps: optimiser steps.
        batch: images a step.
        lr: peak learning rate: linear warm-up, constant, linear decay to 0.
        warmup: steps of the warm-up.
        decay: share of the steps, at the end, over which the rate falls to 0.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights (shorter at the start).
        auxiliary: weight of -log p(x0) beside the variational loss.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        seed: of everything random.
        bf16: matrix products in bfloat16 (ten times faster on CPUs with AMX).
        compile: let torch.compile fuse the transformer (a minute to start, faster after).
        condition: how conditions are drawn.
    """

    steps: int = 10_000
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    ema: float = 0.998
    auxiliary: float = 0.01
    checkpoint_every: int = 500
    log_every: int = 20
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


def corrupt(codes: Tensor, t: Tensor, schedule: Schedule, g: torch.Generator) -> Tensor:
    """Draw x_t from q(x_t | x_0): codes [B, L] at levels t [B]."""
    kept = torch.from_numpy(schedule.A.astype(np.float32))[t][:, None]
    masked = torch.from_numpy(schedule.C.astype(np.float32))[t][:, None]
    u = torch.rand(codes.shape, generator=g)
    k = schedule.num_codes
    x_t = codes
    if schedule.B[1:].any():
        uniform = torch.randint(k, codes.shape, generator=g)
        x_t = torch.where(u < 1.0 - masked, torch.where(u < kept, codes, uniform), k)
        return x_t
    return torch.where(u < 1.0 - masked, x_t, k)


def masked_row_weight(schedule: Schedule, auxiliary: float) -> Tensor:
    """Weight of -log p(x_0) of a masked code at each level, [T + 1] float32, for B = 0.

    With no replacement the variational term of a real code is 0 and that of a masked one is
    (C_t - C_{t-1}) / C_t (-log p(x_0)): the share of masks that the step t -> t-1 uncovers. The
    auxiliary term adds auxiliary (2 - (t-1)/T), on masked codes alone: the others are known.
    """
    c = schedule.C
    t = np.arange(1, schedule.num_steps + 1)
    uncovered = (c[1:] - c[:-1]) / c[1:]
    weight = uncovered + auxiliary * (2.0 - (t - 1) / schedule.num_steps)
    return torch.from_numpy(np.concatenate([[0.0], weight]).astype(np.float32))


class Trainer:
    """The training loop's state: model, averaged weights, optimiser, step.

    Args:
        model: sizes of the denoiser.
        config: how it is trained.
        pairs: what it is trained on.
    """

    def __init__(self, model: DenoiserConfig, config: TrainConfig, pairs: Pairs) -> None:
        if pairs.codes.shape[-1] != model.length or pairs.embeddings.shape[-1] != model.embed_dim:
            raise ValueError("the pairs' codes or embeddings do not have the denoiser's sizes")
        torch.manual_seed(config.seed)
        self.config = config
        self.schedule = Schedule(model.schedule, model.num_steps, model.num_codes)
        self.net = Denoiser(model)
        self.average = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.optimizer = Muon(self.net, config.lr)
        self.sampler = ConditionSampler(pairs, config.condition)
        self.features = torch.compile(self.net.features) if config.compile else self.net.features
        self.weight = masked_row_weight(self.schedule, config.auxiliary)
        self.step, self.seconds = 0, 0.0

    def batch(self, step: int, sampler: ConditionSampler, count: int) -> tuple[Tensor, ...]:
        """Draw x_0, x_t, t, cond and mask of a step; the numbers depend on seed and step alone."""
        g = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        x0, cond, mask = sampler.draw(count, g)
        steps = self.schedule.num_steps
        # One level from each of `count` equal slices: less variance than independent levels.
        u = (torch.arange(count) + torch.rand(count, generator=g)) / count
        t = 1 + (u * steps).long().clamp_max(steps - 1)
        t = t[torch.randperm(count, generator=g)]
        return x0, corrupt(x0, t, self.schedule, g), t, cond, mask

    def loss(self, x0: Tensor, x_t: Tensor, t: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        """T times the variational loss with the auxiliary term, averaged over codes."""
        steps = self.schedule.num_steps
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.config.bf16):
            features = self.features(x_t, t, cond, mask)
            if self.schedule.B[1:].any():
                logits = self.net.head(features).float()
                weight = torch.full((len(t),), float(steps))
                return transition_loss(
                    logits,
                    x0,
                    x_t,
                    t,
                    self.schedule,
                    weight=weight,
                    auxiliary=self.config.auxiliary,
                )[0]
            rows = x_t == self.schedule.num_codes
            logits = self.net.head(features[rows])
        nll = F.cross_entropy(logits.float(), x0[rows], reduction="none")
        weight = self.weight[t][:, None].expand(x0.shape)[rows]
        return steps * (weight * nll).sum() / x0.numel()

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step."""
        cfg = self.config
        loss = self.loss(*self.batch(self.step, self.sampler, cfg.batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), cfg.clip)
        self.optimizer.lr = cfg.rate(self.step)
        self.optimizer.step()
        self.step += 1
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
        params = [p.detach() for p in self.net.parameters()]
        torch._foreach_lerp_(list(self.average.values()), params, 1 - decay)
        return {"loss": loss.detach(), "grad": norm}

    def averaged(self) -> Denoiser:
        """A denoiser with the averaged weights."""
        model = Denoiser(self.net.config)
        model.load_state_dict(self.average)
        return model.eval().requires_grad_(False)

    def start_from(self, model: Denoiser) -> None:
        """Take a trained denoiser's weights as the beginning of a new run."""
        if model.config != self.net.config:
            raise ValueError(f"start: its sizes {model.config} are not {self.net.config}")
        self.net.load_state_dict(model.state_dict())
        self.average = {n: p.detach().clone() for n, p in self.net.named_parameters()}

    def record(self) -> dict[str, Any]:
        """What a model card says about the run."""
        pairs = self.sampler.pairs
        return {
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "steps": self.step,
            "images_seen": self.step * self.config.batch,
            "seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "targets": len(pairs.targets),
            "database": len(pairs.database),
            "worlds": len(pairs.codes),
            "model": self.net.config.to_dict(),
            "config": asdict(self.config),
        }

    def save(self, folder: Path) -> None:
        """Write the whole state; the old checkpoint stays until the new one is complete."""
        state = {f"net.{n}": p.detach() for n, p in self.net.named_parameters()}
        state |= {f"average.{n}": p for n, p in self.average.items()}
        state |= self.optimizer.state()
        meta = {"step": str(self.step), "seconds": repr(self.seconds)}
        part = folder / (STATE_FILE + ".part")
        save_file({k: v.contiguous() for k, v in state.items()}, part, metadata=meta)
        os.replace(part, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        state = load_file(folder / STATE_FILE)
        with safe_open(folder / STATE_FILE, "pt") as f:
            meta = f.metadata()
        with torch.no_grad():
            for n, p in self.net.named_parameters():
                p.copy_(state[f"net.{n}"])
                self.average[n].copy_(state[f"average.{n}"])
        self.optimizer.load(state)
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])


def worlds_of(images: Tensor, count: int, seed: int, batch: int = 256) -> Iterator[Tensor]:
    """The images as they are, then `count` - 1 times with every image augmented in its own way.

    Args:
        images: [N, 3, S, S], uint8.
        count: number of worlds.
        seed: of the augmentations.
        batch: images at a time.

    Yields:
        [N, 3, S, S], uint8.
    """
    yield images
    for world in range(1, count):
        g = torch.Generator().manual_seed(seed * 1_000_003 + world)
        parts = [augment(x.float() / 255, g) for x in images.split(batch)]
        yield (torch.cat(parts) * 255).round().byte()


def make_pairs(
    worlds: Iterable[Tensor],
    encoder: ImageEncoder,
    tokenizer: VQTokenizer,
    targets: Tensor | None = None,
    database: Tensor | None = None,
    batch: int = 64,
) -> Pairs:
    """Encode every world of a collection: codes and embeddings.

    Args:
        worlds: the collection in one or more versions, each [N, 3, S, S] uint8.
        encoder: gives embeddings of PIL images; nothing else of it is used.
        tokenizer: gives codes.
        targets: ids that may be targets, [n] int64; None: all.
        database: ids that may be neighbours, [m] int64; None: all.
        batch: images at a time.
    """
    codes, embeddings = [], []
    for images in worlds:
        pictures = [Image.fromarray(x.numpy()) for x in images.permute(0, 2, 3, 1)]
        rows = encoder.encode_images(pictures, batch_size=batch).vectors
        embeddings.append(torch.from_numpy(np.asarray(rows, dtype=np.float16)))
        parts = [tokenizer.encode(x.float() / 255) for x in images.split(batch)]
        codes.append(torch.cat(parts).to(torch.int16))
    everything = torch.arange(codes[0].shape[0])
    return Pairs(
        torch.stack(codes),
        torch.stack(embeddings),
        everything if targets is None else targets,
        everything if database is None else database,
    )


def load_images(data: str | Path | Database, size: int) -> tuple[Tensor, list[str]]:
    """Read the images of a folder or a database as [N, 3, size, size] uint8.

    Names and captions are not looked at. A database's images are read from their sources, or from
    its thumbnails where a source is no longer there. Images that cannot be read are skipped.

    Returns:
        The images, and a line for each one skipped.

    Raises:
        ValueError: fewer than two images can be read.
    """
    from knnfast.images import READ_ERRORS, list_images, read_image

    readers: list[tuple[str, Callable[[], Image.Image]]] = []
    if isinstance(data, str | Path):
        readers = [(str(p), partial(read_image, p)) for p in list_images(data)]
    else:
        for item in data:
            file = Path(item.source)
            there = bool(item.source) and file.is_file()
            reader = partial(read_image, file) if there else partial(data.thumbnail, item.id)
            readers.append((item.source or item.name, reader))
    rows, skipped = [], []
    for name, read in readers:
        try:
            picture = read().convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        except READ_ERRORS as e:
            skipped.append(f"{name}: {e}")
            continue
        rows.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    if len(rows) < 2:
        raise ValueError(f"data: needs at least two readable images, found {len(rows)}")
    return torch.stack(rows), skipped


def draw_grid(
    trainer: Trainer, tokenizer: VQTokenizer, count: int = 8, steps: int = 25
) -> Image.Image:
    """Samples of the averaged weights: targets on top, then samples from text-like queries."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    shown = replace(
        trainer.config.condition, original=1.0, text_like=1.0, no_query=0.0, no_neighbours=0.0,
        null=0.0, vary_k=0.0, subset=0.0,
    )  # fmt: skip
    targets, cond, mask = ConditionSampler(trainer.sampler.pairs, shown).draw(count, generator, 1)
    net, schedule = trainer.averaged(), trainer.schedule
    rows = [targets]
    steps = min(steps, schedule.num_steps)
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.config.bf16):
        rows += [sample(net, schedule, cond, mask, steps, guidance=3.0, seed=s) for s in (0, 1)]
    pixels = torch.stack([tokenizer.decode(codes) for codes in rows])  # [R, B, 3, S, S]
    r, b, c, h, w = pixels.shape
    sheet = pixels.permute(0, 3, 1, 4, 2).reshape(r * h, b * w, c)
    return Image.fromarray((sheet * 255).round().byte().numpy())


def train(
    data: str | Path | Database | Pairs,
    out: str | Path,
    tokenizer: VQTokenizer,
    encoder: ImageEncoder | None = None,
    model: DenoiserConfig | None = None,
    config: TrainConfig | None = None,
    worlds: int = 8,
    start: Denoiser | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a denoiser on images alone; continue a run that was stopped or killed.

    A folder `out` that holds a checkpoint is continued from it and ends with the same weights, bit
    for bit, as a run that was never stopped (same machine, same thread count).

    Args:
        data: a folder of images, a `Database`, or encoded `Pairs`.
        out: receives `pairs.safetensors`, `state.safetensors` (everything needed to continue),
            `log.csv`, `grids/*.png`, `training.json`, and `denoiser/`: the averaged weights.
        tokenizer: turns images into codes.
        encoder: gives image embeddings; may be None when `data` is `Pairs`.
        model: sizes; what the tokenizer and the embeddings fix is filled in.
        config: how to train.
        worlds: versions of the collection: the first as it is, the others augmented.
        start: a denoiser to start from, in a fresh run.
        progress: show a progress bar.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        ValueError: no usable images, or a checkpoint of another model.
    """
    config = config or TrainConfig()
    folder = Path(out)
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    if isinstance(data, Pairs):
        pairs = data
    elif (folder / PAIRS_FILE).is_file():
        pairs = Pairs.load(folder / PAIRS_FILE)
    else:
        if encoder is None:
            raise ValueError("encoder: needed to encode images")
        images, skipped = load_images(data, tokenizer.image_size)
        for line in skipped:
            warnings.warn(f"skipped {line}", stacklevel=2)
        pairs = make_pairs(worlds_of(images, worlds, config.seed), encoder, tokenizer)
        pairs.save(folder / PAIRS_FILE)
    k = min(config.condition.k, len(pairs.database) - 1)
    config = replace(config, condition=replace(config.condition, k=k))
    model = replace(
        model or DenoiserConfig(),
        num_codes=tokenizer.codebook_size,
        grid=tokenizer.grid,
        embed_dim=pairs.embeddings.shape[-1],
    )
    trainer = Trainer(model, config, pairs)
    if (folder / STATE_FILE).is_file():
        trainer.load(folder)
        _forget(folder / LOG_FILE, trainer.step)
    elif start is not None:
        trainer.start_from(start)
    bar = tqdm(
        total=config.steps, initial=trainer.step, disable=not progress, desc="denoiser", unit="step"
    )
    sums: dict[str, float] = {}
    lap, count = time.perf_counter(), 0
    while trainer.step < config.steps:
        for name, value in trainer.advance().items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += 1
        bar.update()
        end = trainer.step == config.steps
        if trainer.step % config.log_every == 0 or end:
            now = time.perf_counter()
            trainer.seconds += now - lap
            row = {name: value / count for name, value in sums.items()}
            row |= {
                "step": trainer.step,
                "lr": trainer.optimizer.lr,
                "images_per_second": count * config.batch / (now - lap),
                "seconds": trainer.seconds,
            }
            _log(folder / LOG_FILE, row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            sums, lap, count = {}, now, 0
        if trainer.step % config.checkpoint_every == 0 or end:
            trainer.save(folder)
            trainer.averaged().save(folder / "denoiser")
            draw_grid(trainer, tokenizer).save(folder / "grids" / f"{trainer.step:06d}.png")
            text = json.dumps(trainer.record(), indent=1) + "\n"
            (folder / "training.json").write_text(text, encoding="utf-8")
    bar.close()
    return trainer.record()


def _forget(path: Path, step: int) -> None:
    """Drop the lines of a log that a run wrote after the checkpoint it continues from."""
    if path.exists():
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if int(line.split(",")[0]) <= step]
        path.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


def _log(path: Path, row: dict[str, float]) -> None:
    """Append a line to a CSV file."""
    names = ["step", "loss", "grad", "lr", "images_per_second", "seconds"]
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, names)
        if fresh:
            writer.writeheader()
        writer.writerow({n: f"{row[n]:.6g}" for n in names})
