// SPDX-License-Identifier: Apache-2.0
// The canonical score on the device, and its place in the order. FP64, 32 lanes, the tree 16, 8, 4,
// 2, 1, nothing contracted: the bits of include/knnfast/index.h.
#pragma once
#include "topk_cuda.cuh"

namespace knnfast {
namespace cuda {

// Larger is better; zeros of either sign are one score.
__device__ __forceinline__ uint64_t score_key(double score, Metric metric) {
  const uint64_t bits =
      static_cast<uint64_t>(__double_as_longlong((metric == kL2 ? -score : score) + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ __forceinline__ double key_score(uint64_t key, Metric metric) {
  const uint64_t bits = key >> 63 ? key & ~(uint64_t{1} << 63) : ~key;
  const double score = __longlong_as_double(static_cast<long long>(bits));
  return metric == kL2 ? -score + 0.0 : score;
}

__device__ __forceinline__ double tree(double v) {
#pragma unroll
  for (int x = 16; x; x >>= 1) v = __dadd_rn(v, __shfl_xor_sync(~0u, v, x));
  return v;
}

// A whole warp; `row` counts inside the tile whose first byte is `tile`. q: FP32 values.
__device__ __forceinline__ double canonical_score(const unsigned char* tile, int row,
                                                  const float* q, int dim, Metric metric,
                                                  double q_norm) {
  double sum = 0, squares = 0;
  for (int j = threadIdx.x % 32; j < dim; j += 32) {
    const unsigned char* slice = tile + static_cast<int64_t>(j / 64) * kTileRows * kSlice;
    const uint16_t h =
        *reinterpret_cast<const uint16_t*>(slice + unit_offset(row, j % 64 / 8) + j % 8 * 2);
    const double x = half_bits_to_float(h), y = q[j];
    if (metric == kL2) {
      const double t = __dsub_rn(y, x);
      sum = __dadd_rn(sum, __dmul_rn(t, t));
    } else {
      sum = __dadd_rn(sum, __dmul_rn(x, y));
      if (metric == kCosine) squares = __dadd_rn(squares, __dmul_rn(x, x));
    }
  }
  sum = tree(sum);
  if (metric != kCosine) return sum;
  const double x_norm = __dsqrt_rn(tree(squares));
  return x_norm == 0 || q_norm == 0 ? 0.0 : __ddiv_rn(sum, __dmul_rn(x_norm, q_norm));
}

}  // namespace cuda
}  // namespace knnfast
