"""`knnfast generate` and `knnfast edit`: pictures, and a sheet of them."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from knnfast.cli._shared import (
    Bar,
    check_files,
    check_folder,
    check_query,
    database_option,
    device_option,
    neighbours_of,
)


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("--image", "images", multiple=True, type=click.Path(), help="Query by picture.")
@click.option("--image-weight", type=float, help="Share of the picture beside a prompt; 0.5.")
@click.option("-n", "num_images", default=1, show_default=True, help="Images per query.")
@click.option("--k", type=int, help="Neighbours; 10, or as many as there are, when not given.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance weight; 1 is none.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--purity", type=float, help="Draw the surest codes first, so sharply; 0 or more.")
@click.option("--solver", help="dpm (the default) or ddim, of the continuous backbone.")
@click.option("--seed", type=int, help="0 ... 2^64-1; drawn when not given.")
@database_option
@click.option("--group", "groups", multiple=True, help="Search only this group (repeatable).")
@click.option("--no-query", is_flag=True, help="Condition on the neighbours alone.")
@click.option("--no-neighbours", is_flag=True, help="Condition on the query alone.")
@click.option("--model", default="stickers", show_default=True, help="A bundle or a folder.")
@click.option("--backbone", help="discrete or continuous; the model's first when not given.")
@device_option
@click.option("--out", default="out", show_default=True, type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Samples beside neighbours, PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def generate(
    prompts: tuple[str, ...],
    images: tuple[str, ...],
    image_weight: float | None,
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
    Images are drawn 32 at a time; Ctrl-C writes those that are finished, and no sheet.
    """
    from knnfast.images import printable
    from knnfast.pipeline import Interrupted, KNNDiffusion

    check_folder("--out", out)
    _check_sheet(sheet)
    check_query(prompts, images)
    check_files("--image", images)
    pipe = KNNDiffusion.from_pretrained(model, device=device, backbone=backbone)
    if database is not None:
        pipe.database = database
    stopped = False
    try:
        with Bar("denoising", hidden=as_json) as bar:
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
    except Interrupted as e:
        result, stopped = e.output, True
    except KeyboardInterrupt:
        click.echo("stopped: no image was finished, none is written", err=True)
        raise
    stems = [f"{name}-{result.seed}" for name in _distinct(map(_slug, result.labels))]
    files = [out / f"{stem}-{n}.png" for stem in stems for n in range(num_images)]
    done = files[: len(result.images)]
    sheet = sheet or out / f"{stems[0]}-sheet.png"
    try:
        _save_pngs(done, result.images)
        written = None if stopped else _write_sheet(sheet, result, pipe.database)
    except KeyboardInterrupt:
        _save_pngs(done, result.images)
        stopped = True
    if stopped:
        rest = f"; --seed {result.seed} draws them again, and the others"
        click.echo(
            f"stopped: {len(done)} of {len(files)} images are written to {out}"
            + (rest if len(done) < len(files) else ", and no sheet"),
            err=True,
        )
        click.get_current_context().exit(130)
    if as_json:
        neighbours = list(map(neighbours_of, result.neighbours))
        report = {
            "files": [str(f) for f in files], "seed": result.seed,
            "sheet": None if written is None else str(written),
            "labels": result.labels, "neighbours": neighbours, "seconds": result.timings,
        }  # fmt: skip
        click.echo(json.dumps(report, indent=1))
        return
    for label, row in zip(result.labels, result.neighbours, strict=True):
        found = ", ".join(f"{x.item.name} {x.score:.3f}" for x in row)
        click.echo(printable(f"{label}: {found}"))
    for path in files if written is None else [*files, written]:
        click.echo(path)
    _echo_times(result)


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--mask", type=click.Path(path_type=Path), help="White where it may change.")
@click.option(
    "--strength", type=float, help="Share of the picture redrawn; 0.35, or 1 inside a mask."
)
@click.option("-n", "num_images", default=8, show_default=True, help="Candidates.")
@click.option("--image-weight", default=0.3, show_default=True, help="Picture's share in search.")
@click.option("--keep", default=0.2, show_default=True, help="Identity's weight in rank.")
@click.option("--k", type=int, help="Neighbours; 10, or as many as there are, when not given.")
@click.option("--steps", default=8, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="How much the text counts.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--seed", type=int, help="0 ... 2^64-1; drawn when not given.")
@database_option
@click.option("--group", "groups", multiple=True, help="Search only this group (repeatable).")
@click.option("--model", default="stickers-edit", show_default=True, help="A bundle or a folder.")
@device_option
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

    Writes one PNG per candidate, best first, and a sheet with the picture before. Of each it tells
    the score, how near the picture is to TEXT (a cosine: 1 is nearest) before and after; identity,
    how near it is to IMAGE, likewise; and the share of the codes, which are small squares of the
    picture, that changed.
    """
    from knnfast.images import read_image
    from knnfast.pipeline import KNNDiffusion
    from knnfast.sheet import edit_sheet

    check_folder("--out", out)
    _check_sheet(sheet)
    picture = read_image(image)
    allowed = None if mask is None else read_image(mask, background="black")
    pipe = KNNDiffusion.from_pretrained(model, device=device)
    with Bar("editing", hidden=as_json) as bar:
        result = pipe.edit(
            picture, text, mask=allowed, groups=list(groups) or None, callback=bar, **options
        )
    stem = f"{_slug(image.stem)}-{_slug(text)}-{result.seed}"
    files = [out / f"{stem}-{n}.png" for n in range(len(result.edits))]
    sheet = sheet or out / f"{stem}-sheet.png"
    _save_pngs([*files, sheet], [*result.images, edit_sheet(result)])
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
    if max(each.score for each in result.edits) <= result.score + 1e-6:  # rounding of a score
        click.echo(
            "No candidate moved towards the text: try another --seed, a higher --strength or more "
            "candidates (-n).",
            err=True,
        )
    _echo_times(result)


def _distinct(names: Iterable[str]) -> list[str]:
    """The same names, with -2, -3, ... behind those that were there before."""
    found: list[str] = []
    for name in names:
        copies = (f"{name}-{n}" for n in itertools.count(2))
        found.append(name if name not in found else next(x for x in copies if x not in found))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "image"


def _check_sheet(sheet: Path | None) -> None:
    """Refuse a sheet that cannot be written, before anything is computed."""
    if sheet is None:
        return
    if sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet: must end in .png, got {sheet}")
    if sheet.is_dir():
        raise ValueError(f"--sheet: {sheet} is a folder; give a file")
    check_folder("--sheet", sheet.parent)


def _write_sheet(sheet: Path, result: Any, database: Any) -> Path | None:
    """Write the samples beside their neighbours; None, and a word, where they cannot be drawn."""
    from knnfast.sheet import contact_sheet

    try:
        overview = contact_sheet(result, database)
    except (OSError, ValueError) as e:  # the database was saved anew meanwhile, say
        click.echo(f"no sheet: {e}", err=True)
        return None
    _save_pngs([sheet], [overview])
    return sheet


def _save_pngs(paths: Sequence[Path], images: Sequence[Any]) -> None:
    """Write pictures, each whole or not at all."""
    from knnfast import _files

    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        _files.write_atomic(path, buffer.getvalue())


def _echo_times(result: Any) -> None:
    """One line: the seed, and what each phase took."""
    click.echo(
        f"seed {result.seed}; "
        + ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in result.timings.items())
    )
