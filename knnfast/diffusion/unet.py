"""The continuous backbone: a U-Net that denoises code vectors, conditioned on k+1 embeddings."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knnfast._checks import hint
from knnfast.diffusion.backbone import MOST_LAYERS, Backbone, check_sizes
from knnfast.diffusion.sampler import signed
from knnfast.diffusion.schedule import even_levels
from knnfast.diffusion.settings import Settings
from knnfast.ops.philox import NOISE, counter, normal, philox

SOLVERS = {"dpm": 2, "ddim": 1}  # and their orders: DDIM is DPM-Solver++'s first
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class UNetConfig(Settings):
    """Sizes of a U-Net denoiser.

    Attributes:
        num_codes: K.
        grid: rows and columns of codes.
        code_dim: numbers of a code vector, C.
        embed_dim: E, of the condition embeddings.
        widths: channels of each resolution, the finest first; every one but the first attends.
        blocks: residual blocks of each resolution on the way down (one more on the way up).
        groups: of the group norms.
        heads: of the attentions.
        cond_width: of a condition token.
        ranks: neighbours told apart by rank; later ones share the last rank.
        num_steps: T of the noise schedule.
        beta_schedule: diffusers' name of that schedule.
        affinity: log of how much likelier a neighbour's picture is for a cosine to the query that
            is larger by 1.
    """

    num_codes: int = 512
    grid: tuple[int, int] = (16, 16)
    code_dim: int = 8
    embed_dim: int = 512
    widths: tuple[int, ...] = (48, 96, 128)
    blocks: int = 1
    groups: int = 16
    heads: int = 4
    cond_width: int = 256
    ranks: int = 10
    num_steps: int = 1000
    beta_schedule: str = "squaredcos_cap_v2"
    affinity: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, "num_codes", "grid", "code_dim", "embed_dim", "widths", "groups",
            "heads", "cond_width", "ranks", "num_steps",
        )  # fmt: skip
        check_sizes(self, "blocks", most=MOST_LAYERS)
        if len(self.grid) != 2:
            raise ValueError(f"grid must be rows and columns, got {self.grid!r}")
        if len(self.widths) < 2:
            raise ValueError(f"widths: at least two resolutions, got {self.widths}")
        for width in self.widths:
            if width % self.groups or width % self.heads:
                raise ValueError(f"widths {self.widths} must be multiples of groups and heads")
        if self.beta_schedule not in BETA_SCHEDULES:
            allowed = ", ".join(BETA_SCHEDULES)
            raise ValueError(f"beta_schedule must be one of {allowed}, got {self.beta_schedule!r}")

    @property
    def length(self) -> int:
        """Number of codes L."""
        return self.grid[0] * self.grid[1]


class UNetCondition(NamedTuple):
    """What a condition becomes; constant over a sampling run (`UNetDenoiser.prepare`)."""

    tokens: Tensor  # [B, k+1, cond_width]
    paintings: Tensor  # [B, k+1, C, h, w]
    prior: Tensor  # log of how likely each painting is before anything is seen of it, [B, k+1]
    mask: Tensor  # which are on, [B, k+1] bool


class UNetDenoiser(Backbone):
    """Predict v = alpha eps - sigma x_0 of noised code vectors (Salimans and Ho 2022).

    x_0 are the tokenizer's code vectors, centred and scaled: 1/48 of the numbers of a 64 x 64
    picture, the same encoded images as the discrete backbone's, and the only latents that the
    tokenizer's decoder knows; the end of a sampling run snaps to the nearest codes. The network is
    diffusers' `UNet2DConditionModel`, whose cross-attention reads the k+1 embeddings through
    `NeighbourAttnProcessor`. Beside that each embedding paints a guess P_j of its picture (one
    linear map), and x_t says whose picture it is likely to be:

        w_j ~ exp(a_j - c |x_t - alpha P_j|^2 / (sigma^2 + alpha^2 s^2)),   m = sum_j w_j P_j
        v = sigma (alpha (1 - s^2) x_t - m) / (sigma^2 + alpha^2 s^2) + U-Net(x_t, m, t, tokens)

    where a_j is `affinity` times the cosine of embedding j and the query's (the query itself counts
    as its nearest neighbour does; without one, the first neighbour stands for it): pure noise x_T
    does not say whose picture it is. The first term of v is the optimal v for x_0 ~ N(m, s^2); the
    network learns what is left. Without any embedding m = 0 and s = 1, and the first term is 0.

    Args:
        config: sizes.
    """

    backbone = "continuous"
    folder = "unet"
    config_type = UNetConfig
    codebook: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        network, _ = import_diffusers()
        from knnfast.diffusion.scheduler import NeighbourAttnProcessor

        cfg = self.config = config
        attending = len(cfg.widths) - 1
        self.unet = network(
            sample_size=cfg.grid,
            in_channels=2 * cfg.code_dim,
            out_channels=cfg.code_dim,
            block_out_channels=cfg.widths,
            layers_per_block=cfg.blocks,
            norm_num_groups=cfg.groups,
            cross_attention_dim=cfg.cond_width,
            attention_head_dim=cfg.heads,  # diffusers' name for the number of heads
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
            up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        )
        self.unet.set_attn_processor(
            {n: NeighbourAttnProcessor() for n in self.unet.attn_processors}
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        self.unet.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        self.cond_in = nn.Linear(cfg.embed_dim, cfg.cond_width)
        self.cond_mark = nn.Parameter(torch.randn(1 + cfg.ranks, cfg.cond_width) * 0.1)
        self.cond_norm = nn.LayerNorm(cfg.cond_width)
        self.canvas = nn.Linear(cfg.embed_dim, cfg.code_dim * cfg.length)
        nn.init.normal_(self.canvas.weight, std=0.3 * cfg.embed_dim**-0.5)
        self.log_spread = nn.Parameter(torch.tensor(-0.7))  # log s^2
        self.log_trust = nn.Parameter(torch.tensor(4.0))  # log c, for squares averaged over numbers
        self.register_buffer("codebook", torch.zeros(cfg.num_codes, cfg.code_dim))
        alpha_sigma = torch.stack(self._levels())
        self.register_buffer("alpha", alpha_sigma[0], persistent=False)
        self.register_buffer("sigma", alpha_sigma[1], persistent=False)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of each of the T levels."""
        with torch.device("cpu"):  # the solver reads its tables, whatever the network is made on
            kept = self.solver("dpm").alphas_cumprod.double()
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def solver(self, name: str) -> Any:
        """A diffusers scheduler for this network: DPM-Solver++ of order 2 ("dpm") or 1 ("ddim")."""
        if name not in SOLVERS:
            raise ValueError(f"solver: must be one of {', '.join(SOLVERS)}, got {name!r}")
        _, scheduler = import_diffusers()
        return scheduler(
            num_train_timesteps=self.config.num_steps,
            beta_schedule=self.config.beta_schedule,
            prediction_type="v_prediction",
            solver_order=SOLVERS[name],
        )

    # ---- codes and their vectors --------------------------------------------------------------

    def set_codebook(self, vectors: Tensor, counts: Tensor) -> None:
        """Take the tokenizer's code vectors [K, C]; `counts` [K] are how often each is used.

        They are shifted and scaled together, to mean 0 and mean square 1 over the codes in use.
        """
        weight = (counts / counts.sum()).to(vectors.dtype)[:, None]
        centred = vectors.detach() - (weight * vectors.detach()).sum(0)
        scale = (weight * centred.square()).sum(0).mean().rsqrt()
        self.codebook.copy_(centred * scale)

    def check_codebook(self, vectors: Tensor) -> None:
        """Refuse another tokenizer's code vectors [K, C]: not these, shifted and scaled."""
        centred = [v - v.mean(0) for v in (vectors.detach().to(self.codebook), self.codebook)]
        a, b = (v / v.norm() for v in centred)
        if not (a - b).norm() < 0.01:  # FP16 files are within 0.001
            raise ValueError("start: its code vectors are those of another tokenizer")

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes [B, L] to x_0, [B, C, h, w]."""
        return self.codebook[codes].view(len(codes), *self.config.grid, -1).permute(0, 3, 1, 2)

    def nearest(self, x: Tensor) -> Tensor:
        """Vectors [B, C, h, w] to the nearest codes, [B, L] int64; the lower code wins a tie."""
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        distance = self.codebook.square().sum(1) - 2.0 * rows @ self.codebook.T
        return distance.argmin(1).view(len(x), -1)

    # ---- the network --------------------------------------------------------------------------

    def prepare(self, cond: Tensor, cond_mask: Tensor) -> UNetCondition:
        """Read condition embeddings [B, k+1, E] with their mask, once for all steps of a run."""
        cfg = self.config
        scaled = cond * math.sqrt(cfg.embed_dim)  # unit rows become rows of variance 1
        rank = torch.arange(cond.shape[1], device=cond.device).clamp_max(cfg.ranks)
        tokens = self.cond_norm(self.cond_in(scaled) + self.cond_mark[rank])
        paintings = self.canvas(scaled).view(*cond.shape[:2], cfg.code_dim, *cfg.grid)
        return UNetCondition(tokens, paintings, self._prior(cond, cond_mask), cond_mask)

    def _prior(self, cond: Tensor, mask: Tensor) -> Tensor:
        """a_j of the paintings, [B, k+1]; 0 where an embedding is off."""
        unit = F.normalize(cond.float(), dim=-1)
        anchor = mask.int().argmax(1)  # the first that is on
        each = torch.arange(len(unit), device=unit.device)
        cosine = torch.einsum("bkd,bd->bk", unit, unit[each, anchor])
        cosine = cosine.masked_fill(~mask, 0.0)
        if cosine.shape[1] > 1:  # the query
            cosine[:, 0] = torch.where(mask[:, 0], cosine[:, 1:].amax(1), 0.0)
        return self.config.affinity * cosine

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | UNetCondition, cond_mask: Tensor | None = None
    ) -> Tensor:
        """Predict v.

        Args:
            x_t: noised code vectors, [B, C, h, w].
            t: levels, [B] int64 in [0, T).
            cond: what `prepare` returned; or embeddings, [B, k+1, E], with their cond_mask.
            cond_mask: which of the embeddings are on, [B, k+1] bool.

        Returns:
            v, like x_t.

        Raises:
            ValueError: embeddings without a cond_mask.
        """
        if not isinstance(cond, UNetCondition):
            if cond_mask is None:
                raise ValueError("cond_mask: embeddings need one, got None")
            cond = self.prepare(cond, cond_mask)
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (self.alpha, self.sigma))
        on = cond.mask.any(1).view(-1, 1, 1, 1)
        spread = torch.where(on, self.log_spread.exp(), 1.0)
        total = sigma.square() + alpha.square() * spread
        m = self._mix(x_t, alpha, total, cond)
        guess = sigma * (alpha * (1 - spread) * x_t - m) / total
        left = self.unet(
            torch.cat([x_t, m], 1), t, cond.tokens,
            cross_attention_kwargs={"neighbour_mask": cond.mask},
        ).sample  # fmt: skip
        return guess + left

    def _mix(self, x_t: Tensor, alpha: Tensor, total: Tensor, cond: UNetCondition) -> Tensor:
        """The paintings, averaged by how likely each is x_t's picture: m, [B, C, h, w]."""
        distance = (x_t[:, None] - alpha[:, None] * cond.paintings).square().mean((2, 3, 4))
        score = cond.prior - self.log_trust.exp() * distance / total.view(-1, 1)
        some = cond.mask.any(1, keepdim=True)
        score = score.masked_fill(~cond.mask & some, -torch.inf)
        share = score.softmax(1) * some
        return torch.einsum("bk,bkchw->bchw", share, cond.paintings)

    def check(self, steps: int | Sequence[int], guidance: float, *, solver: str = "dpm") -> None:
        """Refuse steps, guidance or a solver out of range."""
        self._count(steps)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
        self.solver(solver)

    def _count(self, steps: Any) -> int:
        """A number of steps, refused out of its range."""
        try:
            if isinstance(steps, bool):
                raise TypeError
            count = operator.index(steps)
        except TypeError:
            raise TypeError(
                f"steps: the continuous backbone takes a number, got {steps!r}"
            ) from None
        if not 1 <= count <= self.config.num_steps:
            raise ValueError(f"steps must be in [1, {self.config.num_steps}], got {count}")
        return count

    @torch.inference_mode(False)  # whose tensors no fold is kept of
    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        cond_mask: Tensor,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        seed: int = 0,
        image_indices: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        *,
        solver: str = "dpm",
    ) -> Tensor:
        """Draw codes; the arguments are those of `Backbone.sample`.

        Args:
            solver: "dpm" (DPM-Solver++, 2nd order) or "ddim" (its 1st); both are deterministic, so
                that an image's noise comes from its seed and index alone.

        Raises:
            ValueError: steps, seed or solver out of range.
        """
        self.check(steps, guidance, solver=solver)
        steps = self._count(steps)
        cfg = self.config
        batch, device = len(cond), cond.device
        if image_indices is None:
            image_indices = torch.arange(batch, device=device)
        noise = initial_noise((cfg.code_dim, *cfg.grid), seed, image_indices)
        # As in the discrete sampler: on the CPU no image sees its batch, not even in a rounding.
        size = 1 if device.type == "cpu" else max(batch, 1)
        drawn: list[Tensor] = []
        told = 0
        for first in range(0, batch, size):
            part = slice(first, first + size)
            condition = (cond[part].clone(), cond_mask[part].clone())
            for done, x in enumerate(self._run(noise[part], condition, steps, guidance, solver), 1):
                now = (first * steps + done * len(x)) // batch
                if callback is not None and now > told:
                    callback(now, steps)
                told = now
            drawn.append(self.nearest(x))
        return torch.cat(drawn) if drawn else cond.new_zeros((0, cfg.length), dtype=torch.int64)

    def _run(
        self, x: Tensor, condition: tuple[Tensor, Tensor], steps: int, guidance: float, solver: str
    ) -> Iterator[Tensor]:
        """Every x_t of a sampling run, from x_T [B, C, h, w] to x_0."""
        scheduler = self.solver(solver)
        levels = even_levels(self.config.num_steps, steps)[:-1]
        # On the host, where the solver's tables are; its own spacing gives some counts a step more.
        scheduler.set_timesteps(timesteps=[level - 1 for level in levels])
        guided = guidance != 1.0
        if guided:
            cond, mask = condition
            condition = (torch.cat([cond, 0 * cond]), torch.cat([mask, torch.zeros_like(mask)]))
        prepared = self.prepare(*condition)
        for t in scheduler.timesteps:
            doubled = torch.cat([x, x]) if guided else x
            level = torch.full((len(doubled),), int(t), device=x.device)
            v = self(doubled, level, prepared)
            if guided:
                v, null = v.chunk(2)
                v = null + guidance * (v - null)
            x = scheduler.step(v, t, x).prev_sample
            yield x


def initial_noise(shape: tuple[int, ...], seed: int, image_indices: Tensor) -> Tensor:
    """Standard normal x_T of images, [B, *shape] float32.

    A number depends on seed, image index and place alone (Philox), not on the batch or device.

    Raises:
        ValueError: seed out of range.
    """
    device = image_indices.device
    key = torch.full((), signed(seed), device=device)  # no copy from the host
    place = torch.arange(math.prod(shape), device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox(zero, place[None], image_indices[:, None], counter(zero, NOISE), key)
    return normal(*words).float().view(len(image_indices), *shape)


def import_diffusers() -> tuple[Any, Any]:
    """Import diffusers' U-Net and solver when a U-Net is made: nothing else here needs them."""
    try:
        with torch.device("cpu"):  # for modules' own tensors, whatever the network is made on
            from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
    except ImportError as e:
        raise ImportError(
            f"the continuous backbone needs diffusers ({e}); {hint('diffusion')}"
        ) from e
    return UNet2DConditionModel, DPMSolverMultistepScheduler
