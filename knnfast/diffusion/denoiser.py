"""The denoiser: a transformer over code patches that reads the query and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knnfast.diffusion.backbone import MOST_LAYERS, Backbone, check_sizes
from knnfast.diffusion.sampler import check_rule, sample
from knnfast.diffusion.schedule import Schedule
from knnfast.diffusion.settings import Settings
from knnfast.ops import Folded, Unfolded, fold_neighbours, neighbour_attention


@dataclass(frozen=True)
class DenoiserConfig(Settings):
    """Sizes of a denoiser.

    Attributes:
        num_codes: K; the mask is index K.
        grid: rows and columns of codes.
        patch: side of the square of codes one transformer token holds.
        width: of the transformer, D.
        depth: number of layers.
        heads: of self-attention.
        cross_heads: of cross-attention, H.
        mlp_width: hidden width of the feed-forward part.
        canvas_width: numbers a condition embedding paints at each transformer token.
        canvas_heads: of the attention over those paintings.
        canvas_layers: layers that read them.
        code_width: width of a code's embedding and of a row of the head.
        embed_dim: E, of the condition embeddings.
        time_width: of the time embedding.
        ranks: neighbours told apart by rank; later ones share the last rank.
        num_steps: T of the schedule it is trained with.
        schedule: name of that schedule.
        source: whether the codes of a picture to edit are a second input.
    """

    num_codes: int = 512
    grid: tuple[int, int] = (16, 16)
    patch: int = 2
    width: int = 256
    depth: int = 5
    heads: int = 4
    cross_heads: int = 8
    mlp_width: int = 1024
    canvas_width: int = 32
    canvas_heads: int = 4
    canvas_layers: tuple[int, ...] = (0, 2)
    code_width: int = 128
    embed_dim: int = 512
    time_width: int = 128
    ranks: int = 10
    num_steps: int = 100
    schedule: str = "mask"
    source: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, "num_codes", "grid", "patch", "width", "heads", "cross_heads",
            "mlp_width", "canvas_width", "canvas_heads", "code_width", "embed_dim", "time_width",
            "ranks", "num_steps",
        )  # fmt: skip
        check_sizes(self, "depth", most=MOST_LAYERS)
        if len(self.grid) != 2:
            raise ValueError(f"grid must be rows and columns, got {self.grid!r}")
        if self.time_width % 2:
            raise ValueError(f"time_width must be even, got {self.time_width}")
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                raise ValueError(f"width {self.width} is not a multiple of {name}")
        if self.canvas_width % self.canvas_heads:
            raise ValueError(f"canvas_width {self.canvas_width} is not a multiple of canvas_heads")
        if any(not 0 <= i < self.depth for i in self.canvas_layers):
            raise ValueError(f"canvas_layers {self.canvas_layers} must lie in [0, {self.depth})")
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise ValueError(f"grid {self.grid} of codes is not a multiple of patch {self.patch}")
        Schedule(self.schedule, self.num_steps, self.num_codes)

    @property
    def length(self) -> int:
        """Number of codes L."""
        return self.grid[0] * self.grid[1]


class Condition(NamedTuple):
    """What the layers read of a condition; constant over a sampling run (`Denoiser.prepare`)."""

    tokens: Tensor  # [B, k+1, D]
    paintings: Tensor  # [B, k+1, N, canvas_width]
    bias: Tensor  # 0 or -inf for each condition token, all 0 where none is on, [B, 1, 1, k+1]
    present: Tensor  # where some condition token is on, [B, 1, 1] bool
    folded: Sequence[Folded | Unfolded | None]  # each layer's, for `ops.neighbour_attention`
    source: tuple[Tensor, Tensor] | None = None  # a source's tokens [B, N, D], copies [B, L, W]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: LayerNorm without parameters, then scale and shift per sample."""
    return F.layer_norm(x, x.shape[-1:]) * (1.0 + scale[:, None]) + shift[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head softmax attention of q [B, N, D] over k, v [B, M, D]; bias [B, 1, 1, M].

    Written out: with so few tokens the scores are small, and torch's fused CPU attention spends
    ten times longer in its backward pass.
    """
    b, n, d = q.shape
    q, k, v = (u.view(b, -1, heads, d // heads).transpose(1, 2) for u in (q, k, v))
    scores = (q * (d // heads) ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, M]
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    h = scores.float().softmax(-1).to(v.dtype) @ v
    return h.transpose(1, 2).reshape(b, n, d)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; x is normalised tokens, [B, N, D]."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(_attend(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Attention of the code tokens to the condition tokens; adds 0 where all of them are off."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, cond: Tensor, bias: Tensor, present: Tensor) -> Tensor:
        """Attend.

        Args:
            x: normalised tokens, [B, N, D].
            cond: condition tokens, [B, k+1, D].
            bias: 0 or -inf for each condition token, all 0 where none is on, [B, 1, 1, k+1].
            present: 1 where some condition token is on, else 0, [B, 1, 1].
        """
        h = _attend(self.to_q(x), self.to_k(cond), self.to_v(cond), self.heads, bias)
        return self.to_out(h) * present.to(x.dtype)

    def fold(self, cond: Tensor, cond_mask: Tensor, fold: bool | None = None) -> Folded | Unfolded:
        """Fold condition tokens into the weights: the same attention, prepared once a run."""
        q, k, v, out = self.to_q, self.to_k, self.to_v, self.to_out
        return fold_neighbours(
            cond, q.weight, k.weight, v.weight, out.weight, q.bias, v.bias, out.bias,
            heads=self.heads, mask=cond_mask, fold=fold,
        )  # fmt: skip


class CanvasAttention(nn.Module):
    """Attention of each token to what the condition embeddings paint at its own place.

    Cross-attention hands every token the same few vectors; an embedding that describes a picture's
    layout then has to be unpacked token by token. Here each embedding is first spread over the
    grid by one linear map, once per sample, and a token mixes the paintings at its place.
    """

    def __init__(self, cfg: DenoiserConfig) -> None:
        super().__init__()
        self.heads = cfg.canvas_heads
        self.to_q = nn.Linear(cfg.width, 16 * cfg.canvas_heads)
        self.to_k = nn.Linear(cfg.width, 16 * cfg.canvas_heads)
        self.to_out = nn.Linear(cfg.canvas_width, cfg.width)

    def forward(
        self, x: Tensor, cond: Tensor, paintings: Tensor, bias: Tensor, present: Tensor
    ) -> Tensor:
        """Attend; `paintings` is [B, k+1, N, canvas_width], the rest as in `CrossAttention`."""
        b, n, _ = x.shape
        q = self.to_q(F.layer_norm(x, x.shape[-1:])).view(b, n, self.heads, 16).transpose(1, 2)
        k = self.to_k(cond).view(b, -1, self.heads, 16).transpose(1, 2)
        scores = (q * 0.25) @ k.transpose(-1, -2) + bias.to(q.dtype)  # [B, H, N, k+1]
        mix = scores.float().softmax(-1).to(x.dtype).permute(0, 3, 2, 1)  # [B, k+1, N, H]
        values = paintings.view(b, -1, n, self.heads, paintings.shape[-1] // self.heads)
        h = (mix.unsqueeze(-1) * values).sum(1).reshape(b, n, -1)
        return self.to_out(h) * present.to(x.dtype)


class Layer(nn.Module):
    """Self-attention, cross-attention, squared-ReLU feed-forward, each behind an AdaLN.

    A layer with a canvas reads it first.
    """

    def __init__(self, cfg: DenoiserConfig, canvas: bool) -> None:
        super().__init__()
        if canvas:
            self.canvas_attention = CanvasAttention(cfg)
        self.self_attention = SelfAttention(cfg.width, cfg.heads)
        self.cross_attention = CrossAttention(cfg.width, cfg.cross_heads)
        self.mlp_in = nn.Linear(cfg.width, cfg.mlp_width)
        self.mlp_out = nn.Linear(cfg.mlp_width, cfg.width)
        # Added to the shared time modulation: shift and scale of each of the three norms.
        self.modulation = nn.Parameter(torch.zeros(6, cfg.width))

    def forward(
        self, x: Tensor, time: Tensor, c: Condition, folded: Folded | Unfolded | None
    ) -> Tensor:
        """Map tokens [B, N, D] to the same shape; time is [B, 6, D]."""
        if hasattr(self, "canvas_attention"):
            x = x + self.canvas_attention(x, c.tokens, c.paintings, c.bias, c.present)
        shift1, scale1, shift2, scale2, shift3, scale3 = (time + self.modulation).unbind(1)
        x = x + self.self_attention(_modulate(x, shift1, scale1))
        if folded is None:
            z = _modulate(x, shift2, scale2)
            x = x + self.cross_attention(z, c.tokens, c.bias, c.present)
        else:
            x = neighbour_attention(x, folded, scale=scale2, shift=shift2)
        return x + self.mlp_out(F.relu(self.mlp_in(_modulate(x, shift3, scale3))).square())


class Denoiser(Backbone):
    """Predict the clean codes from corrupted ones, a level, and k+1 condition embeddings.

    One transformer token holds patch x patch codes (the process treats the codes of a step
    independently anyway). The condition embeddings get a learned mark (query, or the neighbour's
    rank), a small shared network reads each, and every layer attends to the result.

    An editor (`config.source`) is also given a picture's codes. They enter twice: added to the
    tokens, so that the layers see the picture; and at the output, where each place has a gate that
    raises the logit of the source's own code, so that copying need not be learned code by code.
    Both start at zero: a denoiser's weights become an editor's that ignores its source.

    Args:
        config: sizes.
    """

    backbone = "discrete"
    folder = "denoiser"
    config_type = DenoiserConfig

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        cfg = self.config = config
        p2, d = cfg.patch**2, cfg.width
        tokens = cfg.length // p2
        narrow = max(8, cfg.code_width // 2)
        self.code_embedding = nn.Embedding(cfg.num_codes + 1, narrow)
        self.patch_in = nn.Linear(p2 * narrow, d)
        self.position = nn.Parameter(torch.randn(tokens, d) * 0.02)
        self.time_in = nn.Linear(cfg.time_width, cfg.time_width)
        self.time_out = nn.Linear(cfg.time_width, 6 * d)
        self.cond_in = nn.Linear(cfg.embed_dim, d)
        self.cond_mark = nn.Parameter(torch.randn(1 + cfg.ranks, d) * 0.1)
        self.cond_mlp_in = nn.Linear(d, 2 * d)
        self.cond_mlp_out = nn.Linear(2 * d, d)
        self.canvas = nn.Linear(cfg.embed_dim, tokens * cfg.canvas_width)
        self.layers = nn.ModuleList(Layer(cfg, i in cfg.canvas_layers) for i in range(cfg.depth))
        self.norm_out = nn.LayerNorm(d)
        self.patch_out = nn.Linear(d, p2 * cfg.code_width)
        self.head = nn.Linear(cfg.code_width, cfg.num_codes)
        if cfg.source:
            self.source_in = nn.Linear(p2 * narrow, d)
            self.source_gate = nn.Linear(cfg.code_width, 1)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.8)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.code_embedding.weight, std=1.0)
        for layer in self.layers:
            assert isinstance(layer, Layer)  # for the type checker
            for out in (layer.self_attention.to_out, layer.cross_attention.to_out, layer.mlp_out):
                out.weight.data.mul_(0.5 / math.sqrt(self.config.depth))
        self.time_out.weight.data.mul_(0.1)
        self.cond_mlp_out.weight.data.mul_(0.5)
        self.head.weight.data.mul_(0.3)
        if self.config.source:
            for module in (self.source_in, self.source_gate):
                nn.init.zeros_(module.weight)

    @property
    def schedule(self) -> Schedule:
        """The schedule the denoiser is trained with."""
        cfg = self.config
        return Schedule(cfg.schedule, cfg.num_steps, cfg.num_codes)

    def time_modulation(self, t: Tensor) -> Tensor:
        """Levels [B] to the shared AdaLN shifts and scales [B, 6, D]."""
        half = self.config.time_width // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angle = t.float()[:, None] * torch.exp(steps * (-math.log(1e4) / half))[None]
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)
        h = self.time_out(F.silu(self.time_in(wave.to(self.time_in.weight.dtype))))
        return h.view(len(t), 6, self.config.width)

    def read_condition(self, cond: Tensor) -> Tensor:
        """Condition embeddings [B, k+1, E], query first, to condition tokens [B, k+1, D]."""
        rank = torch.arange(cond.shape[1], device=cond.device).clamp_max(self.config.ranks)
        # Unit rows of E numbers become rows of variance 1.
        h = self.cond_in(cond * math.sqrt(self.config.embed_dim)) + self.cond_mark[rank]
        g = F.layer_norm(h, h.shape[-1:])
        return F.layer_norm(
            h + self.cond_mlp_out(F.relu(self.cond_mlp_in(g)).square()), h.shape[-1:]
        )

    def tokens(self, x_t: Tensor) -> Tensor:
        """Codes [B, L] to transformer tokens [B, L / patch^2, D]."""
        return self.patch_in(self._patches(x_t)) + self.position

    def _patches(self, codes: Tensor) -> Tensor:
        """Embedded codes, those of a transformer token side by side: [B, L / patch^2, .]."""
        (rows, cols), p = self.config.grid, self.config.patch
        e = self.code_embedding(codes).view(len(codes), rows // p, p, cols // p, p, -1)
        return e.permute(0, 1, 3, 2, 4, 5).reshape(len(codes), (rows // p) * (cols // p), -1)

    def read_source(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers and the gate read of a picture to edit.

        Args:
            source: its codes, [B, L] int64; the mask K where nothing is known.

        Returns:
            Addends of the tokens [B, N, D]; and, for each code, the feature row that raises its
            own logit by 1, [B, L, code_width], 0 where nothing is known.
        """
        rows = F.pad(self.head.weight, (0, 0, 0, 1))
        rows = rows / rows.square().sum(1, keepdim=True).clamp_min(1e-6)
        # Not rows[source]: on a CPU its backward pass adds in any order.
        return self.source_in(self._patches(source)), F.embedding(source, rows)

    def prepare(
        self, cond: Tensor, cond_mask: Tensor, fold: bool = False, source: Tensor | None = None
    ) -> Condition:
        """Read a condition, once for all steps of a sampling run.

        Args:
            cond: condition embeddings, [B, k+1, E], query first, then neighbours nearest first.
            cond_mask: which of them are on, [B, k+1] bool.
            fold: fold them into each layer's weights (`ops.fold_neighbours`); it pays when the
                result serves several steps.
            source: codes of a picture to edit, [B, L] int64, K where unknown; an editor needs them.

        Raises:
            ValueError: a source for a denoiser that is no editor, or none for an editor.
        """
        if (source is not None) != self.config.source:
            kind = "an editor: it needs" if self.config.source else "no editor: it takes no"
            raise ValueError(f"source: this denoiser is {kind} source")
        tokens = self.read_condition(cond)
        paintings = self.canvas(cond * math.sqrt(self.config.embed_dim))
        paintings = paintings.view(*cond.shape[:2], -1, self.config.canvas_width)
        some = cond_mask.any(1)
        off = ~(cond_mask | ~some[:, None])
        bias = torch.zeros_like(off, dtype=torch.float32).masked_fill(off, float("-inf"))
        folded: list[Folded | Unfolded | None] = [None] * len(self.layers)
        if fold:
            for i, layer in enumerate(self.layers):
                assert isinstance(layer, Layer)  # for the type checker
                folded[i] = layer.cross_attention.fold(tokens, cond_mask)
        read = None if source is None else self.read_source(source)
        return Condition(tokens, paintings, bias[:, None, None], some[:, None, None], folded, read)

    def features(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | Condition,
        cond_mask: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Everything but the head: one row for each code, [B, L, code_width].

        Args:
            x_t: corrupted codes, [B, L] int64, the mask is K.
            t: levels, [B] int64.
            cond: what `prepare` returned; or embeddings, [B, k+1, E], with their cond_mask.
            cond_mask: which of the embeddings are on, [B, k+1] bool.
            source: as in `prepare`.

        Raises:
            ValueError: embeddings without a cond_mask; as `prepare`.
        """
        if not isinstance(cond, Condition):
            if cond_mask is None:
                raise ValueError("cond_mask: embeddings need one, got None")
            cond = self.prepare(cond, cond_mask, source=source)
        (rows, cols), p = self.config.grid, self.config.patch
        x = self.tokens(x_t)
        if cond.source is not None:
            x = x + cond.source[0]
        time = self.time_modulation(t).to(x.dtype)
        for layer, folded in zip(self.layers, cond.folded, strict=True):
            x = layer(x, time, cond, folded)
        y = self.patch_out(self.norm_out(x))
        y = y.view(len(x), rows // p, cols // p, p, p, -1).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(len(x), rows * cols, -1)
        return y if cond.source is None else y + self.source_gate(y) * cond.source[1]

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor, cond_mask: Tensor, source: Tensor | None = None
    ) -> Tensor:
        """Logits of the clean codes, [B, L, K]."""
        return self.head(self.features(x_t, t, cond, cond_mask, source))

    def check(self, steps: int | Sequence[int], guidance: float, **options: Any) -> None:
        """Refuse what `sampler.check_rule` refuses."""
        check_rule(self.schedule, steps, guidance, **options)

    def sample(
        self,
        cond: Tensor,
        cond_mask: Tensor,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        seed: int = 0,
        image_indices: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw codes, [B, L] int64, with the schedule of the training; see `sampler.sample`."""
        return sample(
            self, self.schedule, cond, cond_mask, steps, guidance, seed,
            image_indices=image_indices, callback=callback, **options,
        )  # fmt: skip
