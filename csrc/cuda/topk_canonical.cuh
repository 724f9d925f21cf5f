// SPDX-License-Identifier: Apache-2.0
// The canonical score on the device, and its place in the order. FP64, 32 lanes, the tree 16, 8, 4,
// 2, 1, nothing contracted: the bits of include/knnfast/index.h.
#pragma once
#include <type_traits>

#include "cuda/topk_cuda.cuh"

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

// A canonical score in the unit of the bounds, rounded down by more than this arithmetic can be
// off: what is bounded below it from above scores worse.
//   ip  2^p s     cosine  2^p ‖q‖ s     l2  (‖t‖²/γ - γ s)/2
__device__ __forceinline__ float score_bound(double score, const QueryState& q, int dim,
                                             Metric metric) {
  const double unit = __longlong_as_double(static_cast<long long>(q.exponent + 1023) << 52);
  double value = score * unit, error = 0x1p-80;
  if (metric == kCosine) value *= q.norm;
  if (metric == kL2) {
    const double length = q.norm / unit;
    error += (dim + 16) * 0x1p-50 * (length + value);
    value = (length - value) / 2;
  }
  return static_cast<float>(value - (error + 0x1p-22 * fabs(value)));
}

__device__ __forceinline__ double tree(double v) {
#pragma unroll
  for (int x = 16; x; x >>= 1) v = __dadd_rn(v, __shfl_xor_sync(~0u, v, x));
  return v;
}

// A whole warp; `rows` count inside the tile whose first byte is `tile`. q: FP32 values, padded
// with zeros to whole slices, as rows are: a zero more leaves a sum's bits as they are. Rows come
// from memory, so all loads of kAhead slices go out before the first sum.
template <Metric kMetric, int N>
__device__ __forceinline__ void canonical_scores_of(const unsigned char* tile, const int (&rows)[N],
                                                    const float* q, int dim, double q_norm,
                                                    double (&scores)[N]) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x % 32, slices = half_slices(dim);
  int first[N];  // bytes from the tile to this lane's element; the one 32 further on is at ^ 64
  double sums[N] = {}, squares[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) first[i] = unit_offset(rows[i], lane / 8) + lane % 8 * 2;
  int slice = 0;
  auto add = [&](auto together) {  // the next so many slices
    constexpr int kSlices = decltype(together)::value;
    const unsigned char* from = tile + static_cast<int64_t>(slice) * kTileRows * kSlice;
    uint16_t x[2 * kSlices][N];
    float y[2 * kSlices];
#pragma unroll
    for (int s = 0; s < 2 * kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        x[s][i] = *reinterpret_cast<const uint16_t*>(from + s / 2 * kTileRows * kSlice +
                                                     (first[i] ^ s % 2 * 64));
      y[s] = q[slice * 64 + s * 32 + lane];
    }
    __syncwarp();  // else the compiler mixes loads and sums to save registers
#pragma unroll
    for (int s = 0; s < 2 * kSlices; ++s) {
      const double b = y[s];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double a = half_bits_to_float(x[s][i]);
        if (kMetric == kL2) {
          const double t = __dsub_rn(b, a);
          sums[i] = __dadd_rn(sums[i], __dmul_rn(t, t));
        } else {
          sums[i] = __dadd_rn(sums[i], __dmul_rn(a, b));
          if (kMetric == kCosine) squares[i] = __dadd_rn(squares[i], __dmul_rn(a, a));
        }
      }
    }
    slice += kSlices;
  };
  while (slice + kAhead <= slices) add(std::integral_constant<int, kAhead>{});
  while (slice < slices) add(std::integral_constant<int, 1>{});
#pragma unroll
  for (int i = 0; i < N; ++i) {
    scores[i] = tree(sums[i]);
    if (kMetric == kCosine) {
      const double x_norm = __dsqrt_rn(tree(squares[i]));
      scores[i] =
          x_norm == 0 || q_norm == 0 ? 0.0 : __ddiv_rn(scores[i], __dmul_rn(x_norm, q_norm));
    }
  }
}

template <int N>
__device__ __forceinline__ void canonical_scores(const unsigned char* tile, const int (&rows)[N],
                                                 const float* q, int dim, Metric metric,
                                                 double q_norm, double (&scores)[N]) {
  if (metric == kL2) {
    canonical_scores_of<kL2>(tile, rows, q, dim, q_norm, scores);
  } else if (metric == kCosine) {
    canonical_scores_of<kCosine>(tile, rows, q, dim, q_norm, scores);
  } else {
    canonical_scores_of<kIp>(tile, rows, q, dim, q_norm, scores);
  }
}

}  // namespace cuda
}  // namespace knnfast
