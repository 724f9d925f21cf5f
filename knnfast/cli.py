"""The `knnfast` command."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from knnfast._version import __version__

# What bad input raises: one line on stderr, exit code 2. Anything else is a bug and shows itself.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
BASELINES = ("knn", "lafite", "no_neighbours")  # of training; knnfast.diffusion.pairs has them


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse a device that torch does not know or this machine does not have."""
    import torch

    try:
        kind = torch.device(value).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu, cuda or cuda:N, got {value!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {value} was asked for, and torch finds no CUDA device here")
    return value


class _Group(click.Group):
    """Turns errors of bad input into one clear line; `--debug` keeps the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BAD_INPUT as e:
            if ctx.params.get("debug"):
                raise

            click.echo("error: " + " ".join(str(e).split()), err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Exact retrieval, and images generated from what it finds."""


@main.command()
@click.argument("prompts", nargs=-1)
@click.option("--image", "images", multiple=True, type=click.Path(), help="Query by picture.")
@click.option("--image-weight", default=0.5, show_default=True, help="Share of the picture.")
@click.option("-n", "num_images", default=1, show_default=True, help="Images per query.")
@click.option("--k", default=10, show_default=True, help="Neighbours to condition on.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance weight; 1 is none.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--solver", help="dpm (the default) or ddim, of the continuous backbone.")
@click.option("--seed", type=int, help="0 ... 2^64-1; drawn when not given.")
@click.option("--database", help="A database of the model by name, or a folder.")
@click.option("--group", "groups", multiple=True, help="Search only this group (repeatable).")
@click.option("--no-query", is_flag=True, help="Condition on the neighbours alone.")
@click.option("--no-neighbours", is_flag=True, help="Condition on the query alone.")
@click.option("--model", default="stickers", show_default=True, help="A bundle or a folder.")
@click.option("--backbone", help="discrete or continuous; the model's first when not given.")
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option("--out", default="out", show_default=True, type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Samples beside neighbours, PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def generate(
    prompts: tuple[str, ...],
    images: tuple[str, ...],
    image_weight: float,
    num_images: int,
    no_query: bool,
    no_neighbours: bool,
    groups: tuple[str, ...],
    model: str,
    backbone: str | None,
    device: str,
    out: Path,
    sheet: Path | None,
    as_json: bool,
    database: str | None,
    **options: Any,
) -> None:
    """Generate images for PROMPTS, for pictures (--image), or for both.

    Writes one PNG per image and a sheet that shows each sample beside its retrieved neighbours.
    """
    from knnfast.pipeline import KNNDiffusion
    from knnfast.sheet import contact_sheet

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; give a folder")
    _check_sheet(sheet)
    pipe = KNNDiffusion.from_pretrained(model, device=device, backbone=backbone)
    if database is not None:
        pipe.database = database
    with _Bar("denoising", hidden=as_json) as bar:
        result = pipe(
            list(prompts) or None,
            image=list(images) or None,
            image_weight=image_weight,
            num_images=num_images,
            groups=list(groups) or None,
            use_query=not no_query,
            use_neighbours=not no_neighbours,
            callback=bar,
            **options,
        )
    out.mkdir(parents=True, exist_ok=True)
    stems = [f"{name}-{result.seed}" for name in _distinct(map(_slug, result.labels))]
    files = [out / f"{stem}-{n}.png" for stem in stems for n in range(num_images)]
    for path, image in zip(files, result.images, strict=True):
        _save_png(image, path)
    sheet = sheet or out / f"{stems[0]}-sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    _save_png(contact_sheet(result, pipe.database), sheet)
    if as_json:
        neighbours = [
            [{"id": x.item.id, "name": x.item.name, "group": x.item.group,
              "source": x.item.source, "score": x.score} for x in row]
            for row in result.neighbours
        ]  # fmt: skip
        report = {
            "files": [str(f) for f in files], "sheet": str(sheet), "seed": result.seed,
            "labels": result.labels, "neighbours": neighbours, "seconds": result.timings,
        }  # fmt: skip
        click.echo(json.dumps(report, indent=1))
        return
    for label, row in zip(result.labels, result.neighbours, strict=True):
        click.echo(f"{label}: " + ", ".join(f"{x.item.name} {x.score:.3f}" for x in row))
    for path in [*files, sheet]:
        click.echo(path)
    click.echo(
        f"seed {result.seed}; "
        + ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in result.timings.items())
    )


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--mask", type=click.Path(path_type=Path), help="White where it may change.")
@click.option("--strength", type=float, help="Share of the picture redrawn; 1 inside a mask.")
@click.option("-n", "num_images", default=4, show_default=True, help="Candidates.")
@click.option("--image-weight", default=0.3, show_default=True, help="Picture's share in search.")
@click.option("--keep", default=0.2, show_default=True, help="Identity's weight in rank.")
@click.option("--k", default=10, show_default=True, help="Neighbours to condition on.")
@click.option("--steps", default=8, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="How much the text counts.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--seed", type=int, help="0 ... 2^64-1; drawn when not given.")
@click.option("--database", help="A database of the model by name, or a folder.")
@click.option("--group", "groups", multiple=True, help="Search only this group (repeatable).")
@click.option("--model", default="stickers-edit", show_default=True, help="A bundle or a folder.")
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option("--out", default="out", show_default=True, type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Before and after, PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def edit(
    image: Path,
    text: str,
    mask: Path | None,
    groups: tuple[str, ...],
    model: str,
    device: str,
    out: Path,
    sheet: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Change IMAGE as TEXT says ("with sunglasses"); the rest of it stays. No mask is needed.

    Writes one PNG per candidate, best first, and a sheet with the picture before.
    """
    from knnfast.images import read_image
    from knnfast.pipeline import KNNDiffusion
    from knnfast.sheet import edit_sheet

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; give a folder")
    _check_sheet(sheet)
    picture = read_image(image)
    allowed = None if mask is None else read_image(mask)
    pipe = KNNDiffusion.from_pretrained(model, device=device)
    with _Bar("editing", hidden=as_json) as bar:
        result = pipe.edit(
            picture, text, mask=allowed, groups=list(groups) or None, callback=bar, **options
        )
    stem = f"{_slug(image.stem)}-{_slug(text)}-{result.seed}"
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{stem}-{n}.png" for n in range(len(result.edits))]
    for path, picture in zip(files, result.images, strict=True):
        _save_png(picture, path)
    sheet = sheet or out / f"{stem}-sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    _save_png(edit_sheet(result), sheet)
    if as_json:
        report = {
            "files": [str(f) for f in files], "sheet": str(sheet), "seed": result.seed,
            "text": text, "score_before": result.score,
            "edits": [
                {"score": e.score, "identity": e.identity, "changed": e.changed}
                for e in result.edits
            ],
            "neighbours": [{"name": x.item.name, "score": x.score} for x in result.neighbours],
            "seconds": result.timings,
        }  # fmt: skip
        click.echo(json.dumps(report, indent=1))
        return
    for path, each in zip(files, result.edits, strict=True):
        click.echo(
            f"{path}: score {result.score:.3f} -> {each.score:.3f}, identity {each.identity:.3f}, "
            f"{100 * each.changed:.0f} % of the codes changed"
        )
    click.echo(sheet)
    click.echo(
        f"seed {result.seed}; "
        + ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in result.timings.items())
    )


@main.group()
def database() -> None:
    """Build, describe and merge retrieval databases."""


@database.command("build")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--encoder",
    required=True,
    help="A model bundle (stickers), an encoder's folder, or open_clip:MODEL/PRETRAINED.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option("--json", "as_json", is_flag=True)
def database_build(
    folder: Path, encoder: str, out: Path, batch_size: int, device: str, as_json: bool
) -> None:
    """Embed every png, jpg and webp below FOLDER into a database."""
    from knnfast.database import Database
    from knnfast.images import list_images

    list_images(folder)  # a wrong path is told before an encoder is loaded
    skipped: list[dict[str, str]] = []

    def on_skip(path: Path, reason: str) -> None:
        skipped.append({"file": str(path), "reason": reason})
        if not as_json:
            click.echo(f"skipped {reason}", err=True)

    db = Database.build(
        folder, _encoder(encoder, device), batch_size=batch_size,
        progress=not as_json and sys.stderr.isatty(), on_skip=on_skip,
    )  # fmt: skip
    db.save(out)
    if as_json:
        click.echo(json.dumps({"path": str(out), "images": len(db), "skipped": skipped}, indent=1))
    else:
        click.echo(f"{out}: {len(db):,} images, {len(skipped):,} damaged files skipped")


@database.command("info")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def database_info(path: Path, as_json: bool) -> None:
    """Describe a saved database."""
    from knnfast.database import Database

    db = Database.open(path)
    info = {
        "path": str(path),
        "images": len(db),
        "encoder": db.encoder.to_dict(),
        "metric": db.index.metric,
        "bytes": db.index.nbytes,
        "groups": db.groups,
    }
    if as_json:
        click.echo(json.dumps(info, indent=1))
        return
    click.echo(f"{path}: {len(db):,} images, {db.index.nbytes / 2**20:.1f} MiB of embeddings")
    click.echo(f"encoder {db.encoder.name}, {db.encoder.dim} numbers, {db.encoder.sha256[:12]}")
    for group, count in db.groups.items():
        click.echo(f"{count:8,}  {group or '(no group)'}")


@database.command("merge")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
def database_merge(paths: tuple[Path, ...], out: Path) -> None:
    """Merge databases made by one encoder."""
    from knnfast.database import Database

    merged = Database.merge([Database.open(p) for p in paths])
    merged.save(out)
    click.echo(f"{out}: {len(merged):,} images")


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Run to start or go on."
)
@click.option("--model", default="stickers", show_default=True, help="Gives encoder and tokenizer.")
@click.option(
    "--from", "start", help="Begin with the denoiser of this model (stickers); it learns faster."
)
@click.option("--encoder", help="Another: a model bundle, a folder, or open_clip:MODEL/PRETRAINED.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Another: a VQModel's folder.")
@click.option(
    "--backbone", type=click.Choice(["discrete", "continuous"]), default="discrete",
    show_default=True,
)  # fmt: skip
@click.option("--steps", default=10_000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=128, show_default=True, help="Images a step, over all processes.")
@click.option("--accumulate", default=1, show_default=True, help="Passes for a step, each smaller.")
@click.option("--lr", type=float, help="Peak learning rate; 0.003 discrete, 0.001 continuous.")
@click.option("--k", default=10, show_default=True, help="Neighbours to condition on, at most.")
@click.option("--versions", default=8, show_default=True, help="Augmented versions of the images.")
@click.option(
    "--baseline", type=click.Choice(BASELINES), default="knn", show_default=True,
    help="Leave the neighbours out: the embedding with LAFITE's noise, or as it is.",
)  # fmt: skip
@click.option("--noise", default=0.75, show_default=True, help="Length of LAFITE's noise.")
@click.option("--importance", is_flag=True, help="Draw the levels of noise by importance.")
@click.option(
    "--candidates", default=0, show_default=True,
    help="Look up this many neighbours of each image once; 0 searches at every step.",
)  # fmt: skip
@click.option("--checkpoint-every", default=200, show_default=True, help="Steps; also of samples.")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
    help="Of matrix products; auto takes bf16 where the machine computes it.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def train(
    data: Path, out: Path, model: str, encoder: str | None, tokenizer: Path | None, backbone: str,
    start: str | None, lr: float | None, versions: int, k: int, baseline: str, noise: float,
    precision: str, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a denoiser on the pictures in DATA. No caption is read.

    DATA is a folder of images, WebDataset shards (one, a folder of them, or "shard-{000..099}.tar")
    or a saved database. A run that was stopped or killed goes on from its last checkpoint. The
    trained model, with DATA as its database, lies under OUT/model, which `--model` of the other
    commands takes.

    On several GPUs: torchrun --nproc-per-node 8 -m knnfast train DATA --device cuda --out RUN
    """
    from knnfast.database import Database
    from knnfast.diffusion.data import build_database, shards
    from knnfast.diffusion.denoiser import DenoiserConfig
    from knnfast.diffusion.distributed import has_bf16, processes
    from knnfast.diffusion.pairs import ConditionConfig
    from knnfast.diffusion.tokenizer import VQTokenizer
    from knnfast.diffusion.trainer import TrainConfig
    from knnfast.diffusion.training import train as run
    from knnfast.diffusion.unet import UNetConfig
    from knnfast.images import list_images
    from knnfast.pipeline import BACKBONES, KNNDiffusion

    if versions < 1:
        raise ValueError(f"--versions: must be at least 1, got {versions}")
    config = TrainConfig(
        condition=ConditionConfig(k=k).baseline(baseline, noise),
        bf16=precision == "bf16" or (precision == "auto" and has_bf16(device)),
        lr=lr if lr is not None else 3e-3 if backbone == "discrete" else 1e-3, **options,
    )  # fmt: skip
    if (out / "model").exists():
        raise ValueError(f"--out: {out / 'model'} exists already; that run is finished")
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out: {out} lies inside DATA; its pictures would be trained on")
    saved = (data / "database.json").is_file()
    source = Database.open(data) if saved else data
    if not saved and not shards(data):
        found = len(list_images(data))  # a wrong path is told before a model is loaded
        if found < 2:
            raise ValueError(f"data: needs at least two readable images, found {found}")
    with processes(device) as these:
        # A tokenizer's folder is small beside an encoder's weights: a wrong path is told first.
        codes = None if tokenizer is None else VQTokenizer.from_folder(tokenizer, these.device)
        embed = None if encoder is None else _encoder(encoder, str(these.device))
        if codes is None or embed is None:
            pipe = KNNDiffusion.from_pretrained(model, device=these.device)
            codes, embed = codes or pipe.tokenizer, embed or pipe.encoder
        if isinstance(source, Database):
            source.check_encoder(embed.card)
        begin = None
        sizes: Any = DenoiserConfig() if backbone == "discrete" else UNetConfig()
        if start is not None:
            begin = KNNDiffusion.from_pretrained(start, backbone=backbone).denoiser
            sizes = begin.config
        condition = replace(config.condition, semantic=_semantic(embed))
        record = run(
            source, out, codes, embed, model=sizes, start=begin, worlds=versions, device=device,
            config=replace(config, condition=condition), progress=not as_json,
        )  # fmt: skip
        if not these.main:
            return
        db = source if isinstance(source, Database) else build_database(source, embed)
        kind = BACKBONES[backbone]
        denoiser = kind.from_folder(out / kind.folder, device=these.device)
        KNNDiffusion(embed, codes, denoiser, {"training": db}).save_pretrained(out / "model")
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{out / 'model'}: {record['steps']:,} steps, {record['seconds']:.0f} s")
    click.echo(f'try: knnfast generate "..." --model {out / "model"}; samples: {out / "grids"}')


@main.command()
@click.argument("model")
@click.option("--judge", help="Folder of a second encoder; the embedded judge by default.")
@click.option("--inception", type=click.Path(), help="Inception's weights, for the FID.")
@click.option("--ablation", help="One of the paper's ablations by name, or all; see --out.")
@click.option("--quick", is_flag=True, help="Fewer names in an ablation: minutes, wide intervals.")
@click.option("--continuous", help="A model with the continuous backbone, if not MODEL.")
@click.option(
    "--out", default="out/results", show_default=True, type=click.Path(path_type=Path),
    help="Folder of the ablations' report: README.md, plots, JSON.",
)  # fmt: skip
@click.option("--prompts", type=int, help="Names to generate: 300, or 200 in an ablation.")
@click.option("--other-prompts", default=40, show_default=True, help="Names of the unseen kind.")
@click.option("--other-samples", default=2, show_default=True, help="Images of each of these.")
@click.option("--k", default=10, show_default=True, help="Neighbours to condition on.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance weight; 1 is none.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--backbone", help="discrete or continuous; the model's first when not given.")
@click.option("--device", default="cpu", show_default=True, callback=_device)
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def evaluate(
    ctx: click.Context, model: str, judge: str | None, ablation: str | None, quick: bool,
    continuous: str | None, out: Path, prompts: int | None, seed: int, backbone: str | None,
    device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure what MODEL (a bundle or a folder) generates, beside real and wrong pictures.

    With --ablation: neighbours, condition, k, index, steps, guidance, truncation, backbone or all.
    """
    from knnfast import ablations
    from knnfast import evaluate as measures
    from knnfast.pipeline import KNNDiffusion, backbones_of

    if ablation is None:
        for name in ("quick", "continuous", "out"):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise ValueError(f"--{name}: goes with --ablation")
        pipe = KNNDiffusion.from_pretrained(model, device=device, backbone=backbone)
        with _Bar("evaluating", hidden=as_json) as bar:
            result = measures.evaluate(
                pipe, judge, prompts=300 if prompts is None else prompts, seed=seed, progress=bar,
                **options,
            )  # fmt: skip
        click.echo(json.dumps(result, indent=1) if as_json else measures.report(result))
        return
    for name in (*options, "backbone"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--{name.replace('_', '-')}: an ablation has its own settings")
    names = list(ablations.ABLATIONS) if ablation == "all" else [ablation]
    if unknown := set(names) - set(ablations.ABLATIONS):
        allowed = ", ".join(ablations.ABLATIONS)
        raise ValueError(f"--ablation: must be one of {allowed} or all, got {unknown.pop()!r}")
    if prompts is None:
        prompts = ablations.QUICK_PROMPTS if quick else ablations.PROMPTS
    pipe = KNNDiffusion.from_pretrained(model, device=device, backbone="discrete")
    if continuous is None and "continuous" in backbones_of(model):
        continuous = model
    other = None
    if continuous is not None:
        other = KNNDiffusion.from_pretrained(continuous, device=device, backbone="continuous")
    with _Bar("evaluating", hidden=as_json) as bar:
        results = ablations.run(
            names, pipe, out, prompts=prompts, seed=seed, judge=judge, continuous=other,
            progress=bar,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    for result in results:
        for claim in result["claims"]:
            click.echo(f"{result['name']}: {claim['claim']}: {claim['found']}")
    click.echo(out / "README.md")


@main.command()
@click.option("--n", default=1_000_000, show_default=True, help="Rows.")
@click.option("--d", default=512, show_default=True, help="Elements of a row.")
@click.option("--batch", default="1,16,64", show_default=True, help="Queries in one call.")
@click.option("--k", default=10, show_default=True, help="Neighbours.")
@click.option("--metric", default="ip", show_default=True, help="ip or l2.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--threads", type=int, help="At most so many; the machine's by default.")
@click.option("--peers", help="Only these, separated by commas; all that are installed by default.")
@click.option("--seconds", default=80.0, show_default=True, help="About how long it may take.")
@click.option(
    "--plot", default="knnfast-bench.png", show_default=True, help="PNG to write, or none."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(batch: str, peers: str | None, plot: str, as_json: bool, **options: Any) -> None:
    """Your shape against FAISS and other peers on this machine: a table and a plot.

    Answers are judged against FP64 before they are timed; contenders take turns.
    """
    from knnfast.benchmark.faiss_reference import faiss_reference
    from knnfast.benchmark.plot import require_matplotlib

    if plot != "none":
        require_matplotlib()
        if not Path(plot).absolute().parent.is_dir():
            raise ValueError(f"--plot: {Path(plot).parent} is no folder")
    try:
        sizes = [int(b) for b in batch.split(",")]
    except ValueError:
        raise ValueError(f"--batch must be numbers separated by commas, got {batch!r}") from None
    report = faiss_reference(
        batch=sizes,
        peers=None if peers is None else peers.split(","),
        progress=lambda line: click.echo(line, err=True),
        **options,
    )
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.table())
    if plot != "none":
        report.save_plot(plot)
        click.echo(f"saved {plot}", err=True)


@main.command()
@click.option("--model", default="stickers", show_default=True, help="A bundle or a folder.")
@click.option("--json", "as_json", is_flag=True)
def info(model: str, as_json: bool) -> None:
    """Say what is installed and what a model holds."""
    import torch

    from knnfast import _C
    from knnfast.pipeline import KNNDiffusion

    pipe = KNNDiffusion.from_pretrained(model)
    report = {
        "knnfast": __version__,
        "torch": torch.__version__,
        "cuda_built": _C.has_cuda,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "model": model,
        "encoder": pipe.encoder.card.to_dict(),
        "databases": {name: len(db) for name, db in pipe.databases.items()},
        "parameters": sum(p.numel() for p in pipe.denoiser.parameters()),
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for key, value in report.items():
        click.echo(f"{key:12} {value}")


class _Bar:
    """A progress bar fed by `callback(done, total)`."""

    def __init__(self, label: str, hidden: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=label, unit="step", leave=False, disable=hidden or not sys.stderr.isatty()
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def _encoder(spec: str, device: str) -> Any:
    """An encoder by its own spec, or the one of a model bundle."""
    from knnfast.encoders import load_encoder
    from knnfast.pipeline import BUNDLES

    bundled = BUNDLES / spec / "encoder"
    return load_encoder(bundled if bundled.is_dir() else spec, device=device)


def _semantic(encoder: Any) -> int | None:
    """How many of an embedding's numbers a prompt fills, None for all: the rest are looks."""
    filled = encoder.encode_text(["a picture"]).vectors[0].nonzero()[0]
    count = int(filled[-1]) + 1
    return None if count == encoder.dim else count


def _save_png(image: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    from knnfast import _files

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _files.write_atomic(path, buffer.getvalue())


def _check_sheet(sheet: Path | None) -> None:
    """Refuse a sheet that cannot be written, before anything is computed."""
    if sheet is None:
        return
    if sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet: must end in .png, got {sheet}")
    if sheet.is_dir():
        raise ValueError(f"--sheet: {sheet} is a folder; give a file")


def _distinct(names: Iterable[str]) -> list[str]:
    """The same names, with -2, -3, ... behind those that were there before."""
    found: list[str] = []
    for name in names:
        copies = (f"{name}-{n}" for n in itertools.count(2))
        found.append(name if name not in found else next(x for x in copies if x not in found))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "image"
