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

// A whole warp; `rows` count inside the tile whose first byte is `tile`. q: FP32 values. The loads
// and sums of several rows hide each other's latency.
template <int N>
__device__ __forceinline__ void canonical_scores(const unsigned char* tile, const int (&rows)[N],
                                                 const float* q, int dim, Metric metric,
                                                 double q_norm, double (&scores)[N]) {
  double sums[N] = {}, squares[N] = {};
  for (int j = threadIdx.x % 32; j < dim; j += 32) {
    const unsigned char* slice = tile + static_cast<int64_t>(j / 64) * kTileRows * kSlice;
    const double y = q[j];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned char* unit = slice + unit_offset(rows[i], j % 64 / 8);
      const double x = half_bits_to_float(reinterpret_cast<const uint16_t*>(unit)[j % 8]);
      if (metric == kL2) {
        const double t = __dsub_rn(y, x);
        sums[i] = __dadd_rn(sums[i], __dmul_rn(t, t));
      } else {
        sums[i] = __dadd_rn(sums[i], __dmul_rn(x, y));
        if (metric == kCosine) squares[i] = __dadd_rn(squares[i], __dmul_rn(x, x));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) scores[i] = tree(sums[i]);
  if (metric != kCosine) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double x_norm = __dsqrt_rn(tree(squares[i]));
    scores[i] = x_norm == 0 || q_norm == 0 ? 0.0 : __ddiv_rn(scores[i], __dmul_rn(x_norm, q_norm));
  }
}

__device__ __forceinline__ double canonical_score(const unsigned char* tile, int row,
                                                  const float* q, int dim, Metric metric,
                                                  double q_norm) {
  double score[1];
  canonical_scores(tile, {row}, q, dim, metric, q_norm, score);
  return score[0];
}

}  // namespace cuda
}  // namespace knnfast
