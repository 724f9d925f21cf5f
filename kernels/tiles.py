"""Shared @jit helpers: the random maps of knnfast/ops/philox.py and one row's scores.

INTERPRET marks a run under Triton's interpreter, whose 16-bit `tl.dot` operands are widened first
(its BF16 dot is silently wrong).
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Streams of random numbers (knnfast/ops/philox.py).
CHOICE = tl.constexpr(0)
GUMBEL = tl.constexpr(1)
PURITY = tl.constexpr(3)
# Columns of a step's weights (knnfast/ops/reference.py).
MASK_P = tl.constexpr(1)
MASK_U = tl.constexpr(2)
REAL_P = tl.constexpr(3)
REAL_U0 = tl.constexpr(4)
REAL_U1 = tl.constexpr(5)


def row_block(K, configs):
    """BLOCK_K and the warps for rows of K classes; configs: (largest BLOCK_K, warps), rising."""
    block_k = max(16, triton.next_power_of_2(K))
    for limit, warps in configs:
        if block_k <= limit:
            return block_k, warps
    raise ValueError(f"logits: K must be at most {configs[-1][0]} on CUDA, got {K}")


@functools.lru_cache
def multiprocessors(device):
    """How many a CUDA device has, and whose tiles suit it: sm_90's, sm_80's or sm_86's."""
    if device.type != "cuda":  # the interpreter
        return 1, 80
    found = torch.cuda.get_device_properties(device)
    large = found.shared_memory_per_block_optin >= 160 << 10
    return found.multi_processor_count, 90 if found.major == 9 else 80 if large else 86


@triton.jit
def words_at(seed, block, position, image, t, stream: tl.constexpr):
    """Return the four 32-bit words of counter (block, position, image, t | stream)."""
    return tl.philox(seed, block, position, image, t | stream * 268435456)  # 2^28


@triton.jit
def unit52(w0, w1):
    """Map two words to a uniform in (0, 1), exact in FP64."""
    m = (w0.to(tl.int64) << 20) | (w1.to(tl.int64) >> 12)
    return (m.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def below(w0, w1, n):
    """Map two words to a uniform integer in [0, n)."""
    n = n.to(tl.int64)
    return (w0.to(tl.int64) * n + ((w1.to(tl.int64) * n) >> 32)) >> 32


@triton.jit
def exponential(word):
    """Map a word to -log(1 - v), v = (word + 1/2) 2^-32, exact at both ends in FP32."""
    scale: tl.constexpr = 2.3283064365386963e-10
    half: tl.constexpr = 1.1641532182693481e-10
    v = word.to(tl.float32) * scale + half
    u = (word ^ 0xFFFFFFFF).to(tl.float32) * scale + half
    # What u lost of 1 - v, over u; where it counts, v is small and 1 / u = 1 + v to half an ulp.
    lost = tl.where(v < 0.5, ((1.0 - u) - v) * (1.0 + v), 0.0)
    return -(tl.log(u) + lost)


@triton.jit
def gumbel(word):
    """Map a word to -log(-log(1 - v))."""
    return -tl.log(exponential(word))


@triton.jit
def class_waits(seed, position, image, t, BLOCK_K: tl.constexpr):
    """Exponentials, exp(-Gumbel), of classes 0 .. BLOCK_K - 1: a Philox block serves four."""
    block = tl.arange(0, BLOCK_K // 4)
    w0, w1, w2, w3 = words_at(seed, block, position, image, t, GUMBEL)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_K / 4, 2, 2]: w0 w1, w2 w3
    return exponential(tl.reshape(words, (BLOCK_K,)))


@triton.jit
def row_scores(
    cond_ptr, null_ptr, K, guidance, inverse_temperature, top_r, top_k,
    HAS_NULL: tl.constexpr, TRUNCATE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load one row and return (l [BLOCK_K] less its maximum, whether it is bad).

    Maxima go before anything is multiplied: logits far from 0 would lose digits.
    """
    col = tl.arange(0, BLOCK_K)
    ninf = float("-inf")
    l = tl.load(cond_ptr + col, mask=col < K, other=ninf).to(tl.float32)  # [BLOCK_K]
    bad = tl.sum((~(l < float("inf"))).to(tl.int32), 0)
    if HAS_NULL:
        n = tl.load(null_ptr + col, mask=col < K, other=ninf).to(tl.float32)
        bad += tl.sum((~(n < float("inf"))).to(tl.int32), 0)
        excluded = (l == ninf) | (n == ninf)
        l = l - tl.max(l, 0)
        n = n - tl.max(n, 0)
        l = tl.where(excluded, ninf, n + (l - n) * guidance)
    top = tl.max(l, 0)
    bad += (~((top < float("inf")) & (top > ninf))).to(tl.int32)
    l = (l - top) * inverse_temperature
    if TRUNCATE:
        # The smallest kept value, by bisection over the floats' order; its equals by index.
        e = tl.exp(l)
        mass_limit = tl.where(top_r < 1.0, top_r * tl.sum(e, 0), float("inf"))
        count_limit = tl.where(top_k > 0, top_k * 1.0, float("inf"))
        bits = l.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        high = tl.max(key, 0).to(tl.int64)
        low = tl.zeros_like(high) - 2139095041  # the key of -inf
        for _ in range(32):
            middle = (low + high) >> 1
            over = key > middle.to(tl.int32)
            mass = tl.sum(tl.where(over, e, 0.0), 0)
            count = tl.sum(over.to(tl.float32), 0)
            fits = (mass < mass_limit) & (count < count_limit)
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, tl.minimum(middle + 1, high))
        cut = high.to(tl.int32)
        over = key > cut
        tie = key == cut
        rank = (tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)).to(tl.float32)
        mass = tl.sum(tl.where(over, e, 0.0), 0) + rank * e
        count = tl.sum(over.to(tl.float32), 0) + rank
        l = tl.where(over | (tie & (mass < mass_limit) & (count < count_limit)), l, ninf)
    return l, bad
