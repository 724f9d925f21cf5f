"""The Triton kernels' map from bits to noise by itself, to be checked at its ends."""

import triton
import triton.language as tl
from knnfast.kernels.tiles import gumbel


@triton.jit
def noise_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(words_ptr + i, mask=i < n, other=0).to(tl.uint32)
    tl.store(out_ptr + i, gumbel(word), mask=i < n)
