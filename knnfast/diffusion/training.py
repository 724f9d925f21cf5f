"""Training of the denoiser on images alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from knnfast import _files
from knnfast.diffusion.augment import PHOTOS, AugmentConfig
from knnfast.diffusion.backbone import Backbone
from knnfast.diffusion.cache import digest, load_cache, save_cache
from knnfast.diffusion.data import ImageEncoder, encode
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.distributed import Processes, processes
from knnfast.diffusion.pairs import ConditionSampler, Pairs, nearest
from knnfast.diffusion.schedule import Schedule
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import Objective, TrainConfig, Trainer, fit
from knnfast.diffusion.unet import UNetConfig
from knnfast.diffusion.unet_training import unet_trainer
from knnfast.ops import transition_loss

if TYPE_CHECKING:
    from knnfast.database import Database

NEIGHBOURS_FILE = "neighbours.safetensors"

# ---- the loss -----------------------------------------------------------------------------------


def corrupt(codes: Tensor, t: Tensor, schedule: Schedule, noise: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0).

    Args:
        codes: x_0, [B, L] int64.
        t: levels, [B] int64 in [1, T].
        schedule: of the corruption.
        noise: uniform numbers, [B, L] float64 in [0, 1): below A_t a code is kept, from 1 - C_t on
            it is masked, and in between each of the K codes has an interval of B_t.
    """
    a, b, c = (x[t][:, None] for x in _tables(schedule, t.device))
    k = schedule.num_codes
    x_t = codes
    if schedule.B[1:].any():
        replaced = ((noise - a) / b).clamp(0, k - 1).long()
        x_t = torch.where(noise < a, codes, replaced)
    return torch.where(noise < 1.0 - c, x_t, k)


@functools.lru_cache(maxsize=8)
def _tables(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C on a device, made once: a copy from the host at each step would wait for it."""
    A, B, C = (torch.tensor(x, device=device) for x in (schedule.A, schedule.B, schedule.C))
    return A, B, C


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


class CodesObjective(Objective):
    """T times the variational loss of discrete diffusion with the auxiliary term, over codes.

    Args:
        net: the network.
        auxiliary: weight of -log p(x0).
        bf16: matrix products in bfloat16.
        compile: let torch.compile fuse the transformer.
    """

    def __init__(
        self, net: Denoiser, auxiliary: float, bf16: bool = False, compile: bool = False
    ) -> None:
        super().__init__()
        self.net: Denoiser = net
        self.schedule = net.schedule
        self.num_levels = self.schedule.num_steps
        self.auxiliary, self.bf16 = auxiliary, bf16
        self.features = torch.compile(net.features) if compile else net.features
        for name, value in (("weight", auxiliary), ("uncovered", 0.0)):
            self.register_buffer(name, masked_row_weight(self.schedule, value), persistent=False)

    def noise(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """Uniform numbers for `corrupt`."""
        return torch.rand(x0.shape, generator=g, dtype=torch.float64)

    def corrupted(
        self, x0: Tensor, t: Tensor, noise: Tensor, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x_t, its levels, and what the network reads beside them."""
        return corrupt(x0, t, self.schedule, noise), t, inputs

    def forward(
        self, x0: Tensor, t: Tensor, factor: Tensor, noise: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss; `inputs` are the condition embeddings and which of them are on."""
        steps = self.num_levels
        x_t, t, inputs = self.corrupted(x0, t, noise, inputs)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.features(x_t, t, *inputs)
            if self.schedule.B[1:].any():
                loss, kl = transition_loss(  # in place: nobody reads the logits again
                    self.net.head(features), x0, x_t, t, self.schedule, weight=steps * factor,
                    auxiliary=self.auxiliary, inplace=True,
                )  # fmt: skip
                return loss, steps * kl
            rows = x_t == self.schedule.num_codes
            logits = self.net.head(features[rows])
        nll = torch.zeros(x0.shape, device=x0.device)
        nll[rows] = F.cross_entropy(logits.float(), x0[rows], reduction="none")
        image = steps * nll.mean(1)
        weight, uncovered = self.get_buffer("weight"), self.get_buffer("uncovered")
        return (factor * weight[t] * image).mean(), uncovered[t] * image.detach()


# ---- runs ---------------------------------------------------------------------------------------


def draw_grid(
    net: Backbone, tokenizer: VQTokenizer, sampler: ConditionSampler, config: TrainConfig,
    columns: int = 8, steps: int = 25,
) -> Image.Image:  # fmt: skip
    """Targets on top, below them two samples for each from text-like queries."""
    generator = torch.Generator().manual_seed(config.seed)
    shown = replace(
        config.condition, original=1.0, text_like=float(config.condition.text_like > 0),
        no_query=0.0, no_neighbours=float(not config.condition.shows_neighbours), null=0.0,
        vary_k=0.0, subset=0.0,
    )  # fmt: skip
    columns = min(columns, config.batch, len(sampler.pairs.targets))
    targets, cond, mask = sampler.under(shown).draw(columns, generator)
    device = next(net.parameters()).device
    cond, mask = cond.to(device), mask.to(device)
    rows = [targets]
    steps = min(steps, net.config.num_steps)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        for seed in (0, 1):
            rows.append(net.sample(cond, mask, steps, guidance=3.0, seed=seed))
    return tokenizer.sheet(rows)


def look_up_neighbours(pairs: Pairs, folder: Path, count: int, processes: Processes) -> Tensor:
    """What `nearest` gives for these pairs, made once and kept beside the run."""
    found = digest((pairs.embeddings, pairs.targets, pairs.database))
    recipe = {"embeddings": found, "count": count}
    file = folder / NEIGHBOURS_FILE
    if processes.main and load_cache(file, recipe) is None:
        save_cache(file, {"ids": nearest(pairs, count)}, recipe)
    processes.wait()
    tensors = load_cache(file, recipe)
    assert tensors is not None
    return tensors["ids"]


def train(
    data: str | Path | Database | Pairs,
    out: str | Path,
    tokenizer: VQTokenizer,
    encoder: ImageEncoder | None = None,
    model: DenoiserConfig | UNetConfig | None = None,
    config: TrainConfig | None = None,
    versions: int = 8,
    augmentation: AugmentConfig = PHOTOS,
    crop: str | None = None,
    start: Backbone | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a denoiser on images alone; continue a run that was stopped or killed.

    A folder `out` that holds a checkpoint is continued from it and ends with the same weights, bit
    for bit, as a run that was never stopped (same machine, same thread count, on a CPU). Started by
    `torchrun`, the processes share every batch.

    Args:
        data: a folder of images, WebDataset shards (see `data.shards`), a `Database`, or encoded
            `Pairs`.
        out: receives `pairs.safetensors` and with `config.candidates` `neighbours.safetensors`
            (made once), `state.safetensors` (everything needed to continue), `log.csv`,
            `tensorboard/`, `grids/*.png`, `training.json`, and `denoiser/` or `unet/`: the averaged
            weights.
        tokenizer: turns images into codes.
        encoder: gives image embeddings; may be None when `data` is `Pairs`.
        model: sizes, and with their type the backbone; what the tokenizer and the embeddings fix
            is filled in. None: those of `start`, or the discrete backbone's defaults.
        config: how to train.
        versions: of the collection: the first as it is, the others augmented.
        augmentation: how the pictures of the others are changed.
        crop: of pictures that are no squares: `center`, `pad` (the whole on white), or None, as
            the encoder does.
        start: a denoiser to start from, in a fresh run.
        device: `cpu` or `cuda`; under `torchrun`, each process takes its own GPU.
        progress: show a progress bar.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        ValueError: no usable images, or fewer than `config.condition.k`; `start` is of other sizes
            or (the U-Net) of another tokenizer; `model` is an editor's; `out` holds a run of other
            data, tokenizer, start, sizes or settings.
    """
    config = config or TrainConfig()
    folder = Path(out)
    model = model or (DenoiserConfig() if start is None else start.config)
    if isinstance(model, DenoiserConfig) and model.source:
        raise ValueError("model: an editor; `editing.train_editor` (--editor) trains one")
    model = replace(model, num_codes=tokenizer.codebook_size, grid=tokenizer.grid)
    with processes(device) as these:
        if isinstance(data, Pairs):
            pairs = data
        elif encoder is None:
            raise ValueError("encoder: needed to encode images")
        else:
            pairs = encode(
                data, folder, encoder, tokenizer, versions, config.seed, these, progress,
                augmentation, crop,
            )  # fmt: skip
        model = replace(model, embed_dim=pairs.embeddings.shape[-1])
        folder.mkdir(parents=True, exist_ok=True)
        candidates = None
        if config.candidates and config.condition.shows_neighbours:
            candidates = look_up_neighbours(pairs, folder, config.candidates, these)
        codebook = tokenizer.quantize.embedding.weight.cpu()
        if isinstance(model, UNetConfig):
            model = replace(model, code_dim=codebook.shape[1])
            trainer = unet_trainer(model, config, pairs, codebook, these, candidates)
        else:
            trainer = denoiser_trainer(model, config, pairs, these, candidates)
        if start is not None:
            trainer.start_from(start)
            if isinstance(model, UNetConfig):
                trainer.net.check_codebook(codebook)
        trainer.made_from["tokenizer"] = _files.weights_hash(tokenizer)
        about = {
            "targets": len(pairs.targets),
            "database": len(pairs.database),
            "versions": len(pairs.codes),
        }

        def draw(trainer: Trainer) -> Image.Image:
            assert isinstance(trainer.sampler, ConditionSampler)  # for the type checker
            return draw_grid(trainer.averaged(), tokenizer, trainer.sampler, config)

        return fit(trainer, folder, trainer.net.folder, draw, about, progress)


def denoiser_trainer(
    model: DenoiserConfig, config: TrainConfig, pairs: Pairs, processes: Processes | None = None,
    candidates: Tensor | None = None,
) -> Trainer:  # fmt: skip
    """A trainer of a new denoiser.

    Args:
        model: sizes of the denoiser.
        config: how it is trained.
        pairs: what it is trained on.
        processes: the processes that share each batch.
        candidates: what `nearest` returned for these pairs; None searches at every step.
    """
    pairs.check_sizes(model.length, model.embed_dim)
    config = config.with_lr(3e-3)
    torch.manual_seed(config.seed)
    objective = CodesObjective(Denoiser(model), config.auxiliary, config.bf16, config.compile)
    sampler = ConditionSampler(pairs, config.condition, candidates)
    return Trainer(objective, config, sampler, processes, made_from={"data": pairs.digest()})
