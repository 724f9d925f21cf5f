// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "isa/avx2_int8.h"
#include "isa/common.h"
#include "isa/matmul.h"

namespace knnfast {
namespace {

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

// sums[q][r] = rows[r] · values of query q, for NX rows and NQ queries.
template <int NX, int NQ>
inline void fp16_tile(const uint16_t* x, int dim, const ScanQuery* queries, float (*sums)[16]) {
  __m256 acc[NX][NQ];
  for (auto& row : acc)
    for (__m256& a : row) a = _mm256_setzero_ps();
  const auto step = [&](int j, auto load) {
    __m256 f[NX];
    for (int r = 0; r < NX; ++r) f[r] = load(x + static_cast<size_t>(r) * dim);
    for (int q = 0; q < NQ; ++q) {
      const __m256 v = _mm256_loadu_ps(queries[q].values + j);
      for (int r = 0; r < NX; ++r) acc[r][q] = _mm256_fmadd_ps(f[r], v, acc[r][q]);
    }
  };
  int j = 0;
  for (; j + 8 <= dim; j += 8)
    step(j, [j](const uint16_t* row) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j)));
    });
  if (j < dim) step(j, [j, dim](const uint16_t* row) { return load8(row, j, dim); });
  for (int q = 0; q < NQ; ++q)
    for (int r = 0; r < NX; ++r) sums[q][r] = sum(acc[r][q]);
}

void scan_fp16(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, bool cosine, Sink* sink) {
  const __m256 one = _mm256_set1_ps(1);
  for (uint32_t b = next_live(rows, begin, end); b < end; b = next_live(rows, b + 1, end)) {
    const size_t first = static_cast<size_t>(b) * kBlockRows;
    for (int q0 = 0; q0 < nq;) {
      const int count = nq - q0 >= 4 ? 4 : 1;
      alignas(32) float sums[4][16];
      for (int r = 0; r < kBlockRows; r += count == 4 ? 2 : 4) {
        const uint16_t* x = rows.rows + (first + r) * rows.dim;
        float (*out)[16] = reinterpret_cast<float (*)[16]>(&sums[0][r]);
        if (count == 4)
          fp16_tile<2, 4>(x, rows.dim, queries + q0, out);
        else
          fp16_tile<4, 1>(x, rows.dim, queries + q0, out);
      }
      for (int i = 0; i < count; ++i) {
        ScanQuery& q = queries[q0 + i];
        __m256 u[2];
        for (int h = 0; h < 2; ++h) {
          const __m256 norm = _mm256_loadu_ps(rows.row_norm + first + 8 * h);
          const __m256 positive = _mm256_cmp_ps(norm, _mm256_setzero_ps(), _CMP_GT_OQ);
          const __m256 inverse = cosine ? _mm256_and_ps(positive, _mm256_div_ps(one, norm)) : one;
          u[h] = _mm256_fmadd_ps(_mm256_set1_ps(q.err[kStops]), cosine ? one : norm,
                                 _mm256_set1_ps(q.base));
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

// Canonical sums of NX rows with NQ queries: part[r][i] = lanes 4h to 4h+3 plus lanes 4h+16 to
// 4h+19, what the tree adds first. A quarter of the lanes at a time, 3 x 2 pairs fit the registers,
// and 5 loads feed 6 multiplications, of which there are two a cycle, as of the loads.
template <int NX, int NQ, bool L2>
inline void canonical_quarter(const double* x, const double* q, size_t stride, int dim,
                              __m256d (*part)[NQ]) {
  __m256d acc[NX][NQ][2];
#pragma GCC unroll 3
  for (int r = 0; r < NX; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NQ; ++i) acc[r][i][0] = acc[r][i][1] = _mm256_setzero_pd();
  for (int j = 0; j < dim; j += 32)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m256d v[NX];
#pragma GCC unroll 3
      for (int r = 0; r < NX; ++r) {
        v[r] = _mm256_load_pd(x + r * stride + j + 16 * p);
        __asm__("" : "+x"(v[r]));  // into a register: GCC would load it anew for every use
      }
#pragma GCC unroll 2
      for (int i = 0; i < NQ; ++i) {
        __m256d w = _mm256_load_pd(q + i * stride + j + 16 * p);
        __asm__("" : "+x"(w));
#pragma GCC unroll 3
        for (int r = 0; r < NX; ++r) {
          __m256d& a = acc[r][i][p];
          if (L2) {  // never fused
            const __m256d t = _mm256_sub_pd(w, v[r]);
            a = _mm256_add_pd(a, _mm256_mul_pd(t, t));
          } else {  // a score's products are exact: fused or not, the same bits
            a = _mm256_fmadd_pd(v[r], w, a);
          }
        }
      }
    }
#pragma GCC unroll 3
  for (int r = 0; r < NX; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NQ; ++i) part[r][i] = _mm256_add_pd(acc[r][i][0], acc[r][i][1]);
}

inline double sum4(__m256d v) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

template <int NX, int NQ, bool L2>
inline void canonical_tile(const double* x, const double* q, size_t stride, int dim, double* sums,
                           int nq) {
  __m256d part[4][NX][NQ];
  for (int h = 0; h < 4; ++h)
    canonical_quarter<NX, NQ, L2>(x + 4 * h, q + 4 * h, stride, dim, part[h]);
  for (int r = 0; r < NX; ++r)
    for (int i = 0; i < NQ; ++i)
      sums[r * nq + i] = sum4(_mm256_add_pd(_mm256_add_pd(part[0][r][i], part[2][r][i]),
                                            _mm256_add_pd(part[1][r][i], part[3][r][i])));
}

// NX rows with all queries: the rows stay in L1, the queries go through it.
template <int NX, bool L2>
inline void canonical_queries(const double* x, const double* q, int nq, size_t stride, int dim,
                              double* sums) {
  int i = 0;
  for (; i + 2 <= nq; i += 2)
    canonical_tile<NX, 2, L2>(x, q + i * stride, stride, dim, sums + i, nq);
  if (i < nq) canonical_tile<NX, 1, L2>(x, q + i * stride, stride, dim, sums + i, nq);
}

template <bool L2>
void canonical(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
               double* sums) {
  int r = 0;
  for (; r + 3 <= nx; r += 3)
    canonical_queries<3, L2>(x + r * stride, q, nq, stride, dim, sums + r * nq);
  for (; r < nx; ++r) canonical_queries<1, L2>(x + r * stride, q, nq, stride, dim, sums + r * nq);
}

enum RowSum { kDot, kL2, kNorm2 };

// Eight elements of a row and a query onto two of the sums.
template <RowSum Kind>
inline void add_eight(__m256 f, const double* q, __m256d* lanes) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m256d v = _mm256_cvtps_pd(h ? _mm256_extractf128_ps(f, 1) : _mm256_castps256_ps128(f));
    const __m256d w = Kind == kNorm2 ? v : _mm256_load_pd(q + 4 * h);
    if (Kind == kL2) {  // never fused
      const __m256d t = _mm256_sub_pd(w, v);
      lanes[h] = _mm256_add_pd(lanes[h], _mm256_mul_pd(t, t));
    } else {  // a score's products are exact: fused or not, the same bits
      lanes[h] = _mm256_fmadd_pd(v, w, lanes[h]);
    }
  }
}

template <RowSum Kind>
double row_sum(const uint16_t* x, const double* q, int dim) {
  __m256d lanes[8];
  for (__m256d& lane : lanes) lane = _mm256_setzero_pd();
  int j = 0;
  for (; j + 32 <= dim; j += 32)
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
      add_eight<Kind>(load8(x, j + 8 * p, dim), q + j + 8 * p, lanes + 2 * p);
  for (int p = 0; j < dim; ++p, j += 8) add_eight<Kind>(load8(x, j, dim), q + j, lanes + 2 * p);
  for (int l = 0; l < 4; ++l) lanes[l] = _mm256_add_pd(lanes[l], lanes[l + 4]);
  return sum4(_mm256_add_pd(_mm256_add_pd(lanes[0], lanes[2]), _mm256_add_pd(lanes[1], lanes[3])));
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

extern const Kernels kAvx2 = {
    "avx2",
    kWindow,       // window
    0,             // tile_batch
    0,             // matrix_batch
    kWindowStops,  // stop_groups
    kGroup,        // stop_batch
    scan_int8,
    scan_fp16,
    canonical<false>,
    canonical<true>,
    widen,
    row_sum<kDot>,
    row_sum<kL2>,
    row_sum<kNorm2>,
    to_half,
    to_float,
    centre_row_plain<to_float>,
    quantize_row_plain,
    squares,
    round_row,
    scale_row,
    matmul,
    matmul,
    nullptr,
};

}  // namespace knnfast
