"""The Triton kernels' maps from bits to noise by themselves, to be checked at their ends."""

import triton
import triton.language as tl
from knnfast.kernels.tiles import below, gumbel, unit52


@triton.jit
def noise_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(words_ptr + i, mask=i < n, other=0).to(tl.uint32)
    tl.store(out_ptr + i, gumbel(word), mask=i < n)


@triton.jit
def maps_kernel(words_ptr, n, uniform_ptr, whole_ptr):
    w0 = tl.load(words_ptr).to(tl.uint32)
    w1 = tl.load(words_ptr + 1).to(tl.uint32)
    tl.store(uniform_ptr, unit52(w0, w1))
    tl.store(whole_ptr, below(w0, w1, tl.full((), n, tl.int32)))
