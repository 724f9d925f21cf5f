"""What the denoiser learns from: codes of images, their embeddings, and neighbours among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnfast.search import Index


@dataclass(frozen=True)
class Pairs:
    """Images as (codes, embedding), in several versions ("worlds") of the same collection.

    World 0 holds the images as they are; in each other world every image is augmented in its own
    way, *and the embeddings are those of the augmented images*. Neighbours are always taken from
    the target's own world, so what a neighbour's embedding says about its picture is true in every
    world, and reading it is the only way to know the picture.

    Attributes:
        codes: [W, N, L] int16.
        embeddings: [W, N, E] float16, unit rows.
        targets: [n] int64, images that may be drawn as targets.
        database: [m] int64, images that may be neighbours.
    """

    codes: Tensor
    embeddings: Tensor
    targets: Tensor
    database: Tensor

    def restricted(self, targets: Tensor, database: Tensor, worlds: int | None = None) -> Pairs:
        """The same images with other targets, another database, and the first `worlds` worlds."""
        return Pairs(self.codes[:worlds], self.embeddings[:worlds], targets, database)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_file({k: v.clone().contiguous() for k, v in vars(self).items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Pairs:
        """Read what `save` wrote."""
        return cls(**load_file(path))


@dataclass(frozen=True)
class ConditionConfig:
    """How conditions are drawn in training. All probabilities are per image.

    Attributes:
        k: neighbours at most.
        vary_k: probability that fewer than k are shown (uniform in 1...k).
        semantic: numbers of the embedding that a text embedding fills too; None: all of them.
        text_like: probability that the query is cut to its semantic part, as a prompt's is.
        noise: largest length of the Gaussian noise added to a unit query (LAFITE), drawn uniformly.
        confuse: largest weight with which the semantic part of a random one of the 20 nearest
            images is mixed into a disturbed query: a prompt is nearly as close to its rivals.
        exclude: probability that the target itself and its near-duplicates are kept out of the
            neighbours. 1 is the paper's setting as we read it. Below 1 the model also sees
            neighbour lists in which the wanted picture *is* present, as it is at inference when the
            database has it, and learns to use such a neighbour.
        near: cosine similarity from which an image counts as a near-duplicate of the target.
        subset: probability that only a random part of the database is searched (farther
            neighbours, as in a swapped or small database).
        original: probability of world 0.
        no_query: probability that only neighbours are shown.
        no_neighbours: probability that only the query is shown.
        null: probability that nothing is shown (classifier-free guidance).
    """

    k: int = 10
    vary_k: float = 0.5
    semantic: int | None = None
    text_like: float = 0.6
    noise: float = 1.0
    confuse: float = 0.0
    exclude: float = 1.0
    near: float = 0.95
    subset: float = 0.25
    original: float = 0.3
    no_query: float = 0.15
    no_neighbours: float = 0.15
    null: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class ConditionSampler:
    """Draws training batches: target codes, condition embeddings, and which of them are on.

    Args:
        pairs: the images.
        config: how conditions are drawn.
    """

    def __init__(self, pairs: Pairs, config: ConditionConfig) -> None:
        if not 1 <= config.k <= len(pairs.database):
            raise ValueError(f"k must be in [1, {len(pairs.database)}], got {config.k}")
        self.pairs, self.config = pairs, config
        self._indexes: dict[int, Index] = {}

    def draw(self, count: int, generator: torch.Generator, chunks: int = 4) -> tuple[Tensor, ...]:
        """Draw a batch.

        Args:
            count: images.
            generator: source of every random choice.
            chunks: parts of the batch; each is drawn from one world and one search.

        Returns:
            codes [count, L] int64, cond [count, k+1, E] float32, mask [count, k+1] bool.
        """
        sizes = [count // chunks + (i < count % chunks) for i in range(chunks)]
        parts = [self._chunk(n, generator) for n in sizes if n]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _chunk(self, count: int, g: torch.Generator) -> tuple[Tensor, ...]:
        cfg, pairs = self.config, self.pairs
        worlds = len(pairs.codes)

        def chance(p: float, n: int = count) -> Tensor:
            return torch.rand(n, generator=g) < p

        world = 0
        if worlds > 1 and not chance(cfg.original, 1):
            world = int(torch.randint(1, worlds, (1,), generator=g))
        drawn = torch.randint(len(pairs.targets), (count,), generator=g)
        targets = pairs.targets[drawn]
        rows = pairs.embeddings[world]
        own = rows[targets].float()
        query = self._query(own, rows[pairs.database].float(), chance(cfg.text_like), g)

        allowed = None
        if chance(cfg.subset, 1):
            share = 0.02 + 0.48 * float(torch.rand(1, generator=g)) ** 2
            keep = torch.rand(len(pairs.database), generator=g) < share
            keep |= torch.isin(pairs.database, targets)
            allowed = pairs.database[keep]
        excluded = chance(cfg.exclude)
        ids = self._neighbours(query, targets, own, world, allowed, excluded)

        cond = torch.cat([query[:, None], rows[ids.clamp_min(0)].float()], 1)
        shown = torch.where(
            chance(cfg.vary_k), torch.randint(1, cfg.k + 1, (count,), generator=g), cfg.k
        )
        on = (ids >= 0) & (torch.arange(cfg.k)[None] < shown[:, None])
        what = torch.rand(count, generator=g)
        edges = np.cumsum([cfg.null, cfg.no_query, cfg.no_neighbours])
        use_query = (what >= edges[1]).unsqueeze(1)
        use_neighbours = ((what >= edges[0]) & ~((what >= edges[1]) & (what < edges[2])))[:, None]
        mask = torch.cat([use_query, on & use_neighbours], 1)
        return pairs.codes[world][targets].long(), cond * mask[..., None], mask

    def _query(
        self, own: Tensor, database: Tensor, text_like: Tensor, g: torch.Generator
    ) -> Tensor:
        """The query embedding: the image's own, cut and disturbed to resemble a prompt's."""
        cfg, count = self.config, len(own)
        semantic = cfg.semantic or own.shape[1]
        part = (torch.arange(own.shape[1])[None] < semantic) | ~text_like[:, None]
        query = F.normalize(own * part, dim=1)
        noise = F.normalize(torch.randn(own.shape, generator=g) * part, dim=1)
        noise = noise * torch.rand(count, 1, generator=g) * cfg.noise
        if cfg.confuse:
            meaning = F.normalize(database[:, :semantic], dim=1)
            near = (query[:, :semantic] @ meaning.T).topk(min(20, len(database)), dim=1).indices
            one = torch.randint(near.shape[1], (count, 1), generator=g)
            rival = meaning[near.gather(1, one)[:, 0]]
            rival = rival * torch.rand(count, 1, generator=g) * cfg.confuse
            noise = noise + F.pad(rival, (0, own.shape[1] - semantic)) * text_like[:, None]
        # An image query is exact at inference; half of them stay so.
        exact = ~text_like & (torch.rand(count, generator=g) < 0.5)
        return F.normalize(query + noise * (~exact)[:, None], dim=1)

    def _neighbours(
        self, query: Tensor, targets: Tensor, own: Tensor, world: int, allowed: Tensor | None,
        excluded: Tensor,
    ) -> Tensor:  # fmt: skip
        """Ids of the k nearest allowed images [n, k], nearest first, -1 where there are fewer."""
        k = self.config.k
        allow = None if allowed is None else allowed.numpy()
        # Enough to fill k places when near-duplicates of the target are taken out.
        count = min(k + 32, len(self.pairs.database))
        found = torch.from_numpy(self._index(world).search(query.numpy(), count, allow=allow)[1])
        rows = self.pairs.embeddings[world][found.clamp_min(0)].float()
        near = (rows * own[:, None]).sum(-1) >= self.config.near
        near |= found == targets[:, None]
        drop = (near & excluded[:, None]) | (found < 0)
        order = drop.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        ids = torch.where(drop, -1, found).gather(1, order)
        return F.pad(ids, (0, k - ids.shape[1]), value=-1)

    def _index(self, world: int) -> Index:
        """The world's database, indexed on first use."""
        if world not in self._indexes:
            rows = self.pairs.embeddings[world][self.pairs.database]
            index = self._indexes[world] = Index(rows.shape[1], metric="ip")
            index.add(rows, ids=self.pairs.database)
        return self._indexes[world]
