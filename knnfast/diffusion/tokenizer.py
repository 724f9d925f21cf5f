"""Images to discrete codes and back: a VQ autoencoder in the format of diffusers' `VQModel`.

The parameter names, the arithmetic and the files (`config.json`,
`diffusion_pytorch_model.safetensors`) are those of `diffusers.VQModel`, so weights move both ways;
diffusers itself is not imported, because that alone takes seconds beside torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from knnfast import _files
from knnfast.diffusion.backbone import MOST_LAYERS, check_sizes, load_network
from knnfast.images import pictures_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# What a stage may be on the way down and up, without and with attention after its blocks.
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
# Names of an attention's parts in diffusers before 0.15, as in VQ-Diffusion's published files.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class TokenizerConfig:
    """The part of `VQModel`'s configuration that the arithmetic depends on."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    mid_block_add_attention: bool = True
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(
            self, "in_channels", "out_channels", "block_out_channels", "latent_channels",
            "sample_size", "num_vq_embeddings", "norm_num_groups",
        )  # fmt: skip
        check_sizes(self, "layers_per_block", most=MOST_LAYERS)
        if self.vq_embed_dim is not None:
            check_sizes(self, "vq_embed_dim")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must be multiples of "
                f"norm_num_groups {self.norm_num_groups}"
            )
        for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
            types = getattr(self, name) or (kinds[0],) * len(self.block_out_channels)
            if other := sorted(set(types) - set(kinds)):
                allowed = " and ".join(kinds)
                raise ValueError(f"VQModel with {name} {other} is not supported (only {allowed})")
            if len(types) != len(self.block_out_channels):
                raise ValueError(
                    f"{name}: {len(types)} stages, block_out_channels has "
                    f"{len(self.block_out_channels)}"
                )
            object.__setattr__(self, name, types)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TokenizerConfig:
        """Read a `VQModel` configuration; what this module does not compute is refused by name."""
        fixed = {"act_fn": "silu", "norm_type": "group"}
        for name, wanted in fixed.items():
            if raw.get(name, wanted) != wanted:
                raise ValueError(f"VQModel with {name}={raw[name]!r} is not supported ({wanted!r})")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in raw.items() if k in known}
        listed = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**{**values, **listed})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as diffusers writes it."""
        return {
            "_class_name": "VQModel",
            **asdict(self),
            "act_fn": "silu",
            "norm_type": "group",
        }


class NormSiLU(nn.GroupNorm):
    """GroupNorm followed by SiLU; training may set `fused`, a faster form of the same function."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)
        self.fused: Callable[[Tensor, Tensor, Tensor, int, float], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate [B, C, H, W]."""
        if self.fused is not None:
            return self.fused(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(super().forward(x))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = NormSiLU(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c_in, H, W] to [B, c_out, H, W]."""
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nn.Module):
    """Single-head self-attention over the pixels of the coarsest grid."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Stride-2 convolution padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double the sides."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks of one resolution, each with attention if asked for; then a change of it."""

    def __init__(
        self, c_in: int, c_out: int, layers: int, groups: int, down: bool, up: bool, attention: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)
        )
        if attention:
            self.attentions = nn.ModuleList(Attention(c_out, groups) for _ in range(layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks, then the change of resolution."""
        for i, block in enumerate(self.resnets):
            x = block(x)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention (if asked for), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        if attention:
            self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class LatentEncoder(nn.Module):
    """Images to latents."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                cfg.layers_per_block,
                groups,
                down=i + 1 < len(widths),
                up=False,
                attention=cfg.down_block_types[i] == DOWN[1],
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, cfg.mid_block_add_attention)
        self.conv_norm_out = NormSiLU(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] to latents."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class LatentDecoder(nn.Module):
    """Latents to images."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, cfg.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                cfg.layers_per_block + 1,
                groups,
                down=False,
                up=i + 1 < len(widths),
                attention=cfg.up_block_types[i] == UP[1],
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = NormSiLU(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map latents to images around [-1, 1]."""
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(self.conv_norm_out(x))


class Codebook(nn.Module):
    """The code vectors."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code of each row of `z` [N, dim]; the lower index wins a tie."""
        codes = self.embedding.weight.to(z.dtype)
        return (codes.square().sum(1) - 2.0 * z @ codes.T).argmin(1)


class VQTokenizer(nn.Module):
    """VQ autoencoder: `encode` gives codes, `decode` gives images.

    Args:
        config: sizes; images are `sample_size` squared and every stage but the last halves them.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if config.sample_size % factor:
            raise ValueError(f"sample_size {config.sample_size} is not a multiple of {factor}")
        dim = config.vq_embed_dim or config.latent_channels
        self.encoder = LatentEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, dim, 1)
        self.quantize = Codebook(config.num_vq_embeddings, dim)
        self.post_quant_conv = nn.Conv2d(dim, config.latent_channels, 1)
        self.decoder = LatentDecoder(config)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.config.sample_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.image_size // 2 ** (len(self.config.block_out_channels) - 1)
        return side, side

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return self.config.num_vq_embeddings

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] to latents before quantisation [B, dim, h, w]."""
        return self.quant_conv(self.encoder(images * 2.0 - 1.0))

    def pixels(self, quantized: Tensor) -> Tensor:
        """Code vectors [B, dim, h, w] to images around [0, 1], not clamped."""
        return self.decoder(self.post_quant_conv(quantized)) * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: [B, 3, S, S], float in [0, 1], S = `image_size`.

        Returns:
            Codes, [B, h*w] int64, row-major. Where two codes are equally near, the convolutions'
            rounding decides: on CUDA TF32's, unless `torch.backends.cudnn.allow_tf32` is off.

        Raises:
            ValueError: wrong shape.
        """
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images must be [B, 3, {size}, {size}], got {list(images.shape)}")
        z = self.latents(images)
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return self.quantize.nearest(rows).reshape(images.shape[0], -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes.

        Args:
            codes: [B, h*w], int64 in [0, K).

        Returns:
            Images, [B, 3, S, S] float in [0, 1].

        Raises:
            ValueError: wrong shape, or a code out of range.
        """
        h, w = self.grid
        if codes.ndim != 2 or codes.shape[1] != h * w:
            raise ValueError(f"codes must be [B, {h * w}], got {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes must be in [0, {self.codebook_size})")
        z = self.quantize.embedding(codes).reshape(len(codes), h, w, -1).permute(0, 3, 1, 2)
        return self.pixels(z).clamp(0.0, 1.0)

    def sheet(self, rows: Sequence[Tensor]) -> Image.Image:
        """Rows of codes, each [B, h*w], as one picture: a row below the other."""
        device = next(self.parameters()).device
        pixels = torch.cat([self.decode(codes.to(device)) for codes in rows], -2)
        return pictures_of(torch.cat([*pixels], -1)[None])[0]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and the weights as diffusers would; `dtype` is the stored type."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to("cpu", dtype) for k, v in self.state_dict().items()}
        _files.save_tensors(folder / WEIGHTS_FILE, state, {"format": "pt"})
        _files.write_json(folder / CONFIG_FILE, self.config.to_dict())

    @classmethod
    def from_folder(
        cls, path: str | Path, device: str | torch.device = "cpu", image_size: int | None = None
    ) -> VQTokenizer:
        """Load a folder that `save` or diffusers' `VQModel.save_pretrained` wrote.

        VQ-Diffusion's published VQ-VAE (the folder `vqvae` of microsoft/vq-diffusion-ithq) is one,
        once its weights are safetensors; the names of its time are understood.

        Args:
            path: the folder.
            device: where the model goes.
            image_size: side of the pictures in pixels, a multiple of 2^(stages - 1). None takes the
                configuration's `sample_size`, which is VQModel's default of 32 wherever nobody set
                it: the weights fit any size, so nothing else tells.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the model is of a kind this module does not compute, or
                such an image_size does not fit it.
        """
        file = Path(path) / CONFIG_FILE
        raw = _files.read_json(file)
        weights = Path(path) / WEIGHTS_FILE
        model = load_network(lambda: cls(TokenizerConfig.from_dict(raw)), file, weights, _new_name)
        if image_size is not None:
            factor = model.image_size // model.grid[0]
            if image_size < factor or image_size % factor:
                raise ValueError(
                    f"image_size must be a positive multiple of {factor}, got {image_size}"
                )
            model.config = replace(model.config, sample_size=image_size)
        return model.to(device)


def _new_name(name: str) -> str:
    """Today's name of a parameter in diffusers."""
    module, _, rest = name.rpartition(".attentions.")
    if not module:
        return name
    place, part, kind = rest.split(".", 2)
    return f"{module}.attentions.{place}.{OLD_NAMES.get(part, part)}.{kind}"
