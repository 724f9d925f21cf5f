"""Row-sparse head: draw the choices, compact on the device, run the head on those rows alone.

logits[r] = features[rows[r]] W^T + b for r < count                    (reference.sample_head)

Three launches and a prefix sum, no host synchronisation: programs beyond `count` return at once.
Bytes: count * D + K * D (weights once a row block, from L2); FLOPs: 2 count K D, which binds above
about 200 rows. FP32 accumulation, FP32 logits to the drawing kernel of transition_step.py.
Scratch is [B L, K] FP32, of which count rows are touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import INTERPRET, below, unit52, words_at
from knnfast.kernels.transition_step import _launch

CONFIGS = {"BLOCK_R": 16, "BLOCK_K": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def transition_choose_kernel(
    x_t_ptr, weights_ptr, image_ptr, seed_ptr, out_ptr, need_ptr,
    total, L, K,
    stride_weights,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choices of BLOCK tokens: x_s where the network has no say, need = 1 elsewhere."""
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

    w0, w1, w2, w3 = words_at(seed, position * 0, position, image, t, 0)
    u = unit52(w0, w1)
    w_p = tl.load(w_ptr + tl.where(masked, 1, 3), mask=inside, other=0.0)
    u0 = tl.load(w_ptr + tl.where(masked, 2, 4), mask=inside, other=0.0)
    u1 = tl.load(w_ptr + tl.where(masked, 2, 5), mask=inside, other=0.0)
    least = w_p + tl.minimum(u0, u1)
    most = w_p + tl.maximum(u0, u1)

    need = (u < w_p) | ((u >= least) & (u < most))
    x_s = tl.where((u >= w_p) & (u < least), below(w2, w3, K), x_t)
    tl.store(out_ptr + flat, x_s, mask=inside)
    tl.store(need_ptr + flat, need.to(tl.int64), mask=inside)


@triton.jit
def sample_head_kernel(
    features_ptr, weight_ptr, bias_ptr, rows_ptr, count_ptr, out_ptr,
    K, D,
    stride_f, stride_w,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_R, BLOCK_K] of the compact logits."""
    first = tl.program_id(0) * BLOCK_R
    count = tl.load(count_ptr)
    if first < count:
        r = first + tl.arange(0, BLOCK_R)
        live = r < count
        flat = tl.load(rows_ptr + r, mask=live, other=0).to(tl.int64)
        col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        d = tl.arange(0, BLOCK_D)

        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            inner = start + d
            f = tl.load(
                features_ptr + flat[:, None] * stride_f + inner[None, :],
                mask=live[:, None] & (inner < D)[None, :], other=0.0,
            )  # [BLOCK_R, BLOCK_D]  # fmt: skip
            w = tl.load(
                weight_ptr + col[None, :].to(tl.int64) * stride_w + inner[:, None],
                mask=(col < K)[None, :] & (inner < D)[:, None], other=0.0,
            )  # [BLOCK_D, BLOCK_K]  # fmt: skip
            if INTERPRET:
                f, w = f.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(f, w, acc, input_precision="ieee")

        if HAS_BIAS:
            acc += tl.load(bias_ptr + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
        out = out_ptr + r[:, None].to(tl.int64) * K + col[None, :]
        tl.store(out, acc, mask=live[:, None] & (col < K)[None, :])


def launch_transition_choose(x_t, weights, image_indices, seed, num_codes):
    """Return x_s [B, L], rows [B L] (the first count are meant) and count [1]."""
    x_t, weights, image_indices = x_t.contiguous(), weights.contiguous(), image_indices.contiguous()
    total = x_t.numel()
    x_s, need = torch.empty_like(x_t), torch.empty_like(x_t)
    block = 256
    transition_choose_kernel[(triton.cdiv(total, block),)](
        x_t_ptr=x_t, weights_ptr=weights, image_ptr=image_indices, seed_ptr=seed, out_ptr=x_s,
        need_ptr=need, total=total, L=x_t.shape[1], K=num_codes,
        stride_weights=7 if weights.dim() == 2 else 0, BLOCK=block, num_warps=4,
    )  # fmt: skip
    need = need.view(-1)
    place = need.cumsum(0)
    # Slot `total` takes what is not needed; order is kept, so the result is deterministic.
    slot = torch.where(need != 0, place - 1, total)
    index = torch.arange(total, device=x_t.device)
    rows = torch.zeros(total + 1, dtype=torch.int64, device=x_t.device).scatter_(0, slot, index)
    return x_s, rows[:total], place[-1:]


def launch_sample_head(
    features, null_features, weight, bias, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    """Features [B, L, D], weight [K, D] -> x_s [B, L]."""
    if x_t.numel() == 0:
        return torch.empty_like(x_t)
    K, D = weight.shape
    weight = weight.contiguous()
    x_s, rows, count = launch_transition_choose(x_t, weights, image_indices, seed, K)
    total = x_t.numel()

    def head(f):
        f = f.reshape(total, D).contiguous()
        out = torch.empty((total, K), dtype=torch.float32, device=f.device)
        grid = (triton.cdiv(total, CONFIGS["BLOCK_R"]), triton.cdiv(K, CONFIGS["BLOCK_K"]))
        sample_head_kernel[grid](
            features_ptr=f, weight_ptr=weight, bias_ptr=f if bias is None else bias,
            rows_ptr=rows, count_ptr=count, out_ptr=out, K=K, D=D, stride_f=D, stride_w=D,
            HAS_BIAS=bias is not None, **CONFIGS,
        )  # fmt: skip
        return out

    logits = head(features)
    null = None if null_features is None else head(null_features)
    return _launch(
        logits, null, x_t.contiguous(), weights.contiguous(), image_indices.contiguous(), seed,
        (guidance, temperature, top_r, top_k), x_s, rows=rows, count=count,
    )  # fmt: skip
