"""`knnfast database`: build, describe and merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from knnfast.cli._shared import check_folder, device_option, find_encoder

_replace = click.option("--replace", is_flag=True, help="Write over a database that is there.")


def _check_out(out: Path, replace: bool) -> None:
    """Refuse a place that cannot be written, or where a database is that nobody gave up."""
    from knnfast.database import Database

    check_folder("--out", out)
    Database.check_place(out)
    if Database.is_at(out) and not replace:
        raise ValueError(f"--out: {out} is a database already; --replace writes over it")


def _databases(path: Path) -> list[Path]:
    """A database's folder, or those of a model: a folder, or a bundle by its name."""
    from knnfast.database import Database
    from knnfast.pipeline import databases_of, find_model

    if Database.is_at(path):
        return [path]
    try:
        root = find_model(str(path))
    except FileNotFoundError:
        return [path]  # which opening it tells
    return databases_of(root)


@click.group()
def database() -> None:
    """Build, describe and merge retrieval databases."""


@database.command("build")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--encoder",
    required=True,
    help="A model or an encoder's folder, a bundle (stickers), or open_clip:MODEL/PRETRAINED.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_replace
@click.option("--batch-size", default=64, show_default=True)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_build(
    folder: Path,
    encoder: str,
    out: Path,
    replace: bool,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Embed every png, jpg and webp below FOLDER into a database."""
    from knnfast.database import Database
    from knnfast.images import list_images

    # Wrong paths are told before an encoder is loaded.
    list_images(folder)
    _check_out(out, replace)
    skipped: list[dict[str, str]] = []

    def on_skip(path: Path, reason: str) -> None:
        skipped.append({"file": str(path), "reason": reason})
        if not as_json:
            click.echo(f"skipped {reason}", err=True)

    db = Database.build(
        folder, find_encoder(encoder, device), batch_size=batch_size,
        progress=not as_json and sys.stderr.isatty(), on_skip=on_skip,
    )  # fmt: skip
    db.save(out)
    if as_json:
        click.echo(json.dumps({"path": str(out), "images": len(db), "skipped": skipped}, indent=1))
    else:
        files = "file" if len(skipped) == 1 else "files"
        click.echo(f"{out}: {len(db):,} images, {len(skipped):,} damaged {files} skipped")


@database.command("info")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_info(path: Path, as_json: bool) -> None:
    """Describe a saved database, or those of a model (a bundle's name or a folder)."""
    from knnfast.database import Database

    found: list[dict[str, Any]] = []
    for folder in _databases(path):
        db = Database.open(folder)
        found.append({
            "path": str(folder),
            "images": len(db),
            "encoder": db.encoder.to_dict(),
            "metric": db.index.metric,
            "bytes": db.index.nbytes,
            "pictures": None if db.pictures is None else str(db.pictures),
            "groups": db.groups,
        })  # fmt: skip
        if as_json:
            continue
        click.echo(f"{folder}: {len(db):,} images, {db.index.nbytes / 2**20:.1f} MiB of embeddings")
        click.echo(f"encoder {db.encoder.name}, {db.encoder.dim} numbers, {db.encoder.sha256[:12]}")
        if db.pictures is not None:
            click.echo(f"pictures {db.pictures}")
        for group, count in db.groups.items():
            click.echo(f"{count:8,}  {group or '(no group)'}")
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))


@database.command("merge")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_replace
def database_merge(paths: tuple[Path, ...], out: Path, replace: bool) -> None:
    """Merge databases made by one encoder."""
    from knnfast.database import Database
    from knnfast.diffusion.data import identity

    _check_out(out, replace)
    databases: dict[str, tuple[Path, Database]] = {}
    for path in paths:
        database = Database.open(path)
        first, _ = databases.setdefault(identity(database), (path, database))
        if first is not path:
            raise ValueError(f"paths: {path} holds the same images as {first}; give each once")
    merged = Database.merge([database for _, database in databases.values()])
    merged.save(out)
    click.echo(f"{out}: {len(merged):,} images")
