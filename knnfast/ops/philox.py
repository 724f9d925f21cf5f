"""Philox4x32-10 (Salmon et al., SC 2011): the counter-based random numbers of every op.

A number depends on its coordinates alone: key = seed, counter = (class block, position, image,
t | stream). Batch, tiling, thread and device counts do not enter, and every backend computes the
same bits (`tl.philox` and csrc/ops/philox.h hold the other two copies of this function).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHOICE, GUMBEL, PRIOR, PURITY, NOISE = range(5)
STREAM_SHIFT = 28  # t stays below 2^28, the stream lies above it

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Map counters (int64 tensors of 32-bit words, broadcast) and a 64-bit key to four words."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # A 32 by 32 bit product needs 64 bits without a sign: split one factor in halves.
        hi0, lo0 = _mulhilo(c0, _M0)
        hi1, lo1 = _mulhilo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _mulhilo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def counter(t: Tensor, stream: int) -> Tensor:
    """The fourth counter word: t | stream."""
    return t | (stream << STREAM_SHIFT)


def unit52(w0: Tensor, w1: Tensor) -> Tensor:
    """A uniform in (0, 1) with 52 bits, exact in FP64: (m + 1/2) 2^-52 is never 0 and never 1."""
    m = (w0 << 20) | (w1 >> 12)
    return (m.double() + 0.5) * 2.0**-52


def below(w0: Tensor, w1: Tensor, n: int) -> Tensor:
    """A uniform integer in [0, n), n < 2^31: the high word of (w0, w1) * n, in 64-bit steps."""
    return (w0 * n + ((w1 * n) >> 32)) >> 32


def gumbel(word: Tensor) -> Tensor:
    """Gumbel noise from one 32-bit word, FP64: -log(-log1p(-v)), v = (word + 1/2) 2^-32.

    Neither v nor 1 - v is ever 0, so the noise lies in (-3.14, 22.88). The FP32 backends take 1 - v
    from the complemented word, which keeps both ends as exact as the middle.
    """
    v = (word.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v))


def normal(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """A standard normal from four words, FP64 (Box and Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(unit52(w0, w1)))
    return radius * torch.cos((2.0 * math.pi) * unit52(w2, w3))
