"""Neighbour attention on folded weights: normalise, score, softmax, combine, add, in one kernel.

y = x + [sum_h softmax(z A_h + a_h) C_h + b],  z = LN(x)(1 + scale) + shift
                                                               (reference.neighbour_attention)

One program holds BLOCK_L tokens of an image. Where these are 128 it reads x twice, from memory for
the scores, with the sums for mean and variance on the way, and from L2 for the residual; fewer read
it once more, before the scores. A and C come from L2, for an image that is all off not at all.
Bytes: 2 B D itemsize (L + H N); FLOPs: 4 B L D H N, at N = 11 and L = 1024 in FP16 150 a byte for
16 heads and 81 for 8: memory binds an H200, which turns at 184. The tiles hold 12 embeddings for
11; for 16 heads their products take 0.9 of the floor's time, and 2 D H N + 3 D BLOCK_L numbers a
program pass through L2, 2.4 times the floor's bytes: at most some 60 % of the floor are to be
expected; not measured. N and H are constants of the compiled kernel, or A would be read two bytes
at a time.
Scores and sums in FP32, the variance about a number of the row's own, (x - that) k (1 + scale) and
the probabilities rounded to the type of x for the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import INTERPRET, multiprocessors

# (largest number of columns, BLOCK_L, BLOCK_D, num_stages) for two-byte numbers on sm_90, on other
# GPUs with 160 KiB of shared memory, on those with 99 KiB, and for FP32. Eight warps hold the
# scores, without spills. FP32 keeps below 64 tokens, where Triton would take sm_100's tensor cores:
# they round to TF32 whatever the precision that is asked for. WIDEST is how many bytes of a row of
# A fit.
CONFIGS = {
    90: ((128, 128, 32, 3), (256, 128, 32, 4), (512, 64, 32, 2), (1024, 32, 16, 3),
         (2048, 16, 16, 1)),
    80: ((128, 128, 32, 3), (256, 128, 32, 3), (512, 64, 32, 2), (1024, 32, 16, 3),
         (2048, 16, 16, 1)),
    86: ((128, 128, 32, 3), (256, 64, 32, 3), (512, 32, 32, 2), (1024, 16, 16, 2)),
    32: ((256, 32, 32, 2), (1024, 16, 16, 2)),
}  # fmt: skip
WIDEST = {90: 4096, 80: 4096, 86: 2048}


@triton.jit
def columns(first, N, H, NP: tl.constexpr, HP: tl.constexpr):
    """NP embeddings from `first` on, by HP heads: embedding, column of A, whether there is one."""
    c = tl.arange(0, NP * HP)
    n, h = first + c // HP, c % HP
    return n, n * H + h, (n < N) & (h < H)


@triton.jit
def product(left, right, total):
    """Total + left @ right."""
    if INTERPRET:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def settled(total, WAITS: tl.constexpr):
    """A product that is done before anything after it begins, where WAITS.

    sm_90 multiplies asynchronously, from shared memory and from registers, and Triton lets products
    of a loop overlap with what follows them. That is wrong here: A's tiles are read by other
    instructions, too, for which it leaves out the buffer that the overlap needs, and z's registers
    are written again by the next iteration. It does so only where the loop itself uses no sum.
    """
    if INTERPRET or not WAITS:
        return total
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def load_tile(ptr, row, has_row, column, has_column, stride):
    """Part of a matrix with rows `stride` apart, 0 where it has none."""
    return tl.load(
        ptr + row[:, None] * stride + column[None, :],
        mask=has_row[:, None] & has_column[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def finish(
    score, side, ratio, centre, mask_ptr, a_ptr, n, column, real,
    MERGED: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Sums of products to scores [BLOCK_L, NP, HP]; MERGED: of tokens not normalised yet."""
    bias = tl.load(a_ptr + column, mask=real, other=0.0).to(tl.float32)
    if MERGED:
        r, c = tl.arange(0, 16)[:, None], tl.arange(0, side.shape[1])
        # Gathered in place: the scores would take the few rows' layout.
        weights = tl.gather(tl.sum(tl.where(r < 2, side, 0.0), 0), c, 0)
        score = score * ratio[:, None] - centre[:, None] * weights[None, :]
        bias += tl.gather(tl.sum(tl.where(r == 2, side, 0.0), 0), c, 0)
    on = tl.load(mask_ptr + n, mask=real, other=0) != 0
    score = tl.where(on[None, :], score + bias[None, :], float("-inf"))
    return tl.reshape(score, (score.shape[0], NP, score.shape[1] // NP))


@triton.jit
def neighbour_attention_kernel(
    x_ptr, A_ptr, a_ptr, C_ptr, bias_ptr, mask_ptr, scale_ptr, shift_ptr, y_ptr,
    L, D, eps,
    stride_xb, stride_xl, stride_scale, stride_shift,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, NP: tl.constexpr, MORE: tl.constexpr, HP: tl.constexpr,
    MERGED: tl.constexpr, EVEN: tl.constexpr, WAITS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_L tokens of one image; columns of the scores are (n, h) as in A's layout."""
    blocks = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    # Rows beyond the image read its last: masks would take registers.
    x_row = x_ptr + image * stride_xb + tl.minimum(l, L - 1)[:, None].to(tl.int64) * stride_xl
    A_ptr += image * D * (N * H)
    a_ptr += image * (N * H)
    C_ptr += image * (N * H) * D
    mask_ptr += image * N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    n, column, real = columns(0, N, H, NP, HP)
    if MORE:
        n2, column2, real2 = columns(NP, N, H, MORE, HP)
    e = tl.arange(0, 2 * NP)
    any_on = tl.max(tl.load(mask_ptr + e, mask=e < N, other=0).to(tl.int32), 0) > 0
    reach = tl.where(any_on, D, 0)  # nobody asks for the scores of an image that is all off

    # Sums are about the mean of the row's first chunk: the variance loses at most a factor
    # 1 + D / BLOCK_D to cancellation, for that chunk alone adds its distance to the variance.
    pivot = tl.zeros((BLOCK_L,), tl.float32)
    mean = pivot  # from the pivot
    k = pivot + 1.0
    ratio = k
    centre = pivot
    if NORM:
        inside = (d < D) | EVEN
        x = tl.load(x_row + d[None, :], mask=inside[None, :], other=0.0)
        pivot = tl.sum(x.to(tl.float32), 1) / tl.minimum(D, BLOCK_D)
        if MERGED:
            off = tl.where(inside[None, :], x.to(tl.float32) - pivot[:, None], 0.0)
            k = 1.0 / tl.sqrt(tl.sum(off * off, 1) / tl.minimum(D, BLOCK_D) + eps)
        else:
            sums = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
            squares = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
            for start in tl.range(0, reach, BLOCK_D, num_stages=4):
                inside = (start + d < D) | EVEN
                x = tl.load(x_row + (start + d)[None, :], mask=inside[None, :], other=0.0)
                off = tl.where(inside[None, :], x.to(tl.float32) - pivot[:, None], 0.0)
                sums += off
                squares += off * off
            mean = tl.sum(sums, 1) / D
            k = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 1) / D - mean * mean, 0.0) + eps)

    # MERGED spares that pass: scores are sums of (x - pivot) k (1 + scale) A, k a guess from the
    # first chunk. The row's mean and deviation, known at the end, and the shift come to them as
    # sums over A: the product of a few rows, (1 + scale) in two parts and the shift. Where the
    # guess is bad for some row, for precision or for FP16's range, a second turn knows better.
    r = tl.arange(0, 16)[:, None]
    score = tl.zeros((BLOCK_L, NP * HP), tl.float32)
    side = tl.zeros((16, NP * HP), tl.float32)
    if MORE:
        score2 = tl.zeros((BLOCK_L, MORE * HP), tl.float32)
        side2 = tl.zeros((16, MORE * HP), tl.float32)
    turn = 0
    while turn < 2:
        score = tl.zeros((BLOCK_L, NP * HP), tl.float32)
        side = tl.zeros((16, NP * HP), tl.float32)
        if MORE:
            score2 = tl.zeros((BLOCK_L, MORE * HP), tl.float32)
            side2 = tl.zeros((16, MORE * HP), tl.float32)
        if MERGED:
            sums = tl.zeros((BLOCK_L, BLOCK_D // 8), tl.float32)  # by eights: a thread has them
            squares = tl.zeros((BLOCK_L, BLOCK_D // 8), tl.float32)
        for start in range(0, reach, BLOCK_D):
            inner = start + d
            inside = (inner < D) | EVEN
            x = tl.load(x_row + inner[None, :], mask=inside[None, :], other=0.0)
            z = tl.where(inside[None, :], x.to(tl.float32) - pivot[:, None], 0.0)
            if NORM:
                if MERGED:
                    eights = tl.reshape(z, (BLOCK_L, BLOCK_D // 8, 8))
                    sums += tl.sum(eights, 2)
                    squares += tl.sum(eights * eights, 2)
                else:
                    z = z - mean[:, None]
                z = z * k[:, None]
            factor = tl.full((BLOCK_D,), 1.0, tl.float32)
            if HAS_SCALE:
                s = tl.load(scale_ptr + image * stride_scale + inner, mask=inside, other=0.0)
                factor += s.to(tl.float32)
                z = z * factor[None, :]  # [BLOCK_L, BLOCK_D]
            if HAS_SHIFT:
                s = tl.load(shift_ptr + image * stride_shift + inner, mask=inside, other=0.0)
                if not MERGED:
                    z = z + s.to(tl.float32)[None, :]
            z = z.to(dtype)
            A = load_tile(A_ptr, inner, inside, column, real, N * H)  # [BLOCK_D, NP HP]
            score = settled(product(z, A, score), WAITS)
            if MORE:
                A2 = load_tile(A_ptr, inner, inside, column2, real2, N * H)
                score2 = settled(product(z, A2, score2), WAITS)
            if MERGED:
                high = factor.to(dtype)
                low = (factor - high.to(tl.float32)).to(dtype)
                few = tl.where(r == 0, high[None, :], tl.where(r == 1, low[None, :], 0.0))
                if HAS_SHIFT:
                    few = tl.where(r == 2, s[None, :], few)
                few = few.to(dtype)  # [16, BLOCK_D]
                side = product(few, A, side)
                if MORE:
                    side2 = product(few, A2, side2)
        turn += 2
        if MERGED and NORM:
            mean = tl.sum(sums, 1) / D
            variance = tl.maximum(tl.sum(squares, 1) / D - mean * mean, 0.0) + eps
            rstd = 1.0 / tl.sqrt(variance)
            ratio, centre = rstd / k, mean * rstd
            if turn == 2:
                # The root of the second bounds the row's largest number, before the scale.
                bad = (mean * mean > variance) | ((mean * mean + variance) * D * k * k > 4e6)
                turn -= tl.max(bad.to(tl.int32), 0)
                pivot = tl.where(bad, pivot + mean, pivot)  # no other row's sums change
                k = tl.where(bad, rstd, k)

    score = finish(score, side, ratio, centre, mask_ptr, a_ptr, n, column, real, MERGED, NP)
    top = tl.max(score, 1)
    if MORE:
        score2 = finish(
            score2, side2, ratio, centre, mask_ptr, a_ptr, n2, column2, real2, MERGED, MORE
        )
        top = tl.maximum(top, tl.max(score2, 1))
    top = tl.where(top == float("-inf"), 0.0, top)  # padded heads, and images that are all off
    p = tl.exp(score - top[:, None, :])
    total = tl.sum(p, 1)
    if MORE:
        p2 = tl.exp(score2 - top[:, None, :])
        total += tl.sum(p2, 1)
    total = tl.where(total == 0.0, 1.0, total)
    p = tl.reshape(p / total[:, None, :], (BLOCK_L, NP * HP)).to(dtype)
    if MORE:
        p2 = tl.reshape(p2 / total[:, None, :], (BLOCK_L, MORE * HP)).to(dtype)

    y_row = y_ptr + (image * L + l[:, None]) * D
    for start in range(0, D, BLOCK_D):
        inner = start + d
        inside = (inner < D) | EVEN
        b = tl.load(bias_ptr + inner, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:  # before the product, which then hides its way from L2
            x = tl.load(x_row + inner[None, :], mask=inside[None, :], other=0.0)
        wanted = inside & any_on
        C = load_tile(C_ptr, column, real, inner, wanted, D)  # [NP HP, BLOCK_D]
        out = product(p, C, tl.zeros((BLOCK_L, BLOCK_D), tl.float32))
        if MORE:
            C = load_tile(C_ptr, column2, real2, inner, wanted, D)
            out = product(p2, C, out)
        out = tl.where(any_on, out + b[None, :], 0.0)
        if RESIDUAL:
            out += x.to(tl.float32)
        stored = (l < L)[:, None] & inside[None, :]
        tl.store(y_row + inner[None, :], out.to(y_ptr.dtype.element_ty), mask=stored)


def parts(N, heads):
    """Embeddings of the first and the second product: powers of two, together N at least."""
    least = max(1, 16 // heads)  # tl.dot wants 16 columns
    whole = max(least, triton.next_power_of_2(N))
    half = whole // 2
    if half < least or heads * whole > 256:  # the other tiles have no registers for two
        return whole, 0
    rest = max(least, triton.next_power_of_2(N - half))
    return (half, rest) if rest < half else (whole, 0)


def tiles_of(columns, B, L, x):
    """BLOCK_L, BLOCK_D and num_stages. No token sees another; 128 of them take another order."""
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
    # Not contiguous: AdaLN's are slices of one tensor, which would be copied at every layer.
    scale, shift = (
        v.contiguous() if v is not None and v.stride(-1) != 1 else v for v in (scale, shift)
    )
    B, L, D = x.shape
    _, _, N, H = A.shape
    y = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    heads = triton.next_power_of_2(H)
    embeddings, more = parts(N, heads)
    block_l, block_d, stages = tiles_of(heads * (embeddings + more), B, L, x)
    if x.numel():
        neighbour_attention_kernel[(triton.cdiv(L, block_l) * B,)](
            x_ptr=x, A_ptr=A, a_ptr=a, C_ptr=C, bias_ptr=bias, mask_ptr=mask,
            scale_ptr=x if scale is None else scale, shift_ptr=x if shift is None else shift,
            y_ptr=y, L=L, D=D, eps=eps, stride_xb=x.stride(0), stride_xl=x.stride(1),
            stride_scale=0 if scale is None or scale.dim() == 1 else scale.stride(0),
            stride_shift=0 if shift is None or shift.dim() == 1 else shift.stride(0),
            NORM=norm, RESIDUAL=residual, HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None, N=N, H=H, NP=embeddings, MORE=more, HP=heads,
            MERGED=block_l == 128, EVEN=D % block_d == 0,
            WAITS=multiprocessors(x.device)[1] == 90,
            BLOCK_L=block_l, BLOCK_D=block_d, num_warps=8, num_stages=stages,
        )  # fmt: skip
    return y
