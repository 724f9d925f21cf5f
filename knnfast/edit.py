"""Text-driven local edits: what a text asks for is redrawn where it belongs, the rest stays.

An editor (`DenoiserConfig.source`) predicts a picture's codes from the picture and a text. Where
the text changes its prediction is where the edit belongs; that part is masked and drawn again, all
other codes are kept:

    d_i = sum_c (p_w(c) - p(c | s)) |e_c - e_{s_i}|^2,  p_w = softmax(l + w (l_text - l))

is averaged over 3x3 cells, and the `strength` share with the largest d is redrawn. Here s are the
picture's codes, e the code vectors, w the guidance, l and l_text the logits of p(. | s) and
p(. | s, text), both from a blank canvas. (The model: Sheynin et al. 2022, section 3; finding the
place by a difference of predictions: Couairon et al. 2022.) Nobody draws a mask; one may be given,
and bounds the edit.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from knnfast._calls import Clock, choose_neighbours
from knnfast._checks import check_number, check_range
from knnfast.database import Database, Item, Neighbour
from knnfast.diffusion.denoiser import Denoiser
from knnfast.diffusion.pairs import ConditionConfig
from knnfast.encoders import Embeddings, pixels
from knnfast.images import pictures_of, read_image, upright
from knnfast.mixture import Mixture
from knnfast.query import Picture, Query, embed, mix

if TYPE_CHECKING:
    from knnfast.pipeline import Databases, KNNDiffusion

SPARE = 8  # neighbours searched beyond k, for those that are the picture itself
NEAR = ConditionConfig.near  # cosine from which a neighbour counts as that


@dataclass
class Edit:
    """One candidate.

    `score`: cosine of picture and text; `identity`: cosine of picture and original; both by the
    model's encoder. `changed`: share of the codes that differ from the original's.
    """

    image: Image.Image
    score: float
    identity: float
    changed: float


@dataclass
class EditOutput:
    """What an edit returns.

    Attributes:
        edits: the candidates, best first.
        original: the picture as the tokenizer gives it back: what unchanged codes look like.
        score: cosine of the original and the text.
        region: cells that were redrawn, [rows, columns] bool.
        neighbours: what was found for picture and text, nearest first.
        timings: seconds by phase.
        seed: of the random numbers.
        label: the text.
    """

    edits: list[Edit]
    original: Image.Image
    score: float
    region: np.ndarray
    neighbours: list[Neighbour]
    timings: dict[str, float]
    seed: int
    label: str

    @property
    def images(self) -> list[Image.Image]:
        """The candidates' pictures, best first."""
        return [edit.image for edit in self.edits]


@torch.no_grad()
def edit(
    self: KNNDiffusion,
    image: Picture,
    prompt: str | Query,
    *,
    mask: np.ndarray | Image.Image | None = None,
    strength: float | None = None,
    num_images: int = 8,
    image_weight: float = 0.3,
    keep: float = 0.2,
    k: int | None = None,
    steps: int = 8,
    guidance: float = 3.0,
    truncation: float = 1.0,
    seed: int | None = None,
    database: Databases | None = None,
    groups: Sequence[str] | None = None,
    where: Callable[[Item], bool] | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> EditOutput:
    """Change a picture as a text says; the rest of it stays. Needs an editor's weights.

    Args:
        image: the picture, PIL or a file; brought to the model's size, padded white.
        prompt: what it should have or become: "sunglasses", "with a crown", "blue".
        mask: where it may change: bool [H, W] of the picture's own size, or an image of that size
            (grey from 128 on; not where it is transparent). None: the model finds the place.
        strength: share of the picture's codes that are redrawn, of those inside the mask where
            there is one, in (0, 1]; default 0.35, and 1 with a mask.
        num_images: candidates, >= 1.
        image_weight: share of the picture in the query that neighbours are searched with, in
            [0, 1]; the text has the rest.
        keep: weight of identity beside the text's score when candidates are ranked, >= 0.
        k: neighbours to condition on; None: 10, or as many as there are.
        steps: denoising steps, 1 ... T; fewer where the strength leaves fewer levels.
        guidance: how much the text counts, >= 0; 1 is the model's plain prediction.
        truncation: keep the most probable classes up to this mass, in (0, 1].
        seed: 0 ... 2^64 - 1; same seed, same edits on one machine with one number of
            threads; None draws one.
        database: what is searched, as in a call.
        groups: search only these groups.
        where: search only the items for which this is true.
        callback: called with (finished, total) network steps.

    Returns:
        EditOutput: candidates, best first, and the original beside them.

    Raises:
        ValueError, TypeError: the model is no editor, or one whose schedule replaces codes; an
            argument out of its range.
        FileNotFoundError: no such picture, or a folder that holds no database.
    """
    if not (isinstance(self.denoiser, Denoiser) and self.denoiser.config.source):
        raise ValueError('model: is no editor; load one, for example "stickers-edit"')
    self.denoiser.schedule.check_keeps()
    if not isinstance(prompt, str | Query):
        raise TypeError(f"prompt: expected text, got {type(prompt).__name__}")
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(f"prompt: must hold at least one word, got {prompt!r}")
    if strength is None:
        strength = 0.35 if mask is None else 1.0
    for name, value in (("strength", strength), ("image_weight", image_weight)):
        check_number(name, value)
        if not 0 <= value <= 1 or (name == "strength" and value == 0):
            low = "(0, 1]" if name == "strength" else "[0, 1]"
            raise ValueError(f"{name}: must lie in {low}, got {value}")
    for name, value in (("keep", keep), ("guidance", guidance)):
        check_number(name, value)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: must be a finite number of at least 0, got {value}")
    check_range("num_images", num_images, 1)
    seed = secrets.randbits(63) if seed is None else seed
    check_range("seed", seed, 0, 2**64 - 1)
    seed = int(seed)
    check_number("truncation", truncation)
    check_range("steps", steps, 1)  # its levels follow from the strength: no list of them
    self.denoiser.check(steps, guidance, truncation=truncation)
    db = self.find_database(database)
    k, allow = choose_neighbours(db, k, groups, where)
    if not isinstance(image, Image.Image | str | Path):
        raise TypeError(f"image: expected a picture or a file, got {type(image).__name__}")
    picture = upright(image) if isinstance(image, Image.Image) else read_image(image)
    cells = cells_of(mask, picture, self.tokenizer.grid)

    timings: dict[str, float] = {}
    clock = Clock(timings, self.device)
    net, size = self.denoiser, self.tokenizer.image_size
    with clock("encode"):
        array = torch.from_numpy(pixels([picture], size)).to(self.device)
        source = self.tokenizer.encode(array.permute(0, 3, 1, 2).float() / 255)
        (original,) = pictures_of(self.tokenizer.decode(source))
        text = mix((prompt, 1.0), label=None if isinstance(prompt, Query) else prompt)
        both = mix((text, 1 - image_weight), (original, image_weight))
        rows = embed([text, mix((original, 1.0)), both], self.encoder).vectors
        asked, searched = (Embeddings(row[None], self.encoder.card) for row in (rows[0], rows[2]))
    with clock("search"):
        wide = max(k, db.most(k + SPARE, allow))
        found = others(db, db.search(searched, wide, allow=allow)[0], rows[1])
        neighbours = db.best(found, k)
        cond, on = self.condition(db, asked, [neighbours], k)
    with clock("locate"):
        count = max(1, round(strength * int(cells.sum())))
        region = choose(disagreement(self, source, cond, on, guidance), cells, count)
        masked, unknown = region.flatten().to(self.device), net.schedule.num_codes
        shown = source if mask is None else torch.where(masked, unknown, source)
        level = max(1, round(net.schedule.num_steps * count / source.shape[1]))
    with clock("denoise"):
        codes = net.sample(
            cond.expand(num_images, -1, -1),
            on.expand(num_images, -1),
            steps=steps,
            guidance=guidance,
            truncation=truncation,
            seed=seed,
            callback=callback,
            source=shown.expand(num_images, -1),
            start=(torch.where(masked, unknown, source).repeat(num_images, 1), level),
        )
    with clock("decode"):
        alone = [self.tokenizer.decode(row[None]) for row in codes]
        images = pictures_of(torch.cat(alone))
    with clock("rank"):
        seen = self.encoder.encode_images([original, *images]).vectors
        scores, identity = seen @ rows[0], seen @ seen[0]
        changed = (codes != source).float().mean(1).tolist()
        edits = [
            Edit(each, float(scores[n + 1]), float(identity[n + 1]), changed[n])
            for n, each in enumerate(images)
        ]
        edits.sort(key=lambda e: -(e.score + keep * e.identity))
    return EditOutput(
        edits, original, float(scores[0]), region.numpy(), neighbours, timings, seed, text.label
    )


def cells_of(
    mask: np.ndarray | Image.Image | None, picture: Image.Image, grid: tuple[int, int]
) -> Tensor:
    """Cells [rows, columns] bool that a mask over a picture touches; all of them without one.

    Raises:
        ValueError: a mask of another size, of another type, or one that is empty.
    """
    if mask is None:
        return torch.ones(grid, dtype=torch.bool)
    if isinstance(mask, Image.Image):
        mask = np.asarray(upright(mask, "black").convert("L")) >= 128
    given = np.asarray(mask)
    if given.shape != (picture.height, picture.width):
        raise ValueError(
            f"mask: must be [{picture.height}, {picture.width}] as the image is, "
            f"got {list(given.shape)}"
        )
    if given.dtype != np.bool_:
        raise ValueError(f"mask: must be bool, got {given.dtype}")
    if not given.any():
        raise ValueError("mask: is empty; nothing may change")
    # The same padding as the picture's: black on white becomes the mask on nothing.
    drawn = Image.fromarray(np.where(given, 0, 255).astype(np.uint8))
    side = max(picture.size)
    whole = pixels([drawn], side)[0, ..., 0] < 128
    places = torch.from_numpy(whole).float()[None, None]
    return F.adaptive_max_pool2d(places, grid)[0, 0] > 0


def others(db: Database | Mixture, found: list[Neighbour], original: np.ndarray) -> list[Neighbour]:
    """Neighbours that are not the picture itself, nor a near-duplicate of it."""
    if not found:
        return found
    scores = db.vectors([n.item.id for n in found]) @ original
    return [n for n, score in zip(found, scores.tolist(), strict=True) if score < NEAR]


def disagreement(
    pipe: KNNDiffusion, source: Tensor, cond: Tensor, on: Tensor, guidance: float
) -> Tensor:
    """How far the text leads each of the picture's codes [1, L] away from itself: [rows, columns].

    d_i = sum_c (p_w(c) - p(c | s)) |e_c - e_{s_i}|^2,  p_w = softmax(l + w (l_text - l))

    over code vectors e, so that codes that look alike count as one; w is the guidance. Both
    predictions start from a blank canvas and see the picture.
    """
    net = pipe.denoiser
    assert isinstance(net, Denoiser)  # for the type checker
    both = torch.cat([cond, torch.zeros_like(cond)])
    blank = torch.full_like(source, net.schedule.num_codes).repeat(2, 1)
    level = torch.full((2,), net.schedule.num_steps, device=source.device)
    mask = torch.cat([on, torch.zeros_like(on)])
    text, plain = net(blank, level, both, mask, source.repeat(2, 1)).float()  # they are near
    guided = plain + guidance * (text - plain)
    vectors = pipe.tokenizer.quantize.embedding.weight
    distance = torch.cdist(vectors[source[0]], vectors).square()  # [L, K]
    d = ((guided.softmax(-1) - plain.softmax(-1)) * distance).sum(-1)
    return d.view(pipe.tokenizer.grid).cpu()


def choose(difference: Tensor, cells: Tensor, count: int) -> Tensor:
    """The `count` allowed cells with the largest mean difference over 3x3: [rows, cols] bool."""
    counts = F.avg_pool2d(torch.ones_like(difference)[None, None], 3, 1, 1)
    mean = (F.avg_pool2d(difference[None, None], 3, 1, 1) / counts)[0, 0]
    mean = torch.where(cells, mean, -torch.inf).flatten()
    region = torch.zeros(mean.shape, dtype=torch.bool)
    region[mean.topk(count).indices] = True
    return region.view(cells.shape)
