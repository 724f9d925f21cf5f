# SPDX-License-Identifier: Apache-2.0
"""The text side of the embedded encoder: a table of word vectors."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words of Latin letters and digits, accents removed."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("\u2019", "'")).replace("'", "")
    return re.findall(r"[a-z0-9]+", "".join(c for c in plain if not unicodedata.combining(c)))


def grams(word: str) -> list[str]:
    """Cut a word into its character pairs and triples, ends marked.

    Spellings of one sound count as one (ph and f, ck and k, y and i), doubled letters as single.
    """
    sound = word.replace("ph", "f").replace("ck", "k").replace("y", "i")
    marked = "^" + re.sub(r"(.)\1", r"\1", sound) + "$"
    return [marked[i : i + n] for n in (2, 3) for i in range(len(marked) - n + 1)]


class WordTable:
    """A text is the weighted mean of its words' vectors, normalised.

    The table keeps 4 or 8 bits a value with one scale a word; a word's weight is folded into its
    vector. A word outside the table is answered by the words that share its letters (cosine of
    their counts of character pairs and triples, rare ones counting more): misspellings, plurals
    and compounds land near what they are made of, and weigh less the less they share.

    Args:
        words: the vocabulary, without duplicates.
        codes: [V, dim] int8 (8 bits), or [V, dim / 2] uint8 (two 4-bit values each, low first).
        scales: [V] float16.
    """

    NEIGHBOURS = 4
    FLOOR = 0.25

    def __init__(self, words: Sequence[str], codes: np.ndarray, scales: np.ndarray):
        if len(words) != len(codes) or len(words) != len(scales):
            raise ValueError(f"{len(words)} words, {len(codes)} codes and {len(scales)} scales")
        self.words = list(words)
        self.codes = codes
        self.scales = scales
        self.row = {word: i for i, word in enumerate(self.words)}
        if len(self.row) != len(self.words):
            raise ValueError("the vocabulary holds a word twice")
        self._letters: tuple[dict[str, list[int]], list[float]] | None = None

    @classmethod
    def quantise(cls, words: Sequence[str], vectors: np.ndarray, bits: int) -> WordTable:
        """Round float vectors [V, dim] to `bits` a value, the scale fitted for each word."""
        top = {4: 7, 8: 127}[bits]
        peak = np.abs(vectors).max(1, keepdims=True)
        best, error = np.zeros_like(peak), np.full(peak.shape, np.inf)
        for clip in (1.0,) if bits == 8 else (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            scale = np.maximum(peak * clip / top, 1e-6).astype(np.float16).astype(np.float32)
            rounded = np.clip(np.rint(vectors / scale), -top, top) * scale
            miss = ((rounded - vectors) ** 2).sum(1, keepdims=True)
            best, error = np.where(miss < error, scale, best), np.minimum(miss, error)
        codes = np.clip(np.rint(vectors / best), -top, top).astype(np.int8)
        if bits == 4:
            nibbles = (codes + 8).astype(np.uint8)
            codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        return cls(words, codes, best[:, 0].astype(np.float16))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.codes.shape[1] * (2 if self.codes.dtype == np.uint8 else 1)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the stored vectors of some rows, float32 [len(rows), dim]."""
        index = np.asarray(rows, dtype=np.int64)
        codes = self.codes[index]
        if codes.dtype == np.uint8:
            pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
            codes = pairs.astype(np.int8) - np.int8(8)
        return codes.astype(np.float32) * self.scales[index].astype(np.float32)[:, None]

    def similar(self, word: str) -> list[tuple[int, float]]:
        """Find up to NEIGHBOURS rows that share the word's letters, with their cosines."""
        if self._letters is None:
            self._letters = self._index_letters()
        postings, lengths = self._letters
        shared: dict[int, float] = defaultdict(float)
        own = 0.0
        for gram in set(grams(word)):
            rows = postings.get(gram, [])
            weight = self._rarity(len(rows))
            own += weight
            for row in rows:
                shared[row] += weight
        cosines = [(s / math.sqrt(own * lengths[row]), row) for row, s in shared.items()]
        best = sorted(cosines, key=lambda pair: (-pair[0], pair[1]))[: self.NEIGHBOURS]
        return [(row, min(float(cosine), 1.0)) for cosine, row in best if cosine >= self.FLOOR]

    def _index_letters(self) -> tuple[dict[str, list[int]], list[float]]:
        """Return which rows hold each letter group, and each row's squared length in them."""
        postings: dict[str, list[int]] = defaultdict(list)
        pieces = [set(grams(word)) for word in self.words]
        for row, groups in enumerate(pieces):
            for gram in groups:
                postings[gram].append(row)
        weight = {gram: self._rarity(len(rows)) for gram, rows in postings.items()}
        return dict(postings), [sum(weight[g] for g in groups) for groups in pieces]

    def _rarity(self, count: int) -> float:
        """Weigh a letter group by the squared logarithm of its inverse frequency."""
        return math.log((2 + len(self.words)) / (1 + count)) ** 2

    def parts(self, text: str) -> list[tuple[int, float]]:
        """Return the (row, weight) pairs whose weighted sum is the text."""
        found: list[tuple[int, float]] = []
        for word in words_of(text):
            if word in self.row:
                found.append((self.row[word], 1.0))
                continue
            near = self.similar(word)
            total = sum(cosine**4 for _, cosine in near)
            found += [(row, cosine**4 / total * near[0][1]) for row, cosine in near]
        return found

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts to unit rows, float32 [N, dim]."""
        out = np.zeros((len(texts), self.dim), np.float32)
        unread: list[str] = []
        for i, text in enumerate(texts):
            parts = self.parts(text)
            if parts:
                weights = np.array([weight for _, weight in parts], np.float32)
                out[i] = weights @ self.vectors([row for row, _ in parts])
            norm = float(np.linalg.norm(out[i]))
            if norm < 1e-6:
                unread.append(f"text {i} ({text!r})")
                continue
            out[i] /= norm
        if unread:
            named = ", ".join(unread[:20]) + (", ..." if len(unread) > 20 else "")
            hold = "holds" if len(unread) == 1 else f"({len(unread)} of {len(texts)}) hold"
            raise ValueError(
                f"{named} {hold} no word this encoder can read "
                "(it reads English words in Latin letters, and digits)"
            )
        return out
