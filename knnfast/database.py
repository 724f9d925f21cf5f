"""Database: an exact index of image embeddings, with what each row is a picture of."""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from knnfast import _files
from knnfast._checks import check_range
from knnfast.images import READ_ERRORS, THUMBNAILS, Thumbnails, list_images, printable, read_image
from knnfast.search import Index

if TYPE_CHECKING:
    from knnfast.encoders import Embeddings, Encoder, EncoderCard

FORMAT = "knnfast-database"

# What `Database.save` writes beside database.json; with a dot before and more behind, a temporary.
_PARTS = re.compile(
    r"index-[0-9a-f]{8}|items-[0-9a-f]{8}\.json|"
    + THUMBNAILS.pattern
    + r"|\.(database\.json|items-.+|thumbnails-.+)-\w{8,}"
)


@dataclass(frozen=True)
class Item:
    """What one row of the index is."""

    id: int
    name: str
    group: str
    source: str


class Unread(NamedTuple):
    """A picture to be read, and what its row will be called."""

    path: Path  # as it is told when it cannot be read
    read: Callable[[], Image.Image]
    name: str
    group: str
    source: str


@dataclass(frozen=True)
class Neighbour:
    """One search result: the item and its score under the index's metric."""

    item: Item
    score: float


class Collection:
    """Items with groups, to choose from."""

    def __iter__(self) -> Iterator[Item]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def groups(self) -> dict[str, int]:
        """Each group and how many images it holds, by name."""
        counts: dict[str, int] = {}
        for item in self:
            counts[item.group] = counts.get(item.group, 0) + 1
        return dict(sorted(counts.items()))

    def ids_of(
        self, groups: Iterable[str] | None = None, where: Callable[[Item], bool] | None = None
    ) -> np.ndarray:
        """Ids of the images in these groups for which `where(item)` holds, [n] int64.

        Feed them to `search(allow=...)`. Without groups, or without `where`, all do.

        Args:
            groups: names, or one name.
            where: called with each `Item`.

        Raises:
            ValueError: a group that is not there. TypeError: groups that are no names, `where` no
                function.
        """
        if isinstance(groups, str):
            groups = [groups]
        if not (groups is None or isinstance(groups, Iterable)):
            raise TypeError(f"groups: expected names, got {groups!r}")
        if not (where is None or callable(where)):
            raise TypeError(f"where: expected a function of an image, got {where!r}")
        wanted = None if groups is None else set(groups)
        if wanted is not None and (unknown := wanted - set(self.groups)):
            raise ValueError(f"groups: {sorted(unknown)} not in this database: {list(self.groups)}")
        ids = [
            item.id
            for item in self
            if (wanted is None or item.group in wanted) and (where is None or where(item))
        ]
        return np.array(ids, np.int64)

    def most(self, k: int, allow: np.ndarray | None = None) -> int:
        """The largest number of neighbours, up to k, that a search among `allow` can give."""
        return min(k, len(self) if allow is None else len(allow))

    def best(self, found: Sequence[Neighbour], k: int) -> list[Neighbour]:
        """The first k of neighbours that a wider search has found."""
        return list(found[:k])


class StaleDatabaseError(ValueError):
    """Others have saved a database since it was opened here: open it again."""


class Database(Collection):
    """Images as a retrieval database: embeddings, names, groups, sources and thumbnails.

    The rows' embeddings live in an `Index` (cosine); everything else is metadata by id. A database
    belongs to the encoder that made its rows: embeddings of another one are refused. Threads may
    search it while one adds.

    Args:
        encoder: card of the encoder whose embeddings the rows are.
        thumbnail_size: pixels on a side of the stored thumbnails, 1 ... 256.

    Attributes:
        pictures: folder that the items' sources are relative to, as `build` was given it; None: the
            working directory. Assign another one where the pictures were moved.
    """

    def __init__(self, encoder: EncoderCard, thumbnail_size: int = 64) -> None:
        self.encoder = encoder
        self.pictures: Path | None = None
        self.index = Index(encoder.dim, metric="cosine")
        self._items: dict[int, Item] = {}
        self._thumbnails = Thumbnails(thumbnail_size)
        self._opened: tuple[Path, Any] | None = None  # from where, and which state of it this is
        self._folders = threading.Lock()  # one adds a folder at a time
        self._writing = threading.Lock()  # one adds or saves at a time
        self._adding = threading.Lock()  # rows and items come together

    # ---- making one -------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        folder: str | Path,
        encoder: Encoder,
        *,
        batch_size: int = 64,
        thumbnail_size: int = 64,
        progress: bool = False,
        on_skip: Callable[[Path, str], None] | None = None,
    ) -> Database:
        """Embed every image (png, jpg, webp) below `folder`.

        An image's name is its file name without the ending, its group the folder it lies in,
        relative to `folder`. A file that cannot be read as an image is left out and reported to
        `on_skip(path, reason)`; the others are still embedded.

        Args:
            folder: with the images, in any folders below it.
            encoder: embeds them.
            batch_size: images embedded at once, >= 1.
            thumbnail_size: pixels on a side of the stored thumbnails, 1 ... 256.
            progress: show a progress bar.
            on_skip: called for each file that is left out.

        Raises:
            FileNotFoundError: `folder` is no folder. ValueError: it holds no readable image, or a
                size out of its range. TypeError: a size that is no whole number.
        """
        root = Path(folder)
        db = cls(encoder.card, thumbnail_size)
        db.add_folder(root, encoder, batch_size=batch_size, progress=progress, on_skip=on_skip)
        if not len(db):
            raise ValueError(f"{root}: no readable image (png, jpg, webp) below it")
        return db

    def add_folder(
        self,
        folder: str | Path,
        encoder: Encoder,
        *,
        batch_size: int = 64,
        progress: bool = False,
        on_skip: Callable[[Path, str], None] | None = None,
    ) -> np.ndarray:
        """Embed the images below `folder` that are not there yet, as `build` does.

        An image is there when an item's source is its file. Of a folder outside of `pictures`,
        sources are whole paths.

        Args: as of `build`.

        Returns:
            Their ids, [N] int64. What was embedded before an exception stays.

        Raises:
            FileNotFoundError: `folder` is no folder. ValueError: another encoder, or a batch_size
                below 1. TypeError: a batch_size that is no whole number.
        """
        self.check_encoder(encoder.card)
        check_range("batch_size", batch_size, 1)
        given, root = Path(folder), Path(folder).resolve()
        with self._folders:
            found = list_images(given)
            if found and not len(self) and self.pictures is None:
                self.pictures = root
            base = Path(self.pictures or "").resolve()
            there = {base / item.source for item in self if item.source}
            paths = [path for path in found if root / path.relative_to(given) not in there]

            def unread(path: Path) -> Unread:
                whole = root / path.relative_to(given)
                inside = self.pictures is not None and whole.is_relative_to(base)
                place = whole.relative_to(base if inside else root)
                source, group = (place if inside else whole), printable(place.parent.as_posix())
                read = partial(read_image, path)
                return Unread(path, read, printable(path.stem), group, source.as_posix())

            shown = _progress(paths, progress, "embedding")
            return self.add_unread(map(unread, shown), encoder, batch_size, on_skip)

    def add_unread(
        self,
        pictures: Iterable[Unread],
        encoder: Encoder,
        batch_size: int = 64,
        on_skip: Callable[[Path, str], None] | None = None,
    ) -> np.ndarray:
        """Read, embed and add pictures, `batch_size` at a time; returns the ids, [N] int64.

        What cannot be read as an image is left out and reported to `on_skip(path, reason)`.
        """
        check_range("batch_size", batch_size, 1)
        ids = [np.empty(0, np.int64)]
        read: list[tuple[Image.Image, Unread]] = []

        def flush() -> None:
            if read:
                images = [image for image, _ in read]
                ids.append(
                    self.add(
                        encoder.encode_images(images, batch_size),
                        images,
                        names=[each.name for _, each in read],
                        groups=[each.group for _, each in read],
                        sources=[each.source for _, each in read],
                    )
                )
            read.clear()

        for each in pictures:
            try:
                read.append((each.read(), each))
            except READ_ERRORS as e:
                if on_skip is not None:
                    on_skip(each.path, str(e))
                continue
            if len(read) == batch_size:
                flush()
        flush()
        return np.concatenate(ids)

    def add(
        self,
        embeddings: Embeddings,
        images: Sequence[Image.Image],
        *,
        names: Sequence[str],
        groups: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Append images with their embeddings; returns their ids, [N] int64.

        Args:
            embeddings: N rows by this database's encoder.
            images: N PIL pictures, kept as thumbnails.
            names: N texts; they need not differ.
            groups: N texts; None: all "".
            sources: N paths, relative to `pictures` or whole; None: all "", no file.

        Raises:
            ValueError: embeddings of another encoder, or lengths that differ; TypeError: an entry
                that is no picture or no text. Nothing is added.
        """
        self.check_encoder(embeddings.card)
        n = len(embeddings.vectors)
        groups = [""] * n if groups is None else groups
        sources = [""] * n if sources is None else sources
        for label, values in (
            ("images", images), ("names", names), ("groups", groups), ("sources", sources),
        ):  # fmt: skip
            if len(values) != n:
                raise ValueError(f"{label}: has {len(values)} entries for {n} embeddings")
            kind = Image.Image if label == "images" else str
            if isinstance(values, str) or not all(isinstance(v, kind) for v in values):
                raise TypeError(f"{label}: must be a sequence of {kind.__name__}")
        thumbnails = [self._thumbnails.shrink(image) for image in images]
        with self._writing, self._adding:
            ids = np.asarray(self.index.add(embeddings.vectors))
            try:
                for i, thumbnail, name, group, source in zip(
                    ids.tolist(), thumbnails, names, groups, sources, strict=True
                ):
                    self._thumbnails.put(i, thumbnail)
                    self._items[i] = Item(i, name, group, source)
            except BaseException:  # Ctrl-C
                self.index.remove(ids)
                for i in ids.tolist():
                    self._items.pop(i, None)
                    self._thumbnails.drop(i)
                raise
        return ids

    def remove(self, ids: Sequence[int] | np.ndarray) -> int:
        """Remove images by id; returns how many were found.

        Their rows are gone from files with the next `save`.

        Args:
            ids: whole numbers; those that are not there are passed over.

        Raises:
            TypeError, ValueError: ids that are no whole numbers.
        """
        gone = {int(i) for i in np.asarray(ids, np.int64).ravel()}
        with self._writing, self._adding:
            kept = {i: item for i, item in self._items.items() if i not in gone}
            try:
                found = self.index.remove(ids)  # first: a search beside it finds no row less than k
                self._items = kept
            except BaseException:  # Ctrl-C
                self._items = {i: item for i, item in self._items.items() if i in self.index}
                raise
            for i in gone:
                self._thumbnails.drop(i)
        return found

    @classmethod
    def merge(cls, databases: Sequence[Database]) -> Database:
        """One database holding the rows of several made by one encoder; ids count anew.

        Thumbnails that lie in files stay there until it is saved.

        Raises:
            ValueError: none given, or their encoders differ. TypeError: one is no database.
        """
        if not databases:
            raise ValueError("databases: at least one is needed to merge, got none")
        for db in databases:
            if not isinstance(db, Database):
                raise TypeError(f"databases: expected Database, got {type(db).__name__}")
        first = databases[0]
        merged = cls(first.encoder, first._thumbnails.size)
        for db in databases:
            merged.check_encoder(db.encoder)
        places = {db.pictures for db in databases}
        merged.pictures = first.pictures if len(places) == 1 else None
        for db in databases:
            old = db.ids
            ids = np.asarray(merged.index.add(db.index.vectors(old)))
            for i, j in zip(ids.tolist(), old.tolist(), strict=True):
                item = replace(db[j], id=i)
                if item.source and db.pictures and merged.pictures is None:
                    item = replace(item, source=str(db.pictures / item.source))
                merged._items[i] = item
                merged._thumbnails.share(i, db._thumbnails, j)
        return merged

    # ---- using it ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, id: int) -> Item:
        try:
            return self._items[id]
        except KeyError:
            raise KeyError(f"id {id} is not in this database") from None

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._items.values()))

    def __repr__(self) -> str:
        return f"Database({len(self):,} images, encoder={self.encoder.name!r})"

    @property
    def ids(self) -> np.ndarray:
        """Ids of all rows in the order they were added, [N] int64."""
        return np.array(list(self._items), np.int64)

    def thumbnail(self, id: int) -> Image.Image:
        """The image of a row as stored: RGB, `thumbnail_size` on a side, padded white."""
        self[id]
        return self._thumbnails.get(id)

    def file(self, item: Item) -> Path | None:
        """The picture's own file; None where the source is none, or is not found."""
        path = (self.pictures or Path()) / item.source
        return path if item.source and path.is_file() else None

    def to(self, device: str) -> Database:
        """Move the index to a device (cpu, cuda or cuda:N), where it is searched; returns itself.

        Raises:
            ValueError: a device that is not there.
        """
        with self._writing, self._adding:
            self.index = self.index.to(device)
        return self

    def check_encoder(self, card: EncoderCard) -> None:
        """Refuse embeddings that another encoder made: their scores would mean nothing."""
        if card.sha256 != self.encoder.sha256:
            raise ValueError(
                f"embeddings of encoder {card.name!r} ({card.sha256[:12]}) do not fit this "
                f"database, which was built with {self.encoder.name!r} ({self.encoder.sha256[:12]})"
            )

    def search(
        self, queries: Embeddings, k: int, *, allow: np.ndarray | None = None
    ) -> list[list[Neighbour]]:
        """The k nearest images of each query by cosine, best first; exact, ties by lower id.

        Args:
            queries: [M, dim] embeddings by this database's encoder.
            k: neighbours, k >= 1; fewer come back when fewer rows are allowed.
            allow: int64 ids to search among (see `ids_of`).

        Raises:
            ValueError: embeddings of another encoder, a k below 1. TypeError: a k that is no whole
                number, an `allow` that is no list of ids.
        """
        self.check_encoder(queries.card)
        known = self._items  # grows with `add`; `remove` puts another in its place
        scores, ids = self.index.search(queries.vectors, k, allow=allow)
        with self._adding:  # an `add` whose rows were found has their items by now, or is undone
            known = known | self._items if known is not self._items else known
            items = {i: known[i] for i in ids.ravel().tolist() if i in known}
        return [
            [Neighbour(items[i], s) for s, i in zip(row_s, row_i, strict=True) if i in items]
            for row_s, row_i in zip(scores.tolist(), ids.tolist(), strict=True)
        ]

    def vectors(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Stored embeddings of these rows, [n, dim] float32.

        Raises:
            ValueError: an id that is not there. TypeError: ids that are no whole numbers.
        """
        return np.asarray(self.index.vectors(ids)).astype(np.float32)

    # ---- files ------------------------------------------------------------------------------

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Whether a database is saved there, damaged or not."""
        manifest = Path(path) / "database.json"
        return manifest.is_file() and FORMAT.encode() in manifest.read_bytes()

    @staticmethod
    def check_place(path: str | Path) -> None:
        """Refuse a path where something else than a database is."""
        root = Path(path)
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root}: is a file; a database is saved as a folder")
        if not root.is_dir():
            return
        names = [child.name for child in root.iterdir()]
        only_parts = all(map(_PARTS.fullmatch, names))  # what a killed save left
        if not only_parts and not Database.is_at(root):  # asked last: a save may end in between
            raise ValueError(f"{root}: is a folder with other content; give a new or empty one")

    def save(self, path: str | Path) -> None:
        """Write the database into folder `path`, atomically; who adds or saves meanwhile waits.

        New files carry a new generation's name; the manifest `database.json` is replaced last and
        old ones are removed after it, so that a kill at any moment leaves the old database or the
        new one. Files of other names stay.

        Raises:
            StaleDatabaseError: others have saved the very database that this one was opened from.
            ValueError: something else is there.
            OSError: it could not be written (a full disk, say); then nothing of it is left, and the
                old database is.
        """
        root = Path(path)
        self.check_place(root)
        new = not root.exists()
        generation = uuid.uuid4().hex[:8]
        with self._writing, _files.locked(root):
            try:
                self.check_place(root)
                self._check_same(root)
                atlases = self._write(root, generation)
            except BaseException:
                if _names(root, generation):  # Ctrl-C behind the last step: it is saved
                    raise
                for part in root.glob(f"*-{generation}*"):
                    _remove(part)
                if new:
                    with suppress(OSError):  # others put something there
                        root.rmdir()
                raise
            if self._opened and self._opened[0] == root.resolve():
                self._opened = root.resolve(), _files.stamp(root / "database.json")
            if self._thumbnails.lies_in(root):  # in files that go now
                self._thumbnails.lend(self.ids.tolist(), atlases)
            for old in root.iterdir():
                if _PARTS.fullmatch(old.name) and generation not in old.name:
                    _remove(old)

    def _check_same(self, root: Path) -> None:
        """Refuse to write over what others have saved where this database comes from."""
        now = _files.stamp(root / "database.json")
        if self._opened and now and root.resolve() == self._opened[0] and now != self._opened[1]:
            raise StaleDatabaseError(
                f"{root}: others have saved this database since it was opened here; what they "
                "changed would be lost: open it again"
            )

    def _write(self, root: Path, generation: str) -> list[tuple[Path, str]]:
        """Write the files of one generation, the manifest last; the thumbnails with SHA-256."""
        ids = self.ids
        if not np.array_equal(np.sort(self.index.ids), np.sort(ids)):
            raise ValueError(
                f"database: its index holds {len(self.index)} rows for {len(ids)} images; add and "
                "remove both by the methods of `Database`"
            )
        items = [self._items[i] for i in ids.tolist()]
        files: dict[str, str] = {}

        def put(name: str, data: bytes) -> str:
            _files.write_atomic(root / name, data)
            files[name] = _files.sha256_file(root / name)
            return name

        columns = {
            "ids": ids.tolist(),
            "names": [x.name for x in items],
            "groups": [x.group for x in items],
            "sources": [x.source for x in items],
        }
        thumbnails = [
            put(f"thumbnails-{generation}-{n:04}.webp", data)
            for n, data in enumerate(self._thumbnails.atlases(ids))
        ]
        manifest = {
            "format": FORMAT,
            "version": 1,
            "encoder": self.encoder.to_dict(),
            "count": len(self),
            "index": f"index-{generation}",
            "items": put(f"items-{generation}.json", _files.dump_json(columns)),
            "pictures": None if self.pictures is None else str(self.pictures),
            "thumbnail_size": self._thumbnails.size,
            "thumbnails": thumbnails,
            "sha256": files,
        }
        self.index.save(root / f"index-{generation}")
        _files.write_json(root / "database.json", manifest)
        return [(root / name, files[name]) for name in thumbnails]

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu") -> Database:
        """Open a saved database; thumbnails are read when they are asked for.

        Who opens it while it is saved anew gets the old one or the new one. Of the old one the
        thumbnails go with its files.

        Args:
            path: its folder.
            device: where its rows are searched: cpu, cuda or cuda:N.

        Raises:
            FileNotFoundError: no database at `path`, or a file of it is missing.
            ValueError: a damaged or foreign file; the message names it. The rows of the index are
                mapped, not checked: `database.index.verify()` does that.
        """
        root = Path(path)
        while True:
            before = _files.stamp(root / "database.json")
            try:
                db = cls._open(root, device)
                db._opened = root.resolve(), before
                return db
            except FileNotFoundError:
                if before is None or _files.stamp(root / "database.json") == before:
                    raise

    @classmethod
    def _open(cls, root: Path, device: str) -> Database:
        from knnfast.encoders import EncoderCard

        if not (root / "database.json").is_file():
            raise FileNotFoundError(f"{root}: no database there (it has no database.json)")
        manifest_path = root / "database.json"
        manifest = _files.read_json(manifest_path, FORMAT)
        db = cls.__new__(cls)
        try:
            db.encoder = EncoderCard.from_dict(manifest["encoder"])
            db.pictures = Path(manifest["pictures"]) if manifest.get("pictures") else None
            db._thumbnails = Thumbnails(manifest["thumbnail_size"])
            items_path, index_path = (
                root / _files.plain_name(manifest[name]) for name in ("items", "index")
            )
            atlas_paths = [root.absolute() / _files.plain_name(n) for n in manifest["thumbnails"]]
            sha256 = {str(k): str(v) for k, v in manifest["sha256"].items()}
            atlases = [(path, sha256[path.name]) for path in atlas_paths]
            items_sha256 = sha256[items_path.name]
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{manifest_path}: incomplete or malformed ({e!r})") from None
        db._writing, db._adding, db._folders = (threading.Lock() for _ in range(3))
        _files.check_sha256(items_path, items_sha256)
        columns = _files.read_json(items_path)
        try:
            rows = zip(
                columns["ids"], columns["names"], columns["groups"], columns["sources"],
                strict=True,
            )  # fmt: skip
            db._items = {int(i): Item(int(i), str(n), str(g), str(s)) for i, n, g, s in rows}
            db._thumbnails.lend(list(db._items), atlases)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"{items_path}: incomplete or malformed ({e!r})") from None
        db.index = Index.open(index_path, device)
        if db.index.dim != db.encoder.dim or set(db.index.ids.tolist()) != set(db._items):
            raise ValueError(
                f"{manifest_path}: the index holds {len(db.index)} rows of {db.index.dim} numbers, "
                f"the manifest says {len(db._items)} of {db.encoder.dim}, or other ids"
            )
        return db


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link, but not what that leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _names(root: Path, generation: str) -> bool:
    """Whether the manifest is that of a generation."""
    manifest = root / "database.json"
    return manifest.is_file() and generation.encode() in manifest.read_bytes()


def _progress(items: Sequence[Path], shown: bool, label: str) -> Iterable[Path]:
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="image", disable=not shown)
