// SPDX-License-Identifier: Apache-2.0
// What the top-k kernels share: where rows lie, what a query carries, and the bounds.
//
// Bounds. Scores are in the query's own unit: q' = 2^p q with max |q'_j| in [64, 128), and larger
// is better. Constants of a query or a metric are dropped, they do not change the order.
//   fp16  ip:     q'·x                 from the FP16 rounding h of q'
//         cosine: q'·x / ‖x‖
//         l2:     q'·x - γ‖x‖²/2, γ = 2^p
//   int8  with y = x - μ (cosine: x/‖x‖ - μ), its codes y = a·c + r, and t = q' (l2: 2^p (q - μ)),
//         its codes t = b·p + w:
//         ip, cosine: t·μ + t·y        l2: t·y - γ‖y‖²/2
// The estimate v replaces t·y by a·b·(c·p). What lies between v and the canonical score is at most
//   fp16  ‖q'-h‖‖x‖                rounding of the query (Cauchy-Schwarz)
//         (2d+64) 2^-23 (‖h‖+2^-14)(‖x‖+2^-14)
//                                  tensor cores cut each addend to 24 bits of the largest, which
//                                  they tell by exponents: a subnormal or a zero counts as 2^-14
//         2^-22 ‖q'‖‖x‖            this page's own float arithmetic, the canonical rounding
//   int8  ‖t‖‖r‖ + ‖w‖‖a·c‖        codes of the row, codes of the query; the integer sum is exact
//         2^-20 (‖t‖+‖w‖)‖a·c‖ + 2^-22 |t·μ|
//   l2    2^-22 γ·weight, and (d+8) 2^-52 2^p ‖q‖² (canonical rounding when ‖q‖ dwarfs the rows)
// so every bound is   v ± (err_row·A + err_code·B + err_fixed + 2^-22 γ·weight)   with the row's
// norms A and B. The factors below are rounded up; FP32 overflow gives an infinite error, which
// opens the row: never a wrong answer.
#pragma once
#include "cuda/cuda_device.cuh"
#include "cuda/topk_cuda.h"

namespace knnfast {
namespace cuda {

constexpr float kMinusInf = -__builtin_huge_valf();

// One query, prepared for the scan and for the opening.
struct QueryState {
  float scale;     // int8: b
  float center;    // int8, ip and cosine: t·μ
  float gamma;     // l2: 2^p, else 0
  float err_row;   // scan: times ‖x‖ (fp16) or ‖r‖ (int8)
  float err_code;  // scan, int8: times ‖a·c‖
  float open_row;  // the same when the query is not rounded (FP32 dot product)
  float open_code;
  float err_fixed;  // fp16, cosine: times 1/‖x‖
  double norm;      // cosine: √(q·q), in the canonical order; l2: t·t, in FP16 scans of t = q'
  int bad;          // the query has a NaN or an infinity
  int exponent;     // p
};
static_assert(sizeof(QueryState) == 48, "copied as three 16-byte words");

// Where the scan finds and leaves things; the same for all three scan kernels.
struct ScanArgs {
  const SegmentView* segments;
  const uint32_t* filter;
  const unsigned char* panels;  // operand form of the queries: [panel][slice][columns][128 bytes]
  const QueryState* queries;
  float* upper;  // [batch, bins]
  float* lower;  // [batch, bins >> lower_shift]
  int64_t rows;
  int tiles_per_segment, tiles;  // tiles of 256 rows
  int slices, bins, lower_shift;
  int batch, panels_count;
  Metric metric;
};

struct TilePlace {
  int segment;
  int64_t row;  // first row of the tile inside its segment
};
__device__ __forceinline__ TilePlace place_tile(const ScanArgs& a, int tile) {
  const int segment = tile / a.tiles_per_segment;
  return {segment, static_cast<int64_t>(tile - segment * a.tiles_per_segment) * kTileRows};
}

// First byte of a slice of a tile; `row` (a multiple of 256) is the tile's first row.
__host__ __device__ __forceinline__ int64_t slice_offset(int64_t row, int slice, int slices) {
  return (row * slices + static_cast<int64_t>(slice) * kTileRows) * kSlice;
}
// Byte of 16-byte unit `unit` of row `row` inside a slice.
__host__ __device__ __forceinline__ int unit_offset(int row, int unit) {
  return row * kSlice + ((unit ^ (row & 7)) << 4);
}

// The rows of a bin that exist: bit i is row i of the 32.
__device__ __forceinline__ uint32_t bin_rows(int64_t rows, int bin) {
  const int64_t first = static_cast<int64_t>(bin) * kBinRows;
  return first + kBinRows <= rows ? ~0u : first < rows ? (1u << (rows - first)) - 1 : 0u;
}

// Those that may be found.
__device__ __forceinline__ uint32_t bin_mask(const SegmentView& segment, const uint32_t* filter,
                                             int64_t rows, int bin, int64_t row_in_segment) {
  const uint32_t mask = filter ? filter[bin] : segment.alive[row_in_segment / kBinRows];
  return mask & bin_rows(rows, bin);
}

struct Bounds {
  float upper, lower;
};

// A row that may not be found: a NaN as its norm makes both bounds NaN, which fmaxf passes over.
// One select a row instead of a branch that would keep the compiler from interleaving rows.
template <class Term>
__device__ __forceinline__ Term term_if(bool live, Term term) {
  if (!live) term.norm = __uint_as_float(0x7fffffff);
  return term;
}

// bounds<L2>: without L2 the metric is another one, and its shift, 0, is left out.
struct HalfScan {
  using Term = HalfTerm;
  using Sum = float;
  static constexpr bool kIsInt8 = false;
  __device__ static __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t* b) {
    mma_f16(c, a, b);
  }
  __device__ static __forceinline__ const unsigned char* matrix(const SegmentView& s) {
    return s.half;
  }
  __device__ static __forceinline__ const Term* terms(const SegmentView& s) { return s.half_terms; }
  template <bool L2 = true>
  __device__ static __forceinline__ Bounds bounds(float sum, const Term& row, const QueryState& q,
                                                  Metric metric) {
    const float factor = metric == kCosine ? row.weight : 1.0f;
    float value = sum * factor;
    float error = (q.err_row * row.norm + q.err_fixed) * factor;
    if (L2) {
      const float shift = q.gamma * row.weight;
      value -= shift;
      error += 0x1p-22f * shift;
    }
    return {value + error, value - error};
  }
};

struct CodeScan {
  using Term = CodeTerm;
  using Sum = int;
  static constexpr bool kIsInt8 = true;
  __device__ static __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t* b) {
    mma_s8(c, a, b);
  }
  __device__ static __forceinline__ const unsigned char* matrix(const SegmentView& s) {
    return s.codes;
  }
  __device__ static __forceinline__ const Term* terms(const SegmentView& s) { return s.code_terms; }
  template <bool L2 = true>
  __device__ static __forceinline__ Bounds bounds(float sum, const Term& row, const QueryState& q,
                                                  Metric) {
    float value = q.center + row.scale * q.scale * sum;
    float error = q.err_row * row.residual + (q.err_code * row.norm + q.err_fixed);
    if (L2) {
      const float shift = q.gamma * row.weight;
      value -= shift;
      error += 0x1p-22f * shift;
    }
    return {value + error, value - error};
  }
};

// Order-preserving forms: a larger key is a larger number. NaN never reaches them.
__device__ __forceinline__ uint32_t float_key(float v) {
  const uint32_t u = __float_as_uint(v);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float key_float(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace cuda
}  // namespace knnfast
