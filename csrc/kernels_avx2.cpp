// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C. vpmaddubsw would saturate on 8-bit codes, so even and odd dimensions are
// widened to 16 bits and multiplied by vpmaddwd.
#include <immintrin.h>

#include "kernels_common.h"

namespace knnfast {
namespace {

void report(const ScanRows& rows, uint32_t block, ScanQuery& query, int index, __m256 u0, __m256 u1,
            Sink* sink) {
  const __m256 tau = _mm256_set1_ps(query.tau);
  uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(u0, tau, _CMP_GE_OQ))) |
                  static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(u1, tau, _CMP_GE_OQ)))
                      << 8;
  if (rows.live) mask &= rows.live[block];
  if (!mask) return;
  float upper[kBlockRows];
  _mm256_storeu_ps(upper, u0);
  _mm256_storeu_ps(upper + 8, u1);
  query.tau = sink->hit(sink, index, block, upper, mask);
}

template <int NQ>
void int8_tile(const ScanRows& rows, uint32_t block, ScanQuery* queries, int index, bool l2,
               Sink* sink) {
  const uint8_t* codes = rows.codes + static_cast<size_t>(block) * rows.groups * 64;
  __m256i acc[NQ][2];
  for (int q = 0; q < NQ; ++q) acc[q][0] = acc[q][1] = _mm256_set1_epi32(queries[q].offset);
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  for (int g = 0; g < rows.groups; ++g) {
    __m256i even[2], odd[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i c = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(codes + static_cast<size_t>(g) * 64 + h * 32));
      even[h] = _mm256_and_si256(c, low);
      odd[h] = _mm256_srli_epi16(c, 8);
    }
    for (int q = 0; q < NQ; ++q) {
      int32_t word;
      memcpy(&word, queries[q].codes + g * kBlockDims, 4);
      const __m256i w = _mm256_set1_epi32(word);
      const __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
      const __m256i w_odd = _mm256_srai_epi16(w, 8);
      for (int h = 0; h < 2; ++h)
        acc[q][h] = _mm256_add_epi32(acc[q][h], _mm256_add_epi32(_mm256_madd_epi16(even[h], w_even),
                                                                 _mm256_madd_epi16(odd[h], w_odd)));
    }
  }
  const size_t first = static_cast<size_t>(block) * kBlockRows;
  for (int q = 0; q < NQ; ++q) {
    __m256 u[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 norm = _mm256_loadu_ps(rows.norm + first + 8 * h);
      u[h] = _mm256_fmadd_ps(_mm256_set1_ps(queries[q].err),
                             _mm256_loadu_ps(rows.residual + first + 8 * h),
                             _mm256_set1_ps(queries[q].base));
      u[h] = _mm256_fmadd_ps(_mm256_set1_ps(queries[q].err_norm), norm, u[h]);
      if (l2)
        u[h] = _mm256_fmadd_ps(_mm256_set1_ps(queries[q].sq), _mm256_mul_ps(norm, norm), u[h]);
      u[h] = _mm256_fmadd_ps(
          _mm256_mul_ps(_mm256_cvtepi32_ps(acc[q][h]), _mm256_loadu_ps(rows.scale + first + 8 * h)),
          _mm256_set1_ps(queries[q].mul), u[h]);
    }
    report(rows, block, queries[q], index + q, u[0], u[1], sink);
  }
}

void scan_int8(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, Sink* sink) {
  for (uint32_t b = begin; b < end; ++b) {
    int q = 0;
    for (; q + 4 <= nq; q += 4) int8_tile<4>(rows, b, queries + q, q, l2, sink);
    for (; q < nq; ++q) int8_tile<1>(rows, b, queries + q, q, l2, sink);
  }
}

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Eight values from j on, zeros past dim.
inline __m256 load8(const uint16_t* x, int j, int dim) {
  if (j + 8 <= dim)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j)));
  uint16_t rest[8] = {};
  memcpy(rest, x + j, static_cast<size_t>(dim - j) * 2);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest)));
}

template <int NQ>
inline void fp16_tile(const uint16_t* x, int dim, const ScanQuery* queries, float (*sums)[16]) {
  __m256 acc[2][NQ];
  for (auto& row : acc)
    for (__m256& a : row) a = _mm256_setzero_ps();
  for (int j = 0; j < dim; j += 8) {
    const __m256 f0 = load8(x, j, dim), f1 = load8(x + dim, j, dim);
    for (int q = 0; q < NQ; ++q) {
      const __m256 v = _mm256_loadu_ps(queries[q].values + j);
      acc[0][q] = _mm256_fmadd_ps(f0, v, acc[0][q]);
      acc[1][q] = _mm256_fmadd_ps(f1, v, acc[1][q]);
    }
  }
  for (int q = 0; q < NQ; ++q)
    for (int r = 0; r < 2; ++r) sums[q][r] = sum(acc[r][q]);
}

void scan_fp16(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, bool cosine, Sink* sink) {
  const __m256 one = _mm256_set1_ps(1);
  for (uint32_t b = begin; b < end; ++b) {
    const size_t first = static_cast<size_t>(b) * kBlockRows;
    if (rows.live && !rows.live[b]) continue;
    for (int q0 = 0; q0 < nq;) {
      const int count = nq - q0 >= 4 ? 4 : 1;
      alignas(32) float sums[4][16];
      for (int r = 0; r < kBlockRows; r += 2) {
        const uint16_t* x = rows.rows + (first + r) * rows.dim;
        float (*out)[16] = reinterpret_cast<float (*)[16]>(&sums[0][r]);
        if (count == 4)
          fp16_tile<4>(x, rows.dim, queries + q0, out);
        else
          fp16_tile<1>(x, rows.dim, queries + q0, out);
      }
      for (int i = 0; i < count; ++i) {
        ScanQuery& q = queries[q0 + i];
        __m256 u[2];
        for (int h = 0; h < 2; ++h) {
          const __m256 norm = _mm256_loadu_ps(rows.row_norm + first + 8 * h);
          const __m256 positive = _mm256_cmp_ps(norm, _mm256_setzero_ps(), _CMP_GT_OQ);
          const __m256 inverse = cosine ? _mm256_and_ps(positive, _mm256_div_ps(one, norm)) : one;
          u[h] =
              _mm256_fmadd_ps(_mm256_set1_ps(q.err), cosine ? one : norm, _mm256_set1_ps(q.base));
          if (l2) u[h] = _mm256_fmadd_ps(_mm256_set1_ps(q.sq), _mm256_mul_ps(norm, norm), u[h]);
          u[h] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_load_ps(sums[i] + 8 * h), inverse),
                                 _mm256_set1_ps(q.mul), u[h]);
        }
        report(rows, b, q, q0 + i, u[0], u[1], sink);
      }
      q0 += count;
    }
  }
}

// Lanes 4i to 4i+3 lie in acc[i].
inline double combine(__m256d* acc) {
  for (int stride = 4; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) acc[i] = _mm256_add_pd(acc[i], acc[i + stride]);
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(acc[0]), _mm256_extractf128_pd(acc[0], 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

template <class Step>
inline double canonical(int dim, Step step) {
  __m256d acc[8];
  for (__m256d& a : acc) a = _mm256_setzero_pd();
  for (int j = 0; j < dim; j += 32)
    for (int i = 0; i < 8; ++i) acc[i] = step(acc[i], j + 4 * i);
  return combine(acc);
}

double dot(const double* x, const double* q, int dim) {
  return canonical(dim, [&](__m256d a, int j) {  // exact products: fused or not, the same bits
    return _mm256_fmadd_pd(_mm256_loadu_pd(x + j), _mm256_loadu_pd(q + j), a);
  });
}

double l2(const double* x, const double* q, int dim) {
  return canonical(dim, [&](__m256d a, int j) {  // never fused
    const __m256d t = _mm256_sub_pd(_mm256_loadu_pd(q + j), _mm256_loadu_pd(x + j));
    return _mm256_add_pd(a, _mm256_mul_pd(t, t));
  });
}

void widen(const uint16_t* x, int dim, double* out) {
  int j = 0;
  for (; j < dim; j += 8) {
    const __m256 f = load8(x, j, dim);
    _mm256_storeu_pd(out + j, _mm256_cvtps_pd(_mm256_castps256_ps128(f)));
    _mm256_storeu_pd(out + j + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(f, 1)));
  }
  for (; j % 32; j += 4) _mm256_storeu_pd(out + j, _mm256_setzero_pd());
}

bool to_half(const float* x, uint16_t* out, int64_t n) {
  bool finite = true;
  int64_t i = 0;
  const __m128i top = _mm_set1_epi16(0x7c00);
  __m128i bad = _mm_setzero_si128();
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    bad = _mm_or_si128(bad, _mm_cmpeq_epi16(_mm_and_si128(h, top), top));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  for (; i < n; ++i) {
    out[i] = float_to_half(x[i]);
    finite &= (out[i] & 0x7c00) != 0x7c00;
  }
  return finite && _mm_movemask_epi8(bad) == 0;
}

void to_float(const uint16_t* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = half_to_float(x[i]);
}

}  // namespace

extern const Kernels kAvx2 = {"avx2",          scan_int8,      scan_fp16,
                              one_by_one<dot>, one_by_one<l2>, widen,
                              to_half,         to_float,       quantize_row_plain<to_float>};

}  // namespace knnfast
