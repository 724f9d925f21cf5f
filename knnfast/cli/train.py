"""`knnfast train`: a denoiser, or an editor, of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knnfast.cli._shared import check_folder, device_option, find_encoder

if TYPE_CHECKING:
    from knnfast.database import Database

# What knnfast.diffusion.pairs, .augment and .data have, without importing torch.
CONDITIONS = ("robust", "paper", "lafite", "no_neighbours")
AUGMENT = ("photos", "stickers")
CROPS = ("center", "pad")
SECTIONS = ("model", "condition", "train", "augmentation")


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Run to start or go on."
)
@click.option("--model", help="Gives encoder and tokenizer; that of --from, or stickers.")
@click.option(
    "--from", "start", help="Begin with the denoiser of this model (stickers); it learns faster."
)
@click.option("--editor", is_flag=True, help="Train what `knnfast edit` takes; needs --from.")
@click.option("--encoder", help="Another: a model bundle, a folder, or open_clip:MODEL/PRETRAINED.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Where a database's lie now.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Another: a VQModel's folder.")
@click.option(
    "--image-size",
    type=int,
    help="Of --tokenizer: pixels of a picture's side; its sample_size, often VQModel's default 32.",
)
@click.option(
    "--backbone", type=click.Choice(["discrete", "continuous"]), default="discrete",
    show_default=True,
)  # fmt: skip
@click.option(
    "--config", "file", type=click.Path(path_type=Path),
    help="JSON with the settings that have no option, too; options that are given win.",
)  # fmt: skip
@click.option("--steps", default=10_000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=128, show_default=True, help="Images a step, over all processes.")
@click.option("--accumulate", default=1, show_default=True, help="Passes for a step, each smaller.")
@click.option(
    "--lr", type=float, help="Peak learning rate; 0.003 discrete, 0.001 continuous or an editor."
)
@click.option("--k", type=int, help="Neighbours to condition on; 10, or as many as there are.")
@click.option(
    "--condition", type=click.Choice(CONDITIONS), default="robust", show_default=True,
    help="What the model is shown of a picture. paper: its own embedding and its neighbours. "
    "robust: the same, but disturbed towards what a prompt gives: noise, fewer neighbours, a part "
    "of the database, either alone. lafite: no neighbours, the embedding with noise of one length. "
    "no_neighbours: the embedding alone. Each shows a tenth nothing, for guidance.",
)  # fmt: skip
@click.option("--noise", type=float, help="Length of lafite's noise, 0.75; robust's largest, 1.")
@click.option(
    "--versions", default=8, show_default=True,
    help="Of the collection: as it is, and augmented; 1 augments nothing.",
)  # fmt: skip
@click.option(
    "--augment", type=click.Choice(AUGMENT), default="photos", show_default=True,
    help="photos: mirrored, moved, larger or smaller. stickers: turned and of any hue, too.",
)  # fmt: skip
@click.option(
    "--crop", type=click.Choice(CROPS),
    help="Of pictures that are no squares: their middle, or all on white; as the encoder does.",
)  # fmt: skip
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
@click.pass_context
def train(
    ctx: click.Context, data: Path, out: Path, model: str | None, encoder: str | None,
    tokenizer: Path | None, image_size: int | None, backbone: str, start: str | None,
    editor: bool, file: Path | None, lr: float | None, versions: int, k: int | None,
    condition: str, noise: float | None,
    augment: str, crop: str | None, precision: str, pictures: Path | None, device: str,
    as_json: bool, **options: Any,
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
    from knnfast.diffusion.augment import KINDS
    from knnfast.diffusion.data import build_database, count_readable
    from knnfast.diffusion.distributed import has_bf16, processes
    from knnfast.diffusion.edit_data import encode_edits
    from knnfast.diffusion.editing import EditConfig, editor_from, import_cv2, train_editor
    from knnfast.diffusion.pairs import ConditionConfig
    from knnfast.diffusion.tokenizer import VQTokenizer
    from knnfast.diffusion.trainer import TrainConfig
    from knnfast.diffusion.training import train as run
    from knnfast.diffusion.unet import import_diffusers
    from knnfast.pipeline import BACKBONES, KNNDiffusion

    if versions < 1:
        raise ValueError(f"--versions: must be at least 1, got {versions}")
    if image_size is not None and tokenizer is None:
        raise ValueError("--image-size: of --tokenizer, which is not given")
    if editor and (start is None or backbone != "discrete"):
        raise ValueError("--editor: needs --from, a model with a discrete denoiser to begin with")
    if editor:
        import_cv2()
    if backbone == "continuous":
        import_diffusers()
    settings = SettingsFile(file)
    if start is not None and "model" in settings.sections:
        raise ValueError(f"{file}: model: --from has sizes of its own")
    kind = BACKBONES[backbone]
    sizes = settings.changed("model", kind.config_type())
    augmentation = settings.changed("augmentation", KINDS[augment])
    preset = (EditConfig if editor else ConditionConfig)().preset(condition, noise)
    shown = settings.changed("condition", preset)
    if noise is not None:
        shown = replace(shown, noise=preset.noise, least_noise=preset.least_noise)
    if k is not None:
        shown = replace(shown, k=k)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    options |= {"bf16": bf16, "lr": lr}
    config = settings.changed("train", TrainConfig(**options, condition=shown))
    source_of = {name: ctx.get_parameter_source(name) for name in options}
    source_of["bf16"] = ctx.get_parameter_source("precision")
    won = (n for n in options if source_of[n] is click.core.ParameterSource.COMMANDLINE)
    config = replace(config, **{name: options[name] for name in won})
    if (out / "model").exists():
        raise ValueError(f"--out: {out / 'model'} exists already; that run is finished")
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out: {out} lies inside DATA; its pictures would be trained on")
    check_folder("--out", out)
    _check_run(out)
    source = _collection(data, pictures)
    found = count_readable(source, max(2, shown.k + 1))
    if found < 2:
        raise ValueError(f"data: needs at least two readable images, found {found}")
    if k is None and "k" not in settings.sections.get("condition", {}):
        shown = replace(shown, k=min(shown.k, found - 1))
        config = replace(config, condition=shown)
    elif found < shown.k:
        raise ValueError(f"--k: must be at most {found}, the readable images, got {shown.k}")
    with processes(device) as these:
        # A tokenizer's folder is small beside an encoder's weights: a wrong path is told first.
        codes = None
        if tokenizer is not None:
            codes = VQTokenizer.from_folder(tokenizer, these.device, image_size)
        embed = None if encoder is None else find_encoder(encoder, str(these.device))
        if codes is None or embed is None:
            pipe = KNNDiffusion.from_pretrained(model or start or "stickers", device=these.device)
            codes, embed = codes or pipe.tokenizer, embed or pipe.encoder
        if isinstance(source, Database):
            source.check_encoder(embed.card)
        begin: Any = None
        if start is not None:
            begin = KNNDiffusion.from_pretrained(start, backbone=backbone).denoiser
        if shown.semantic is None:
            config = replace(config, condition=replace(shown, semantic=_semantic(embed)))
        try:
            if editor:
                edits = encode_edits(
                    source, out, embed, codes, versions, config.seed, these, augmentation, crop,
                    near=shown.near,
                )  # fmt: skip
                record = train_editor(
                    edits, out, begin if begin.config.source else editor_from(begin), embed, codes,
                    config, device=device, progress=not as_json,
                )  # fmt: skip
            else:
                record = run(
                    source, out, codes, embed, model=sizes if begin is None else None,
                    start=begin, versions=versions, augmentation=augmentation, crop=crop,
                    device=device, config=config, progress=not as_json,
                )  # fmt: skip
        except KeyboardInterrupt:
            click.echo(f"{out}: stopped; the same command goes on from here", err=True)
            raise
        if not these.main:
            return
        db = source if isinstance(source, Database) else build_database(source, embed)
        denoiser = kind.from_folder(out / kind.folder, device=these.device)
        KNNDiffusion(embed, codes, denoiser, {"training": db}).save_pretrained(out / "model")
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{out / 'model'}: {record['steps']:,} steps, {record['seconds']:.0f} s")
    what = 'edit PICTURE "..."' if editor else 'generate "..."'
    click.echo(f"try: knnfast {what} --model {out / 'model'}; samples: {out / 'grids'}")


class SettingsFile:
    """The sections of a settings file; none without a file.

    Raises:
        ValueError: a section that is unknown, or no object.
    """

    def __init__(self, file: Path | None) -> None:
        from knnfast import _files

        self.file = file
        self.sections = {} if file is None else _files.read_json(file)
        for name, section in self.sections.items():
            if name not in SECTIONS:
                raise ValueError(
                    f"{file}: section must be one of {', '.join(SECTIONS)}, got {name!r}"
                )
            if not isinstance(section, dict):
                raise ValueError(f"{file}: {name} must be an object, got {section!r}")

    def changed(self, name: str, settings: Any) -> Any:
        """Settings with what a section says in their place."""
        try:
            return settings.updated(self.sections.get(name, {}))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{self.file}: {name}: {e}") from None


def _check_run(out: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    from knnfast.diffusion.data import PAIRS_FILE, PARTS_FOLDER
    from knnfast.diffusion.edit_data import EDITS_FILE

    names = [child.name for child in out.iterdir()] if out.is_dir() else []
    first = (PAIRS_FILE, PARTS_FOLDER, EDITS_FILE)  # what a run writes before all else
    if names and not any(made in name for made in first for name in names):
        raise ValueError(f"--out: {out} is a folder with other content; give a new or empty one")


def _collection(data: Path, pictures: Path | None) -> Database | Path:
    """What DATA is, with its pictures' folder where one is given."""
    from knnfast.database import Database

    source = Database.open(data) if Database.is_at(data) else data
    if pictures is not None:
        if not isinstance(source, Database) or not pictures.is_dir():
            raise ValueError(f"--pictures: must be a folder, and DATA a database, got {pictures}")
        source.pictures = pictures
    return source


def _semantic(encoder: Any) -> int | None:
    """How many of an embedding's numbers a prompt fills, None for all: the rest are looks."""
    filled = encoder.encode_text(["a picture"]).vectors[0].nonzero()[0]
    count = int(filled[-1]) + 1
    return None if count == encoder.dim else count
