"""For diffusers: a drop-in for its `VQDiffusionScheduler`, and a cross-attention processor.

The scheduler has the same configuration, `set_timesteps` and `step`, backed by
`ops.transition_step`. It differs where diffusers is wrong: n inference steps stride over the whole
chain with the exact posterior of each jump (diffusers truncates the chain to its last n steps and
starts an all-MASK canvas where the model expects few masks).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from knnfast import ops
from knnfast.diffusion.schedule import even_levels


@dataclass
class VQDiffusionSchedulerOutput(BaseOutput):
    """Output of `VQDiffusionScheduler.step`.

    Attributes:
        prev_sample: tokens of the level that the step leads to, [B, L] int64.
    """

    prev_sample: Tensor


@dataclass(frozen=True)
class _Levels:
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray


class VQDiffusionScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Exact mask-and-replace transitions behind the interface of diffusers.

    Args:
        num_vec_classes: K + 1, the mask included as the last class.
        num_train_timesteps: T. diffusers' timestep i is level i + 1 here.
        alpha_cum_start, alpha_cum_end: cumulative chance to keep a code, at levels 1 and T.
        gamma_cum_start, gamma_cum_end: cumulative chance of MASK, at levels 1 and T.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_vec_classes: int,
        num_train_timesteps: int = 100,
        alpha_cum_start: float = 0.99999,
        alpha_cum_end: float = 0.000009,
        gamma_cum_start: float = 0.000009,
        gamma_cum_end: float = 0.99999,
    ) -> None:
        self.num_embed = num_vec_classes
        self.mask_class = num_vec_classes - 1
        T = num_train_timesteps
        A = np.r_[1.0, np.linspace(alpha_cum_start, alpha_cum_end, T)]
        C = np.r_[0.0, np.linspace(gamma_cum_start, gamma_cum_end, T)]
        replaced = 1 - A - C
        replaced[replaced < 1e-12] = 0.0  # rounding's: where A + C = 1 no code is replaced
        self._schedule = _Levels(A, replaced / self.mask_class, C)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(T - 1, -1, -1)
        self._next = {t: t - 1 for t in range(1, T + 1)}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the levels to visit: n of them spread over the chain, or any falling list.

        Args:
            num_inference_steps: n, at most num_train_timesteps.
            device: where `timesteps` lies.
            timesteps: instead of n, diffusers' timesteps in falling order; the last one leads to
                the data.

        Raises:
            ValueError: n out of range, or timesteps that do not fall or lie outside the chain.
        """
        T = self.config["num_train_timesteps"]
        if timesteps is None:
            n = num_inference_steps
            if n is None or not 1 <= n <= T:
                raise ValueError(f"num_inference_steps: must be in [1, {T}], got {n}")
            levels = even_levels(T, n)
        else:
            levels = [t + 1 for t in timesteps] + [0]
            if len(levels) < 2 or any(a <= b for a, b in pairwise(levels)) or levels[0] > T:
                raise ValueError(f"timesteps: must fall and lie in [0, {T - 1}], got {timesteps}")
        self.num_inference_steps = len(levels) - 1
        self.timesteps = torch.tensor([t - 1 for t in levels[:-1]], device=device)
        self._next = dict(pairwise(levels))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> VQDiffusionSchedulerOutput | tuple[Tensor]:
        """Draw the tokens of the next level in the list.

        Args:
            model_output: log p(x_0 | x_t) or logits, [B, K, L]; -inf excludes a class. Guidance is
                given before: l_null + w (l - l_null).
            timestep: one of `timesteps`.
            sample: x_t, [B, L] int64.
            generator: seeds the step's random numbers; None: torch's own.
            return_dict: False returns a tuple.

        Raises:
            ValueError: a timestep that is not in the list; what `ops.transition_step` refuses.
        """
        t = int(timestep) + 1
        if t not in self._next:
            raise ValueError(f"timestep: {t - 1} is not in the list that set_timesteps chose")
        weights = ops.transition_weights(
            self._schedule, t, self._next[t], self.mask_class, sample.device
        )
        where = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (1,), generator=generator, device=where).to(sample.device)
        logits = model_output.transpose(1, 2)
        if logits.dtype == torch.float64:
            logits = logits.float()
        prev = ops.transition_step(logits, sample, weights, seed=seed)
        return VQDiffusionSchedulerOutput(prev_sample=prev) if return_dict else (prev,)


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    cond: weakref.ref[Tensor]
    mask: Tensor | None
    folded: ops.Folded | ops.Unfolded


class NeighbourAttnProcessor:
    """Cross-attention of a diffusers U-Net to k + 1 embeddings, through folded weights.

    `unet.set_attn_processor({name: NeighbourAttnProcessor() for name in unet.attn_processors})`.
    The fold of a condition is kept while the same tensor comes back unchanged (all steps of a run)
    with a mask of the same values, under the same autocast, and gradients are off. Tensors made
    under `torch.inference_mode` do not tell whether they were changed: with one of these, every
    call folds. Nor do weights that are changed through `.data` (an EMA's `copy_to`, say): call
    `reset` after that. Self-attention, which has no condition, is diffusers' own.

    A U-Net makes a new tensor of its `encoder_attention_mask` at every step, and to compare the
    values waits for the device. A mask given as `cross_attention_kwargs={"neighbour_mask": mask}`,
    [B, N] bool, comes through unchanged: then nothing is read.
    """

    def __init__(self) -> None:
        self._self_attention = AttnProcessor2_0()
        self._kept: _Kept | None = None  # replaced as a whole: threads may share a processor

    def reset(self) -> None:
        """Forget the kept fold, after weights were changed through `.data`."""
        self._kept = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; the arguments are those of diffusers' processors.

        Args:
            attn: the layer.
            hidden_states: [B, L, D] or [B, C, h, w].
            encoder_hidden_states: the condition, [B, N, E]; None: self-attention.
            attention_mask: diffusers' additive mask, [B, 1, N].
            temb: of diffusers; read by its self-attention alone.
            neighbour_mask: which of the N are on, [B, N] bool.
            kwargs: for self-attention.

        Raises:
            ValueError: a layer with spatial_norm, norm_q or norm_k; two masks.
        """
        if encoder_hidden_states is None:
            return self._self_attention(attn, hidden_states, None, attention_mask, temb, **kwargs)
        for name in ("spatial_norm", "norm_q", "norm_k"):
            if getattr(attn, name, None) is not None:
                raise ValueError(f"attn: {name} is not supported by NeighbourAttnProcessor")
        x, shape = hidden_states, hidden_states.shape
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if neighbour_mask is not None and attention_mask is not None:
            raise ValueError("neighbour_mask: is the mask of the condition; give no other one")
        folded = self._fold(attn, encoder_hidden_states, attention_mask, neighbour_mask)
        out = ops.neighbour_attention(x, folded, norm=False, residual=False)
        out = attn.to_out[1](out)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def _fold(
        self, attn: Attention, cond: Tensor, attention_mask: Tensor | None, mask: Tensor | None
    ) -> ops.Folded | ops.Unfolded:
        layers: list[Any] = [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
        weights = [p for m in layers for p in (m.weight, m.bias)]
        given = attention_mask if mask is None else mask
        key = None if torch.is_grad_enabled() else _key(attn, cond, given, weights)
        kept = self._kept
        if (
            kept is not None
            and kept.key == key
            and kept.cond() is cond
            and _same_mask(given, kept.mask, mask is None)
        ):
            return kept.folded
        n = cond
        if attn.norm_cross:
            n = attn.norm_encoder_hidden_states(n)
        if attention_mask is not None:  # diffusers' additive bias, [B, 1, N]: off is -10000
            mask = attention_mask.reshape(len(n), -1, n.shape[1])[:, 0] > -5000.0
        wq, bq, wk, _, wv, bv, wo, bo = weights
        usual = attn.scale * (wq.shape[0] // attn.heads) ** 0.5  # 1 unless the layer rescales
        folded = ops.fold_neighbours(
            n, wq * usual, wk, wv, wo, None if bq is None else bq * usual, bv, bo,
            heads=attn.heads, mask=mask,
        )  # fmt: skip
        if key is not None:
            self._kept = _Kept(key, weakref.ref(cond), given, folded)
        return folded


def _key(
    attn: Attention, cond: Tensor, mask: Tensor | None, weights: list[Tensor | None]
) -> tuple[Any, ...] | None:
    """What changes with a fold's sources or type; None where a source does not tell its changes."""
    norm = list(attn.norm_cross.parameters()) if attn.norm_cross else []
    if any(x is not None and x.is_inference() for x in (cond, mask, *weights, *norm)):
        return None
    kind = cond.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    versions = (None if w is None else (id(w), w._version) for w in (*weights, *norm))
    return (autocast, cond._version, None if mask is None else mask._version, *versions)


def _same_mask(given: Tensor | None, kept: Tensor | None, by_value: bool) -> bool:
    """Whether a mask is the kept one; by value where a U-Net makes it anew at every step."""
    return given is kept or (
        by_value
        and given is not None
        and kept is not None
        and given.dtype == kept.dtype
        and given._version == kept._version  # of the key: the kept one has not changed since
        and torch.equal(given, kept)
    )
