"""Images as an editor's training data: read, aligned with their neighbours and encoded once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from knnfast import _files
from knnfast.diffusion.augment import PHOTOS, AugmentConfig
from knnfast.diffusion.cache import load_cache, save_cache
from knnfast.diffusion.data import (
    ImageEncoder,
    identity,
    load_images,
    lost_pictures,
    own_crop,
    pictures,
)
from knnfast.diffusion.distributed import Processes
from knnfast.diffusion.editing import EditPairs, import_cv2, make_edit_pairs
from knnfast.diffusion.pairs import ConditionConfig
from knnfast.diffusion.tokenizer import VQTokenizer

if TYPE_CHECKING:
    from knnfast.database import Database

EDITS_FILE = "edit-pairs.safetensors"


def encode_edits(
    data: str | Path | Database,
    folder: Path,
    encoder: ImageEncoder,
    tokenizer: VQTokenizer,
    versions: int,
    seed: int,
    processes: Processes | None = None,
    augmentation: AugmentConfig = PHOTOS,
    crop: str | None = None,
    neighbours: int = 3,
    near: float = ConditionConfig.near,
) -> EditPairs:
    """Read a collection and align each image's neighbours once; later calls read the result.

    All pixels stay in memory: versions (1 + neighbours) 3 S^2 bytes an image. The arguments are
    those of `data.encode` and `make_edit_pairs`.

    Raises:
        ValueError: too few readable images, or `folder` holds another collection's result.
        ImportError: OpenCV is not installed.
    """
    import_cv2()
    processes = processes or Processes()
    crop = crop or own_crop(encoder)
    file = folder / EDITS_FILE
    recipe = {
        "data": identity(data),
        "thumbnails": lost_pictures(data),
        "encoder": encoder.card.sha256,
        "tokenizer": _files.weights_hash(tokenizer),
        "image_size": tokenizer.image_size,
        "versions": versions,
        "neighbours": neighbours,
        "near": near,
        "embeddings": "of the originals",
        "augmentation": augmentation.to_dict(),
        "crop": crop,
        "seed": seed,
    }
    if processes.main and load_cache(file, recipe) is None:
        loaded = load_images(pictures(data), tokenizer.image_size, encoder, crop)
        for line in loaded.skipped:
            warnings.warn(f"skipped {line}", stacklevel=2)
        pairs, _ = make_edit_pairs(
            loaded.squares, encoder, tokenizer, versions, neighbours, seed, augmentation, near,
            loaded.embeddings,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        # Two tensors of a file may not share their memory.
        save_cache(file, {**vars(pairs), "database": pairs.database.clone()}, recipe)
    processes.wait()
    tensors = load_cache(file, recipe)
    assert tensors is not None
    return EditPairs(**tensors)
