"""`knnfast database`: build, describe and merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from knnfast.cli._shared import check_folder, device_option, find_encoder


@click.group()
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
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_build(
    folder: Path, encoder: str, out: Path, batch_size: int, device: str, as_json: bool
) -> None:
    """Embed every png, jpg and webp below FOLDER into a database."""
    from knnfast.database import Database
    from knnfast.images import list_images

    # Wrong paths are told before an encoder is loaded.
    list_images(folder)
    check_folder("--out", out)
    Database.check_place(out)
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
        click.echo(f"{out}: {len(db):,} images, {len(skipped):,} damaged files skipped")


@database.command("info")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
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
    from knnfast.diffusion.data import identity

    check_folder("--out", out)
    Database.check_place(out)
    databases: dict[str, tuple[Path, Database]] = {}
    for path in paths:
        database = Database.open(path)
        first, _ = databases.setdefault(identity(database), (path, database))
        if first is not path:
            raise ValueError(f"paths: {path} holds the same images as {first}; give each once")
    merged = Database.merge([database for _, database in databases.values()])
    merged.save(out)
    click.echo(f"{out}: {len(merged):,} images")
