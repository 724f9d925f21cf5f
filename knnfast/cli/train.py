"""`knnfast train`: a denoiser of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from knnfast.cli._shared import check_folder, device_option, find_encoder

BASELINES = ("knn", "lafite", "no_neighbours")  # knnfast.diffusion.pairs has them


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Run to start or go on."
)
@click.option("--model", default="stickers", show_default=True, help="Gives encoder and tokenizer.")
@click.option(
    "--from", "start", help="Begin with the denoiser of this model (stickers); it learns faster."
)
@click.option("--encoder", help="Another: a model bundle, a folder, or open_clip:MODEL/PRETRAINED.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Where a database's lie now.")
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
@device_option
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    data: Path, out: Path, model: str, encoder: str | None, tokenizer: Path | None, backbone: str,
    start: str | None, lr: float | None, versions: int, k: int, baseline: str, noise: float,
    precision: str, pictures: Path | None, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a denoiser on the pictures in DATA. No caption is read.

    DATA is a folder of images, WebDataset shards (one, a folder of them, or "shard-{000..099}.tar")
    or a saved database, whose pictures are read from the folder that it was built from (--pictures,
    if they were moved), or taken from its thumbnails, which is told. A run that was stopped or
    killed goes on from its last checkpoint. The trained model, with DATA as its database, lies
    under OUT/model, which `--model` of the other commands takes.

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
    check_folder("--out", out)
    saved = (data / "database.json").is_file()
    source = Database.open(data) if saved else data
    if pictures is not None:
        if not isinstance(source, Database) or not pictures.is_dir():
            raise ValueError(f"--pictures: must be a folder, and DATA a database, got {pictures}")
        source.pictures = pictures
    if not saved and not shards(data):
        found = len(list_images(data))  # a wrong path is told before a model is loaded
        if found < 2:
            raise ValueError(f"data: needs at least two readable images, found {found}")
    with processes(device) as these:
        # A tokenizer's folder is small beside an encoder's weights: a wrong path is told first.
        codes = None if tokenizer is None else VQTokenizer.from_folder(tokenizer, these.device)
        embed = None if encoder is None else find_encoder(encoder, str(these.device))
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
        try:
            record = run(
                source, out, codes, embed, model=sizes, start=begin, worlds=versions, device=device,
                config=replace(config, condition=condition), progress=not as_json,
            )  # fmt: skip
        except KeyboardInterrupt:
            click.echo(f"{out}: stopped; the same command goes on from here", err=True)
            raise
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


def _semantic(encoder: Any) -> int | None:
    """How many of an embedding's numbers a prompt fills, None for all: the rest are looks."""
    filled = encoder.encode_text(["a picture"]).vectors[0].nonzero()[0]
    count = int(filled[-1]) + 1
    return None if count == encoder.dim else count
