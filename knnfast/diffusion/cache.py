"""Tensors that were made once from something, beside a record of what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from knnfast import _files

FORMAT = "knnfast-cache"


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of CPU tensors: their types, shapes and bytes."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(f"{x.dtype} {list(x.shape)}\n".encode())
        found.update(x.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_cache(path: Path, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write tensors to `path` (safetensors), then their recipe and hash beside it (JSON).

    A kill in between leaves a file without a record, which does not count.
    """
    record = path.with_suffix(".json")
    record.unlink(missing_ok=True)
    _files.save_tensors(path, tensors)
    seal = {"format": FORMAT, "recipe": dict(recipe), "sha256": _files.sha256_file(path)}
    _files.write_json(record, seal)


def load_cache(path: Path, recipe: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Read what `save_cache` wrote, or None where there is nothing complete.

    Raises:
        ValueError: made from something else, or damaged; the message says what to remove.
    """
    record = path.with_suffix(".json")
    if not record.is_file():
        return None
    seal = _files.read_json(record, FORMAT)
    check_recipe(record, seal["recipe"], recipe)
    _files.check_sha256(path, seal["sha256"])
    return load_file(path)


def check_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to reuse what was made from something else.

    What was made from fewer thumbnails is no worse: its pictures were there then.
    """
    for name in {**found, **wanted}:
        a, b = found.get(name), wanted.get(name)
        if name == "thumbnails" and isinstance(a, int) and isinstance(b, int) and a < b:
            continue
        if a != b:
            raise ValueError(
                f"{path}: was made with {name} = {a!r}, now it is {b!r}; give another folder, or "
                "remove this file to make it anew"
            )
