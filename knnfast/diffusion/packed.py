"""The denoiser's features on the CPU: weights packed once, a thread for each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from knnfast import _C

if TYPE_CHECKING:
    from knnfast.diffusion.denoiser import Denoiser, Layer


class PackedDenoiser:
    """`Denoiser.features` for sampling on the CPU in FP32, as one call of C++ a step.

    A sequence (an image with its condition, or without for guidance) runs through all layers on one
    thread and never meets another: its bits depend neither on the batch nor on the number of
    threads. Operations a sequence and step: 2 N (12 D^2 + 2 N D) a layer for N = L / patch^2
    tokens; its activations stay in L2 and the weights pass from L3 once. Threads beyond the number
    of sequences have nothing to do.

    The weights are copied: pack again after they change.

    Args:
        denoiser: on the CPU, in FP32.
        levels: the levels t that will be asked for.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[int]) -> None:
        self.denoiser, cfg = denoiser, denoiser.config
        weights: list[Tensor] = [denoiser.code_embedding.weight, *_pair(denoiser.patch_in)]
        weights += [denoiser.position, *_pair(denoiser.norm_out), *_pair(denoiser.patch_out)]
        if cfg.source:
            weights += _pair(denoiser.source_gate)
        layers = self.layers = cast("list[Layer]", list(denoiser.layers))
        modulations = []
        with torch.no_grad():
            time = denoiser.time_modulation(torch.tensor(list(levels)))  # [levels, 6, D]
            one = torch.tensor([0.0, 1.0] * 3)[:, None]  # the scales are 1 + what is learned
            for layer in layers:
                attention = layer.self_attention
                for linear in (attention.to_qkv, attention.to_out, layer.mlp_in, layer.mlp_out):
                    weights += _pair(linear)
                if hasattr(layer, "canvas_attention"):
                    weights += _pair(layer.canvas_attention.to_q)
                    weights += _pair(layer.canvas_attention.to_out)
                modulations.append(time + layer.modulation + one)
        self.modulation = torch.stack(modulations, 1).contiguous()  # [levels, depth, 6, D]
        self.row = {level: i for i, level in enumerate(levels)}
        sizes = [
            cfg.length // cfg.patch**2, cfg.width, cfg.depth, cfg.heads, cfg.mlp_width,
            cfg.cross_heads, cfg.num_codes, denoiser.code_embedding.embedding_dim, cfg.patch,
            cfg.grid[1], cfg.code_width, cfg.canvas_width, cfg.canvas_heads,
        ]  # fmt: skip
        canvas = [hasattr(layer, "canvas_attention") for layer in layers]
        read = _Addresses(weights)
        self.net = _C.PackedDenoiser(sizes, cfg.source, canvas, read.at)

    @staticmethod
    def serves(denoiser: Any, cond: Tensor) -> bool:
        """Whether the packed form is for this network and these embeddings."""
        from knnfast.diffusion.denoiser import Denoiser

        return (
            isinstance(denoiser, Denoiser)
            and cond.device.type == denoiser.head.weight.device.type == "cpu"
            and cond.dtype == denoiser.head.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )

    @torch.no_grad()
    def prepare(self, cond: Tensor, mask: Tensor, source: Tensor | None) -> Any:
        """Pack one image's condition; the arguments and errors are `Denoiser.prepare`'s."""
        denoiser = self.denoiser
        c = denoiser.prepare(cond, mask, source=source)
        crossed = [layer.cross_attention.fold(c.tokens, mask, True) for layer in self.layers]
        keys = [
            layer.canvas_attention.to_k(c.tokens) if hasattr(layer, "canvas_attention") else None
            for layer in self.layers
        ]
        tokens, copies = c.source or (None, None)
        groups = [
            _Addresses(group)
            for group in (
                *zip(*(each[:4] for each in crossed), strict=True),
                keys,
                [c.paintings, c.bias, tokens, copies],
            )
        ]
        mask = mask.contiguous()
        *lists, rest = (group.at for group in groups)
        return _C.PackedCondition(self.net, cond.shape[1], mask.data_ptr(), *lists, *rest)

    def features(self, x: Tensor, t: int, conditions: list[Any], guided: bool) -> Tensor:
        """What the head reads, [1 or 2, B, L, code_width]: with the conditions, then without."""
        cfg = self.denoiser.config
        x = x.contiguous()
        out = torch.empty(1 + guided, len(x), cfg.length, cfg.code_width)
        modulation = self.modulation[self.row[t]]
        ok = self.net.features(
            x.data_ptr(), conditions, guided, modulation.data_ptr(), out.data_ptr()
        )
        if not ok:
            raise ValueError(f"x_t: codes must be in [0, {cfg.num_codes}]")
        return out


class _Addresses:
    """Where tensors lie, 0 for None; they are kept alive as contiguous FP32 beside."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.tensors = [None if t is None else t.detach().float().contiguous() for t in tensors]
        self.at = [0 if t is None else t.data_ptr() for t in self.tensors]


def _pair(layer: nn.Linear | nn.LayerNorm) -> list[Tensor]:
    return [layer.weight, layer.bias]
