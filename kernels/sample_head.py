"""Row-sparse head: draw the choices, compact on the device, run the head on those rows alone.

logits[r] = features[rows[r]] W^T + b for r < count                    (reference.sample_head)

Three launches, four with guidance, no host synchronisation: a fixed grid goes through the rows that
the first lists. Bytes: count * D + K * D; FLOPs: 2 count K D, which bind an H200 above about 200
rows. From L2 pass the weights once for BLOCK_R rows and the features once for BLOCK_K classes: 43
FLOPs a byte in FP16, so that L2 binds the kernel. FP32 accumulation, FP32 logits to the drawing
kernel of transition_step.py. Scratch is [B L, K] FP32, of which count rows are touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import INTERPRET, multiprocessors
from knnfast.kernels.transition_step import _launch, launch_transition_choose

# By bytes a number. FP32 keeps below 64 rows, as in neighbour_attention.py.
CONFIGS = {
    2: {"BLOCK_R": 64, "BLOCK_K": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_R": 16, "BLOCK_K": 128, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def sample_head_kernel(
    features_ptr, weight_ptr, bias_ptr, rows_ptr, count_ptr, out_ptr,
    K, D,
    stride_f, stride_w,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_R, BLOCK_K] of the compact logits, every num_programs-th of one column."""
    count = tl.load(count_ptr)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    for first in range(tl.program_id(0) * BLOCK_R, count, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        live = r < count
        flat = tl.load(rows_ptr + r, mask=live, other=0).to(tl.int64)

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


def launch_sample_head(
    features, null_features, weight, bias, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    """Features [B, L, D], weight [K, D] -> x_s [B, L]."""
    if x_t.numel() == 0:
        return torch.empty_like(x_t)
    K, D = weight.shape
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    x_s, rows, count = launch_transition_choose(x_t, weights, image_indices, seed, K)
    total = x_t.numel()
    config = dict(CONFIGS[weight.element_size()])
    processors, arch = multiprocessors(weight.device)
    # Steps draw some 3 % of the rows: few of them leave multiprocessors idle.
    if triton.cdiv(K, config["BLOCK_K"]) * triton.cdiv(total, 32 * config["BLOCK_R"]) < processors:
        config["BLOCK_K"] = 64
    columns = triton.cdiv(K, config["BLOCK_K"])
    # As many programs as run at once, 72 KiB each, whatever share of the rows is drawn.
    at_once = {90: 3, 80: 2, 86: 1}[arch] * processors
    grid = (min(triton.cdiv(total, config["BLOCK_R"]), max(1, at_once // columns)), columns)

    def head(f):
        f = f.reshape(total, D).contiguous()
        out = torch.empty((total, K), dtype=torch.float32, device=f.device)
        sample_head_kernel[grid](
            features_ptr=f, weight_ptr=weight, bias_ptr=f if bias is None else bias,
            rows_ptr=rows, count_ptr=count, out_ptr=out, K=K, D=D, stride_f=D, stride_w=D,
            HAS_BIAS=bias is not None, **config,
        )  # fmt: skip
        return out

    logits = head(features)
    null = None if null_features is None else head(null_features)
    return _launch(
        logits, null, x_t.contiguous(), weights.contiguous(), image_indices.contiguous(), seed,
        (guidance, temperature, top_r, top_k), x_s, rows, count, compact=True,
    )  # fmt: skip
