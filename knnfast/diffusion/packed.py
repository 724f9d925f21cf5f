"""The denoiser's features on the CPU: weights packed once, a thread for each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from knnfast import _C
from knnfast._phases import phase
from knnfast.ops._checks import check_device, check_dtype, check_shape, pointer

if TYPE_CHECKING:
    from knnfast.diffusion.denoiser import Denoiser, Layer


class PackedDenoiser:
    """`Denoiser.features` for sampling on the CPU in FP32, as one call of C++ a step.

    A sequence (an image with its condition, or without for guidance) runs through all layers on one
    thread and never meets another: its bits do not depend on the batch. Operations a sequence and
    step: 2 N (4 D^2 + 2 D mlp + 2 N D + 2 D H (k+1)) a layer for N = L / patch^2 tokens; its
    activations stay in L2 and the weights pass from L3 once. Threads beyond the number of sequences
    have nothing to do. The condition is folded at any k.

    The weights are copied: pack again after they change.

    Args:
        denoiser: one that `serves` accepts.
        levels: the levels t that will be asked for.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[int]) -> None:
        self.denoiser, cfg = denoiser, denoiser.config
        self.layers = cast("list[Layer]", list(denoiser.layers))
        self.canvases = [getattr(layer, "canvas_attention", None) for layer in self.layers]
        weights: list[Tensor] = [denoiser.code_embedding.weight, *_pair(denoiser.patch_in)]
        weights += [denoiser.position, *_pair(denoiser.norm_out), *_pair(denoiser.patch_out)]
        if cfg.source:
            weights += _pair(denoiser.source_gate)
        modulations = []
        with torch.no_grad():
            time = denoiser.time_modulation(torch.tensor(list(levels), device="cpu"))
            for layer, canvas in zip(self.layers, self.canvases, strict=True):
                attention = layer.self_attention
                for linear in (attention.to_qkv, attention.to_out, layer.mlp_in, layer.mlp_out):
                    weights += _pair(linear)
                if canvas is not None:
                    weights += [*_pair(canvas.to_q), *_pair(canvas.to_out)]
                modulations.append(time + layer.modulation)  # [levels, 6, D]
            modulation = torch.stack(modulations, 1).contiguous()  # [levels, depth, 6, D]
            modulation[:, :, 1::2] += 1.0  # the scales: 1 + what is learned
        self.rows = dict(zip(levels, modulation, strict=True))
        sizes = [
            cfg.length // cfg.patch**2, cfg.width, cfg.depth, cfg.heads, cfg.mlp_width,
            cfg.cross_heads, cfg.num_codes, denoiser.code_embedding.embedding_dim, cfg.patch,
            cfg.grid[1], cfg.code_width, cfg.canvas_width, cfg.canvas_heads,
        ]  # fmt: skip
        canvas_layers = [canvas is not None for canvas in self.canvases]
        read = _Addresses(weights)
        self.net = _C.PackedDenoiser(sizes, cfg.source, canvas_layers, read.at)

    @staticmethod
    def serves(denoiser: Any, cond: Tensor) -> bool:
        """Whether a network is a plain `Denoiser` in FP32 on the CPU, and the embeddings too.

        One whose features another class computes, or with hooks, wrapped or replaced modules, runs
        as it is.
        """
        from knnfast.diffusion import denoiser as modules

        plain = modules.Denoiser
        if not isinstance(denoiser, plain) or torch.is_autocast_enabled("cpu"):
            return False
        known = (
            type(denoiser), modules.Layer, modules.SelfAttention, modules.CrossAttention,
            modules.CanvasAttention, nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList,
        )  # fmt: skip
        return (
            all(
                getattr(type(denoiser), name) is getattr(plain, name) and name not in vars(denoiser)
                for name in ("forward", "features", "tokens", "_patches", "time_modulation")
            )
            and all(type(m) in known for m in denoiser.modules())
            and not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
            and all(
                each.device.type == "cpu" and each.dtype == torch.float32
                for each in (cond, *denoiser.parameters())
            )
        )

    @torch.no_grad()
    def prepare(self, cond: Tensor, mask: Tensor, source: Tensor | None) -> Any:
        """Pack one image's condition; the arguments and errors are `Denoiser.prepare`'s."""
        check_shape("cond", cond, (1, None, self.denoiser.config.embed_dim))
        check_shape("mask", mask, (1, cond.shape[1]))
        check_device("mask", mask, cond.device)
        c = self.denoiser.prepare(cond, mask, source=source)
        crossed = [layer.cross_attention.fold(c.tokens, mask, True) for layer in self.layers]
        keys = [None if canvas is None else canvas.to_k(c.tokens) for canvas in self.canvases]
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
        """What the head reads, [1 or 2, B, L, code_width]: with the conditions, then without.

        Args:
            x: codes, [B, L] int64, the mask is K.
            t: one of the levels.
            conditions: B that `prepare` returned.
            guided: whether the features without a condition are wanted, too.
        """
        cfg = self.denoiser.config
        check_dtype("x", x, (torch.int64,))
        check_shape("x", x, (len(conditions), cfg.length))
        check_device("x", x, torch.device("cpu"))
        x = x.contiguous()
        shape = (1 + guided, len(x), cfg.length, cfg.code_width)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        at = self.rows[t].data_ptr()
        with phase("sample.packed"):
            fits = self.net.features(x.data_ptr(), conditions, guided, at, out.data_ptr())
        if not fits:
            raise ValueError(f"x: codes must be in [0, {cfg.num_codes}]")
        return out


class _Addresses:
    """Where tensors lie, 0 for None; they are kept alive as contiguous FP32 beside."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.tensors = [None if t is None else t.detach().float().contiguous() for t in tensors]
        self.at = [pointer(t) for t in self.tensors]


def _pair(layer: nn.Linear | nn.LayerNorm) -> list[Tensor]:
    return [layer.weight, layer.bias]
