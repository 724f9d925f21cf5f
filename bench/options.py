"""Checks of the scripts' options, before anything is measured."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path


def at_least(parser: argparse.ArgumentParser, least: int, /, **options: int) -> None:
    """End with a message where an option, named as argparse does, is below `least`."""
    for name, value in options.items():
        if value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def above(parser: argparse.ArgumentParser, limit: float, /, **options: float) -> None:
    """End with a message where an option is not a finite number above `limit`."""
    for name, value in options.items():
        if not limit < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above {limit:g}, got {value:g}")


def check_json(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Make the folder of a file that is to be written; end with a message where that cannot be."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--json must be a file in a folder that can be made, got {path} ({error})")
    if path.is_dir():
        parser.error(f"--json must be a file, got the folder {path}")
    if not os.access(path.parent, os.W_OK):
        parser.error(f"--json must be in a folder that can be written to, got {path}")
