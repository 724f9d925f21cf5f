"""What the denoiser learns from: codes of images, their embeddings, and neighbours among them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self

from knnfast import _files
from knnfast.diffusion.cache import digest
from knnfast.diffusion.settings import Settings
from knnfast.search import Index

RIVALS = 20  # nearest images among which a disturbed query finds its rival
SPARE = 32  # neighbours looked up beyond k at first, to fill places of near-duplicates
WIDEST = 4096  # and at most in a step of the training
LOOKED_AT = 1 << 16  # neighbours at a time, for all rows: each is compared with its row


@dataclass(frozen=True)
class Pairs:
    """Images as (codes, embedding), in several versions of the same collection.

    Version 0 holds the images as they are; in each other one every image is augmented in its own
    way, *and the embeddings are those of the augmented images*. Neighbours are always taken from
    the target's own version, so what a neighbour's embedding says about its picture is true in all
    of them, and reading it is the only way to know the picture.

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

    def check_sizes(self, length: int, embed_dim: int) -> None:
        """Refuse a network that reads other numbers of codes or other embeddings.

        Raises:
            ValueError: names both.
        """
        found = self.codes.shape[-1], self.embeddings.shape[-1]
        if found != (length, embed_dim):
            raise ValueError(
                f"pairs: codes and embeddings have sizes {found}, the network's are "
                f"{(length, embed_dim)}"
            )

    def digest(self) -> str:
        """Hash of everything."""
        return digest(vars(self).values())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        _files.save_tensors(Path(path), {k: v.clone() for k, v in vars(self).items()})

    @classmethod
    def load(cls, path: str | Path) -> Pairs:
        """Read what `save` wrote."""
        return cls(**load_file(path))


@dataclass(frozen=True)
class ConditionConfig(Settings):
    """How conditions are drawn in training. All probabilities are per image.

    The paper shows the image's own embedding and its k nearest neighbours, or nothing at all (the
    preset `paper`). The defaults disturb that, because at inference the query is a prompt's
    embedding, which is farther from any image than the image's own, and the database a smaller or
    another one: most queries are noised or cut, and search their neighbours so; some lists are
    short, or from a part of the database; some images are shown without the query or without
    neighbours, so that either alone can be asked for, too.

    Attributes:
        k: neighbours at most.
        vary_k: probability that the number shown is drawn, uniformly from 1...k.
        semantic: numbers of the embedding that a text embedding fills too; None: all of them.
        text_like: probability that the query is cut to its semantic part, as a prompt's is.
        noise: largest length of the Gaussian noise added to a unit query (LAFITE), drawn uniformly.
        least_noise: smallest length of it.
        exact: probability that a query that is not text-like stays undisturbed, as an image query
            is at inference.
        confuse: largest weight with which the semantic part of a random one of the 20 nearest
            images is mixed into a disturbed query: a prompt is nearly as close to its rivals.
        exclude: probability that the target itself and its near-duplicates are kept out of the
            neighbours. 1 is the paper's setting as we read it. Below 1 the model also sees
            neighbour lists in which the wanted picture *is* present, as it is at inference when the
            database has it, and learns to use such a neighbour.
        near: cosine similarity from which an image counts as a near-duplicate of the target.
        subset: probability that only a random part of the database is searched (farther
            neighbours, as in a swapped or small database).
        original: probability of version 0.
        no_query: probability that only neighbours are shown.
        no_neighbours: probability that only the query is shown.
        null: probability that nothing is shown (classifier-free guidance).
    """

    k: int = 10
    vary_k: float = 0.5
    semantic: int | None = None
    text_like: float = 0.6
    noise: float = 1.0
    least_noise: float = 0.0
    exact: float = 0.5
    confuse: float = 0.0
    exclude: float = 1.0
    near: float = 0.95
    subset: float = 0.25
    original: float = 0.3
    no_query: float = 0.15
    no_neighbours: float = 0.15
    null: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.to_dict().items():
            low, high = {"k": (1, None), "semantic": (1, None), "near": (-1, None)}.get(
                name, (0, None if name in ("noise", "least_noise", "confuse") else 1)
            )
            if value is not None and not low <= value <= (math.inf if high is None else high):
                allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{name} must be {allowed}, got {value}")
        if self.least_noise > self.noise:
            raise ValueError(f"least_noise {self.least_noise} exceeds noise {self.noise}")
        if self.null + self.no_query + self.no_neighbours > 1 + 1e-9:
            raise ValueError("null, no_query and no_neighbours add up to more than 1")

    @property
    def shows_neighbours(self) -> bool:
        """Whether any image is ever shown with neighbours."""
        return self.null + self.no_neighbours < 1 - 1e-9

    def preset(self, name: str, noise: float | None = None) -> Self:
        """These settings, with what a named way of drawing conditions fixes.

        Args:
            name: `robust`: these. `paper`: the image embedding as it is and its k nearest
                neighbours, the image and its near-duplicates not among them (Sheynin et al. 2022,
                as we read it). `lafite`: no neighbours; the image embedding with Gaussian noise of
                fixed length, h' = h~ / |h~|, h~ = h + noise e / |e| (Zhou et al. 2022, Eq. 4).
                `no_neighbours`: the image embedding alone, as it is. In all of them `null` of the
                images are shown nothing.
            noise: the largest length of `robust`'s noise, or the length of `lafite`'s (0.75).

        Raises:
            ValueError: another name, or noise for one that adds none.
        """
        if name not in PRESETS:
            raise ValueError(f"condition must be one of {', '.join(PRESETS)}, got {name!r}")
        if name == "robust":
            return self if noise is None else replace(self, noise=noise)
        if noise is not None and name != "lafite":
            raise ValueError(f"noise: {name} adds none, got {noise}")
        length = (0.75 if noise is None else noise) if name == "lafite" else 0.0
        plain = replace(
            self, text_like=0.0, exact=0.0, noise=length, least_noise=length, confuse=0.0,
            vary_k=0.0, subset=0.0, exclude=1.0, no_query=0.0, no_neighbours=0.0,
        )  # fmt: skip
        return plain if name == "paper" else replace(plain, no_neighbours=1.0 - self.null)


PRESETS = ("robust", "paper", "lafite", "no_neighbours")


def nearest(pairs: Pairs, count: int, batch: int = 4096) -> Tensor:
    """The `count` nearest database images of every target by its own embedding, once for all.

    Args:
        pairs: the images.
        count: of neighbours, the target itself among them.
        batch: targets searched at a time.

    Returns:
        Ids, [W, n, min(count, m)] int32, best first, in each version.
    """
    count = min(count, len(pairs.database))
    out = torch.empty(len(pairs.codes), len(pairs.targets), count, dtype=torch.int32)
    for version, rows in enumerate(pairs.embeddings):
        index = Index(rows.shape[1], metric="ip")
        index.add(rows[pairs.database], ids=pairs.database)
        for start in range(0, len(pairs.targets), batch):
            part = pairs.targets[start : start + batch]
            found = index.search(rows[part].float().numpy(), count)[1]
            out[version, start : start + batch] = torch.from_numpy(found)
    return out


def first_kept(
    look: Callable[[Tensor, int], tuple[Tensor, Tensor]], rows: int, k: int, most: int
) -> Tensor:
    """The first k of each row's neighbours that are kept: ids [rows, k], -1 where there are fewer.

    Rows that keep fewer, as where near-duplicates abound, are searched again, wider.

    Args:
        look: called with some rows and a count, gives their nearest ids [n, count], -1 behind the
            last, and which of these are kept.
        rows: how many.
        k: of neighbours.
        most: ids that are looked at for a row: as many as there are, or fewer.
    """
    first = torch.full((rows, k), -1)
    rest, count = torch.arange(rows), k + SPARE
    while len(rest):
        lacking = []
        for part in rest.split(max(1, LOOKED_AT // min(count, most))):
            found, kept = look(part, min(count, most))
            order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :k]
            ids = torch.where(kept, found, -1).gather(1, order)
            first[part, : ids.shape[1]] = ids
            lacking.append(part[(kept.sum(1) < k) & (found[:, -1] >= 0)])
        if found.shape[1] >= most:
            break
        rest = torch.cat(lacking)
        count *= 4
    return first


class ConditionSampler:
    """Draws training batches: target codes, condition embeddings, and which of them are on.

    Neighbours are searched with the disturbed query, as a prompt's are at inference. With
    `candidates` they are the best of these instead, by the same query: no search, for collections
    so large that one would hold up the training.

    Args:
        pairs: the images.
        config: how conditions are drawn.
        candidates: what `nearest` returned for these pairs.
    """

    def __init__(
        self, pairs: Pairs, config: ConditionConfig, candidates: Tensor | None = None
    ) -> None:
        if not 1 <= config.k <= len(pairs.database):
            raise ValueError(
                f"k must be in [1, {len(pairs.database)}], as many as may be neighbours, got "
                f"{config.k}"
            )
        self.pairs, self.config, self.candidates = pairs, config, candidates
        self._indexes: dict[tuple[int, int], Index] = {}

    def under(self, config: ConditionConfig) -> Self:
        """The same images under other conditions; indexes are shared."""
        other = copy.copy(self)
        other.config = config
        return other

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Draw images of one version whose neighbours come from one search.

        Args:
            count: images.
            g: source of every random choice.

        Returns:
            codes [count, L] int64, cond [count, k+1, E] float32, mask [count, k+1] bool.
        """
        version, drawn = self._pick(count, g)
        targets = self.pairs.targets[drawn]
        own = self.pairs.embeddings[version][targets].float()
        cond, mask = self._condition(own, own, version, drawn, g)
        return self.pairs.codes[version][targets].long(), cond, mask

    def _pick(self, count: int, g: torch.Generator) -> tuple[int, Tensor]:
        """A version, and places of targets in `pairs.targets`, [count]."""
        versions, version = len(self.pairs.codes), 0
        if versions > 1 and not _chance(self.config.original, 1, g):
            version = int(torch.randint(1, versions, (1,), generator=g))
        return version, torch.randint(len(self.pairs.targets), (count,), generator=g)

    def _condition(
        self, about: Tensor, own: Tensor, version: int, drawn: Tensor, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Condition embeddings [count, k+1, E], and which of them are on.

        Args:
            about: embeddings that the queries are made of, [count, E].
            own: the targets' embeddings, which tell their near-duplicates.
            version: of the targets.
            drawn: their places in `pairs.targets`.
            g: source of every random choice.
        """
        cfg, pairs, count = self.config, self.pairs, len(drawn)
        targets, rows = pairs.targets[drawn], pairs.embeddings[version]
        query = self._query(about, version, _chance(cfg.text_like, count, g), g)

        ids = torch.full((count, cfg.k), -1)
        if cfg.shows_neighbours:
            allowed = None
            if _chance(cfg.subset, 1, g):
                share = 0.02 + 0.48 * float(torch.rand(1, generator=g)) ** 2
                keep = torch.rand(len(pairs.database), generator=g) < share
                keep |= torch.isin(pairs.database, targets)
                allowed = pairs.database[keep]
            excluded = _chance(cfg.exclude, count, g)
            ids = self._neighbours(query, own, version, drawn, allowed, excluded)

        cond = torch.cat([query[:, None], rows[ids.clamp_min(0)].float()], 1)
        fewer = torch.randint(1, cfg.k + 1, (count,), generator=g)
        shown = torch.where(_chance(cfg.vary_k, count, g), fewer, cfg.k)
        on = (ids >= 0) & (torch.arange(cfg.k)[None] < shown[:, None])
        what = torch.rand(count, generator=g)
        edges = np.cumsum([cfg.null, cfg.no_query, cfg.no_neighbours])
        use_query = (what >= edges[1]).unsqueeze(1)
        use_neighbours = ((what >= edges[0]) & ~((what >= edges[1]) & (what < edges[2])))[:, None]
        mask = torch.cat([use_query, on & use_neighbours], 1)
        return cond * mask[..., None], mask

    def _query(self, own: Tensor, version: int, text_like: Tensor, g: torch.Generator) -> Tensor:
        """The query embedding: the image's own, cut and disturbed to resemble a prompt's."""
        cfg, count = self.config, len(own)
        semantic = cfg.semantic or own.shape[1]
        part = (torch.arange(own.shape[1])[None] < semantic) | ~text_like[:, None]
        query = F.normalize(own * part, dim=1)
        noise = F.normalize(torch.randn(own.shape, generator=g) * part, dim=1)
        length = cfg.least_noise + (cfg.noise - cfg.least_noise) * torch.rand(count, 1, generator=g)
        noise = noise * length
        if cfg.confuse:
            near = self._index(version, semantic).search(query[:, :semantic].numpy(), RIVALS)[1]
            known = min(RIVALS, len(self.pairs.database))
            one = torch.randint(known, (count, 1), generator=g)
            id = torch.from_numpy(near).gather(1, one)[:, 0]
            rival = F.normalize(self.pairs.embeddings[version][id, :semantic].float(), dim=1)
            rival = rival * torch.rand(count, 1, generator=g) * cfg.confuse
            noise = noise + F.pad(rival, (0, own.shape[1] - semantic)) * text_like[:, None]
        exact = ~text_like & (torch.rand(count, generator=g) < cfg.exact)
        return F.normalize(query + noise * (~exact)[:, None], dim=1)

    def _found(
        self, query: Tensor, drawn: Tensor, version: int, allowed: Tensor | None, count: int
    ) -> Tensor:
        """Ids of the `count` allowed images nearest to the queries, -1 behind the last; of all that
        are, where there are candidates."""
        if self.candidates is None:
            allow = None if allowed is None else allowed.numpy()
            rows = self.pairs.embeddings.shape[-1]
            return torch.from_numpy(
                self._index(version, rows).search(query.numpy(), count, allow=allow)[1]
            )
        ids = self.candidates[version][drawn].long()
        score = torch.einsum("ne,nce->nc", query, self.pairs.embeddings[version][ids].float())
        if allowed is not None:
            some = torch.zeros(self.pairs.codes.shape[1], dtype=torch.bool)
            some[allowed] = True
            ids = torch.where(some[ids], ids, -1)
            score = torch.where(ids < 0, -torch.inf, score)
        return ids.gather(1, score.argsort(dim=1, descending=True, stable=True))

    def _neighbours(
        self, query: Tensor, own: Tensor, version: int, drawn: Tensor, allowed: Tensor | None,
        excluded: Tensor,
    ) -> Tensor:  # fmt: skip
        """The k allowed images nearest to the queries, ids [n, k], without the target and its
        near-duplicates where `excluded`, -1 where there are fewer."""
        targets, rows = self.pairs.targets[drawn], self.pairs.embeddings[version]

        def look(part: Tensor, count: int) -> tuple[Tensor, Tensor]:
            found = self._found(query[part], drawn[part], version, allowed, count)
            theirs = rows[found.clamp_min(0)].float()
            near = torch.einsum("ne,nce->nc", own[part], theirs) >= self.config.near
            near |= found == targets[part][:, None]
            return found, ~(near & excluded[part][:, None]) & (found >= 0)

        if self.candidates is None:
            most = min(len(self.pairs.database), self.config.k + WIDEST)
        else:
            most = self.candidates.shape[-1]
        return first_kept(look, len(query), self.config.k, most)

    def _index(self, version: int, dim: int) -> Index:
        """The first `dim` numbers of a version's database, indexed on first use."""
        if (version, dim) not in self._indexes:
            rows = self.pairs.embeddings[version][self.pairs.database, :dim]
            index = Index(dim, metric="cosine" if dim < self.pairs.embeddings.shape[-1] else "ip")
            index.add(rows, ids=self.pairs.database)
            self._indexes[version, dim] = index
        return self._indexes[version, dim]


def _chance(p: float, count: int, g: torch.Generator) -> Tensor:
    """`count` draws that are true with probability p."""
    return torch.rand(count, generator=g) < p
