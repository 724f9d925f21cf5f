"""What the two diffusion backbones share: the sampling protocol, and their files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import Self

from knnfast import _files

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MOST = 1 << 20  # of any size, so that sizes of tensors can be computed
MOST_LAYERS = 1000
N = TypeVar("N", bound=nn.Module)


class Backbone(nn.Module, ABC):
    """A network that turns k+1 condition embeddings into the codes of an image, step by step.

    Attributes:
        backbone: the name by which it is asked for.
        folder: of a model folder, the part that holds its files.
        config: sizes, a dataclass with `from_dict` and `to_dict`.
    """

    backbone: ClassVar[str]
    folder: ClassVar[str]
    config_type: ClassVar[Any]
    config: Any

    @abstractmethod
    def sample(
        self,
        cond: Tensor,
        cond_mask: Tensor,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        seed: int = 0,
        image_indices: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw the codes of images; each backbone has options of its own beside these.

        Args:
            cond: condition embeddings, [B, k+1, E], query first, then neighbours nearest first.
            cond_mask: which of them are on, [B, k+1] bool.
            steps: number of steps.
            guidance: weight of classifier-free guidance; 1 means none.
            seed: of the random numbers; with the image index it fixes an image's noise, whatever
                the batch.
            image_indices: [B] int64, the images' indices in the random numbers; default 0...B-1.
            callback: called with (steps done, steps) after each step.

        Returns:
            Codes, [B, L] int64.
        """

    @abstractmethod
    def check(self, steps: int | Sequence[int], guidance: float) -> None:
        """Refuse arguments of `sample`, each backbone's own too, before anything is computed.

        Raises:
            ValueError: one is out of its range.
        """

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `config.json` and `model.safetensors`; `dtype` is the stored type."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to("cpu", dtype) for k, v in self.state_dict().items()}
        _files.save_tensors(folder / WEIGHTS_FILE, state, {"format": "pt"})
        config = {"backbone": self.backbone, **self.config.to_dict()}
        _files.write_json(folder / CONFIG_FILE, config)

    @classmethod
    def from_folder(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load what `save` wrote, as FP32 in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, does not fit, or holds the other backbone.
        """
        file = Path(path) / CONFIG_FILE
        raw = _files.read_json(file)
        found = raw.pop("backbone", "discrete")
        if found != cls.backbone:
            raise ValueError(f"{file}: holds a {found} backbone, expected a {cls.backbone} one")
        weights = Path(path) / WEIGHTS_FILE
        model = load_network(lambda: cls(cls.config_type.from_dict(raw)), file, weights)
        return model.to(device)


def check_sizes(config: Any, *names: str, most: int = MOST) -> None:
    """Refuse a configuration whose named sizes, or lists of sizes, are not whole numbers from 1 on.

    Raises:
        ValueError: names the first.
    """
    for name in names:
        value = getattr(config, name)
        listed = value if isinstance(value, tuple | list) else (value,)
        if not listed:
            raise ValueError(f"{name} must not be empty")
        if any(not isinstance(x, int) or x < 1 for x in listed):
            raise ValueError(f"{name} must be at least 1, got {value!r}")
        if max(listed) > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value!r}")


def load_network(
    make: Callable[[], N], config: Path, path: Path, rename: Callable[[str], str] | None = None
) -> N:
    """Make a network and load its tensors, as FP32 in evaluation mode.

    Args:
        make: makes it; called without memory first, which sizes that are not the file's could
            exhaust.
        config: the file that its sizes come from.
        path: a safetensors file.
        rename: today's name of a tensor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: sizes that make no network; the file is damaged, or holds another architecture.
    """
    try:
        with torch.device("meta"):
            wanted = make().state_dict()
    except (ValueError, TypeError, RuntimeError) as e:
        raise ValueError(f"{config}: {e}") from e
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        hint = "; the .bin beside it is a pickle, which is not read: save it as safetensors"
        raise FileNotFoundError(f"{path}: no such file{hint if pickled else ''}")
    try:
        state = load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path}: {e}") from e
    if rename is not None:
        state = {rename(name): v for name, v in state.items()}
    check_fits(path, state, wanted)
    model = make()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)


def check_fits(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of a network.

    Raises:
        ValueError: names the file, and the first tensor that is missing, foreign or of other sizes.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is not part of this architecture" for name in state if name not in wanted]
    wrong += [
        f"{name} is {list(state[name].shape)}, expected {list(v.shape)}"
        for name, v in wanted.items()
        if name in state and state[name].shape != v.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{path}: weights of another architecture ({wrong[0]}{more})")
