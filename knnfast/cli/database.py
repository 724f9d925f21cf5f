"""`knnfast database`: build, add to, search, describe and merge."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knnfast.cli._shared import (
    check_files,
    check_folder,
    check_query,
    device_option,
    find_encoder,
    neighbours_of,
)

if TYPE_CHECKING:
    from knnfast.database import Database, Item

_encoder = click.option(
    "--encoder",
    required=True,
    help="A model or an encoder's folder, a bundle (stickers), or open_clip:MODEL/PRETRAINED.",
)
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


def _refuse_model(name: str, path: Path) -> None:
    """Refuse a model, by its name or its folder, where a database's folder is meant."""
    folders = _databases(path)
    if folders != [path]:
        raise ValueError(f"{name}: {path} is a model; give a database's folder, as {folders[0]}")


class Skipped:
    """Counts files that cannot be read as images, and tells them."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden
        self.files: list[dict[str, str]] = []

    def __call__(self, path: Path, reason: str) -> None:
        """Take the next one."""
        self.files.append({"file": str(path), "reason": reason})
        if not self.hidden:
            click.echo(f"skipped {reason}", err=True)

    def __str__(self) -> str:
        return f"{len(self.files):,} damaged {'file' if len(self.files) == 1 else 'files'} skipped"


@click.group()
def database() -> None:
    """Build, add to, search, describe and merge retrieval databases."""


@database.command("build")
@click.argument("folder", type=click.Path(path_type=Path))
@_encoder
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
    skipped = Skipped(hidden=as_json)
    db = Database.build(
        folder, find_encoder(encoder, device), batch_size=batch_size,
        progress=not as_json and sys.stderr.isatty(), on_skip=skipped,
    )  # fmt: skip
    db.save(out)
    if as_json:
        result = {"path": str(out), "images": len(db), "skipped": skipped.files}
        click.echo(json.dumps(result, indent=1))
    else:
        click.echo(f"{out}: {len(db):,} images, {skipped}")


@database.command("add")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@_encoder
@click.option("--batch-size", default=64, show_default=True)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_add(
    path: Path, folder: Path, encoder: str, batch_size: int, device: str, as_json: bool
) -> None:
    """Embed what is below FOLDER and not yet in the database PATH, and save it there.

    An image is in it when it was built from that very file. Images that are gone stay in it. What
    was embedded before Ctrl-C is saved, too.
    """
    from knnfast.database import Database
    from knnfast.images import list_images

    list_images(folder)
    check_folder("path", path)
    _refuse_model("path", path)
    db = Database.open(path)
    skipped, before, found = Skipped(hidden=as_json), len(db), find_encoder(encoder, device)
    try:
        db.add_folder(
            folder, found, batch_size=batch_size,
            progress=not as_json and sys.stderr.isatty(), on_skip=skipped,
        )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"interrupted: {len(db) - before:,} of the images stay added", err=True)
        raise
    finally:
        added = len(db) - before
        if added:
            db, added = _save_added(db, before, path)
    if as_json:
        result = {"path": str(path), "images": len(db), "added": added}
        click.echo(json.dumps({**result, "skipped": skipped.files}, indent=1))
    else:
        images = "image" if added == 1 else "images"
        click.echo(f"{path}: {added:,} {images} added, now {len(db):,}, {skipped}")


def _save_added(db: Database, before: int, path: Path) -> tuple[Database, int]:
    """Save what was added behind the first `before` images, also to what others saved meanwhile.

    Returns what is saved now, and how many images of it were added here.
    """
    from knnfast.database import Database, StaleDatabaseError
    from knnfast.encoders import Embeddings

    def file(of: Database, item: Item) -> str:
        return str((of.pictures or Path()) / item.source) if item.source else ""

    new = db.ids[before:].tolist()
    now, added = db, len(new)
    while True:
        with suppress(StaleDatabaseError):
            now.save(path)
            return now, added
        now = Database.open(path)
        there = {file(now, item) for item in now} - {""}
        ids = [i for i in new if file(db, db[i]) not in there]
        items, added = [db[i] for i in ids], len(ids)
        same = now.pictures == db.pictures
        now.add(
            Embeddings(db.vectors(ids), db.encoder), [db.thumbnail(i) for i in ids],
            names=[item.name for item in items], groups=[item.group for item in items],
            sources=[item.source if same else file(db, item) for item in items],
        )  # fmt: skip


@database.command("info")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_info(path: Path, as_json: bool) -> None:
    """Describe a saved database, or those of a model (a bundle's name or a folder)."""
    from knnfast.database import Database
    from knnfast.images import printable

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
        card = db.encoder
        lines = [f"encoder {card.name}, {card.dim} numbers, {card.sha256[:12]}"]
        if db.pictures is not None:
            lines.append(f"pictures {db.pictures}")
        lines += [f"{count:8,}  {group or '(no group)'}" for group, count in db.groups.items()]
        for line in lines:
            click.echo(printable(line))
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))


@database.command("search")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1)
@click.option("--encoder", help="That of the database; a model PATH has its own.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="Query by picture.")
@click.option("--image-weight", type=float, help="Share of the picture beside a prompt; 0.5.")
@click.option("--k", type=int, help="Neighbours; 10, or as many as there are, when not given.")
@click.option("--group", "groups", multiple=True, help="Search only this group (repeatable).")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_search(
    path: Path, prompts: tuple[str, ...], encoder: str | None, images: tuple[str, ...],
    image_weight: float | None, k: int | None, groups: tuple[str, ...], device: str, as_json: bool,
) -> None:  # fmt: skip
    """Find the images nearest to PROMPTS, to pictures (--image), or to both.

    PATH is a database, or a model (a bundle's name or a folder), whose first database it is.
    """
    from knnfast._calls import choose_neighbours
    from knnfast.database import Database
    from knnfast.images import printable
    from knnfast.query import as_queries, embed

    check_query(prompts, images)
    check_files("--image", images)
    folder = _databases(path)[0]
    db = Database.open(folder)
    if encoder is None and folder == path:
        raise ValueError("--encoder: needed for a database, the one that it was built with")
    found = find_encoder(encoder or str(path), device)
    db.check_encoder(found.card)
    queries = as_queries(list(prompts) or None, list(images) or None, image_weight, None, found)
    count, allow = choose_neighbours(db, k, list(groups) or None, None)
    rows = db.search(embed(queries, found), count, allow=allow)
    if as_json:
        click.echo(json.dumps({
            "labels": [q.label for q in queries], "neighbours": list(map(neighbours_of, rows)),
        }, indent=1))  # fmt: skip
        return
    for query, row in zip(queries, rows, strict=True):
        click.echo(f"{query.label}:")
        for near in row:
            group = f"  ({near.item.group})" if near.item.group else ""
            click.echo(printable(f"{near.score:8.3f}  {near.item.name}{group}"))


@database.command("merge")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_replace
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def database_merge(paths: tuple[Path, ...], out: Path, replace: bool, as_json: bool) -> None:
    """Merge databases made by one encoder."""
    from knnfast.database import Database
    from knnfast.diffusion.data import identity

    _check_out(out, replace)
    databases: dict[str, tuple[Path, Database]] = {}
    for path in paths:
        _refuse_model("paths", path)
        database = Database.open(path)
        first, _ = databases.setdefault(identity(database), (path, database))
        if first is not path:
            raise ValueError(f"paths: {path} holds the same images as {first}; give each once")
    merged = Database.merge([database for _, database in databases.values()])
    merged.save(out)
    if as_json:
        click.echo(json.dumps({"path": str(out), "images": len(merged)}, indent=1))
    else:
        click.echo(f"{out}: {len(merged):,} images")
