"""Transition step of discrete diffusion: the mixture's choice, then one row of logits if it asks.

p(x_s | x_t) = w_p p + w_u uniform + (1 - w_p - w_u) [x_s = x_t]        (reference.transition_step)

The choice kernel decides most tokens and lists the others; a fixed grid goes through the list,
whose length stays on the device, and holds one row at a time in registers. Bytes: rows drawn * K *
itemsize (twice with guidance) + 32 B L. About 90 instructions a class drawn (Philox, a logarithm,
an exponential, a division): at FP16 their issue takes an H100 6 times as long as its memory.
Accumulates in FP32, choices in FP64. Ties go to the lower class. NaN, +inf or no finite class: -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import (
    CHOICE,
    MASK_P,
    MASK_U,
    PURITY,
    REAL_P,
    REAL_U0,
    REAL_U1,
    below,
    class_waits,
    gumbel,
    multiprocessors,
    row_block,
    row_scores,
    unit52,
    words_at,
)

from knnfast.ops import reference

# (largest BLOCK_K, warps): a row stays in registers, 32 classes a thread; above 8,192, where a
# thread has 128 registers, some of it spills.
CONFIGS = ((1024, 1), (2048, 2), (4096, 4), (8192, 8), (65536, 16))

STEP, SCORE, PURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK = 256  # tokens of a program that lists


@triton.jit
def append(rows_ptr, count_ptr, flat, need):
    """Add the needed positions to a list whose order is the programs'; no token depends on it."""
    place = tl.cumsum(need.to(tl.int32), 0)
    first = tl.atomic_add(count_ptr, tl.sum(need.to(tl.int32), 0), sem="relaxed")
    tl.store(rows_ptr + first + place - 1, flat, mask=need)


@triton.jit
def transition_list_kernel(need_ptr, rows_ptr, count_ptr, total, BLOCK: tl.constexpr):
    """The positions of the true ones."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    need = tl.load(need_ptr + flat, mask=flat < total, other=0) != 0
    append(rows_ptr, count_ptr, flat, need)


@triton.jit
def transition_choose_kernel(
    x_t_ptr, weights_ptr, image_ptr, seed_ptr, out_ptr, rows_ptr, count_ptr,
    total, L, K,
    stride_weights,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choices of BLOCK tokens: x_s where the network has no say, the others' positions in rows."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = flat < total
    image_row = flat // L
    position = (flat - image_row * L).to(tl.int32)
    image = tl.load(image_ptr + image_row, mask=inside, other=0).to(tl.int32)
    x_t = tl.load(x_t_ptr + flat, mask=inside, other=0)
    seed = tl.load(seed_ptr)
    w_ptr = weights_ptr + image_row * stride_weights
    t = tl.load(w_ptr, mask=inside, other=0.0).to(tl.int32)
    masked = x_t == K

    w0, w1, w2, w3 = words_at(seed, position * 0, position, image, t, CHOICE)
    u = unit52(w0, w1)
    w_p = tl.load(w_ptr + tl.where(masked, MASK_P, REAL_P), mask=inside, other=0.0)
    u0 = tl.load(w_ptr + tl.where(masked, MASK_U, REAL_U0), mask=inside, other=0.0)
    u1 = tl.load(w_ptr + tl.where(masked, MASK_U, REAL_U1), mask=inside, other=0.0)
    least = w_p + tl.minimum(u0, u1)
    most = w_p + tl.maximum(u0, u1)

    need = inside & ((u < w_p) | ((u >= least) & (u < most)))
    x_s = tl.where((u >= w_p) & (u < least), below(w2, w3, K), x_t)
    tl.store(out_ptr + flat, x_s, mask=inside)
    append(rows_ptr, count_ptr, flat, need)


@triton.jit
def transition_step_kernel(
    logits_ptr, null_ptr, x_t_ptr, weights_ptr, image_ptr, seed_ptr, rows_ptr, count_ptr,
    out_ptr, score_ptr, best_ptr,
    L, K,
    stride_row, stride_null, stride_weights,
    guidance, inverse_temperature, top_r, top_k, purity,
    HAS_NULL: tl.constexpr, TRUNCATE: tl.constexpr, COMPACT: tl.constexpr, MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A share of the tokens at rows[: count]. COMPACT: row r of the logits is that of rows[r]."""
    seed = tl.load(seed_ptr)
    for r in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        flat = tl.load(rows_ptr + r)
        row = flat
        if COMPACT:
            row = flat * 0 + r  # in 64 bits
        image_row = flat // L
        position = (flat - image_row * L).to(tl.int32)
        image = tl.load(image_ptr + image_row).to(tl.int32)
        w_ptr = weights_ptr + image_row * stride_weights
        t = tl.load(w_ptr).to(tl.int32)

        l, bad = row_scores(
            logits_ptr + row * stride_row, null_ptr + row * stride_null, K,
            guidance, inverse_temperature, top_r, top_k, HAS_NULL, TRUNCATE, BLOCK_K,
        )  # fmt: skip
        zero = position * 0
        if MODE == SCORE:
            total = tl.sum(tl.exp(l), 0)
            w0, _, _, _ = words_at(seed, zero, position, image, t, PURITY)
            score = gumbel(w0) - tl.log(total)
            tl.store(score_ptr + flat, tl.where(bad > 0, float("nan"), score))
            tl.store(best_ptr + flat, 1.0 / total)
        else:
            x_t = tl.load(x_t_ptr + flat)
            masked = x_t == K
            w0, w1, w2, w3 = words_at(seed, zero, position, image, t, CHOICE)
            u = unit52(w0, w1)
            w_p = tl.where(masked, tl.load(w_ptr + MASK_P), tl.load(w_ptr + REAL_P))
            from_p = u < w_p
            sharp = 1.0
            if MODE == PURE:
                from_p = x_t == x_t
                sharp = 1.0 + purity * tl.load(best_ptr + flat)
            e = tl.exp(l * sharp)
            if from_p:
                # argmax of l + Gumbel noise as a race: the first of exponential waits at rates e^l.
                # Who loses to underflow cannot win: the noise spans 26.
                x_s = tl.argmax(e / class_waits(seed, position, image, t, BLOCK_K), 0).to(tl.int64)
            else:
                u0 = tl.where(masked, tl.load(w_ptr + MASK_U), tl.load(w_ptr + REAL_U0))
                u1 = tl.where(masked, u0, tl.load(w_ptr + REAL_U1))
                e_i = tl.sum(tl.where(tl.arange(0, BLOCK_K) == x_t, e, 0.0), 0).to(tl.float64)
                p_i = e_i / tl.sum(e, 0).to(tl.float64)
                replaced = u < w_p + u0 * (1.0 - p_i) + u1 * p_i
                x_s = tl.where(replaced, below(w2, w3, K), x_t)
            tl.store(out_ptr + flat, tl.where(bad > 0, -1, x_s))


def _launch(
    logits, null, x_t, weights, image_indices, seed, rule, out, rows, count, *,
    compact=False, mode=STEP, purity=0.0, score=None, best=None,
):  # fmt: skip
    guidance, temperature, top_r, top_k = rule
    K = logits.shape[-1]
    block_k, warps = row_block(K, CONFIGS)
    programs = multiprocessors(logits.device)[0] * (32 // warps)
    none = out
    transition_step_kernel[(min(rows.numel(), programs),)](
        logits_ptr=logits, null_ptr=none if null is None else null, x_t_ptr=x_t,
        weights_ptr=weights, image_ptr=image_indices, seed_ptr=seed, rows_ptr=rows,
        count_ptr=count, out_ptr=out, score_ptr=none if score is None else score,
        best_ptr=none if best is None else best, L=x_t.shape[1], K=K,
        # Not stride(-2), which may be anything where L = 1, of contiguous logits too.
        stride_row=K, stride_null=0 if null is None else K,
        stride_weights=7 if weights.dim() == 2 else 0,
        guidance=guidance, inverse_temperature=1.0 / temperature, top_r=top_r, top_k=top_k,
        purity=purity,
        HAS_NULL=null is not None, TRUNCATE=top_r < 1.0 or 0 < top_k < K,
        COMPACT=compact, MODE=mode, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return out


def launch_transition_choose(x_t, weights, image_indices, seed, num_codes):
    """X_s [B, L], and `_list`'s rows and count of the tokens that need logits."""
    x_t, weights, image_indices = x_t.contiguous(), weights.contiguous(), image_indices.contiguous()
    x_s = torch.empty_like(x_t)
    rows, count = _list(x_t)
    total = x_t.numel()
    transition_choose_kernel[(triton.cdiv(total, BLOCK),)](
        x_t_ptr=x_t, weights_ptr=weights, image_ptr=image_indices, seed_ptr=seed, out_ptr=x_s,
        rows_ptr=rows, count_ptr=count, total=total, L=x_t.shape[1], K=num_codes,
        stride_weights=7 if weights.dim() == 2 else 0, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return x_s, rows, count


def _list(like):
    """An empty list: rows [B L] (the first count are meant, in any order) and count [1]."""
    rows = torch.empty(like.numel(), dtype=torch.int64, device=like.device)
    return rows, torch.zeros(1, dtype=torch.int32, device=like.device)


def _listed(need):
    """Rows and count of the true ones."""
    rows, count = _list(need)
    transition_list_kernel[(triton.cdiv(need.numel(), BLOCK),)](
        need_ptr=need.contiguous().view(torch.uint8), rows_ptr=rows, count_ptr=count,
        total=need.numel(), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return rows, count


def launch_transition_step(
    logits, null_logits, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k, purity,
):  # fmt: skip
    """Dense form: logits [B, L, K] -> x_s [B, L]."""
    logits = logits.contiguous()
    null = None if null_logits is None else null_logits.contiguous()
    x_t, weights, image_indices = x_t.contiguous(), weights.contiguous(), image_indices.contiguous()
    rule = guidance, temperature, top_r, top_k
    if x_t.numel() == 0:
        return torch.empty_like(x_t)
    args = logits, null, x_t, weights, image_indices, seed, rule
    if purity is None:
        return _launch(
            *args, *launch_transition_choose(x_t, weights, image_indices, seed, logits.shape[-1])
        )
    B, L = x_t.shape
    masked = x_t == logits.shape[-1]
    score = torch.full((B, L), float("-inf"), device=x_t.device)
    best = torch.zeros((B, L), device=x_t.device)
    out = x_t.clone()
    _launch(*args, out, *_listed(masked), mode=SCORE, score=score, best=best)
    n = (masked.sum(-1) - torch.round(L * weights[..., reference.KEEP])).clamp(min=0)
    bad = score.isnan()
    order = score.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    order = order.sort(dim=-1, descending=True, stable=True)[1]
    place = torch.arange(L, device=x_t.device).expand(B, L)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    chosen = masked & (rank < n[:, None])
    _launch(*args, out, *_listed(chosen), mode=PURE, purity=purity, best=best)
    return out.masked_fill_(bad, -1)


def launch_transition_rows(
    logits, null_logits, rows, x_t, x_s, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    """Compact form: logits [n, K] of the flat positions rows [n]; returns a completed x_s."""
    out = x_s.clone(memory_format=torch.contiguous_format)  # the kernel indexes it flat
    if rows.numel() == 0:
        return out
    count = torch.full((1,), rows.numel(), dtype=torch.int32, device=x_t.device)
    null = None if null_logits is None else null_logits.contiguous()
    return _launch(
        logits.contiguous(), null, x_t.contiguous(), weights.contiguous(),
        image_indices.contiguous(), seed, (guidance, temperature, top_r, top_k), out,
        rows.contiguous(), count, compact=True,
    )  # fmt: skip
