"""Transition step of discrete diffusion: the mixture's choice, then one row of logits if it asks.

p(x_s | x_t) = w_p p + w_u uniform + (1 - w_p - w_u) [x_s = x_t]        (reference.transition_step)

One program a token. Most tokens are decided by the choice alone and read nothing; the others read
their row once into registers. Bytes: rows drawn * K * itemsize (twice with guidance) + 16 B L;
FLOPs: about 150 a class drawn (Philox, two logarithms); bandwidth binds at FP16 and K >= 1024.
Accumulates in FP32, choices in FP64. Ties go to the lower class. NaN, +inf or no finite class: -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import (
    PURITY,
    below,
    class_noise,
    gumbel,
    row_block,
    row_scores,
    unit52,
    words_at,
)

# (largest BLOCK_K, warps): a row stays in registers, 16 to 64 a thread.
CONFIGS = ((1024, 1), (2048, 4), (8192, 8), (65536, 16))

STEP, SCORE, PURE = 0, 1, 2


@triton.jit
def transition_step_kernel(
    logits_ptr, null_ptr, x_t_ptr, weights_ptr, image_ptr, seed_ptr, rows_ptr, count_ptr,
    out_ptr, score_ptr, best_ptr, chosen_ptr,
    L, K,
    stride_row, stride_null, stride_weights,
    guidance, inverse_temperature, top_r, top_k, purity,
    HAS_NULL: tl.constexpr, TRUNCATE: tl.constexpr, COMPACT: tl.constexpr, MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token: choice, scores, draw. COMPACT: program r holds row r of position rows[r]."""
    row = tl.program_id(0).to(tl.int64)
    flat = row
    live = True
    if COMPACT:
        live = row < tl.load(count_ptr)
        flat = tl.load(rows_ptr + row, mask=live, other=0)
    image_row = flat // L
    position = (flat - image_row * L).to(tl.int32)
    image = tl.load(image_ptr + image_row).to(tl.int32)
    x_t = tl.load(x_t_ptr + flat)
    seed = tl.load(seed_ptr)
    w_ptr = weights_ptr + image_row * stride_weights
    t = tl.load(w_ptr).to(tl.int32)
    masked = x_t == K

    zero = position * 0
    w0, w1, w2, w3 = words_at(seed, zero, position, image, t, 0)
    u = unit52(w0, w1)
    w_p = tl.where(masked, tl.load(w_ptr + 1), tl.load(w_ptr + 3))
    u0 = tl.where(masked, tl.load(w_ptr + 2), tl.load(w_ptr + 4))
    u1 = tl.where(masked, u0, tl.load(w_ptr + 5))
    uniform = below(w2, w3, K)

    # What the network cannot change is decided here; `read` says whether the row is needed.
    from_p = u < w_p
    between = (u >= w_p + tl.minimum(u0, u1)) & (u < w_p + tl.maximum(u0, u1))
    x_s = tl.where((~from_p) & (u < w_p + tl.minimum(u0, u1)), uniform, x_t)
    read = from_p | between
    sharp = 1.0
    if MODE == 1:
        read = masked
    if MODE == 2:
        read = tl.load(chosen_ptr + flat) != 0
        from_p = read
        x_s = x_t
        sharp = 1.0 + purity * tl.load(best_ptr + flat)

    if read & live:
        l, top, bad = row_scores(
            logits_ptr + row * stride_row, null_ptr + row * stride_null, K,
            guidance, inverse_temperature, top_r, top_k, HAS_NULL, TRUNCATE, BLOCK_K,
        )  # fmt: skip
        if MODE == 1:
            total = tl.sum(tl.exp(l - top), 0)
            w0, _, _, _ = words_at(seed, zero, position, image, t, PURITY)
            score = gumbel(w0) - tl.log(total)
            tl.store(score_ptr + flat, tl.where(bad > 0, float("nan"), score))
            tl.store(best_ptr + flat, 1.0 / total)
        else:
            if from_p:
                noised = l * sharp + class_noise(seed, position, image, t, BLOCK_K)
                x_s = tl.argmax(noised, 0).to(tl.int64)
            else:
                col = tl.arange(0, BLOCK_K)
                e = tl.exp(l - top)
                e_i = tl.sum(tl.where(col == x_t, e, 0.0), 0).to(tl.float64)
                p_i = e_i / tl.sum(e, 0).to(tl.float64)
                x_s = tl.where(u < w_p + u0 * (1.0 - p_i) + u1 * p_i, uniform, x_t)
            x_s = tl.where(bad > 0, -1, x_s)
    if MODE != 1:
        tl.store(out_ptr + flat, x_s, mask=live)


def _launch(
    logits, null, x_t, weights, image_indices, seed, rule, out, *,
    rows=None, count=None, mode=STEP, purity=0.0, score=None, best=None, chosen=None,
):  # fmt: skip
    guidance, temperature, top_r, top_k = rule
    K = logits.shape[-1]
    total = x_t.numel() if rows is None else rows.numel()
    block_k, warps = row_block(K, CONFIGS)
    none = out
    transition_step_kernel[(total,)](
        logits_ptr=logits, null_ptr=none if null is None else null, x_t_ptr=x_t,
        weights_ptr=weights, image_ptr=image_indices, seed_ptr=seed,
        rows_ptr=none if rows is None else rows, count_ptr=none if count is None else count,
        out_ptr=out, score_ptr=none if score is None else score,
        best_ptr=none if best is None else best, chosen_ptr=none if chosen is None else chosen,
        L=x_t.shape[1], K=K,
        stride_row=logits.stride(-2), stride_null=0 if null is None else null.stride(-2),
        stride_weights=7 if weights.dim() == 2 else 0,
        guidance=guidance, inverse_temperature=1.0 / temperature, top_r=top_r, top_k=top_k,
        purity=purity,
        HAS_NULL=null is not None, TRUNCATE=top_r < 1.0 or 0 < top_k < K,
        COMPACT=rows is not None, MODE=mode, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return out


def launch_transition_step(
    logits, null_logits, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k, purity,
):  # fmt: skip
    """Dense form: logits [B, L, K] -> x_s [B, L]."""
    logits = logits.contiguous()
    null = None if null_logits is None else null_logits.contiguous()
    x_t, weights, image_indices = x_t.contiguous(), weights.contiguous(), image_indices.contiguous()
    rule = guidance, temperature, top_r, top_k
    out = torch.empty_like(x_t)
    if x_t.numel() == 0:
        return out
    args = logits, null, x_t, weights, image_indices, seed, rule
    if purity is None:
        return _launch(*args, out)
    B, L = x_t.shape
    masked = x_t == logits.shape[-1]
    score = torch.full((B, L), float("-inf"), device=x_t.device)
    best = torch.zeros((B, L), device=x_t.device)
    _launch(*args, out, mode=SCORE, score=score, best=best)
    n = (masked.sum(-1) - torch.round(L * weights[..., 6])).clamp(min=0)
    bad = score.isnan()
    order = score.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    order = order.sort(dim=-1, descending=True, stable=True)[1]
    place = torch.arange(L, device=x_t.device).expand(B, L)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    chosen = (masked & (rank < n[:, None])).to(torch.int32)
    _launch(*args, out, mode=PURE, purity=purity, best=best, chosen=chosen)
    return out.masked_fill_(bad, -1)


def launch_transition_rows(
    logits, null_logits, rows, x_t, x_s, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    """Compact form: logits [n, K] of the flat positions rows [n]; returns a completed x_s."""
    out = x_s.clone()
    if rows.numel() == 0:
        return out
    count = torch.full((1,), rows.numel(), dtype=torch.int64, device=x_t.device)
    null = None if null_logits is None else null_logits.contiguous()
    return _launch(
        logits.contiguous(), null, x_t.contiguous(), weights.contiguous(),
        image_indices.contiguous(), seed, (guidance, temperature, top_r, top_k), out,
        rows=rows.contiguous(), count=count,
    )  # fmt: skip
