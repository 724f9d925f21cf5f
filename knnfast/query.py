"""Queries: what a pipeline is asked for, as text, pictures, embeddings, or anything between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from knnfast._checks import check_number, check_range
from knnfast.encoders import Embeddings, Encoder
from knnfast.images import check_size, read_image

Picture: TypeAlias = Image.Image | str | Path


@dataclass(frozen=True, eq=False)
class Query:
    """A weighted mix of texts, pictures, embeddings and other queries; see `mix` and `between`.

    Attributes:
        parts: (what, weight); a `str` is a text, a `Path` or PIL image a picture, an array [E] an
            embedding.
        label: what it is called in sheets and file names.
        turn: None adds the parts' unit embeddings by weight; in [0, 1] it is the place on the great
            circle from the first of two parts to the second.
    """

    parts: tuple[tuple[Source, float], ...]
    label: str
    turn: float | None = None


Source: TypeAlias = str | Path | Image.Image | np.ndarray | Query


MOST_WEIGHT = 1e30


def mix(*parts: tuple[Source, float], label: str | None = None) -> Query:
    """A query that lies between several: unit(sum_i w_i unit(e_i)).

    Args:
        parts: (what, weight): texts, pictures (PIL, or a file as `Path`), embeddings, queries.
            Weights lie within ±1e30; a negative one leads away from its part.
        label: its name; by default made of the parts.

    Raises:
        ValueError, TypeError: no part, or one that is none of these.
    """
    if not parts:
        raise ValueError("mix: at least one (what, weight) is needed, got none")
    for part in parts:
        if not (isinstance(part, tuple | list) and len(part) == 2):
            raise TypeError(f"mix: a part must be a pair (what, weight), got {part!r}")
        source, weight = part
        _check_source("mix", source)
        check_number("mix: a weight", weight)
        if not abs(weight) <= MOST_WEIGHT:
            raise ValueError(f"mix: a weight must lie within ±{MOST_WEIGHT:g}, got {weight}")
    if not isinstance(label, str | None):
        raise TypeError(f"label: expected a text, got {label!r}")
    if label is None:
        label = " + ".join(f"{weight:g} {_label(source)}" for source, weight in parts)
    return Query(tuple((source, float(weight)) for source, weight in parts), label)


def between(a: Source, b: Source, count: int) -> list[Query]:
    """`count` queries at equal angles from `a` to `b`, both included (slerp).

    e(u) = (sin((1-u) w) e_a + sin(u w) e_b) / sin(w),  cos w = <e_a, e_b>    (Shoemake 1985)

    Raises:
        ValueError, TypeError: fewer than two, or an end that is no query.
    """
    check_range("count", count, 2)
    for name, source in (("a", a), ("b", b)):
        _check_source(name, source)
    return [
        Query(((a, 1.0), (b, 1.0)), f"{_label(a)} to {_label(b)} {u:.2f}", u)
        for u in (n / (count - 1) for n in range(count))
    ]


def as_queries(
    prompt: str | Query | Sequence[str | Query] | None,
    image: Picture | Sequence[Picture] | None,
    image_weight: float | None,
    embedding: np.ndarray | Embeddings | None,
    encoder: Encoder,
) -> list[Query]:
    """The queries of a pipeline call; nothing is encoded yet.

    Raises:
        ValueError, TypeError: none given, a bad one, or different numbers of them.
    """
    weight = 0.5
    if image_weight is not None:
        check_number("image_weight", image_weight)
        if not 0 <= image_weight <= 1:
            raise ValueError(f"image_weight: must lie in [0, 1], got {image_weight}")
        if prompt is None or image is None:
            raise ValueError("image_weight: shares a query of prompt and image; give both")
        weight = image_weight
    prompts = _several("prompt", prompt, str | Query)
    for text in prompts:
        if not isinstance(text, str | Query):
            raise TypeError(f"prompt: expected text, got {type(text).__name__}")
        _check_source("prompt", text)
    pictures = _several("image", image, str | Path | Image.Image)
    rows = _check_embedding(embedding, encoder)
    if len(rows) and (prompts or pictures):
        raise ValueError("embedding: give it alone; `mix` combines it with texts and pictures")
    if len(rows):
        return [Query(((row, 1.0),), f"embedding {n + 1}") for n, row in enumerate(rows)]
    if not prompts and not pictures:
        raise ValueError("prompt: give a prompt, an image, an embedding or several; got none")
    if prompts and pictures and len(prompts) != len(pictures):
        raise ValueError(f"image: {len(pictures)} images beside {len(prompts)} prompts")
    seen: list[Source] = [Path(p) if isinstance(p, str) else p for p in pictures]
    for picture in seen:
        _check_source("image", picture)
    if not pictures:
        return [q if isinstance(q, Query) else Query(((q, 1.0),), q) for q in prompts]
    if not prompts:
        return [Query(((p, 1.0),), f"image {n + 1}") for n, p in enumerate(seen)]
    return [
        Query(((text, 1.0 - weight), (picture, weight)), _label(text))
        for text, picture in zip(prompts, seen, strict=True)
    ]


def _several(name: str, value: Any, one: Any) -> list[Any]:
    """None, one or a sequence of them, as a list."""
    if value is None:
        return []
    if isinstance(value, one):
        return [value]
    unordered = np.ndarray | bytes | bytearray | Mapping | Set
    if isinstance(value, unordered) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected one, or a list of them, got {type(value).__name__}")
    return list(value)


def embed(queries: Sequence[Query], encoder: Encoder) -> Embeddings:
    """Encode queries, every text and picture once: [P, E] float32 unit rows.

    Raises:
        ValueError: an unreadable picture, an embedding of another length, or opposite parts that
            cancel out. FileNotFoundError: no such picture.
    """
    texts: dict[str, int] = {}
    pictures: dict[int, tuple[int, Picture]] = {}

    def collect(query: Query) -> None:
        for source, _ in query.parts:
            if isinstance(source, Query):
                collect(source)
            elif isinstance(source, str):
                texts.setdefault(source, len(texts))
            elif not isinstance(source, np.ndarray):
                pictures.setdefault(id(source), (len(pictures), source))

    for query in queries:
        collect(query)
    opened = [read_image(p) if isinstance(p, str | Path) else p for _, p in pictures.values()]
    # One by one: no query sees the others, even in a rounding.
    text_rows = [encoder.encode_text([text]).vectors[0] for text in texts]
    image_rows = [encoder.encode_images([image]).vectors[0] for image in opened]

    def row(source: Source) -> np.ndarray:
        if isinstance(source, Query):
            return combined(source)
        if isinstance(source, str):
            return text_rows[texts[source]].astype(np.float64)
        if isinstance(source, np.ndarray):
            (checked,) = _check_embedding(source, encoder)
            return _unit(checked.astype(np.float64), "embedding")
        return image_rows[pictures[id(source)][0]].astype(np.float64)

    def combined(query: Query) -> np.ndarray:
        rows = [row(source) for source, _ in query.parts]
        if query.turn is not None:
            return _slerp(rows[0], rows[1], query.turn)
        total = sum(w * r for (_, w), r in zip(query.parts, rows, strict=True))
        return _unit(np.asarray(total), query.label)

    vectors = np.stack([combined(query) for query in queries]).astype(np.float32)
    return Embeddings(vectors, encoder.card)


def _slerp(a: np.ndarray, b: np.ndarray, u: float) -> np.ndarray:
    angle = math.acos(float(np.clip(a @ b, -1.0, 1.0)))
    if angle < 1e-6:
        return a
    if math.pi - angle < 1e-6:
        raise ValueError("between: the two ends are opposite; no shortest way leads from one to it")
    return (math.sin((1 - u) * angle) * a + math.sin(u * angle) * b) / math.sin(angle)


def _unit(row: np.ndarray, label: str) -> np.ndarray:
    norm = float(np.linalg.norm(row))
    if not norm > 1e-6:
        raise ValueError(f"query {label!r}: its parts cancel out; nothing is left to search for")
    return row / norm


def _label(source: Source) -> str:
    if isinstance(source, Query):
        return source.label
    if isinstance(source, str):
        return source
    if isinstance(source, Path):
        return source.stem
    return "embedding" if isinstance(source, np.ndarray) else "image"


def _check_source(name: str, source: object) -> None:
    if isinstance(source, str) and not source.strip():
        raise ValueError(f"{name}: must hold at least one word, got {source!r}")
    if not isinstance(source, str | Path | Image.Image | np.ndarray | Query):
        raise TypeError(
            f"{name}: expected a text, a Path, a PIL image, an array or a Query, "
            f"got {type(source).__name__}"
        )
    if isinstance(source, np.ndarray) and source.ndim != 1:
        raise ValueError(f"{name}: an embedding must be [E], got {list(source.shape)}")
    if isinstance(source, Image.Image):
        check_size(source)


def _check_embedding(value: np.ndarray | Embeddings | None, encoder: Encoder) -> np.ndarray:
    """Rows [n, E] float32, [0, E] for None."""
    if value is None:
        return np.zeros((0, encoder.dim), np.float32)
    if isinstance(value, Embeddings):
        if value.card.sha256 != encoder.card.sha256:
            raise ValueError(
                f"embedding: made by encoder {value.card.name!r}, not by {encoder.card.name!r}"
            )
        value = value.vectors
    try:
        rows = np.atleast_2d(np.asarray(value, np.float32))
    except (TypeError, ValueError):
        raise TypeError(f"embedding: expected numbers, got {value!r}") from None
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != encoder.dim:
        raise ValueError(
            f"embedding: must be [{encoder.dim}] or [P, {encoder.dim}], got {list(rows.shape)}"
        )
    if not np.isfinite(rows).all():
        raise ValueError("embedding: holds a NaN or an infinity")
    return rows
