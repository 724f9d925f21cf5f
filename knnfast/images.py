"""Pictures in and out: files, transparency, thumbnails."""

from __future__ import annotations

import io
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from knnfast import _files
from knnfast._checks import check_range

if TYPE_CHECKING:
    from torch import Tensor

# A saved database's own pictures (database.py).
THUMBNAILS = re.compile(r"thumbnails-[0-9a-f]{8}-\d{4,}\.webp")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ATLAS_SIDE = 32  # thumbnails on a side of one atlas: 32 x 32 cells of 64 px make 2048 px
MOST_PIXELS = 256  # on a side of a thumbnail: a larger atlas is a bomb to Pillow, or no WebP
READ_ERRORS = (
    OSError,
    UnidentifiedImageError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)


def list_images(folder: str | Path) -> list[Path]:
    """All png, jpg and webp files below `folder`, sorted; the thumbnails of databases are none.

    A warning tells of a folder that cannot be listed. Links to folders are not followed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")

    def lost(error: OSError) -> None:
        warnings.warn(f"skipped {error.filename}: {error.strerror}", stacklevel=3)

    paths = (Path(at, name) for at, _, names in os.walk(root, onerror=lost) for name in names)
    files = (p for p in paths if p.suffix.lower() in SUFFIXES and _may_be_file(p))
    return sorted(p for p in files if not _is_thumbnails(p))


def _may_be_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that cannot be entered: opening it will tell
        return True


def _is_thumbnails(path: Path) -> bool:
    return bool(THUMBNAILS.fullmatch(path.name)) and (path.parent / "database.json").is_file()


def printable(name: str) -> str:
    """A file's name as text: what is no UTF-8 in it, or steers a terminal, is replaced."""
    odd = ("Cc", "Cs")  # control characters, and bytes that are no UTF-8
    return "".join(c if unicodedata.category(c) not in odd else "\ufffd" for c in name)


def read_image(path: str | Path, background: str = "white") -> Image.Image:
    """Read an image as RGB, turned upright, transparency on `background`.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a folder. ValueError: not an image, or a
            damaged one.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give a file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return upright(image, background)
    except UnidentifiedImageError:  # whose words are the path again
        raise ValueError(f"{path}: not a readable image") from None
    except READ_ERRORS as e:
        raise ValueError(f"{path}: not a readable image ({e})") from None


def check_size(image: Image.Image) -> None:
    """Refuse a picture without pixels."""
    if 0 in image.size:
        raise ValueError(f"image: has no pixels, its size is {image.size}")


def upright(image: Image.Image, background: str = "white") -> Image.Image:
    """A picture as it is to be looked at: turned as its EXIF says, then `flatten`."""
    return flatten(ImageOps.exif_transpose(image), background)


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """RGB with transparency laid on `background`; ValueError for a picture without pixels."""
    check_size(image)
    if image.mode == "F":
        raise ValueError("image: mode F has no fixed range; give 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        image = _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "P" or "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(behind, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey as L, or LA where one of them is transparent."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(
            f"image: mode {image.mode} must hold 0 to 65535, got {grey.min()} to {grey.max()}"
        )
    levels = Image.fromarray((grey / 257).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return levels
    opaque = Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (levels, opaque))


def pictures_of(pixels: Tensor) -> list[Image.Image]:
    """Pictures of a tensor [N, 3, H, W] in [0, 1]."""
    levels = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(x) for x in levels]


@dataclass(frozen=True)
class Atlas:
    """A WebP file with thumbnails in its cells, row by row."""

    path: Path
    sha256: str
    count: int


class Thumbnails:
    """Small pictures by id: in memory those that were added, in atlases those that were saved."""

    def __init__(self, size: int) -> None:
        check_range("thumbnail_size", size, 1, MOST_PIXELS)
        self.size = size
        self._images: dict[int, Image.Image] = {}
        self._lent: dict[int, tuple[Atlas, int]] = {}  # and the cell
        self._folders: set[Path] = set()
        self._sheet = lru_cache(maxsize=8)(_read_atlas)
        self._cut = lru_cache(maxsize=4096)(self._cut_out)

    def shrink(self, image: Image.Image) -> Image.Image:
        """A picture as large as a cell, padded white."""
        return ImageOps.pad(
            upright(image), (self.size, self.size), Image.Resampling.LANCZOS, color="white"
        )

    def put(self, id: int, thumbnail: Image.Image) -> None:
        """Keep what `shrink` made."""
        self._images[id] = thumbnail

    def drop(self, id: int) -> None:
        """Forget a picture."""
        self._images.pop(id, None)
        self._lent.pop(id, None)

    def share(self, id: int, other: Thumbnails, its: int) -> None:
        """Take the picture `its` of another database, from its atlas if it lies in one."""
        if other.size == self.size and its in other._lent:
            self._lent[id] = other._lent[its]
            self._folders |= other._folders
        else:
            self.put(id, self.shrink(other.get(its)))

    def lend(self, ids: list[int], files: list[tuple[Path, str]]) -> None:
        """Take the pictures of `ids`, all there are, in this order from atlases with SHA-256."""
        per = ATLAS_SIDE**2
        if len(files) != math.ceil(len(ids) / per):
            raise ValueError(f"{len(files)} thumbnail atlases for {len(ids)} images")
        lent: dict[int, tuple[Atlas, int]] = {}
        for n, (path, sha256) in enumerate(files):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            part = ids[n * per : (n + 1) * per]
            atlas = Atlas(path, sha256, len(part))
            lent.update((i, (atlas, cell)) for cell, i in enumerate(part))
        self._folders = {path.parent for path, _ in files}
        self._lent, self._images = lent, {}

    def lies_in(self, folder: Path) -> bool:
        """Whether pictures lie in atlases of this folder."""
        return folder.resolve() in {place.resolve() for place in self._folders}

    def get(self, id: int) -> Image.Image:
        """The picture of a row."""
        while (image := self._images.get(id)) is None:
            atlas, cell = self._lent[id]
            try:
                return self._cut(atlas, cell)
            except FileNotFoundError:
                if self._lent[id][0] is atlas:
                    raise  # else it was saved anew meanwhile
        return image

    def _cut_out(self, atlas: Atlas, cell: int) -> Image.Image:
        x, y = cell % ATLAS_SIDE * self.size, cell // ATLAS_SIDE * self.size
        return self._sheet(atlas).crop((x, y, x + self.size, y + self.size))

    def atlases(self, ids: np.ndarray) -> Iterator[bytes]:
        """WebP sheets of ATLAS_SIDE^2 cells in the order of `ids`; the last is cut.

        A sheet that an atlas holds already is that file. Others are of quality 90, but without loss
        where a picture went through that before.
        """
        per = ATLAS_SIDE**2
        for start in range(0, len(ids), per):
            chunk = ids[start : start + per].tolist()
            lent = [self._lent.get(i) for i in chunk]
            if lent[0] and lent == [(lent[0][0], cell) for cell in range(lent[0][0].count)]:
                file = lent[0][0]
                _check_atlas(file)
                yield file.path.read_bytes()
                continue
            height = math.ceil(len(chunk) / ATLAS_SIDE) * self.size
            sheet = Image.new("RGB", (ATLAS_SIDE * self.size, height), "white")
            for cell, i in enumerate(chunk):
                at = (cell % ATLAS_SIDE * self.size, cell // ATLAS_SIDE * self.size)
                sheet.paste(self.get(i), at)
            buffer = io.BytesIO()
            if any(lent):
                sheet.save(buffer, "WEBP", lossless=True, method=0)
            else:
                sheet.save(buffer, "WEBP", quality=90, method=6)
            yield buffer.getvalue()


def _read_atlas(atlas: Atlas) -> Image.Image:
    _check_atlas(atlas)
    return read_image(atlas.path)


def _check_atlas(atlas: Atlas) -> None:
    if not atlas.path.is_file():
        raise FileNotFoundError(
            f"{atlas.path}: gone; its database was moved or saved anew since it was opened"
        )
    _files.check_sha256(atlas.path, atlas.sha256)
