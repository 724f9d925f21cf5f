// SPDX-License-Identifier: Apache-2.0
// AVX-512 bodies, included by the units with and without VNNI.
#pragma once

#include <immintrin.h>

#include "isa/avx512_int8.h"
#include "isa/common.h"
#include "isa/matmul.h"

namespace knnfast {
namespace {

// sums[q][r] = rows[r] · values of query q, for 4 rows and NQ queries.
template <int NQ>
inline void fp16_tile(const uint16_t* x, int dim, const ScanQuery* queries, float (*sums)[16]) {
  __m512 acc[4][NQ];
  for (auto& row : acc)
    for (__m512& a : row) a = _mm512_setzero_ps();
  for (int j = 0; j < dim; j += 16) {
    const __mmask16 m = dim - j >= 16 ? 0xffff : static_cast<__mmask16>((1 << (dim - j)) - 1);
    __m512 f[4];
    for (int r = 0; r < 4; ++r)
      f[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x + static_cast<size_t>(r) * dim + j));
    for (int q = 0; q < NQ; ++q) {
      const __m512 v = _mm512_loadu_ps(queries[q].values + j);
      for (int r = 0; r < 4; ++r) acc[r][q] = _mm512_fmadd_ps(f[r], v, acc[r][q]);
    }
  }
  for (int q = 0; q < NQ; ++q)
    for (int r = 0; r < 4; ++r) sums[q][r] = _mm512_reduce_add_ps(acc[r][q]);
}

void scan_fp16(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, bool cosine, Sink* sink) {
  for (uint32_t b = next_live(rows, begin, end); b < end; b = next_live(rows, b + 1, end)) {
    const size_t first = static_cast<size_t>(b) * kBlockRows;
    const __m512 norm = _mm512_loadu_ps(rows.row_norm + first);
    const __mmask16 live = rows.live ? rows.live[b] : 0xffff;
    const __m512 one = _mm512_set1_ps(1);
    const __m512 inverse =
        cosine ? _mm512_maskz_div_ps(_mm512_cmp_ps_mask(norm, _mm512_setzero_ps(), _CMP_GT_OQ), one,
                                     norm)
               : one;
    const __m512 error = cosine ? one : norm;
    for (int q0 = 0; q0 < nq; q0 += 4) {
      const int count = nq - q0 < 4 ? nq - q0 : 4;
      alignas(64) float sums[4][16];
      for (int r = 0; r < kBlockRows; r += 4) {
        const uint16_t* x = rows.rows + (first + r) * rows.dim;
        float (*out)[16] = reinterpret_cast<float (*)[16]>(&sums[0][r]);
        if (count == 4)
          fp16_tile<4>(x, rows.dim, queries + q0, out);
        else if (count == 3)
          fp16_tile<3>(x, rows.dim, queries + q0, out);
        else if (count == 2)
          fp16_tile<2>(x, rows.dim, queries + q0, out);
        else
          fp16_tile<1>(x, rows.dim, queries + q0, out);
      }
      for (int i = 0; i < count; ++i) {
        ScanQuery& q = queries[q0 + i];
        __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(q.err[kStops]), error, _mm512_set1_ps(q.base));
        if (l2) u = _mm512_fmadd_ps(_mm512_set1_ps(q.sq), _mm512_mul_ps(norm, norm), u);
        u = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_load_ps(sums[i]), inverse), _mm512_set1_ps(q.mul),
                            u);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(live, u, _mm512_set1_ps(q.tau), _CMP_GE_OQ);
        if (mask) {
          float upper[kBlockRows];
          _mm512_storeu_ps(upper, u);
          q.tau = sink->hit(sink, q0 + i, b, upper, mask);
        }
      }
    }
  }
}

inline double sum8(__m512d e) {
  const __m256d f = _mm256_add_pd(_mm512_castpd512_pd256(e), _mm512_extractf64x4_pd(e, 1));
  const __m128d g = _mm_add_pd(_mm256_castpd256_pd128(f), _mm256_extractf128_pd(f, 1));
  return _mm_cvtsd_f64(_mm_add_sd(g, _mm_unpackhi_pd(g, g)));
}

// Canonical sums of NX rows with NQ queries: half[r][i] = lanes 8h to 8h+7 plus lanes 8h+16 to
// 8h+23, what the tree adds first. Half of the lanes at a time, 3 x 4 pairs fit the registers, and
// 7 loads feed 12 multiplications, of which there are two a cycle, as of the loads.
template <int NX, int NQ, bool L2>
inline void canonical_half(const double* x, const double* q, size_t stride, int dim,
                           __m512d (*half)[NQ]) {
  __m512d acc[NX][NQ][2];
#pragma GCC unroll 3
  for (int r = 0; r < NX; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NQ; ++i) acc[r][i][0] = acc[r][i][1] = _mm512_setzero_pd();
  for (int j = 0; j < dim; j += 32)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512d v[NX];
#pragma GCC unroll 3
      for (int r = 0; r < NX; ++r) {
        v[r] = _mm512_load_pd(x + r * stride + j + 16 * p);
        __asm__("" : "+v"(v[r]));  // into a register: GCC would load it anew for every use
      }
#pragma GCC unroll 4
      for (int i = 0; i < NQ; ++i) {
        __m512d w = _mm512_load_pd(q + i * stride + j + 16 * p);
        __asm__("" : "+v"(w));
#pragma GCC unroll 3
        for (int r = 0; r < NX; ++r) {
          __m512d& a = acc[r][i][p];
          if (L2) {  // never fused
            const __m512d t = _mm512_sub_pd(w, v[r]);
            a = _mm512_add_pd(a, _mm512_mul_pd(t, t));
          } else {  // a score's products are exact: fused or not, the same bits
            a = _mm512_fmadd_pd(v[r], w, a);
          }
        }
      }
    }
#pragma GCC unroll 3
  for (int r = 0; r < NX; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NQ; ++i) half[r][i] = _mm512_add_pd(acc[r][i][0], acc[r][i][1]);
}

template <int NX, int NQ, bool L2>
inline void canonical_tile(const double* x, const double* q, size_t stride, int dim, double* sums,
                           int nq) {
  __m512d low[NX][NQ], high[NX][NQ];
  canonical_half<NX, NQ, L2>(x, q, stride, dim, low);
  canonical_half<NX, NQ, L2>(x + 8, q + 8, stride, dim, high);
  for (int r = 0; r < NX; ++r)
    for (int i = 0; i < NQ; ++i) sums[r * nq + i] = sum8(_mm512_add_pd(low[r][i], high[r][i]));
}

// NQ queries with all rows.
template <int NQ, bool L2>
inline void canonical_rows(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
                           double* sums) {
  int r = 0;
  for (; r + 3 <= nx; r += 3)
    canonical_tile<3, NQ, L2>(x + r * stride, q, stride, dim, sums + r * nq, nq);
  for (; r < nx; ++r) canonical_tile<1, NQ, L2>(x + r * stride, q, stride, dim, sums + r * nq, nq);
}

template <bool L2>
void canonical(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
               double* sums) {
  int i = 0;
  for (; i + 4 <= nq; i += 4)
    canonical_rows<4, L2>(x, nx, q + i * stride, nq, stride, dim, sums + i);
  for (; i < nq; ++i) canonical_rows<1, L2>(x, nx, q + i * stride, nq, stride, dim, sums + i);
}

enum RowSum { kDot, kL2, kNorm2 };

// 32 elements of a row and a query onto the 32 lanes; `m`: of the row's elements, those there are.
template <RowSum Kind>
inline void add_row(const uint16_t* x, const double* q, __mmask32 m, __m512d* lanes) {
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const __m128i h = _mm_maskz_loadu_epi16(static_cast<__mmask8>(m >> (8 * p)), x + 8 * p);
    const __m512d v = _mm512_cvtps_pd(_mm256_cvtph_ps(h));
    const __m512d w = Kind == kNorm2 ? v : _mm512_load_pd(q + 8 * p);
    if (Kind == kL2) {  // never fused
      const __m512d t = _mm512_sub_pd(w, v);
      lanes[p] = _mm512_add_pd(lanes[p], _mm512_mul_pd(t, t));
    } else {  // a score's products are exact: fused or not, the same bits
      lanes[p] = _mm512_fmadd_pd(v, w, lanes[p]);
    }
  }
}

template <RowSum Kind>
double row_sum(const uint16_t* x, const double* q, int dim) {
  __m512d lanes[4];
  for (__m512d& lane : lanes) lane = _mm512_setzero_pd();
  int j = 0;
  for (; j + 32 <= dim; j += 32) add_row<Kind>(x + j, q + j, ~0u, lanes);
  if (j < dim) add_row<Kind>(x + j, q + j, (1u << (dim - j)) - 1, lanes);
  return sum8(_mm512_add_pd(_mm512_add_pd(lanes[0], lanes[2]), _mm512_add_pd(lanes[1], lanes[3])));
}

void widen(const uint16_t* x, int dim, double* out) {
  for (int j = 0; j < dim; j += 32)
#pragma GCC unroll 2
    for (int h = j; h < j + 32; h += 16) {
      const int left = dim - h;
      const __mmask16 m = left >= 16 ? 0xffff
                          : left > 0 ? static_cast<__mmask16>((1 << left) - 1)
                                     : 0;
      const __m512 f = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x + h));
      _mm512_storeu_pd(out + h, _mm512_cvtps_pd(_mm512_castps512_ps256(f)));
      _mm512_storeu_pd(out + h + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(f, 1)));
    }
}

bool to_half(const float* x, uint16_t* out, int64_t n) {
  __mmask16 bad = 0;
  const __m256i top = _mm256_set1_epi16(0x7c00);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m256i h = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(m, x + i), _MM_FROUND_TO_NEAREST_INT);
    bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(h, top), top);
    _mm256_mask_storeu_epi16(out + i, m, h);
  }
  return bad == 0;
}

void to_float(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, m, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x + i)));
  }
}

inline __m512d add_squares(__m512d sum, __m512 v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  return _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sum));
}

void centre_row(const uint16_t* x, float factor, const float* mean, int dim, float* y) {
  for (int j = 0; j < dim; j += 16) {
    const __mmask16 m = dim - j >= 16 ? 0xffff : static_cast<__mmask16>((1 << (dim - j)) - 1);
    const __m512 f =
        _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x + j)), _mm512_set1_ps(factor));
    _mm512_storeu_ps(y + j, _mm512_sub_ps(f, _mm512_maskz_loadu_ps(m, mean + j)));
  }
}

// quantize_row_plain, 16 values at a time; past dim y is 0 and its code 128.
void quantize_row(const float* y, int dim, uint8_t* codes, float* scale, float* residual,
                  float* norm) {
  __m512 size = _mm512_setzero_ps();
  for (int j = 0; j < dim; j += 16)
    size = _mm512_max_ps(size, _mm512_abs_ps(_mm512_loadu_ps(y + j)));
  const float top = _mm512_reduce_max_ps(size);
  const bool tiny = !(top > 1e-30f);
  const float a = tiny ? 0 : top / 127, inverse = tiny ? 0 : 127 / top;
  __m512d rr = _mm512_setzero_pd(), yy = _mm512_setzero_pd();
  for (int j = 0; j < dim; j += 16) {
    const __m512 v = _mm512_loadu_ps(y + j);
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
    rr = add_squares(rr, _mm512_fnmadd_ps(_mm512_set1_ps(a), _mm512_cvtepi32_ps(code), v));
    yy = add_squares(yy, v);
    alignas(16) uint8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes),
                    _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128))));
    const int groups = dim - j >= 16 ? 4 : (dim - j + kBlockDims - 1) / kBlockDims;
    for (int g = 0; g < groups; ++g, codes += kBlockRows * kBlockDims)
      memcpy(codes, bytes + g * kBlockDims, kBlockDims);
  }
  const double squares = _mm512_reduce_add_pd(yy);
  *scale = a;
  *norm = static_cast<float>(sqrt(squares));
  *residual = residual_bound(_mm512_reduce_add_pd(rr), squares, dim);
}

}  // namespace
}  // namespace knnfast
