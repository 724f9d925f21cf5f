"""Training an editor: pictures with a region taken from a neighbour, to be made whole again.

A random region M of an image I is replaced by that region of a near image, aligned to I:

    I_manip = I (1 - M) + warp(J) M                                 (Sheynin et al. 2022)

The denoiser sees the codes of I_manip and the encoder's embedding of I M, and learns to predict
the codes of I. At inference the picture is the user's and the embedding that of the edit text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from knnfast import _files
from knnfast._checks import hint
from knnfast.diffusion.augment import PHOTOS, AugmentConfig, augmented
from knnfast.diffusion.data import ImageEncoder, make_pairs
from knnfast.diffusion.denoiser import Denoiser
from knnfast.diffusion.distributed import processes
from knnfast.diffusion.pairs import ConditionConfig, ConditionSampler, Pairs, first_kept
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import TrainConfig, Trainer, fit
from knnfast.diffusion.training import CodesObjective, corrupt
from knnfast.images import pictures_of
from knnfast.search import Index

BLUR = 5  # pixels, of the Gaussian that ECC sees the pictures through


def align(moving: np.ndarray, fixed: np.ndarray, iterations: int = 50) -> tuple[np.ndarray, bool]:
    """Warp a picture onto another by the affine map of largest correlation.

    ECC (Evangelidis and Psarakis 2008) maximises the zero-mean normalised correlation of grey
    values; where it does not converge, or ends in a map that squeezes or blows up areas more than
    threefold, the picture comes back as it is.

    Args:
        moving: [H, W, 3] uint8.
        fixed: [H, W, 3] uint8.
        iterations: at most.

    Returns:
        The warped picture, [H, W, 3] uint8, white where nothing lies; and whether ECC converged.

    Raises:
        ImportError: OpenCV is not installed.
    """
    cv2 = import_cv2()
    template, grey = (
        cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255 for x in (fixed, moving)
    )
    everywhere = np.full(grey.shape, 255, np.uint8)
    warp: np.ndarray = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, iterations, 1e-4)
    try:
        _, warp = cv2.findTransformECC(
            template, grey, warp, cv2.MOTION_AFFINE, stop, everywhere, BLUR
        )
    except cv2.error:
        return moving, False
    if not 1 / 3 < float(np.linalg.det(warp[:, :2])) < 3:
        return moving, False
    size = fixed.shape[1], fixed.shape[0]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(moving, warp, size, flags=flags, borderValue=(255, 255, 255)), True


def import_cv2() -> Any:
    """Import OpenCV when pictures are aligned: nothing else needs it."""
    try:
        import cv2
    except ImportError as e:
        raise ImportError(f"training an editor needs OpenCV ({e}); {hint('edit')}") from e
    return cv2


@dataclass(frozen=True)
class EditPairs(Pairs):
    """Pairs with their pictures, and beside each picture its nearest neighbours, aligned to it.

    Attributes:
        images: [W, N, 3, S, S] uint8.
        aligned: [W, n, N, 3, S, S] uint8: nearest first, changed as the picture itself was.
    """

    images: Tensor
    aligned: Tensor


def make_edit_pairs(
    images: Tensor,
    encoder: ImageEncoder,
    tokenizer: VQTokenizer,
    versions: int = 6,
    neighbours: int = 3,
    seed: int = 0,
    augmentation: AugmentConfig = PHOTOS,
    near: float = ConditionConfig.near,
    known: Tensor | None = None,
) -> tuple[EditPairs, float]:
    """Encode a collection for an editor, its neighbours aligned.

    Args:
        images: [N, 3, S, S] uint8, N > neighbours.
        encoder: gives embeddings of PIL images.
        tokenizer: gives codes.
        versions: of the collection: the first as it is, the others augmented, each image
            and the neighbours aligned to it in the same way.
        neighbours: of each image: the nearest that are no near-duplicates of it.
        seed: of the augmentations.
        augmentation: how the images of the other versions are changed.
        near: cosine from which an image counts as a near-duplicate.
        known: the first version's embeddings [N, E], where its images were larger.

    Returns:
        The pairs, and the share of the alignments that converged.

    Raises:
        ValueError: an image has not so many neighbours. ImportError: OpenCV is not installed.
    """
    if not 1 <= neighbours < len(images):
        raise ValueError(f"neighbours: must be 1 ... {len(images) - 1}, got {neighbours}")
    import_cv2()
    channels_last = images.permute(0, 2, 3, 1).numpy()
    if known is None:
        pictures = [Image.fromarray(x) for x in channels_last]
        rows = np.asarray(encoder.encode_images(pictures).vectors)
    else:
        rows = known.float().numpy()
    lent_by = nearest_others(rows, neighbours, near)
    aligned = torch.empty(neighbours, *images.shape, dtype=torch.uint8)
    converged = 0
    for i, ids in enumerate(lent_by):
        for n, j in enumerate(ids):
            picture, found = align(channels_last[j], channels_last[i])
            aligned[n, i] = torch.from_numpy(picture).permute(2, 0, 1)
            converged += found
    shown, lent = [images], [aligned]
    for version in range(1, versions):
        g, changed = torch.Generator(), []
        for x in (images, *aligned):  # an image and what is aligned to it change in one way
            g.manual_seed((seed * 1_000_003 + version) % 2**64)
            changed.append(augmented(x, g, augmentation))
        shown.append(changed[0])
        lent.append(torch.stack(changed[1:]))
    plain = make_pairs(shown, encoder, tokenizer, known=known)
    pairs = EditPairs(**vars(plain), images=torch.stack(shown), aligned=torch.stack(lent))
    return pairs, converged / lent_by.size


def nearest_others(rows: np.ndarray, count: int, near: float = ConditionConfig.near) -> np.ndarray:
    """The nearest other pictures of each picture that are no near-duplicates of it, [N, count].

    Args:
        rows: embeddings, [N, E] float32, unit rows.
        count: of neighbours.
        near: cosine from which a picture counts as a near-duplicate.

    Raises:
        ValueError: a picture has not so many.
    """
    index = Index(rows.shape[1], metric="ip")
    index.add(rows)

    def look(part: Tensor, wide: int) -> tuple[Tensor, Tensor]:
        scores, ids = index.search(rows[part.numpy()], wide)
        return torch.from_numpy(ids), torch.from_numpy(scores < near)  # itself is not, either

    nearest = first_kept(look, len(rows), count, len(rows)).numpy()
    if lacking := np.flatnonzero(nearest[:, -1] < 0).tolist():
        raise ValueError(
            f"neighbours: picture {lacking[0]} has fewer than {count} that are no near-duplicates "
            f"of it (cosine below {near})"
        )
    return nearest


@dataclass(frozen=True)
class EditConfig(ConditionConfig):
    """How an editor's batches are drawn. All probabilities are per image.

    Attributes:
        whole: probability that M is the whole image: the picture shown is the aligned neighbour.
        about_image: probability that the query is of I, not of I M, though M is a part: a text may
            name the thing wanted or its part.
        same: probability that the picture shown is I itself.
        hidden: probability that the codes shown inside M are unknown (a mask given by the user).
        blank: probability that all codes shown are unknown.
        local: probability that the codes outside a window around M are given and only those
            inside are corrupted, as they are when an edit runs.
        least: smallest half side of M, as a share of the picture's side.
        most: largest half side of M.
    """

    whole: float = 0.15
    about_image: float = 0.4
    same: float = 0.1
    hidden: float = 0.1
    blank: float = 0.05
    local: float = 0.5
    least: float = 0.12
    most: float = 0.32


def regions(difference: Tensor, least: float, most: float, g: torch.Generator) -> Tensor:
    """Random ellipses and rectangles, more likely where two pictures differ.

    Args:
        difference: [B, S, S], at least 0: how much the pictures differ at each pixel.
        least: smallest half side, as a share of S.
        most: largest half side.
        g: source of every random choice.

    Returns:
        [B, 1, S, S] float in [0, 1], with edges about two pixels soft.
    """
    b, size, _ = difference.shape
    side = max(1, size // 16)  # of a cell, in pixels
    coarse = F.avg_pool2d(difference[:, None], side)
    columns = coarse.shape[-1]
    cell = torch.multinomial(coarse.flatten(1) + 1e-4, 1, generator=g)[:, 0]
    jitter = torch.rand(2, b, generator=g)
    middle = torch.stack([cell // columns, cell % columns]) * side + jitter * side  # [2, B]
    half = (least + (most - least) * torch.rand(2, b, generator=g)) * size
    place = torch.arange(size) + 0.5
    dy = (place[None, :, None] - middle[0][:, None, None]) / half[0][:, None, None]
    dx = (place[None, None, :] - middle[1][:, None, None]) / half[1][:, None, None]
    round_ = torch.rand(b, generator=g) < 0.5
    radius = torch.where(
        round_[:, None, None], (dx * dx + dy * dy).sqrt(), torch.maximum(dx.abs(), dy.abs())
    )
    edge = half.mean(0)[:, None, None]  # pixels from the middle to the edge
    return torch.sigmoid((1 - radius) * edge * 2)[:, None]


class EditSampler(ConditionSampler):
    """Draws an editor's batches; regions, manipulated pictures and queries are made on the fly.

    Args:
        pairs: the images and their aligned neighbours.
        config: how batches are drawn.
        encoder: of the pairs' embeddings.
        tokenizer: of the pairs' codes.
    """

    pairs: EditPairs
    config: EditConfig

    def __init__(
        self, pairs: EditPairs, config: EditConfig, encoder: ImageEncoder, tokenizer: VQTokenizer
    ) -> None:
        super().__init__(pairs, config)
        self.encoder, self.tokenizer = encoder, tokenizer

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Codes, cond, mask as in `ConditionSampler`; source [count, L]; window [count, L] bool."""
        cfg, pairs = self.config, self.pairs

        def chance(p: float) -> Tensor:
            return torch.rand(count, generator=g) < p

        version, drawn = self._pick(count, g)
        targets = pairs.targets[drawn]
        own = pairs.embeddings[version][targets].float()
        codes = pairs.codes[version][targets].long()
        image = pairs.images[version, targets].float() / 255
        rank = torch.randint(pairs.aligned.shape[1], (count,), generator=g)
        other = pairs.aligned[version, rank, targets].float() / 255
        region = regions((image - other).abs().mean(1), cfg.least, cfg.most, g)
        whole = chance(cfg.whole)
        region[whole] = 1.0
        shown = image + (other - image) * region
        # The place that is asked about, on white; the paper's I M is black outside.
        part = 1.0 - (1.0 - image) * region
        about_image = whole | chance(cfg.about_image)
        about = own.clone()
        rest = (~about_image).nonzero()[:, 0]
        if len(rest):
            rows = self.encoder.encode_images(pictures_of(part[rest])).vectors
            about[rest] = torch.from_numpy(np.asarray(rows))
        cond, mask = self._condition(about, own, version, drawn, g)

        # The tokenizer's normalisation carries a change into codes far away: only the codes of the
        # cells that the region touches, and of the cells around them, are taken over.
        cells = F.adaptive_max_pool2d(region, self.tokenizer.grid)
        touched = F.max_pool2d(cells, 3, 1, 1).flatten(1) > 0.5
        changed = touched & ~chance(cfg.same)[:, None]
        to = next(self.tokenizer.parameters()).device
        source = torch.where(changed, self.tokenizer.encode(shown.to(to)).cpu(), codes)
        unknown = (touched & chance(cfg.hidden)[:, None]) | chance(cfg.blank)[:, None]
        source[unknown] = self.tokenizer.codebook_size
        margin = int(torch.randint(1, 4, (1,), generator=g))
        window = F.max_pool2d(cells, 2 * margin + 1, 1, margin).flatten(1) > 0.5
        window |= ~chance(cfg.local)[:, None]
        return codes, cond, mask, source, window


class EditObjective(CodesObjective):
    """The loss of an editor: only the codes inside a sample's window are corrupted.

    Its level is then that of a picture with as many masks: t times the window's share.
    """

    def corrupted(
        self, x0: Tensor, t: Tensor, noise: Tensor, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x_t, its levels, and cond, mask and source."""
        *read, window = inputs
        x_t = torch.where(window, corrupt(x0, t, self.schedule, noise), x0)
        t = (t * window.float().mean(1)).ceil().long().clamp_min(1)
        return x_t, t, tuple(read)


def editor_from(denoiser: Denoiser, gate: float = 6.0) -> Denoiser:
    """An editor that starts from a denoiser's weights.

    Args:
        denoiser: no editor yet.
        gate: how much the source's codes are favoured before anything is learned, in logits.

    Raises:
        ValueError: its schedule replaces codes.
    """
    denoiser.schedule.check_keeps()
    editor = Denoiser(replace(denoiser.config, source=True))
    editor.load_state_dict({**editor.state_dict(), **denoiser.state_dict()})
    torch.nn.init.constant_(editor.source_gate.bias, gate)
    return editor


def train_editor(
    pairs: EditPairs, out: str | Path, start: Denoiser, encoder: ImageEncoder,
    tokenizer: VQTokenizer, config: TrainConfig, device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train an editor on images alone; continue a run that was stopped or killed.

    Args:
        pairs: what `make_edit_pairs` gave.
        out: receives what `training.train` writes.
        start: an editor to start from (see `editor_from`).
        encoder: of the pairs' embeddings.
        tokenizer: of the pairs' codes.
        config: how to train; `config.condition` is an `EditConfig`.
        device: `cpu` or `cuda`.
        progress: show a progress bar.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        ValueError: sizes that do not fit, a schedule that replaces codes, or `out` holds another
            run.
    """
    condition = config.condition
    if not isinstance(condition, EditConfig):
        raise TypeError("config.condition: must be an EditConfig")
    start.schedule.check_keeps()
    if pairs.codes.shape[-1] != start.config.length:
        raise ValueError("the pairs' codes do not have the editor's sizes")
    config = config.with_lr(1e-3)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with processes(device) as these:
        torch.manual_seed(config.seed)
        objective = EditObjective(Denoiser(start.config), config.auxiliary, config.bf16)
        sampler = EditSampler(pairs, condition, encoder, tokenizer)
        made_from = {
            "data": pairs.digest(),
            "encoder": encoder.card.sha256,
            "tokenizer": _files.weights_hash(tokenizer),
        }
        trainer = Trainer(objective, config, sampler, these, made_from=made_from)
        trainer.start_from(start)
        about = {"targets": len(pairs.targets), "versions": len(pairs.codes)}

        def draw(trainer: Trainer) -> Image.Image:
            return draw_edits(trainer.averaged(), sampler, config.seed)

        return fit(trainer, folder, "denoiser", draw, about, progress)


def draw_edits(net: Denoiser, sampler: EditSampler, seed: int, columns: int = 8) -> Image.Image:
    """Targets, what was shown in their place, and two edits of it by text-like queries."""
    plain = replace(
        sampler.config, original=1.0, text_like=1.0, no_query=0.0, no_neighbours=0.0, null=0.0,
        vary_k=0.0, subset=0.0, same=0.0, hidden=0.0, blank=0.0,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    targets, cond, mask, source, _ = sampler.under(plain).draw(columns, g)
    device, steps = net.position.device, min(25, net.schedule.num_steps)
    cond, mask, source = (x.to(device) for x in (cond, mask, source))
    rows = [targets, source]
    rows += [net.sample(cond, mask, steps, seed=s, source=source) for s in (0, 1)]
    return sampler.tokenizer.sheet(rows)
