"""Images as training data: folders, databases and WebDataset shards, encoded once, in parts."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from knnfast import _files
from knnfast.database import Database, Unread
from knnfast.diffusion.augment import PHOTOS, AugmentConfig, augmented
from knnfast.diffusion.cache import check_recipe, load_cache, save_cache
from knnfast.diffusion.distributed import Processes
from knnfast.diffusion.pairs import Pairs
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.trainer import generator
from knnfast.encoders import pixels
from knnfast.images import READ_ERRORS, SUFFIXES, flatten, list_images, printable, read_image

if TYPE_CHECKING:
    from knnfast.encoders import Encoder, EncoderCard

PAIRS_FILE = "pairs.safetensors"
PARTS_FOLDER = "pairs.parts"
PART = 1024  # images encoded at a time; what a kill can lose
MOST_CODES = 1 << 15  # what int16 tells apart
CROPS = ("center", "pad")


class ImageEncoder(Protocol):
    """The side of an encoder that training uses: images in, unit rows out."""

    card: EncoderCard

    def encode_images(self, images: list[Image.Image], batch_size: int = 64) -> Any:
        """Give an object whose `vectors` is [N, E] float32."""


class Picture(NamedTuple):
    """One image of a collection, not read yet."""

    name: str
    read: Callable[[], Image.Image]
    shard: str = ""  # file name of the tar that holds it
    member: str = ""  # its path there


# ---- collections --------------------------------------------------------------------------------


def shards(data: str | Path) -> list[Path]:
    """Tar files that `data` means: one file, `shard-{000..099}.tar`, or a folder that holds some.

    Returns:
        The files in order; empty when `data` is something else.

    Raises:
        FileNotFoundError: a shard is missing.
    """
    path = Path(data)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix != ".tar":
        return []
    files = [path]
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", str(data)):
        before, after = str(data)[: span.start()], str(data)[span.end() :]
        first, last = span.groups()
        numbers = range(int(first), int(last) + 1)
        files = [Path(f"{before}{n:0{len(first)}}{after}") for n in numbers]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such shard")
    return files


def pictures(data: str | Path | Database) -> Iterator[Picture]:
    """Every image of a folder, of WebDataset shards or of a database, in a fixed order.

    Names and captions are not looked at. A database's images come from their files
    (`Database.file`), or from its thumbnails where there is none; a warning tells how many sources
    are named but not found.

    Raises:
        FileNotFoundError: no such folder or shard. ValueError: a damaged shard.
    """
    if isinstance(data, Database):
        if lost := lost_pictures(data):
            warnings.warn(
                f"{lost:,} of {len(data):,} pictures come from the database's thumbnails: their "
                f"files are not found below {data.pictures or 'the working directory'}",
                stacklevel=2,
            )
        for item in data:
            file = data.file(item)
            read = partial(data.thumbnail, item.id) if file is None else partial(read_image, file)
            yield Picture(item.source or item.name, read)
    elif tars := shards(data):
        for file in tars:
            yield from _members(file)
    else:
        for path in list_images(data):
            yield Picture(str(path), partial(read_image, path))


def count_readable(data: str | Path | Database, most: int) -> int:
    """How many images of a collection can be read; no more are looked at once `most` are found.

    Raises: as `pictures`, which also warns; here it does not.
    """
    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in pictures(data):
            try:
                item.read()
            except READ_ERRORS:
                continue
            found += 1
            if found == most:
                break
    return found


def lost_pictures(data: str | Path | Database) -> int:
    """How many of a database's sources are not found, so that their thumbnails are read."""
    if not isinstance(data, Database):
        return 0
    return sum(bool(item.source) and data.file(item) is None for item in data)


def identity(data: str | Path | Database) -> str:
    """Hash of what a collection is: names and sizes of its files, or a database's rows."""
    digest = hashlib.sha256()
    if isinstance(data, Database):
        for item in data:
            row = f"{item.id}\0{item.name}\0{item.source}\n"
            digest.update(row.encode(errors="surrogateescape"))
        digest.update(data.vectors(data.ids).tobytes())
    else:
        root = Path(data)
        for path in shards(data) or list_images(data):
            name = path.relative_to(root) if root.is_dir() else path.name
            row = f"{name}\0{path.stat().st_size}\n"
            digest.update(row.encode(errors="surrogateescape"))
    return digest.hexdigest()


class Loaded(NamedTuple):
    """Pictures as `load_images` gives them."""

    squares: Tensor  # [N, 3, size, size] uint8
    embeddings: Tensor  # of the originals, or of their squares at full size, [N, E] float16
    skipped: list[str]  # a line for each picture that cannot be read


def own_crop(encoder: ImageEncoder) -> str:
    """What an encoder itself makes of a picture that is no square, and so a database: see `square`.

    open_clip's take the middle, those of this package the whole.
    """
    return "center" if encoder.card.name.startswith("open_clip:") else "pad"


def square(image: Image.Image, crop: str) -> Image.Image:
    """The middle of a picture (`center`), or the whole of it on a white square (`pad`)."""
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")
    side = (min if crop == "center" else max)(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    if crop == "center":
        return image.crop((left, top, left + side, top + side))
    whole = Image.new("RGB", (side, side), "white")
    whole.paste(image, (-left, -top))
    return whole


def load_images(
    items: Iterable[Picture], size: int, encoder: ImageEncoder, crop: str, batch: int = 64
) -> Loaded:
    """Read pictures as a tokenizer of `size` sees them, and embed the same part of each.

    Where `crop` is the encoder's own, the embeddings are those of a database. `batch` originals are
    in memory at a time.
    """
    squares = [np.zeros((0, size, size, 3), np.uint8)]
    rows = [np.zeros((0, encoder.card.dim), np.float16)]
    skipped, stream = [], iter(items)
    while group := list(islice(stream, batch)):
        originals = []
        for item in group:
            try:
                originals.append(item.read().convert("RGB"))
            except READ_ERRORS as e:
                name, why = printable(item.name), printable(str(e))
                skipped.append(why if name in why else f"{name}: {why}")
        if originals:
            cut = [square(x, crop) for x in originals]
            squares.append(pixels(originals if crop == "pad" else cut, size))  # it pads, too
            rows.append(_embed(originals if crop == own_crop(encoder) else cut, encoder, batch))
    images = torch.from_numpy(np.concatenate(squares)).permute(0, 3, 1, 2).contiguous()
    return Loaded(images, torch.from_numpy(np.concatenate(rows)), skipped)


def _embed(images: list[Image.Image], encoder: ImageEncoder, batch: int) -> np.ndarray:
    """Embeddings [N, E] as pairs keep them."""
    return np.asarray(encoder.encode_images(images, batch_size=batch).vectors, dtype=np.float16)


def _members(file: Path) -> Iterator[Picture]:
    """Images of a shard, as they stand in it (WebDataset: a tar of KEY.ENDING files)."""
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    read = partial(_decode, content.read())
                    path = PurePosixPath(member.name).as_posix()
                    yield Picture(f"{file}: {path}", read, file.name, path)
    except tarfile.TarError as e:
        raise ValueError(f"{file}: a damaged shard ({e})") from None


def _decode(data: bytes) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # whose words name the buffer
        raise ValueError("not a readable image") from None
    with opened as image:
        return flatten(ImageOps.exif_transpose(image))


def build_database(data: str | Path, encoder: Encoder, batch: int = 64) -> Database:
    """A retrieval database of a folder's images or of WebDataset shards.

    A shard's image is called as its member is, up to the first dot; its group is the member's
    folder.
    """
    if not shards(data):
        return Database.build(data, encoder)

    def unread(item: Picture) -> Unread:
        path = PurePosixPath(item.member)
        name = printable(path.name.partition(".")[0] or path.name)
        group = printable(path.parent.as_posix())
        return Unread(Path(item.name), item.read, name, group, f"{item.shard}/{item.member}")

    db = Database(encoder.card)
    db.add_unread(map(unread, pictures(data)), encoder, batch)  # `encode` has warned of bad ones
    return db


# ---- encoding -----------------------------------------------------------------------------------


def versions_of(
    images: Tensor, count: int, seed: Sequence[int], augmentation: AugmentConfig = PHOTOS
) -> Iterator[Tensor]:
    """The images as they are, then `count` - 1 times with every image augmented in its own way.

    Args:
        images: [N, 3, S, S], uint8.
        count: how many.
        seed: numbers that fix the augmentations.
        augmentation: how the images are changed.

    Yields:
        [N, 3, S, S], uint8.
    """
    yield images
    for version in range(1, count):
        yield augmented(images, generator(*seed, version), augmentation)


def make_pairs(
    versions: Iterable[Tensor],
    encoder: ImageEncoder,
    tokenizer: VQTokenizer,
    targets: Tensor | None = None,
    database: Tensor | None = None,
    batch: int = 64,
    known: Tensor | None = None,
) -> Pairs:
    """Encode every version of a collection: codes and embeddings.

    Args:
        versions: the collection, one or more times, each [N, 3, S, S] uint8.
        encoder: gives embeddings of PIL images; nothing else of it is used.
        tokenizer: gives codes.
        targets: ids that may be targets, [n] int64; None: all.
        database: ids that may be neighbours, [m] int64; None: all.
        batch: images at a time.
        known: the first version's embeddings [N, E], where its images were larger.

    Raises:
        ValueError: the tokenizer has more codes than fit.
    """
    if tokenizer.codebook_size > MOST_CODES:
        raise ValueError(
            f"tokenizer: pairs hold at most {MOST_CODES:,} codes, got {tokenizer.codebook_size:,}"
        )
    device = next(tokenizer.parameters()).device
    codes: list[Tensor] = []
    embeddings = [] if known is None else [known]
    for images in versions:
        if len(embeddings) == len(codes):
            shown = [Image.fromarray(x.numpy()) for x in images.permute(0, 2, 3, 1)]
            embeddings.append(torch.from_numpy(_embed(shown, encoder, batch)))
        parts = [tokenizer.encode(x.to(device).float() / 255).cpu() for x in images.split(batch)]
        codes.append(torch.cat(parts).to(torch.int16))
    everything = torch.arange(codes[0].shape[0])
    return Pairs(
        torch.stack(codes),
        torch.stack(embeddings),
        everything if targets is None else targets,
        everything if database is None else database,
    )


def encode(
    data: str | Path | Database,
    folder: Path,
    encoder: ImageEncoder,
    tokenizer: VQTokenizer,
    versions: int,
    seed: int,
    processes: Processes | None = None,
    progress: bool = True,
    augmentation: AugmentConfig = PHOTOS,
    crop: str | None = None,
) -> Pairs:
    """Encode a collection once; later calls read the result, and a killed one goes on.

    The images pass through memory in parts of PART, shared among the processes; each finished part
    is a file until all of them become `pairs.safetensors`. A `crop` of None is the encoder's own.

    Raises:
        ValueError: fewer than two readable images, or `folder` holds another collection's result.
    """
    processes = processes or Processes()
    crop = crop or own_crop(encoder)
    file, parts = folder / PAIRS_FILE, folder / PARTS_FOLDER
    recipe = {
        "data": identity(data),
        "thumbnails": lost_pictures(data),
        "encoder": encoder.card.sha256,
        "tokenizer": _files.weights_hash(tokenizer),
        "image_size": tokenizer.image_size,
        "versions": versions,
        "augmentation": augmentation.to_dict(),
        "crop": crop,
        "seed": seed,
    }
    if processes.main and load_cache(file, recipe) is None:
        parts.mkdir(parents=True, exist_ok=True)
        made_from = parts / "recipe.json"
        if made_from.is_file():
            check_recipe(made_from, _files.read_json(made_from), recipe)
        _files.write_json(made_from, recipe)
    processes.wait()
    if parts.is_dir():
        made = partial(versions_of, count=versions, augmentation=augmentation)
        _encode_parts(data, parts, encoder, tokenizer, crop, made, seed, processes, progress)
        processes.wait()
        if processes.main:
            _join(parts, file, recipe)
        processes.wait()
    tensors = load_cache(file, recipe)
    assert tensors is not None
    return Pairs(**tensors)


def _encode_parts(
    data: str | Path | Database, folder: Path, encoder: ImageEncoder, tokenizer: VQTokenizer,
    crop: str, versions: Callable[..., Iterator[Tensor]], seed: int, processes: Processes,
    progress: bool,
) -> None:  # fmt: skip
    """Write this process's share of the parts."""
    stream = pictures(data)
    total = None  # how many images shards hold is known at their end
    if isinstance(data, Database):
        total = len(data)
    elif not shards(data):
        total = len(list_images(data))
    shown = progress and processes.main
    bar = tqdm(desc="encoding", total=total, unit="image", disable=not shown)
    number = 0
    while items := list(islice(stream, PART)):
        part = folder / f"{number:06d}.safetensors"
        if number % processes.count == processes.rank and not part.is_file():
            images, known, skipped = load_images(items, tokenizer.image_size, encoder, crop)
            for line in skipped:
                warnings.warn(f"skipped {line}", stacklevel=2)
            if len(images):
                made = make_pairs(
                    versions(images, seed=(seed, number)), encoder, tokenizer, known=known
                )
                _files.save_tensors(part, {"codes": made.codes, "embeddings": made.embeddings})
        bar.update(len(items))
        number += 1
    bar.close()


def _join(parts: Path, file: Path, recipe: dict[str, Any]) -> None:
    """Make one file of all parts."""
    loaded = [load_file(p) for p in sorted(parts.glob("*.safetensors"))]
    count = sum(p["codes"].shape[1] for p in loaded)
    if count < 2:
        shutil.rmtree(parts)  # nothing worth going on from
        raise ValueError(f"data: needs at least two readable images, found {count}")
    tensors = {name: torch.cat([p[name] for p in loaded], 1) for name in ("codes", "embeddings")}
    everything = torch.arange(count)
    save_cache(file, {**tensors, "targets": everything, "database": everything.clone()}, recipe)
    shutil.rmtree(parts)
