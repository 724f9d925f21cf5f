"""Several databases searched as one, each for its share of the neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from knnfast._checks import check_number
from knnfast.database import Collection, Database, Item, Neighbour

if TYPE_CHECKING:
    from knnfast.encoders import Embeddings, EncoderCard


class Mixture(Collection):
    """Databases of one encoder with weights; it is searched like a `Database`.

    A search for k gives each database k times its share of the weights, rounded to whole numbers by
    largest remainder, and orders what they find by score. An id tells row and database:
    id = row's id * number of databases + the database's place.

    Args:
        weights: weight of each database, at least 0, not all 0.

    Raises:
        ValueError: no database, a bad weight, or different encoders. TypeError: no number.
    """

    def __init__(self, weights: Mapping[Database, float]) -> None:
        if not weights:
            raise ValueError("database: a mix needs at least one database, got none")
        for database, weight in weights.items():
            check_number("database: a weight", weight)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"database: a weight must be at least 0, got {weight}")
            database.check_encoder(next(iter(weights)).encoder)
        total = sum(weights.values())
        if total == 0:
            raise ValueError("database: all weights are 0")
        self.parts = [(db, weight / total) for db, weight in weights.items()]

    def __len__(self) -> int:
        return sum(len(db) for db, _ in self.parts)

    def __getitem__(self, id: int) -> Item:
        which, row = self._locate(id)
        return self._own(which, self.parts[which][0][row])

    def __iter__(self) -> Iterator[Item]:
        for which, (db, _) in enumerate(self.parts):
            for item in db:
                yield self._own(which, item)

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.2f} of {db!r}" for db, share in self.parts)
        return f"Mixture({shares})"

    def thumbnail(self, id: int) -> Image.Image:
        """The image of a row as its database stores it."""
        which, row = self._locate(id)
        return self.parts[which][0].thumbnail(row)

    def check_encoder(self, card: EncoderCard) -> None:
        """Refuse embeddings that another encoder made."""
        self.parts[0][0].check_encoder(card)

    def counts(self, k: int) -> list[int]:
        """How many of k neighbours each database gives; ties of the remainders to the earlier."""
        exact = [k * share for _, share in self.parts]
        counts = [math.floor(x + 1e-9) for x in exact]
        order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in order[: k - sum(counts)]:
            counts[i] += 1
        return counts

    def most(self, k: int, allow: np.ndarray | None = None) -> int:
        """The largest number of neighbours, up to k, of which every database has its share."""
        sizes = [self._size(which, allow) for which in range(len(self.parts))]
        for n in range(k, 0, -1):
            if all(c <= size for c, size in zip(self.counts(n), sizes, strict=True)):
                return n
        return 0

    def check_shares(self, k: int, allow: np.ndarray | None = None) -> None:
        """Refuse a k of which a database has fewer allowed images than its share."""
        for which, ((db, _), count) in enumerate(zip(self.parts, self.counts(k), strict=True)):
            size = self._size(which, allow)
            if count > size:
                raise ValueError(f"k: {count} neighbours are asked of {db!r}, {size} are allowed")

    def search(
        self, queries: Embeddings, k: int, *, allow: np.ndarray | None = None
    ) -> list[list[Neighbour]]:
        """Neighbours of each query, best first: each database's share of k, exact.

        Raises:
            ValueError: a database has fewer allowed images than its share.
        """
        self.check_shares(k, allow)
        found: list[list[Neighbour]] = [[] for _ in range(len(queries))]
        for which, ((db, _), count) in enumerate(zip(self.parts, self.counts(k), strict=True)):
            if not count:
                continue
            own = self._own_ids(which, allow)
            for row, neighbours in enumerate(db.search(queries, count, allow=own)):
                found[row] += [Neighbour(self._own(which, n.item), n.score) for n in neighbours]
        return [sorted(row, key=lambda n: -n.score) for row in found]

    def best(self, found: Sequence[Neighbour], k: int) -> list[Neighbour]:
        """The first of neighbours that a wider search has found: each database's share of k.

        Where a database has fewer left, the others' next ones.
        """
        left = self.counts(k)
        kept: list[Neighbour] = []
        spare: list[Neighbour] = []
        for neighbour in found:
            which, _ = self._locate(neighbour.item.id)
            (kept if left[which] > 0 else spare).append(neighbour)
            left[which] -= 1
        return sorted([*kept, *spare[: k - len(kept)]], key=lambda n: -n.score)

    def vectors(self, ids: Iterable[int]) -> np.ndarray:
        """Stored embeddings of these rows, [n, dim] float32."""
        found = [self.parts[which][0].vectors([row]) for which, row in map(self._locate, ids)]
        none = self.parts[0][0].vectors([])
        return np.concatenate([none, *found])

    def _own_ids(self, which: int, allow: np.ndarray | None) -> np.ndarray | None:
        """The rows of one database among `allow`; None: all."""
        if allow is None:
            return None
        return allow[allow % len(self.parts) == which] // len(self.parts)

    def _size(self, which: int, allow: np.ndarray | None) -> int:
        own = self._own_ids(which, allow)
        return len(self.parts[which][0]) if own is None else len(own)

    def _own(self, which: int, item: Item) -> Item:
        return replace(item, id=item.id * len(self.parts) + which)

    def _locate(self, id: int) -> tuple[int, int]:
        row, which = divmod(id, len(self.parts))
        return which, row
