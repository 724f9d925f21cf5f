"""The log of a training run: a CSV file, and TensorBoard's where that is installed."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from knnfast import _files

FILE = "log.csv"
FIELDS = ("step", "loss", "grad", "lr", "images_per_second", "seconds")


class RunLog:
    """Appends to `log.csv` and, with the package tensorboard, to `tensorboard/`.

    Args:
        folder: of the run.
        step: of the checkpoint it goes on from; what was written after it is dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        if self.path.exists():
            head, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
            kept = [x for x in lines if x.count(",") == len(FIELDS) - 1]  # a kill can cut a line
            kept = [x for x in kept if int(x.split(",")[0]) <= step]
            text = "\n".join([head or ",".join(FIELDS), *kept]) + "\n"
            _files.write_atomic(self.path, text.encode())
        else:
            self.path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
        self.board = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def row(self, values: dict[str, float]) -> None:
        """Append one line; `values` has every name of FIELDS."""
        with self.path.open("a", newline="", encoding="utf-8") as f:
            csv.writer(f).writerow(f"{values[n]:.8g}" for n in FIELDS)
        if self.board is not None:
            for name in FIELDS[1:]:
                self.board.add_scalar(name, values[name], int(values["step"]))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Show a picture on the board."""
        if self.board is not None:
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        if self.board is not None:
            self.board.close()
