"""Neighbour attention on folded weights: normalise, score, softmax, combine, add, in one kernel.

y = x + [sum_h softmax(z A_h + a_h) C_h + b],  z = LN(x)(1 + scale) + shift
                                                               (reference.neighbour_attention)

One program holds BLOCK_L tokens of an image. It reads x from memory once (mean, variance, scores
and residual find it again in L2) and writes y once; A and C come from L2, shared by the image's
programs. Bytes: 2 B D itemsize (L + H N); FLOPs: 4 B L D H ceil16(N), which binds above D = 512.
Scores and sums in FP32, variance in two passes, probabilities rounded to the type of x for the dot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import INTERPRET

# Scores held by a program, BLOCK_L * HN, and the depth of a chunk of D.
CONFIGS = {"scores": 16384, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}


@triton.jit
def neighbour_attention_kernel(
    x_ptr, A_ptr, a_ptr, C_ptr, bias_ptr, mask_ptr, scale_ptr, shift_ptr, y_ptr,
    L, D, N, H, eps,
    stride_xb, stride_xl, stride_scale, stride_shift,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    NP: tl.constexpr, HP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_L tokens of one image; columns of the scores are (n, h) as in A's layout."""
    blocks = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    live = (l < L)[:, None]
    x_row = x_ptr + image * stride_xb + l[:, None].to(tl.int64) * stride_xl
    y_row = y_ptr + (image * L + l[:, None]) * D
    HN: tl.constexpr = NP * HP
    c = tl.arange(0, HN)
    n, h = c // HP, c % HP
    real = (n < N) & (h < H)
    column = n * H + h
    d = tl.arange(0, BLOCK_D)

    mean = tl.zeros((BLOCK_L,), tl.float32)
    rstd = mean + 1.0
    if NORM:
        for start in range(0, D, BLOCK_D):
            inside = (start + d < D)[None, :]
            x = tl.load(x_row + (start + d)[None, :], mask=live & inside, other=0.0)
            mean += tl.sum(x.to(tl.float32), 1)
        mean = mean / D
        square = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = (start + d < D)[None, :]
            x = tl.load(x_row + (start + d)[None, :], mask=live & inside, other=0.0)
            centred = tl.where(inside, x.to(tl.float32) - mean[:, None], 0.0)
            square += tl.sum(centred * centred, 1)
        rstd = 1.0 / tl.sqrt(square / D + eps)

    score = tl.zeros((BLOCK_L, HN), tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + d
        inside = inner < D
        x = tl.load(x_row + inner[None, :], mask=live & inside[None, :], other=0.0)
        z = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]  # [BLOCK_L, BLOCK_D]
        if HAS_SCALE:
            s = tl.load(scale_ptr + image * stride_scale + inner, mask=inside, other=0.0)
            z = z * (1.0 + s.to(tl.float32))[None, :]
        if HAS_SHIFT:
            s = tl.load(shift_ptr + image * stride_shift + inner, mask=inside, other=0.0)
            z = z + s.to(tl.float32)[None, :]
        z = tl.where(inside[None, :], z, 0.0).to(x_ptr.dtype.element_ty)
        A = tl.load(
            A_ptr + (image * D + inner[:, None]) * (N * H) + column[None, :],
            mask=inside[:, None] & real[None, :], other=0.0,
        )  # [BLOCK_D, HN]  # fmt: skip
        if INTERPRET:
            z, A = z.to(tl.float32), A.to(tl.float32)
        score = tl.dot(z, A, score, input_precision="ieee")

    on = tl.load(mask_ptr + image * N + n, mask=real, other=0) != 0
    any_on = tl.max(on.to(tl.int32), 0) > 0
    bias = tl.load(a_ptr + image * (N * H) + column, mask=real, other=0.0).to(tl.float32)
    score = tl.where(on[None, :], score + bias[None, :], float("-inf"))
    score = tl.reshape(score, (BLOCK_L, NP, HP))
    top = tl.max(score, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # padded heads, and images that are all off
    p = tl.exp(score - top[:, None, :])
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0.0, 1.0, total)[:, None, :]
    p = tl.reshape(p, (BLOCK_L, HN)).to(x_ptr.dtype.element_ty)

    for start in range(0, D, BLOCK_D):
        inner = start + d
        inside = inner < D
        C = tl.load(
            C_ptr + (image * (N * H) + column[:, None]) * D + inner[None, :],
            mask=real[:, None] & inside[None, :], other=0.0,
        )  # [HN, BLOCK_D]  # fmt: skip
        if INTERPRET:
            out = tl.dot(p.to(tl.float32), C.to(tl.float32), input_precision="ieee")
        else:
            out = tl.dot(p, C, input_precision="ieee")
        out += tl.load(bias_ptr + inner, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = tl.where(any_on, out, 0.0)
        if RESIDUAL:
            x = tl.load(x_row + inner[None, :], mask=live & inside[None, :], other=0.0)
            out += x.to(tl.float32)
        tl.store(
            y_row + inner[None, :], out.to(y_ptr.dtype.element_ty), mask=live & inside[None, :]
        )


def launch_neighbour_attention(x, A, a, C, bias, mask, scale, shift, norm, eps, residual):
    """X [B, L, D] -> y [B, L, D]; A [B, D, N, H], C [B, N, H, D]."""
    if x.dtype == torch.float64:
        raise TypeError("x: fp64 runs on the CPU only")
    if x.stride(-1) != 1:
        x = x.contiguous()
    A, a, C, bias = A.contiguous(), a.contiguous(), C.contiguous(), bias.contiguous()
    mask = mask.contiguous().view(torch.uint8)
    scale, shift = (None if v is None else v.contiguous() for v in (scale, shift))
    B, L, D = x.shape
    _, _, N, H = A.shape
    y = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    heads, embeddings = triton.next_power_of_2(H), triton.next_power_of_2(N)
    embeddings = max(embeddings, 16 // heads)  # tl.dot wants 16 columns
    block_l = min(128, max(16, CONFIGS["scores"] // (heads * embeddings)))
    block_l = max(16, min(block_l, triton.next_power_of_2(L)))
    # Wide fp32 scores beside a full block of C would not fit an A100's shared memory.
    wide = heads * embeddings * x.element_size() > 2048
    if x.numel():
        neighbour_attention_kernel[(triton.cdiv(L, block_l) * B,)](
            x_ptr=x, A_ptr=A, a_ptr=a, C_ptr=C, bias_ptr=bias, mask_ptr=mask,
            scale_ptr=x if scale is None else scale, shift_ptr=x if shift is None else shift,
            y_ptr=y, L=L, D=D, N=N, H=H, eps=eps, stride_xb=x.stride(0), stride_xl=x.stride(1),
            stride_scale=0 if scale is None or scale.dim() == 1 else D,
            stride_shift=0 if shift is None or shift.dim() == 1 else D,
            NORM=norm, RESIDUAL=residual, HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None, NP=embeddings, HP=heads, BLOCK_L=block_l,
            BLOCK_D=16 if wide else CONFIGS["BLOCK_D"], num_warps=CONFIGS["num_warps"],
            num_stages=CONFIGS["num_stages"],
        )  # fmt: skip
    return y
