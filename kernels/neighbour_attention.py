"""Neighbour attention on folded weights: normalise, score, softmax, combine, add, in one kernel.

y = x + [sum_h softmax(z A_h + a_h) C_h + b],  z = LN(x)(1 + scale) + shift
                                                               (reference.neighbour_attention)

One program holds BLOCK_L tokens of an image. It reads x from memory once (its mean and variance,
in one pass; scores and residual find it again in L2) and writes y once; A and C come from L2.
Bytes: 2 B D itemsize (L + H N); FLOPs: 4 B L D H ceil16(N), at N = 11 and L = 1024 in FP16 218 a
byte for 16 heads and 118 for 8: memory binds an H100, which turns at 295. What binds the kernel is
L2, from which a program reads 2 D H N + 3 D BLOCK_L numbers, there 2 to 2.5 times the floor's
bytes: at most some 60 % of the floor are to be expected; not measured. N and H are constants of the
compiled kernel, or A would be read two bytes at a time.
Scores and sums in FP32, variance about a mean, probabilities rounded to the type of x for the dot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import INTERPRET, multiprocessors

# (largest NP HP, BLOCK_L, BLOCK_D, num_stages) for two-byte numbers on sm_90, on other GPUs with
# 160 KiB of shared memory, on those with 99 KiB, and for FP32. Eight warps hold the scores, without
# spills. FP32 keeps below 64 tokens, where Triton would take sm_100's tensor cores: they round to
# TF32 whatever the precision that is asked for. WIDEST is how many bytes of a row of A fit.
CONFIGS = {
    90: ((128, 128, 32, 3), (256, 128, 64, 3), (512, 64, 32, 2), (1024, 32, 16, 3),
         (2048, 16, 16, 1)),
    80: ((128, 128, 32, 3), (256, 128, 32, 3), (512, 64, 32, 2), (1024, 32, 16, 3),
         (2048, 16, 16, 1)),
    86: ((128, 128, 32, 3), (256, 64, 32, 3), (512, 32, 32, 2), (1024, 16, 16, 2)),
    32: ((256, 32, 32, 2), (1024, 16, 16, 2)),
}  # fmt: skip
WIDEST = {90: 4096, 80: 4096, 86: 2048}


@triton.jit
def neighbour_attention_kernel(
    x_ptr, A_ptr, a_ptr, C_ptr, bias_ptr, mask_ptr, scale_ptr, shift_ptr, y_ptr,
    L, D, eps,
    stride_xb, stride_xl, stride_scale, stride_shift,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, NP: tl.constexpr, HP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
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

    # Sums about the mean of the first chunk: the variance loses at most a factor 1 + D / BLOCK_D
    # to cancellation, whatever the row, for that chunk alone adds its distance to the variance.
    pivot = tl.zeros((BLOCK_L,), tl.float32)
    mean = pivot  # from the pivot
    rstd = pivot + 1.0
    if NORM:
        x = tl.load(x_row + d[None, :], mask=live & (d < D)[None, :], other=0.0)
        pivot = tl.sum(x.to(tl.float32), 1) / tl.minimum(D, BLOCK_D)
        sums = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        squares = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=4):
            inside = (start + d < D)[None, :]
            x = tl.load(x_row + (start + d)[None, :], mask=live & inside, other=0.0)
            off = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
            sums += off
            squares += off * off
        mean = tl.sum(sums, 1) / D
        rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 1) / D - mean * mean, 0.0) + eps)

    score = tl.zeros((BLOCK_L, HN), tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + d
        inside = inner < D
        x = tl.load(x_row + inner[None, :], mask=live & inside[None, :], other=0.0)
        z = ((x.to(tl.float32) - pivot[:, None]) - mean[:, None]) * rstd[:, None]
        if HAS_SCALE:
            s = tl.load(scale_ptr + image * stride_scale + inner, mask=inside, other=0.0)
            z = z * (1.0 + s.to(tl.float32))[None, :]  # [BLOCK_L, BLOCK_D]
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
        b = tl.load(bias_ptr + inner, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:  # before the product, which then hides its way from L2
            x = tl.load(x_row + inner[None, :], mask=live & inside[None, :], other=0.0)
        C = tl.load(
            C_ptr + (image * (N * H) + column[:, None]) * D + inner[None, :],
            mask=real[:, None] & inside[None, :], other=0.0,
        )  # [HN, BLOCK_D]  # fmt: skip
        if INTERPRET:
            out = tl.dot(p.to(tl.float32), C.to(tl.float32), input_precision="ieee")
        else:
            out = tl.dot(p, C, input_precision="ieee")
        out = tl.where(any_on, out + b[None, :], 0.0)
        if RESIDUAL:
            out += x.to(tl.float32)
        tl.store(
            y_row + inner[None, :], out.to(y_ptr.dtype.element_ty), mask=live & inside[None, :]
        )


def tiles_of(columns, B, L, x):
    """BLOCK_L, BLOCK_D and num_stages. A token is computed alone, whatever BLOCK_L."""
    count, arch = multiprocessors(x.device)
    limit = WIDEST[arch] // x.element_size()
    if columns > limit:
        raise ValueError(
            f"folded: heads times embeddings, each rounded up to a power of two, must be at most "
            f"{limit} for {x.dtype} on this GPU, got {columns}: fold_neighbours(..., fold=False)"
        )
    table = CONFIGS[32 if x.dtype == torch.float32 else arch]
    _, block_l, block_d, stages = next(c for c in table if columns <= c[0])
    block_l = max(16, min(block_l, triton.next_power_of_2(L)))
    # Fewer tokens a program while twice the programs still run at once.
    while block_l > 16 and 2 * B * triton.cdiv(L, block_l) <= count:
        block_l //= 2
    return block_l, block_d, stages


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
    block_l, block_d, stages = tiles_of(heads * embeddings, B, L, x)
    if x.numel():
        neighbour_attention_kernel[(triton.cdiv(L, block_l) * B,)](
            x_ptr=x, A_ptr=A, a_ptr=a, C_ptr=C, bias_ptr=bias, mask_ptr=mask,
            scale_ptr=x if scale is None else scale, shift_ptr=x if shift is None else shift,
            y_ptr=y, L=L, D=D, eps=eps, stride_xb=x.stride(0), stride_xl=x.stride(1),
            stride_scale=0 if scale is None or scale.dim() == 1 else D,
            stride_shift=0 if shift is None or shift.dim() == 1 else D,
            NORM=norm, RESIDUAL=residual, HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None, N=N, H=H, NP=embeddings, HP=heads, BLOCK_L=block_l,
            BLOCK_D=block_d, num_warps=8, num_stages=stages,
        )  # fmt: skip
    return y
