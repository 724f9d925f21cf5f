# SPDX-License-Identifier: Apache-2.0
"""Ablations of a model, the paper's and our own: one thing about the generation changes at a time.

Every setting generates the same names with the same seeds, so settings are compared image by
image. Each ablation becomes a JSON file; the report (a page with tables and plots) is made from
all JSON files of a folder, so it can be built up one ablation at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnfast import _files
from knnfast._calls import DEFAULT_K
from knnfast.ablation_report import FORMAT, require_plots, write_report
from knnfast.evaluate import Panel, databases_of
from knnfast.metrics import bootstrap_interval

if TYPE_CHECKING:
    from torch import Tensor

    from knnfast.database import Database, Item
    from knnfast.diffusion.backbone import Backbone
    from knnfast.diffusion.schedule import Schedule
    from knnfast.encoders import Encoder
    from knnfast.pipeline import KNNDiffusion

PROMPTS, QUICK_PROMPTS = 100, 16
# What is averaged over the images: (encoder, metric).
METRICS = (
    ("judge", "score"),
    ("judge", "r_precision@1"),
    ("judge", "r_precision@10"),
    ("encoder", "score"),
    ("encoder", "r_precision@10"),
    ("judge", "nearest_distance"),
    ("pixels", "nearest_pixel_distance"),
)


@dataclass(frozen=True)
class Setting:
    """One way to generate."""

    label: str
    k: int = 10
    use_query: bool = True
    use_neighbours: bool = True
    own: bool = True  # whether a name may find the very picture that it belongs to
    share: float = 1.0  # of the database
    steps: int = 25
    one_step: bool = False  # VQ-Diffusion's fast sampler: a one-step posterior for every jump
    guidance: float = 3.0
    truncation: float = 1.0
    backbone: str = "discrete"


@dataclass(frozen=True)
class Ablation:
    """A question about generation.

    Attributes:
        name: of the ablation and its files.
        title: what is varied.
        settings: the ways to generate that are compared.
        claims: (what is said, the setting it says is better, the one it says is worse).
        source: who says it, and how sure that is.
        axis: name of the horizontal axis and each setting's place on it, for a line plot.
    """

    name: str
    title: str
    settings: tuple[Setting, ...]
    claims: tuple[tuple[str, str, str], ...]
    source: str
    axis: tuple[str, tuple[float, ...]] | None = None


BOTH = Setting("query and neighbours")
QUERY = Setting("query only", use_neighbours=False)
NEIGHBOURS = Setting("neighbours only", use_query=False)
NOT_OWN = Setting("own picture left out", own=False)
KS = (1, 2, 5, 10, 20)
SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
STEPS = (5, 10, 15, 25, 50)
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
TRUNCATION = (0.7, 0.86, 0.95, 1.0)

ABLATIONS = {
    a.name: a
    for a in (
        Ablation(
            "neighbours",
            "Neighbours on and off",
            (BOTH, QUERY),
            (("neighbours help", BOTH.label, QUERY.label),),
            "Paper, quoted from memory: a model trained without neighbours is much worse. Here one "
            "model is asked without them, which it met in a part of its training (by default "
            "15 %).",
        ),
        Ablation(
            "condition",
            "Query only, neighbours only, both",
            (QUERY, NEIGHBOURS, BOTH),
            (
                ("both beats the query alone", BOTH.label, QUERY.label),
                ("both beats the neighbours alone", BOTH.label, NEIGHBOURS.label),
            ),
            "Paper: the query and its neighbours together. RDM found the opposite for its "
            "ImageNet model: the text alone generalised better.",
        ),
        Ablation(
            "own",
            "The own picture left out of the search",
            (QUERY, NOT_OWN, BOTH),
            (
                ("neighbours help without the own picture", NOT_OWN.label, QUERY.label),
                ("the own picture helps", BOTH.label, NOT_OWN.label),
            ),
            "Not from the paper. A prompt of a user has no picture of its own in the database; the "
            "names measured here have. Left out, a name finds all pictures but that one.",
        ),
        Ablation(
            "k",
            "Number of neighbours",
            tuple(Setting(f"k = {k}", k=k) for k in KS),
            (
                ("ten neighbours beat one", "k = 10", "k = 1"),
                ("ten neighbours beat twenty", "k = 10", "k = 20"),
            ),
            "Paper, quoted from memory: k = 10 is best, which is also what models here are trained "
            "with by default.",
            ("k", tuple(map(float, KS))),
        ),
        Ablation(
            "index",
            "Share of the database that is searched",
            tuple(Setting(f"{s:.0%} of the index", share=s) for s in SHARES),
            (("a larger index is better", "100% of the index", "10% of the index"),),
            "Paper, quoted from memory: the larger the index, the better. Here a part of the index "
            "holds the own picture of that part of the names alone: this is coverage before it is "
            "anything else.",
            ("share of the index", SHARES),
        ),
        Ablation(
            "steps",
            "Number of steps: exact strides against one-step posteriors",
            tuple(
                Setting(f"{n} steps, {'one-step' if one else 'exact'}", steps=n, one_step=one)
                for one in (False, True)
                for n in STEPS
            ),
            (
                ("at 5 steps, exact strides beat one-step posteriors", "5 steps, exact",
                 "5 steps, one-step"),
                ("at 10 steps, exact strides beat one-step posteriors", "10 steps, exact",
                 "10 steps, one-step"),
                ("more steps are better", "50 steps, exact", "5 steps, exact"),
            ),
            "Derived, not from the paper: VQ-Diffusion's fast sampler takes the one-step posterior "
            "for a jump of several levels, so many codes (76 % of them at 10 steps of 100, 41 % at "
            "25) are left for the last step, where they are drawn independently.",
            ("steps", tuple(map(float, STEPS)) * 2),
        ),
        Ablation(
            "guidance",
            "Classifier-free guidance",
            tuple(Setting(f"guidance {g:g}", guidance=g) for g in GUIDANCE),
            (
                ("guidance helps", "guidance 3", "guidance 1"),
                ("there is too much of it", "guidance 3", "guidance 8"),
            ),
            "Paper: uses guidance; its weight is not known to us. VQ-Diffusion: 3 to 5.",
            ("guidance weight", GUIDANCE),
        ),
        Ablation(
            "truncation",
            "Truncation: probability mass that is kept",
            tuple(Setting(f"truncation {r:g}", truncation=r) for r in TRUNCATION),
            (("keeping 0.86 beats keeping all", "truncation 0.86", "truncation 1"),),
            "VQ-Diffusion (the paper's discrete backbone): 0.86.",
            ("mass kept", TRUNCATION),
        ),
        Ablation(
            "backbone",
            "Discrete and continuous backbone",
            (Setting("discrete"), Setting("continuous", backbone="continuous")),
            (),
            "Paper: has both. No direction is claimed. A U-Net's `affinity` is chosen after "
            "training: that of `stickers` by 40 of the names measured.",
        ),
    )
}  # fmt: skip


def one_step_schedule(schedule: Schedule, steps: int | Sequence[int]) -> Schedule:
    """A schedule whose exact strides are what VQ-Diffusion's fast sampler does with `schedule`.

    For a jump t -> s that sampler takes the posterior of the single step s + 1 -> s, which leaves
    masked what that step would: C_s / C_{s+1}. A schedule with C'_s = C'_t C_s / C_{s+1} at the
    levels visited has just these strides; the last step draws everything that is left in both.

    Raises:
        ValueError: a schedule with replacement, for which there is no such form.
    """
    from knnfast.diffusion.schedule import Schedule

    if schedule.B[1:].any():
        raise ValueError(f"one-step posteriors need a schedule without replacement: {schedule}")
    out = Schedule(schedule.name, schedule.num_steps, schedule.num_codes)
    masked = schedule.C.copy()
    for t, s in pairwise(schedule.levels(steps if isinstance(steps, int) else list(steps))):
        masked[s] = masked[t] * schedule.C[s] / schedule.C[s + 1]
    out.C, out.A = masked, 1.0 - masked
    return out


class _Models:
    """The pipelines and databases that settings ask for, made once."""

    def __init__(self, discrete: KNNDiffusion, continuous: KNNDiffusion | None, training: str):
        self.pipes = {"discrete": discrete, "continuous": continuous}
        self.database = discrete.databases[training]
        self._parts: dict[float, Database] = {1.0: self.database}

    def part(self, share: float) -> Database:
        """A fixed random part of the database; a smaller one lies within a larger one."""
        from knnfast.database import Database
        from knnfast.encoders import Embeddings

        if share not in self._parts:
            whole = self.database
            order = np.random.default_rng(0).permutation(whole.ids)
            ids = np.sort(order[: round(share * len(order))])
            part = Database(whole.encoder)
            part.add(
                Embeddings(whole.vectors(ids), whole.encoder),
                [whole.thumbnail(i) for i in ids.tolist()],
                names=[whole[i].name for i in ids.tolist()],
            )
            self._parts[share] = part
        return self._parts[share]

    def pipe(self, setting: Setting) -> KNNDiffusion | None:
        """The pipeline of a setting, None where the model is not there."""
        from knnfast.pipeline import KNNDiffusion

        pipe = self.pipes[setting.backbone]
        if pipe is None or not setting.one_step:
            return pipe
        denoiser = _one_step(pipe.denoiser)
        return KNNDiffusion(pipe.encoder, pipe.tokenizer, denoiser, pipe.databases)


def _one_step(denoiser: Backbone) -> Backbone:
    """The same network behind VQ-Diffusion's fast sampler."""
    from knnfast.diffusion.denoiser import Denoiser
    from knnfast.diffusion.sampler import sample

    class OneStep(Denoiser):
        """A denoiser that takes one-step posteriors for its strides."""

        def sample(
            self, cond: Tensor, cond_mask: Tensor, steps: int | Sequence[int] = 25,
            *args: Any, **options: Any,
        ) -> Tensor:  # fmt: skip
            """Draw codes, [B, L] int64."""
            schedule = one_step_schedule(self.schedule, steps)
            return sample(self, schedule, cond, cond_mask, steps, *args, **options)

    same = OneStep(denoiser.config)
    same.load_state_dict(denoiser.state_dict())
    return same.to(next(denoiser.parameters()).device).eval().requires_grad_(False)


def run(
    names: Sequence[str],
    pipe: KNNDiffusion,
    out: Path,
    *,
    prompts: int = PROMPTS,
    seed: int = 0,
    judge: Encoder | str | Path | None = None,
    continuous: KNNDiffusion | None = None,
    training: str | None = None,
    other: str | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run ablations, and write each one's JSON when it is done, then the report.

    Args:
        names: of ABLATIONS.
        pipe: the model.
        out: folder of the report; made when missing.
        prompts: names generated in each setting, half of them held out of the training where any
            are.
        seed: of the choice of names and of all samples.
        judge: see `Panel`.
        continuous: a model with the continuous backbone; None: its settings are not available.
        training: name of the database whose images the generator was trained on; None: its first.
        other: name of the database it has never seen, whose names are among the wrong answers;
            None: its second, where it has one.
        batch: names generated at once; they share their noise.
        progress: called with (images done, images in all).

    Returns:
        What was written, one dictionary for each ablation.

    Raises:
        ValueError: an unknown name, fewer than four prompts, or fewer images than a setting needs.
        ImportError: matplotlib is missing.
    """
    require_plots()
    for name in names:
        if name not in ABLATIONS:
            raise ValueError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
    if prompts < 4:
        raise ValueError(f"prompts: must be at least 4, got {prompts}")
    training, other = databases_of(pipe, training, other)
    images = len(pipe.databases[training])
    for setting in (s for name in names for s in ABLATIONS[name].settings):
        if round(setting.share * images) - (not setting.own) < setting.k:
            raise ValueError(
                f"ablation: {setting.label!r} searches {setting.k} neighbours in "
                f"{setting.share:.0%} of database {training!r}, which holds {images} images"
            )
    out.mkdir(parents=True, exist_ok=True)
    panel = Panel(pipe, judge, training, other)
    rows = np.concatenate(panel.choose(prompts, np.random.default_rng(seed)))
    texts = [panel.real.names[row] for row in rows]
    _, own_picture = panel.search(rows, DEFAULT_K)
    models = _Models(pipe, continuous, training)
    known: dict[Setting, dict[str, Any]] = {}  # several ablations share their default setting
    wanted = {replace(s, label="") for name in names for s in ABLATIONS[name].settings}
    total = len(texts) * sum(models.pipes[s.backbone] is not None for s in wanted)
    done = 0

    def generate(setting: Setting, pipe: KNNDiffusion) -> dict[str, Any]:
        nonlocal done
        start = time.process_time()
        images = []
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            for asked in [part] if setting.own else [[name] for name in part]:
                images += pipe(
                    asked, k=setting.k, steps=setting.steps, guidance=setting.guidance,
                    truncation=setting.truncation, seed=(seed + first) % 2**64,
                    database=models.part(setting.share), use_query=setting.use_query,
                    use_neighbours=setting.use_neighbours,
                    where=None if setting.own else _but(asked[0]),
                ).images  # fmt: skip
            done += len(part)
            if progress is not None:
                progress(done, total)
        seconds = time.process_time() - start
        return {**panel.values(images, rows), "cpu_seconds": seconds}

    results = []
    for name in names:
        ablation = ABLATIONS[name]
        measured: dict[str, dict[str, Any] | None] = {}
        for setting in ablation.settings:
            key = replace(setting, label="")
            chosen = models.pipe(setting)
            if chosen is None:
                measured[setting.label] = None
                continue
            if key not in known:
                known[key] = generate(setting, chosen)
            measured[setting.label] = known[key]
        result = {
            "format": FORMAT,
            **_summary(ablation, measured),
            "prompts": len(texts),
            "held_out": int(panel.real.held_out[rows].sum()),
            "names": len(panel.real.names),
            "own_picture": own_picture,
            "seed": seed,
            "batch": batch,
            "denoiser_sha256": _files.weights_hash(pipe.denoiser),
            "continuous_sha256": continuous and _files.weights_hash(continuous.denoiser),
        }
        _files.write_json(out / f"{name}.json", result)
        results.append(result)
    write_report(out, {a.name: a.source for a in ABLATIONS.values()})
    return results


def _but(name: str) -> Callable[[Item], bool]:
    """All pictures but the one of a name."""
    return lambda item: item.name != name


def _summary(
    ablation: Ablation, measured: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """Means of each setting, and each claim beside what was found."""
    settings = []
    for setting in ablation.settings:
        values = measured[setting.label]
        entry: dict[str, Any] = {"setting": asdict(setting), "available": values is not None}
        if values is not None:
            entry["cpu_seconds"] = round(values["cpu_seconds"], 1)
            entry["metrics"] = {
                f"{who} {metric}": float(values[who][metric].mean()) for who, metric in METRICS
            }
            for who in ("judge", "encoder"):
                if "cmmd_to_held_out" in values[who]:
                    entry["metrics"][f"{who} cmmd_to_held_out"] = values[who]["cmmd_to_held_out"]
            entry["interval"] = list(bootstrap_interval(values["judge"]["score"]))
        settings.append(entry)
    claims = []
    for text, better, worse in ablation.claims:
        a, b = measured[better], measured[worse]
        assert a is not None
        assert b is not None
        difference = a["judge"]["score"] - b["judge"]["score"]
        low, high = bootstrap_interval(difference)
        found = "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"
        claims.append(
            {
                "claim": text, "better": better, "worse": worse, "found": found,
                "difference": float(difference.mean()), "interval": [low, high],
            }
        )  # fmt: skip
    return {
        "name": ablation.name,
        "title": ablation.title,
        "axis": ablation.axis,
        "settings": settings,
        "claims": claims,
    }
