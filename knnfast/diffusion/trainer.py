"""The training loop of every backbone: data-parallel, averaged weights, exact resumption."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from knnfast import _files
from knnfast._phases import phase
from knnfast.diffusion.distributed import Processes
from knnfast.diffusion.levels import Levels
from knnfast.diffusion.optim import Muon
from knnfast.diffusion.pairs import ConditionConfig
from knnfast.diffusion.runlog import RunLog
from knnfast.diffusion.settings import Settings

STATE_FILE = "state.safetensors"

# Settings that a run may change when it goes on: beside rounding, and the learning rate's fall with
# other `steps`, they do not decide what its weights become.
FREE = ("steps", "checkpoint_every", "log_every", "accumulate", "compile")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the denoiser is trained.

    Attributes:
        steps: optimiser steps.
        batch: images a step, over all processes.
        accumulate: passes that a process makes for a step, each on an equal part of its images.
        group: images that share a version and a search; processes * accumulate equal parts of a
            batch that hold whole groups are drawn without waste.
        lr: peak learning rate: linear warm-up, constant, linear decay to 0. None: 0.003 for a
            discrete denoiser, 0.001 for a U-Net or an editor.
        warmup: steps of the warm-up.
        decay: share of the steps, at the end, over which the rate falls to 0.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights (shorter at the start).
        auxiliary: weight of -log p(x0) beside the variational loss.
        importance: draw levels by importance (see `Levels`); else uniformly.
        candidates: neighbours looked up once for each image, by its own embedding, from which
            every step takes its own; 0 searches the database at every step.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        seed: of everything random.
        bf16: matrix products in bfloat16 (for CPUs with AMX, and GPUs).
        compile: let torch.compile fuse the transformer (a minute to start, faster after).
        condition: how conditions are drawn.
    """

    steps: int = 10_000
    batch: int = 128
    accumulate: int = 1
    group: int = 32
    lr: float | None = None
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    ema: float = 0.998
    auxiliary: float = 0.01
    importance: bool = False
    candidates: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "steps", "batch", "accumulate", "group", "warmup", "checkpoint_every", "log_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")
        if not 0 <= self.auxiliary < math.inf:
            raise ValueError(f"auxiliary must be finite and at least 0, got {self.auxiliary}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {self.seed}")
        # The image itself is among them.
        least = self.condition.k + (self.condition.exclude > 0)
        if self.candidates and self.candidates < least:
            raise ValueError(
                f"candidates must be 0 or at least {least} (k = {self.condition.k}), "
                f"got {self.candidates}"
            )

    def with_lr(self, default: float) -> TrainConfig:
        """These settings with a peak learning rate, the default where they have none."""
        return replace(self, lr=default) if self.lr is None else self

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        assert self.lr is not None
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Objective(nn.Module):
    """A network with the loss it is trained by: what a backbone gives to the `Trainer`.

    Attributes:
        net: the network; it has `config.to_dict()` and `save(folder)`.
        num_levels: T.
    """

    net: nn.Module
    num_levels: int

    def noise(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """Draw the random numbers that corrupt x0 [B, ...], on the CPU."""
        raise NotImplementedError

    def forward(
        self, x0: Tensor, t: Tensor, factor: Tensor, noise: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch.

        Args:
            x0: clean data, [B, ...].
            t: levels, [B] int64 in [1, T].
            factor: 1 / (T p(t)), [B]: the weight of each image's loss.
            noise: what `noise` gave.
            inputs: what else the network reads, as the sampler drew it.

        Returns:
            The mean loss, and each image's without its factor, [B], detached.
        """
        raise NotImplementedError


class Batch(NamedTuple):
    """What a process needs for one pass: all of its random choices are made."""

    x0: Tensor
    u: Tensor  # which level, [B] float64 in [0, 1)
    noise: Tensor
    inputs: tuple[Tensor, ...]


class TrainingSampler(Protocol):
    """Draws what a network is trained on."""

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Give x0 [count, ...] and the network's other inputs, by the numbers of `g` alone."""


class Optimizer(Protocol):
    """The side of `Muon` that the trainer uses."""

    lr: float

    def step(self) -> None:
        """Apply one update from the gradients that are there, and clear them."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""


def ahead(make: Callable[[int], Any], first: int, background: bool) -> Iterator[Any]:
    """make(first), make(first + 1), ...: one ahead in a thread, or each when it is asked for."""
    if not background:
        yield from map(make, count(first))
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(make, first)
        for number in count(first + 1):
            ready = pending.result()
            pending = pool.submit(make, number)
            yield ready


def _difference(found: dict[str, Any], now: dict[str, Any], other: str) -> str:
    """The first setting that differs, in words; `other` where they are of another kind."""
    if set(found) != set(now):
        return other
    for name in found:
        a, b = found[name], now[name]
        if isinstance(a, dict) and isinstance(b, dict):
            if inner := _difference(a, b, other):
                return inner
        elif name not in FREE and a != b:
            return f"{name} = {a!r}, now it is {b!r}"
    return ""


class Trainer:
    """The training loop's state: network, averaged weights, optimiser, levels, step.

    The images of a step, and every random number about them, depend on the seed, the step and the
    image's place in the batch alone: not on the number of processes, nor on `accumulate`.

    Args:
        objective: the network and its loss.
        config: how it is trained.
        sampler: what it is trained on.
        processes: the processes that share each batch; on their device it is trained.
        optimizer: by default Muon.
        made_from: hashes of what it is made from (its data, say); `load` refuses others.
    """

    def __init__(
        self, objective: Objective, config: TrainConfig, sampler: TrainingSampler,
        processes: Processes | None = None, optimizer: Optimizer | None = None,
        made_from: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.processes = processes or Processes()
        start, stop = self.processes.share(config.batch)
        if (stop - start) % config.accumulate:
            raise ValueError(
                f"accumulate: {stop - start} images of a process cannot be shared by "
                f"{config.accumulate} passes"
            )
        self.config, self.sampler = config, sampler
        self.objective = objective.to(self.processes.device)
        self.net: Any = objective.net
        self.parallel = self.processes.wrap(self.objective)
        self.average = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        if config.lr is None:
            raise ValueError("config.lr: must be a number; see `TrainConfig.with_lr`")
        self.optimizer = optimizer or Muon(self.net, config.lr, bf16=config.bf16)
        self.levels = Levels(objective.num_levels, config.importance)
        self.made_from: dict[str, str | None] = {"start": None, **(made_from or {})}
        self.step, self.seconds = 0, 0.0
        self._batches: Iterator[Batch] | None = None

    def draw(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Draw images [start, stop) of a step's batch."""
        cfg = self.config
        stop = cfg.batch if stop is None else stop
        g = generator(cfg.seed, step, 0)
        # One level from each of `batch` equal slices: less variance than independent levels.
        slices = torch.randperm(cfg.batch, generator=g)
        u = (slices + torch.rand(cfg.batch, generator=g, dtype=torch.float64)) / cfg.batch
        parts: list[tuple[Tensor, ...]] = []
        for group in range(start // cfg.group, -(-stop // cfg.group)):
            first = group * cfg.group
            g = generator(cfg.seed, step, 1 + group)
            x0, *inputs = self.sampler.draw(min(cfg.group, cfg.batch - first), g)
            noise = self.objective.noise(x0, g)
            own = slice(max(0, start - first), stop - first)
            parts.append(tuple(x[own] for x in (x0, noise, *inputs)))
        x0, noise, *inputs = (torch.cat(column) for column in zip(*parts, strict=True))
        return Batch(x0, u[start:stop], noise, tuple(inputs))

    def _draw_pass(self, number: int) -> Batch:
        """Draw what this process needs for a pass, counted over all steps."""
        step, part = divmod(number, self.config.accumulate)
        start, stop = self.processes.share(self.config.batch)
        size = (stop - start) // self.config.accumulate
        batch = self.draw(step, start + part * size, start + (part + 1) * size)
        if self.processes.device.type != "cuda":
            return batch
        return Batch(
            batch.x0.pin_memory(), batch.u, batch.noise.pin_memory(),
            tuple(x.pin_memory() for x in batch.inputs),
        )  # fmt: skip

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of a batch, each image's level, and each image's own loss."""
        device = self.processes.device
        t, factor = self.levels.draw(batch.u)
        moved = (t, factor, batch.noise, *batch.inputs)
        loss, losses = self.parallel(
            batch.x0.to(device, non_blocking=True),
            *(x.to(device, non_blocking=True) for x in moved),
        )
        return loss, t, losses

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step; gives the loss over all processes and the gradient's norm."""
        cfg = self.config
        if self._batches is None:
            gpu = self.processes.device.type == "cuda"
            self._batches = ahead(self._draw_pass, self.step * cfg.accumulate, background=gpu)
        total = torch.zeros(1, device=self.processes.device)
        levels, losses = [], []
        for part in range(cfg.accumulate):
            with self._gradients_stay(part + 1 < cfg.accumulate):
                with phase("train.data"):
                    batch = next(self._batches)
                with phase("train.forward"):
                    loss, t, own = self.loss(batch)
                with phase("train.backward"):
                    (loss / cfg.accumulate).backward()
            total += loss.detach() / cfg.accumulate
            levels.append(t)
            losses.append(own)
        if cfg.importance:
            seen = torch.stack([torch.cat(levels).to(total), torch.cat(losses)], 1)
            everyone = self.processes.gather(seen).cpu()
            self.levels.update(everyone[:, 0].long(), everyone[:, 1])
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), cfg.clip)
        self.optimizer.lr = cfg.rate(self.step)
        with phase("train.optimizer"):
            self.optimizer.step()
        self.step += 1
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
        params = [p.detach() for p in self.net.parameters()]
        torch._foreach_lerp_(list(self.average.values()), params, 1 - decay)
        return {"loss": self.processes.gather(total).mean(), "grad": norm}

    def _gradients_stay(self, on: bool) -> AbstractContextManager[Any]:
        """While on, gradients are summed here and not exchanged."""
        if on and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def averaged(self) -> Any:
        """A network with the averaged weights."""
        net = copy.deepcopy(self.net)
        net.load_state_dict(self.average, strict=False)
        return net.eval().requires_grad_(False)

    def start_from(self, net: Any) -> None:
        """Take a trained network's weights as the beginning of a new run."""
        found, wanted = net.config.to_dict(), self.net.config.to_dict()
        if found != wanted:
            raise ValueError(f"start: its sizes {found} are not {wanted}")
        self.net.load_state_dict(net.state_dict())
        self.average = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.made_from["start"] = _files.weights_hash(net)

    def record(self) -> dict[str, Any]:
        """What a model card says about the run."""
        return {
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "steps": self.step,
            "images_seen": self.step * self.config.batch,
            "seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "device": self.processes.device.type,
            "model": self.net.config.to_dict(),
            "config": asdict(self.config),
        }

    def save(self, folder: Path) -> None:
        """Write the whole state; the old checkpoint stays until the new one is complete."""
        state = {f"net.{n}": v for n, v in self.net.state_dict().items()}
        state |= {f"average.{n}": p for n, p in self.average.items()}
        state |= self.optimizer.state() | self.levels.state()
        meta = {
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "model": json.dumps(self.net.config.to_dict()),
            "config": json.dumps(asdict(self.config)),
            "made_from": json.dumps(self.made_from),
        }
        _files.save_tensors(folder / STATE_FILE, state, meta)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: a damaged file, one of an older version, another network, or data, start or
                settings that make another run.
        """
        file = folder / STATE_FILE
        try:
            with safe_open(file, "pt") as f:
                meta = f.metadata()
            state = load_file(file)
            model, config, made_from = (
                json.loads(meta[name]) for name in ("model", "config", "made_from")
            )
            step, seconds = int(meta["step"]), float(meta["seconds"])
        except (SafetensorError, TypeError, KeyError, ValueError) as e:
            raise ValueError(
                f"{file}: not a complete checkpoint of this version ({e!r}); give another folder"
            ) from None
        wanted = json.loads(json.dumps(asdict(self.config)))
        sources = {**made_from, **self.made_from}
        others = [n for n in sources if made_from.get(n) != self.made_from.get(n)]
        difference = (
            _difference(model, self.net.config.to_dict(), "another backbone")
            or _difference(config, wanted, "settings of another kind")
            or (f"another {others[0]}" if others else "")
        )
        if difference:
            raise ValueError(
                f"{file}: was trained with {difference}; go on with the same, or give another "
                "folder"
            )
        self.net.load_state_dict({n: state[f"net.{n}"] for n in self.net.state_dict()})
        for n, p in self.average.items():
            p.copy_(state[f"average.{n}"])
        self.optimizer.load(state)
        self.levels.load(state)
        self.step, self.seconds, self._batches = step, seconds, None


def generator(*numbers: int) -> torch.Generator:
    """Random numbers of their own for each list of numbers, such as (seed, step, stream)."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def fit(
    trainer: Trainer, folder: Path, name: str, draw: Callable[[Trainer], Image.Image],
    about: dict[str, Any] | None = None, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Run the training loop to its end, from the checkpoint in `folder` if there is one.

    The main process writes `log.csv`, `tensorboard/` (where installed) and, at each checkpoint,
    `grids/*.png`, the averaged network under `name`, `training.json` and, last, the checkpoint.

    Args:
        trainer: at its beginning.
        folder: of the run.
        name: folder of the averaged network, below it.
        draw: makes the picture of samples.
        about: more for `training.json`.
        progress: show a progress bar.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        ValueError: fewer steps than the run has made.
        FloatingPointError: the loss or its gradient is no longer finite; the last checkpoint is
            from before that.
        OSError: a file could not be written (a full disk, say); the last checkpoint is unharmed.
    """
    cfg, main = trainer.config, trainer.processes.main
    if (folder / STATE_FILE).is_file():
        trainer.load(folder)
    if trainer.step > cfg.steps:
        raise ValueError(f"steps: {folder} has made {trainer.step} already, got {cfg.steps}")
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, trainer.step) if main else None
    bar = tqdm(
        total=cfg.steps, initial=trainer.step, disable=not (progress and main), desc=name,
        unit="step",
    )  # fmt: skip
    sums: dict[str, Tensor] = {}
    lap, steps = time.perf_counter(), 0
    while trainer.step < cfg.steps:
        values = trainer.advance()
        sums = {n: sums[n] + v if sums else v for n, v in values.items()}
        steps += 1
        bar.update()
        end = trainer.step == cfg.steps
        checkpoint = end or trainer.step % cfg.checkpoint_every == 0
        if checkpoint or trainer.step % cfg.log_every == 0:
            row = {n: float(v) / steps for n, v in sums.items()}
            for what, n in (("loss", "loss"), ("gradient's norm", "grad")):
                if not math.isfinite(row[n]):
                    raise FloatingPointError(
                        f"the {what} is {row[n]} at step {trainer.step}; try a lower learning rate"
                    )
            now = time.perf_counter()
            trainer.seconds += now - lap
            row |= {
                "step": trainer.step,
                "lr": trainer.optimizer.lr,
                "images_per_second": steps * cfg.batch / (now - lap),
                "seconds": trainer.seconds,
            }
            sums, lap, steps = {}, now, 0
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            if log is not None:
                log.row(row)
        if checkpoint and log is not None:
            trainer.averaged().save(folder / name)
            _files.write_json(folder / "training.json", {**trainer.record(), **(about or {})})
            trainer.save(folder)  # after what goes with it, before what takes long
            picture = draw(trainer)
            picture.save(folder / "grids" / f"{trainer.step:06d}.png")
            log.picture("samples", picture, trainer.step)
            lap = time.perf_counter()
    bar.close()
    if log is not None:
        log.close()
    trainer.processes.wait()
    return {**trainer.record(), **(about or {})}
