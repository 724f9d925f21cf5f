# SPDX-License-Identifier: Apache-2.0
"""Models of open_clip as encoders (extra `clip`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from knnfast._checks import hint
from knnfast.encoders.base import Encoder, EncoderCard, fingerprint
from knnfast.images import upright


class OpenClipEncoder(Encoder):
    """A model of open_clip (extra `clip`), by name and pretrained tag, or from a local folder."""

    def __init__(self, spec: str, device: str | torch.device = "cpu"):
        body = spec.removeprefix("open_clip:")
        local = body.startswith("local-dir:")
        model, slash, pretrained = body.partition("/")
        if not local and not (model and slash and pretrained):
            raise ValueError(
                f"{spec!r} should read open_clip:MODEL/PRETRAINED or open_clip:local-dir:PATH"
            )
        if local:
            folder = Path(body.removeprefix("local-dir:"))
            if not folder.is_dir():
                raise FileNotFoundError(f"no open_clip folder at {folder}")
            spec = f"open_clip:local-dir:{folder.resolve()}"  # opened from anywhere
        self.spec = spec
        open_clip = import_open_clip()
        name, tag = (body, None) if local else (model, pretrained)
        if not local and (model, pretrained) not in open_clip.list_pretrained():
            raise ValueError(f"open_clip knows no weights {pretrained!r} of a model {model!r}")
        try:
            network, _, self._preprocess = open_clip.create_model_and_transforms(
                name, pretrained=tag, device=str(device)
            )
            self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a download, a file or a configuration: whatever it was
            reason = str(error).strip().splitlines()
            raise OSError(
                f"the weights of {spec} cannot be loaded: {reason[0] if reason else repr(error)}"
            ) from error
        self._network = network.eval().requires_grad_(False)
        self.device = torch.device(device)
        size = network.visual.image_size
        dim = int(self._text_features(["a"]).shape[1])
        state = {key: _raw(value) for key, value in network.state_dict().items()}
        digest = fingerprint(
            {"tower": {"open_clip": name if not local else "local-dir"}}, state, ()
        )
        label = "open_clip:local-dir" if local else spec
        self.card = EncoderCard(
            label, dim, digest, int(size[0] if isinstance(size, tuple) else size)
        )

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            tokens = self._tokenizer(list(texts)).to(self.device)
            return F.normalize(self._network.encode_text(tokens).float(), dim=-1)

    def to(self, device: str | torch.device) -> OpenClipEncoder:
        """Move the network to a device; returns itself."""
        self.device = torch.device(device)
        self._network.to(self.device)
        return self

    def save(self, folder: str | Path) -> str:
        """Return the name to load it by; the weights are not written, they stay where they are."""
        return self.spec

    def _image_rows(self, images: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([self._preprocess(upright(image)) for image in images])
        with torch.inference_mode():
            rows = self._network.encode_image(batch.to(self.device)).float()
        return F.normalize(rows, dim=-1).cpu().numpy()

    def _text_rows(self, texts: Sequence[str]) -> np.ndarray:
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {i} is empty")
        rows = [
            self._text_features(texts[i : i + 256]).cpu().numpy() for i in range(0, len(texts), 256)
        ]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)


def _raw(value: Tensor) -> np.ndarray:
    """View a tensor as bytes numpy can hash (numpy has no bfloat16)."""
    value = value.detach().cpu().contiguous()
    return (
        value.view(torch.uint8).numpy()
        if value.ndim
        else value.reshape(1).view(torch.uint8).numpy()
    )


_schemas: list[Any] = []  # torch.library.Library objects undo their definitions when collected


def import_open_clip() -> Any:
    """Import open_clip, also beside a torchvision that was built for another torch.

    Such a torchvision fails at import, because its C++ operators cannot be loaded. open_clip uses
    its image transforms alone, so it is enough that the operators' schemas exist.
    """
    try:
        found = importlib.util.find_spec("torchvision")
        if found is not None and found.origin is not None and not _schemas:
            for path in Path(found.origin).parent.glob("_C*.so"):
                try:
                    torch.ops.load_library(path)
                except OSError:
                    library = torch.library.Library("torchvision", "FRAGMENT")
                    for op in ("nms", "qnms"):
                        library.define(f"{op}(Tensor dets, Tensor scores, float iou) -> Tensor")
                    _schemas.append(library)
        import open_clip
    except Exception as error:
        raise ImportError(f"open_clip cannot be imported ({error}); {hint('clip')}") from error
    return open_clip
