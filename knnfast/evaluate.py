# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a model bundle.

`evaluate` generates for fixed prompts and seeds and measures by two encoders: the conditioning one
and a judge that the generator has never met. Every figure stands beside what real and wrong
pictures get.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnfast import _files
from knnfast._checks import check_range
from knnfast.metrics import (
    bootstrap_interval,
    cmmd,
    mean_score,
    nearest_distance,
    pixel_distance,
    r_precision,
)

if TYPE_CHECKING:
    from PIL import Image

    from knnfast.database import Database, Neighbour
    from knnfast.encoders import Encoder
    from knnfast.pipeline import KNNDiffusion

MODES = {  # name: (use_query, use_neighbours)
    "neighbours_and_query": (True, True),
    "query_only": (True, False),
    "neighbours_only": (False, True),
}
DEFAULT_MODE = "neighbours_and_query"
RANKS = (1, 10)  # of R-precision


def held_out(name: str, share: float = 0.1) -> bool:
    """Tell whether a name belongs to the fixed share that recipes keep out of training.

    A name is held out when the first 32 bits of its SHA-256 are below share * 2^32.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def databases_of(
    pipe: KNNDiffusion, training: str | None = None, other: str | None = None
) -> tuple[str, str | None]:
    """Names of the database that a model was trained on, and of one it has never seen.

    By default the first and the second that it holds; a model of `knnfast train` holds one.

    Raises:
        ValueError: it does not hold them.
    """
    names = list(pipe.databases)
    training = names[0] if training is None else training
    if other is None:
        other = next((name for name in names if name != training), None)
    for name in (training, other):
        if name is not None and name not in names:
            raise ValueError(f"no database {name!r} in this model: {sorted(names)}")
    return training, other


class _Real:
    """The pictures of all databases, their names, and which of them the generator has seen."""

    def __init__(self, databases: Mapping[str, Database], training: str, other: str | None):
        rows = [(which, item) for which in (training, other) if which for item in databases[which]]
        self.names = [item.name for _, item in rows]
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        for problem, found in (
            ("an image without a name", not all(name.strip() for name in self.names)),
            (f"two images called {twice[0]!r}" if twice else "", twice),
            (f"{len(rows)} images, fewer than {max(RANKS)}", len(rows) < max(RANKS)),
        ):
            if found:
                where = " and ".join(repr(which) for which in (training, other) if which)
                raise ValueError(f"database {where}: {problem}; names are the prompts")
        self.images = [databases[which].thumbnail(item.id).convert("RGB") for which, item in rows]
        self.row = {name: i for i, name in enumerate(self.names)}
        self.training = np.array([which == training for which, _ in rows], bool)
        # Recipes with an unseen database hold names out; `knnfast train` takes all it is given.
        apart = [other is not None and held_out(name) for name in self.names]
        self.held_out = np.array(apart) & self.training


class _View:
    """One encoder's embeddings of all names and all real pictures."""

    def __init__(self, encoder: Encoder, real: _Real):
        self.encoder = encoder
        try:
            self.texts = encoder.encode_text(real.names).vectors
        except ValueError as e:
            raise ValueError(f"encoder {encoder.card.name!r}: {e}; names are the prompts") from None
        self.real = encoder.encode_images(real.images).vectors


class Panel:
    """What generated images are measured against: all real pictures, as two encoders see them.

    Args:
        pipe: a model.
        judge: an encoder that did not condition it, or a folder of one; None: the embedded one,
            for models of the embedded encoder.
        training: name of the database whose images the generator was trained on.
        other: name of the database it has never seen; None: there is none, and no picture of the
            other was held out of the training.

    Raises:
        ValueError: no judge is given and the model has another encoder; or the judge is its own.
    """

    def __init__(
        self,
        pipe: KNNDiffusion,
        judge: Encoder | str | Path | None,
        training: str,
        other: str | None,
    ):
        from knnfast.encoders import load_encoder

        if judge is None:
            bundle = Path(__file__).parent / "bundles" / "stickers"
            known = _files.read_json(bundle / "encoder" / "encoder.json")["card"]["sha256"]
            if pipe.encoder.card.sha256 != known:
                raise ValueError(
                    "judge: the embedded one knows stickers alone, and this model's encoder is "
                    f"{pipe.encoder.card.name!r}; give a second encoder (--judge)"
                )
            judge = bundle / "judge"
        if isinstance(judge, str | Path):
            judge = load_encoder(judge)
        if judge.card.sha256 == pipe.encoder.card.sha256:
            raise ValueError("the judge is the encoder that conditions the generator")
        self.judge = judge
        self.database = pipe.databases[training]
        self.real = _Real(pipe.databases, training, other)
        self.views = {"encoder": _View(pipe.encoder, self.real), "judge": _View(judge, self.real)}
        self.held_out = np.flatnonzero(self.real.held_out)
        self.searched = np.flatnonzero(self.real.training)
        self.size = self.real.images[0].size
        self._pixels = _pixels(self.real.images, self.size)

    def choose(self, prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows of names to generate: of trained pictures, and half of held-out ones (or fewer)."""
        unseen = rng.permutation(self.held_out)[: prompts // 2]
        free = np.flatnonzero(self.real.training & ~self.real.held_out)
        return rng.permutation(free)[: prompts - len(unseen)], unseen

    def search(self, rows: np.ndarray, k: int) -> tuple[list[list[Neighbour]], dict[str, float]]:
        """What the names in `rows` find, and how often the very picture that a name belongs to.

        Returns:
            The neighbours, and the shares of the names whose own picture is the `first` of them,
            `among` them, and `among_held_out` of names of held-out pictures, where there are any.
        """
        from knnfast.encoders import Embeddings

        view = self.views["encoder"]
        found = self.database.search(Embeddings(view.texts[rows], view.encoder.card), k)
        names = [self.real.names[row] for row in rows]
        own = [[n.item.name == name for n in near] for near, name in zip(found, names, strict=True)]
        among = np.array([any(hits) for hits in own])
        shares = {
            "first": float(np.mean([hits[0] for hits in own])), "among": float(among.mean()),
        }  # fmt: skip
        if (unseen := self.real.held_out[rows]).any():
            shares["among_held_out"] = float(among[unseen].mean())
        return found, shares

    def values(self, images: list[Image.Image], rows: np.ndarray) -> dict[str, dict[str, Any]]:
        """Measure images of the names in `rows`, one each.

        Returns:
            For `encoder` and `judge`: `r_precision@1`, `r_precision@10`, `score` and
            `nearest_distance` of each image [N] float64, and `cmmd_to_held_out` of all of them
            where there are held-out ones; for `pixels`: `nearest_pixel_distance` of each image.
        """
        out: dict[str, dict[str, Any]] = {}
        for label, view in self.views.items():
            seen = view.encoder.encode_images(images).vectors
            values: dict[str, Any] = {
                f"r_precision@{k}": r_precision(seen, view.texts, rows, k) for k in RANKS
            }
            own = np.asarray(seen, np.float64) * np.asarray(view.texts[rows], np.float64)
            values["score"] = own.sum(1)
            if len(self.held_out):
                values["cmmd_to_held_out"] = cmmd(seen, view.real[self.held_out])
            values["nearest_distance"] = nearest_distance(seen, view.real[self.searched])
            out[label] = values
        near = pixel_distance(_pixels(images, self.size), self._pixels[self.searched])
        return {**out, "pixels": {"nearest_pixel_distance": near}}


def _pixels(images: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB").resize(size)) for image in images])


def evaluate(
    pipe: KNNDiffusion,
    judge: Encoder | str | Path | None = None,
    *,
    prompts: int = 300,
    k: int | None = None,
    steps: int = 25,
    guidance: float = 3.0,
    truncation: float = 1.0,
    seed: int = 0,
    training: str | None = None,
    other: str | None = None,
    other_prompts: int = 40,
    other_samples: int = 2,
    batch: int = 25,
    inception: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the names of the database it was trained on, and of one it has not seen.

    Prompts are names: half of pictures that the generator was trained on, half of held-out ones
    (fewer where there are not enough); all these pictures are in the database. Each mode of MODES
    generates one image a prompt. Then `other_prompts` names of the other database are generated
    with each of the two databases. For a model with one database there are neither held-out
    pictures nor this last part.

    Args:
        pipe: the model.
        judge: see `Panel`.
        prompts: how many names, training and held-out together.
        k: neighbours of a prompt; None: 10, or as many as there are.
        steps: denoising steps.
        guidance: classifier-free guidance weight.
        truncation: probability mass of the codes that is kept.
        seed: of the choice of prompts and of all samples.
        training: name of the database whose images the generator was trained on; None: its first.
        other: name of the database it has never seen; None: its second, where it has one.
        other_prompts: how many names of the other database.
        other_samples: images for each of these, and for each database.
        batch: prompts generated at once; they share their noise, so figures depend on it a little.
        inception: file of Inception's weights for the FID; see `fid.fid`. None: where something
            for it is missing, the result says what.
        progress: called with (images done, images in all).

    Returns:
        A JSON-able dictionary; `report` prints it.

    Raises:
        ValueError: a setting out of its range, or names that cannot be prompts: one is empty,
            there twice, or unreadable to an encoder; no judge for this model. TypeError: a setting
            that is no number.
        FileNotFoundError, ImportError: `inception` is given and cannot be used.
    """
    from knnfast._calls import DEFAULT_K

    check_range("prompts", prompts, 4)
    check_range("other_prompts", other_prompts, 2)
    check_range("other_samples", other_samples, 1)
    check_range("steps", steps, 1)
    check_range("seed", seed, 0, 2**64 - 1)
    check_range("batch", batch, 1)
    if inception is not None:
        from knnfast.fid import weights_at

        weights_at(inception)
    training, other = databases_of(pipe, training, other)
    size = min(len(pipe.databases[name]) for name in (training, other) if name is not None)
    k = min(DEFAULT_K, size) if k is None else k
    check_range("k", k, 1, size, "the size of the smallest database")
    start = time.perf_counter()
    panel = Panel(pipe, judge, training, other)
    real, views, judge = panel.real, panel.views, panel.judge
    rng = np.random.default_rng(seed)
    seen, unseen = panel.choose(prompts, rng)
    foreign = rng.permutation(np.flatnonzero(~real.training))[:other_prompts]
    chosen = np.concatenate([seen, unseen])
    is_unseen = np.arange(len(chosen)) >= len(seen)
    total = len(MODES) * len(chosen) + 2 * len(foreign) * other_samples
    done = 0

    def generate(rows: np.ndarray, samples: int, database: str, mode: str) -> list[Image.Image]:
        nonlocal done
        use_query, use_neighbours = MODES[mode]
        images: list[Image.Image] = []
        for number, first in enumerate(range(0, len(rows), batch)):
            part = [real.names[row] for row in rows[first : first + batch]]
            images += pipe(
                part,
                k=k,
                steps=steps,
                guidance=guidance,
                truncation=truncation,
                num_images=samples,
                seed=(seed + number) % 2**64,
                database=database,
                use_query=use_query,
                use_neighbours=use_neighbours,
            ).images
            done += len(part) * samples
            if progress is not None:
                progress(done, total)
        return images

    def measure(images: list[Image.Image]) -> dict[str, Any]:
        """Measure images of the chosen prompts, one each."""
        return _means(panel.values(images, chosen), is_unseen)

    images = {mode: generate(chosen, 1, training, mode) for mode in MODES}
    generated = {mode: measure(pictures) for mode, pictures in images.items()}

    found, own_picture = panel.search(chosen, k)
    nearest = [panel.database.thumbnail(near[0].item.id) for near in found]
    own = [real.images[row] for row in chosen]
    shuffled = np.roll(chosen, len(chosen) // 2 + 1)
    bounds: dict[str, Any] = {
        "nearest_picture": measure(nearest),
        "tokenizer": measure(_reconstruct(pipe, own)),
        "real": measure(own),
    }
    for label, view in views.items():
        bounds["real"][label]["score_shuffled"] = mean_score(
            view.real[chosen], view.texts[shuffled]
        )
        if len(panel.held_out):
            bounds["real"][label]["cmmd_training_to_held_out"] = cmmd(
                view.real[seen], view.real[panel.held_out]
            )

    unseen_kind: dict[str, Any] = {}
    if other is not None:
        pictures = {
            database: generate(foreign, other_samples, database, DEFAULT_MODE)
            for database in (other, training)
        }
        unseen_kind["out_of_distribution"] = _unseen_kind(panel, pictures, other_samples)
    return {
        "settings": {
            "prompts_training": len(seen),
            "prompts_held_out": len(unseen),
            "names": len(real.names),
            "k": k,
            "steps": steps,
            "guidance": guidance,
            "truncation": truncation,
            "seed": seed,
            "batch": batch,
            "encoder": pipe.encoder.card.to_dict(),
            "judge": judge.card.to_dict(),
            "denoiser_sha256": _files.weights_hash(pipe.denoiser),
        },
        "chance": {"r_precision@1": 1 / len(real.names), "r_precision@10": 10 / len(real.names)},
        "own_picture": own_picture,
        "generated": generated,
        "bounds": bounds,
        **unseen_kind,
        "fid": _fids(images, panel, inception),
        "seconds": time.perf_counter() - start,
    }


def _means(measured: Mapping[str, Mapping[str, Any]], unseen: np.ndarray) -> dict[str, Any]:
    """What `Panel.values` gave, over all images and over those of names (un)seen in training."""
    out: dict[str, Any] = {}
    for label, per_image in measured.items():
        if label == "pixels":
            continue
        values: dict[str, Any] = {}
        for metric in (f"r_precision@{k}" for k in RANKS):
            found = per_image[metric]
            values[metric] = float(found.mean())
            values[f"{metric}_interval"] = list(bootstrap_interval(found))
            values[f"{metric}_training"] = float(found[~unseen].mean())
            if unseen.any():
                values[f"{metric}_held_out"] = float(found[unseen].mean())
        values["score"] = float(per_image["score"].mean())
        if "cmmd_to_held_out" in per_image:
            values["cmmd_to_held_out"] = per_image["cmmd_to_held_out"]
        values["nearest_distance"] = float(per_image["nearest_distance"].mean())
        out[label] = values
    pixels = measured["pixels"]["nearest_pixel_distance"]
    return {**out, "nearest_pixel_distance": float(pixels.mean())}


def _unseen_kind(
    panel: Panel, pictures: Mapping[str, list[Image.Image]], samples: int
) -> dict[str, Any]:
    """How often names that training has never seen give a picture of their kind.

    Args:
        panel: has both kinds.
        pictures: `samples` for each name, drawn from the database that they are in, then from that
            of the training.
        samples: pictures of a name.
    """
    shares: dict[str, np.ndarray] = {}
    for database, drawn in pictures.items():
        rows = panel.judge.encode_images(drawn).vectors
        nearest = (rows @ panel.views["judge"].real.T).argmax(1)
        shares[database] = (~panel.real.training[nearest]).reshape(-1, samples).mean(1)
    own, training = shares.values()
    return {
        "prompts": len(own),
        "samples": samples,
        "share_by_database": {name: _mean(values) for name, values in shares.items()},
        "difference": _mean(own - training),
        "note": "the generator has seen none of them; encoder, judge and tokenizer have",
    }


def _mean(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": list(bootstrap_interval(values))}


def _fids(
    images: Mapping[str, list[Image.Image]], panel: Panel, inception: str | Path | None
) -> dict[str, Any]:
    """FID of each mode's pictures to the real ones that were searched, or why there is none."""
    from knnfast.fid import fid

    real = _pixels([panel.real.images[row] for row in panel.searched], panel.size)
    try:
        return {mode: fid(_pixels(x, panel.size), real, inception) for mode, x in images.items()}
    except (ImportError, FileNotFoundError) as e:
        if inception is not None:
            raise
        return {"not_available": str(e)}


def _reconstruct(pipe: KNNDiffusion, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Send pictures through the tokenizer and back."""
    import torch

    from knnfast.encoders import pixels
    from knnfast.images import pictures_of

    out: list[Image.Image] = []
    for start in range(0, len(images), 50):
        part = torch.from_numpy(pixels(images[start : start + 50], pipe.tokenizer.image_size))
        with torch.inference_mode():
            batch = part.to(pipe.device).permute(0, 3, 1, 2).float() / 255
            out += pictures_of(pipe.tokenizer.decode(pipe.tokenizer.encode(batch)))
    return out


def report(result: Mapping[str, Any]) -> str:
    """Set an evaluation out as text."""
    columns = (
        "R@1",
        "R@10",
        "R@10 training",
        "R@10 untrained",
        "score",
        "CMMD",
        "nearest",
        "pixels",
    )
    keys = (
        "r_precision@1",
        "r_precision@10",
        "r_precision@10_training",
        "r_precision@10_held_out",
        "score",
        "cmmd_to_held_out",
        "nearest_distance",
    )
    lines = []
    for label in ("judge", "encoder"):
        lines.append(f"{'by the ' + label:24}" + "".join(f"{c:>15}" for c in columns))
        for name, values in {**result["generated"], **result["bounds"]}.items():
            row = [values[label].get(key) for key in keys] + [values["nearest_pixel_distance"]]
            cells = ("" if v is None else f"{v:.3f}" for v in row)
            lines.append(f"  {name:22}" + "".join(f"{cell:>15}" for cell in cells))
        wrong = result["bounds"]["real"][label]["score_shuffled"]
        lines.append(f"  {'real, shuffled names':22}{'':60}{wrong:15.3f}")
    lines.append(f"chance: R@10 {result['chance']['r_precision@10']:.4f}")
    if result["settings"]["prompts_held_out"]:
        lines.append("untrained: the generator was not trained on these, the database holds them")
    if "own_picture" in result:  # not in results of before it was measured
        own = result["own_picture"]
        lines.append(
            f"a name's own picture: the first found for {own['first']:.1%} of the names, among "
            f"the {result['settings']['k']} found for {own['among']:.1%}"
            + (f", {own['among_held_out']:.1%} untrained" if "among_held_out" in own else "")
        )
    if "out_of_distribution" in result:
        shares = result["out_of_distribution"]
        for name, value in [
            *((f"with database {n!r}", v) for n, v in shares["share_by_database"].items()),
            ("difference", shares["difference"]),
        ]:
            low, high = value["interval"]
            lines.append(
                f"unseen kind, {name}: {value['mean']:.3f} (95 % interval {low:.3f} to {high:.3f})"
            )
    fids = result.get("fid", {})  # not in results of before it was measured
    if "not_available" in fids:
        lines.append(f"not available: {fids['not_available']}")
    elif fids:
        values = ", ".join(f"{mode} {value:.1f}" for mode, value in fids.items())
        lines.append(f"FID to the real ones: {values}")
    return "\n".join(lines)
