"""What several commands share."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from knnfast.database import Neighbour


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse a device that this machine does not have, before anything else is done."""
    from knnfast._device import check_torch_device

    check_torch_device("--device", value)
    return value


device_option = click.option("--device", default="cpu", show_default=True, callback=_device)


def _given_once(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """Refuse an option that is given twice, of which click would take the last."""
    if len(value) > 1:
        raise ValueError(
            f"{param.opts[0]}: give one; `knnfast database merge` makes one of several"
        )
    return value[0] if value else None


database_option = click.option(
    "--database",
    multiple=True,
    callback=_given_once,
    help="A database of the model by name, or a folder.",
)


def check_query(prompts: Sequence[str], images: Sequence[str]) -> None:
    """Refuse a command that asks for nothing."""
    if not prompts and not images:
        raise ValueError("prompts: give a prompt, or a picture (--image); got none")


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that can be neither made nor written into, before anything is computed."""
    whole = folder.absolute()
    try:
        place = next(p for p in (whole, *whole.parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except NotADirectoryError:
        raise ValueError(f"{option}: {folder} cannot be a folder: {place} is a file") from None
    except OSError as e:
        raise ValueError(f"{option}: {folder} cannot be written ({e.strerror})") from None


def check_files(option: str, paths: Sequence[str]) -> None:
    """Refuse a folder where a picture is meant."""
    for path in paths:
        if Path(path).is_dir():
            raise ValueError(f"{option}: must be a file, {path} is a folder")


def neighbours_of(row: Sequence[Neighbour]) -> list[dict[str, Any]]:
    """What a query has found, for JSON."""
    return [{**asdict(near.item), "score": near.score} for near in row]


class Bar:
    """A progress bar fed by `callback(done, total)`."""

    def __init__(self, label: str, hidden: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=label, unit="step", leave=False, disable=hidden or not sys.stderr.isatty()
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def find_encoder(spec: str, device: str) -> Any:
    """The encoder of a model, a bundle's name or a folder, or one by its own spec."""
    from knnfast.encoders import load_encoder
    from knnfast.pipeline import encoder_of, find_model

    try:
        root = find_model(spec)
    except FileNotFoundError as e:
        if spec.startswith("open_clip:") or Path(spec).is_dir():
            return load_encoder(spec, device=device)
        raise FileNotFoundError(
            f"--encoder: no encoder's folder, no open_clip:..., and {e}"
        ) from None
    return encoder_of(root, device)
