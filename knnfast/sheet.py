"""One picture of what was made: samples beside their neighbours, edits beside the original."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from knnfast.database import Database
    from knnfast.edit import EditOutput
    from knnfast.mixture import Mixture
    from knnfast.pipeline import Output

CELL = 96  # pixels on a side of a sample as shown
SMALL = 56  # and of a neighbour
GAP = 8
CAPTION = 22


def contact_sheet(
    output: Output, database: Database | Mixture, max_neighbours: int = 10
) -> Image.Image:
    """Draw one row per query: its text, its samples, then its neighbours with name and score.

    Args:
        output: what `KNNDiffusion.__call__` returned.
        database: the database that was searched; it holds the thumbnails.
        max_neighbours: neighbours shown per row.
    """
    rows = len(output.neighbours)
    per_row = len(output.images) // rows
    shown = min(max_neighbours, max(len(n) for n in output.neighbours))
    left = GAP + per_row * (CELL + GAP) + 2 * GAP
    column = SMALL + 28
    width = left + shown * column + GAP
    height = GAP + rows * (CAPTION + CELL + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(15), ImageFont.load_default(10)
    for row, neighbours in enumerate(output.neighbours):
        y = GAP + row * (CAPTION + CELL + GAP)
        draw.text((GAP, y), _spelled(output.labels[row]), "black", large)
        if row == 0:
            draw.text((left, y + 4), "retrieved neighbours", "gray", small)
        y += CAPTION
        for n, image in enumerate(_samples(output, row, per_row)):
            at = (GAP + n * (CELL + GAP), y)
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), at)
        for n, neighbour in enumerate(neighbours[:shown]):
            x = left + n * column
            thumbnail = database.thumbnail(neighbour.item.id)
            sheet.paste(thumbnail.resize((SMALL, SMALL), Image.Resampling.LANCZOS), (x, y))
            name = _clip(_spelled(neighbour.item.name), column, small)
            draw.text((x, y + SMALL + 3), name, "black", small)
            draw.text((x, y + SMALL + 15), f"{neighbour.score:.3f}", "gray", small)
    return sheet


def edit_sheet(output: EditOutput) -> Image.Image:
    """Draw the picture before, the cells that were redrawn, and the candidates, best first."""
    shown = [(output.original, f"before {output.score:.3f}")]
    cells = Image.fromarray(np.where(output.region, 255, 0).astype(np.uint8)).convert("RGB")
    shown.append((cells, "white: redrawn"))
    shown += [(e.image, f"{e.score:.3f}, identity {e.identity:.2f}") for e in output.edits]
    across = min(len(shown), 6)
    width, height = CELL + GAP, CELL + GAP + 14
    down = -(-len(shown) // across)
    sheet = Image.new("RGB", (GAP + across * width, CAPTION + GAP + down * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 4), _spelled(output.label), "black", ImageFont.load_default(15))
    small = ImageFont.load_default(10)
    for n, (image, caption) in enumerate(shown):
        x, y = GAP + n % across * width, CAPTION + GAP + n // across * height
        smooth = Image.Resampling.NEAREST if n == 1 else Image.Resampling.LANCZOS
        sheet.paste(image.resize((CELL, CELL), smooth), (x, y))
        draw.text((x, y + CELL + 1), caption, "gray", small)
    return sheet


def _samples(output: Output, row: int, per_row: int) -> Sequence[Image.Image]:
    return output.images[row * per_row : (row + 1) * per_row]


def _spelled(text: str) -> str:
    """Text without accents: Pillow's own font has no letters beyond ASCII."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c for c in letters if not unicodedata.combining(c))


def _clip(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width - 4:
        return text
    while text and font.getlength(text + "\u2026") > width - 4:
        text = text[:-1]
    return text + "\u2026"
