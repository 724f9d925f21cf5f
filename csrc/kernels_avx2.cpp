// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C. vpmaddubsw gives 16-bit sums of two products; they are added up over a
// window of groups before they are widened: 1.125 multiplications for 32 codes instead of 2.
// Nothing overflows: the queries are coded so that no sum of a window leaves 16 bits (kernels.h).
#include <immintrin.h>

#include "kernels_common.h"
#include "kernels_matmul.h"

namespace knnfast {
namespace {

constexpr int kWindow = 8;  // groups
static_assert(kQueryPad % (kWindow * kBlockDims) == 0, "whole windows of zeros");

static_assert((kWindow - 1) * 64 <= 1024, "what may be read past the codes");

// The live rows of a block of which a comparison holds.
inline uint32_t live_rows(const ScanRows& rows, uint32_t block, __m256 low, __m256 high) {
  const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(low)) |
                        static_cast<uint32_t>(_mm256_movemask_ps(high)) << 8;
  return rows.live ? mask & rows.live[block] : mask;
}

void report(const ScanRows& rows, uint32_t block, ScanQuery& query, int index, __m256 u0, __m256 u1,
            Sink* sink) {
  const __m256 tau = _mm256_set1_ps(query.tau);
  const uint32_t mask = live_rows(rows, block, _mm256_cmp_ps(u0, tau, _CMP_GE_OQ),
                                  _mm256_cmp_ps(u1, tau, _CMP_GE_OQ));
  if (!mask) return;
  float upper[kBlockRows];
  _mm256_storeu_ps(upper, u0);
  _mm256_storeu_ps(upper + 8, u1);
  query.tau = sink->hit(sink, index, block, upper, mask);
}

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Cache lines to ask for while tiles are summed: `lines` of them per window, from `at` on.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  int lines = 0;

  void ask() {
    if (at >= end) return;
    for (int i = 0; i < lines; ++i, at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
};

// sums[b][q] += codes of block `block + b·apart` · codes of queries[index[q]], groups [first, end),
// rows 0 to 7 and 8 to 15. Queries are zero-filled, so that the last window may run past the last
// group.
template <int NB, int NQ>
inline void int8_sums(const ScanRows& rows, uint32_t block, uint32_t apart,
                      const ScanQuery* queries, const int (&index)[NQ], int first, int end,
                      Ahead& ahead_, __m256i (&sums)[NB][NQ][2]) {
  Ahead ahead = ahead_;
  const size_t bytes = static_cast<size_t>(rows.groups) * 64, stride = bytes * apart;
  const uint8_t* codes = rows.codes + block * bytes;
  const __m256i one = _mm256_set1_epi16(1);
  for (int g = first, w = first / kWindow; g < end; g += kWindow, ++w) {
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      __m256i part[NQ][2];
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q)
        part[q][0] = part[q][1] = broadcast(queries[index[q]].offsets + w);
#pragma GCC unroll 8
      for (int i = 0; i < kWindow; ++i) {
        const uint8_t* c = codes + b * stride + (g + i) * 64;
        const __m256i low = load(c), high = load(c + 32);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; ++q) {
          const __m256i p = broadcast(queries[index[q]].codes + (g + i) * kBlockDims);
          part[q][0] = _mm256_add_epi16(part[q][0], _mm256_maddubs_epi16(low, p));
          part[q][1] = _mm256_add_epi16(part[q][1], _mm256_maddubs_epi16(high, p));
          // Now: GCC would gather the products of a window first, in more registers than there are.
          __asm__("" : "+x"(part[q][0]), "+x"(part[q][1]));
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q)
        for (int h = 0; h < 2; ++h)
          sums[b][q][h] = _mm256_add_epi32(sums[b][q][h], _mm256_madd_epi16(part[q][h], one));
    }
    ahead.ask();
  }
  ahead_.at = ahead.at;
}

// Sums up to group `end` of NQ queries from `index` on.
template <int NB, int NQ>
inline void first_sums(const ScanRows& rows, uint32_t block, uint32_t apart,
                       const ScanQuery* queries, int index, int end, Ahead& ahead,
                       __m256i (&sums)[NB][NQ][2]) {
  int all[NQ];
  for (int q = 0; q < NQ; ++q) {
    all[q] = index + q;
    for (int b = 0; b < NB; ++b) sums[b][q][0] = sums[b][q][1] = _mm256_setzero_si256();
  }
  int8_sums<NB, NQ>(rows, block, apart, queries, all, 0, end, ahead, sums);
}

// Where a stop is tested: at the end of a window. What is left from the stop itself on is more.
inline int stop_window(int groups, int stop) {
  return (stop_group(groups, stop) + kWindow - 1) / kWindow * kWindow;
}

struct BlockTerms {  // what the bound takes from rows 0 to 7 and 8 to 15
  __m256 scale[2], residual[2], norm[2];
  __m256i bounds[2];
};

inline BlockTerms load_terms(const ScanRows& rows, uint32_t block) {
  BlockTerms t;
  for (int h = 0; h < 2; ++h) {
    const size_t first = static_cast<size_t>(block) * kBlockRows + 8 * h;
    t.scale[h] = _mm256_loadu_ps(rows.scale + first);
    t.bounds[h] = load(rows.bounds + first);
    t.residual[h] = _mm256_castsi256_ps(
        _mm256_and_si256(t.bounds[h], _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    t.norm[h] = _mm256_loadu_ps(rows.norm + first);
  }
  return t;
}

template <bool L2>
inline __m256 bound(const BlockTerms& t, int h, __m256i sum, const ScanQuery& q) {
  __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(q.err), t.residual[h], _mm256_set1_ps(q.base));
  u = _mm256_fmadd_ps(_mm256_set1_ps(q.err_norm), t.norm[h], u);
  if (L2) u = _mm256_fmadd_ps(_mm256_set1_ps(q.sq), _mm256_mul_ps(t.norm[h], t.norm[h]), u);
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), t.scale[h]), _mm256_set1_ps(q.mul),
                         u);
}

template <bool L2>
inline void test_block(const ScanRows& rows, const BlockTerms& t, const __m256i* sum, ScanQuery& q,
                       int index, uint32_t block, Sink* sink) {
  report(rows, block, q, index, bound<L2>(t, 0, sum[0], q), bound<L2>(t, 1, sum[1], q), sink);
}

// NB blocks, `apart` from each other, and NQ queries.
template <bool L2, int NB, int NQ>
void int8_tile(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int index,
               Sink* sink, Ahead& ahead) {
  __m256i sums[NB][NQ][2];
  first_sums<NB, NQ>(rows, block, apart, queries, index, rows.groups, ahead, sums);
  for (uint32_t b = 0; b < NB; ++b) {
    const uint32_t at = block + b * apart;
    const BlockTerms t = load_terms(rows, at);
    for (int q = 0; q < NQ; ++q)
      test_block<L2>(rows, t, sums[b][q], queries[index + q], index + q, at, sink);
  }
}

// What is left of 8 rows behind a stop, in 255ths.
inline __m256 rest_of(const BlockTerms& t, int h, int stop) {
  const __m256i shifted = stop == 0 ? _mm256_srli_epi32(t.bounds[h], 8) : t.bounds[h];
  const __m256i share = _mm256_and_si256(shifted, _mm256_set1_epi32(255));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(share), t.norm[h]);
}

// StopTest's inequality, all but the first term.
template <bool L2>
inline __m256 stop_terms(const StopTest& test, const BlockTerms& t, int h) {
  __m256 u = _mm256_mul_ps(rest_of(t, h, test.stop), _mm256_set1_ps(1 + 0x1p-18f));
  u = _mm256_fmadd_ps(_mm256_set1_ps(test.err), t.residual[h], u);
  u = _mm256_fmadd_ps(_mm256_set1_ps(test.err_norm), t.norm[h], u);
  if (L2) u = _mm256_fmadd_ps(_mm256_set1_ps(test.sq), _mm256_mul_ps(t.norm[h], t.norm[h]), u);
  return u;
}

// The queries that go on past a stop with one block, and their sums so far.
struct Going {
  __m256i sums[kGroup][2];
  int query[kGroup];
  int count = 0;

  void add(int q, const __m256i* sum) {
    sums[count][0] = sum[0];
    sums[count][1] = sum[1];
    query[count++] = q;
  }
};

// NB blocks, `apart` from each other, and NQ queries, up to the first stop that is tested.
template <bool L2, int NB, int NQ>
void int8_heads(const ScanRows& rows, uint32_t block, uint32_t apart, const ScanQuery* queries,
                int index, const StopTest& test, Ahead& ahead, Going* going) {
  __m256i sums[NB][NQ][2];
  first_sums<NB, NQ>(rows, block, apart, queries, index, stop_window(rows.groups, test.stop), ahead,
                     sums);
  for (uint32_t b = 0; b < NB; ++b) {
    const uint32_t at = block + b * apart;
    const BlockTerms t = load_terms(rows, at);
    const __m256 others[2] = {stop_terms<L2>(test, t, 0), stop_terms<L2>(test, t, 1)};
    for (int q = 0; q < NQ; ++q) {
      const __m256 need = _mm256_set1_ps(test.need[index + q]);
      const __m256 ratio = _mm256_set1_ps(test.ratio[index + q]);
      __m256 goes[2];
      for (int h = 0; h < 2; ++h) {
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[b][q][h]), t.scale[h]);
        goes[h] = _mm256_cmp_ps(_mm256_fmadd_ps(product, ratio, others[h]), need, _CMP_NLT_UQ);
      }
      if (live_rows(rows, at, goes[0], goes[1])) going[b].add(index + q, sums[b][q]);
    }
  }
}

// Up to NQ queries that go on, the `count` from `first` on, from one stop to the next or to the
// end.
template <bool L2, int NQ>
void int8_rest(const ScanRows& rows, uint32_t block, const BlockTerms& t, int stop,
               ScanQuery* queries, int first, int count, Sink* sink, StopTest& test, Going& going) {
  __m256i sums[1][NQ][2];
  int index[NQ];
  for (int i = 0; i < NQ; ++i) {
    const int at = first + (i < count ? i : 0);
    index[i] = going.query[at];
    for (int h = 0; h < 2; ++h) sums[0][i][h] = going.sums[at][h];
  }
  const bool last = stop + 1 == kStops;
  const int end = last ? rows.groups : stop_window(rows.groups, stop + 1);
  Ahead none;
  int8_sums<1, NQ>(rows, block, 0, queries, index, stop_window(rows.groups, stop), end, none, sums);
  for (int i = 0; i < count; ++i) {
    ScanQuery& q = queries[index[i]];
    if (last) {
      const float tau = q.tau;
      test_block<L2>(rows, t, sums[0][i], q, index[i], block, sink);
      if (q.tau != tau) test.raise(index[i], q);
    } else {
      __m256 goes[2];
      for (int h = 0; h < 2; ++h) {
        const __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(q.left[stop + 1]), rest_of(t, h, stop + 1),
                                         bound<L2>(t, h, sums[0][i][h], q));
        goes[h] = _mm256_cmp_ps(u, _mm256_set1_ps(q.tau), _CMP_GE_OQ);
      }
      if (live_rows(rows, block, goes[0], goes[1])) going.add(index[i], sums[0][i]);
    }
  }
}

// What is left of a block for the queries that go on.
template <bool L2>
void int8_rests(const ScanRows& rows, uint32_t block, ScanQuery* queries, Sink* sink,
                StopTest& test, Going& going, int64_t* stopped) {
  const BlockTerms t = load_terms(rows, block);
  for (int stop = test.stop; stop < kStops; ++stop) {
    const int count = going.count;
    going.count = 0;  // and never ahead of what is still to be read
    for (int i = 0; i < count; i += 4) {
      const int n = count - i < 4 ? count - i : 4;
      auto* rest = n > 1 ? int8_rest<L2, 4> : int8_rest<L2, 1>;
      rest(rows, block, t, stop, queries, i, n, sink, test, going);
    }
    if (stop + 1 < kStops) stopped[stop + 1] += (count - going.count) * kBlockRows;
  }
}

// Tiles of NQ queries from q on.
template <bool L2, bool Stops, int NB, int NQ>
inline void int8_tiles(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries,
                       int& q, int nq, Sink* sink, const StopTest& test, Ahead& ahead,
                       Going* going) {
  for (; q + NQ <= nq; q += NQ)
    if (Stops)
      int8_heads<L2, NB, NQ>(rows, block, apart, queries, q, test, ahead, going);
    else
      int8_tile<L2, NB, NQ>(rows, block, apart, queries, q, sink, ahead);
}

// NB blocks, `apart` from each other, and all queries. The first tile of queries waits for its
// codes, the others find them in L1: so all of them together fetch the block that comes next.
template <bool L2, bool Stops, int NB>
void int8_blocks(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int nq,
                 Sink* sink, StopTest& test, Ahead ahead, int64_t* stopped) {
  Going going[NB];
  int q = 0;
  if constexpr (NB == 1)
    int8_tiles<L2, Stops, 1, 4>(rows, block, apart, queries, q, nq, sink, test, ahead, going);
  int8_tiles<L2, Stops, NB, 1>(rows, block, apart, queries, q, nq, sink, test, ahead, going);
  if (!Stops) return;
  for (uint32_t b = 0; b < NB; ++b) {
    stopped[test.stop] += (nq - going[b].count) * kBlockRows;
    if (going[b].count)
      int8_rests<L2>(rows, block + b * apart, queries, sink, test, going[b], stopped);
  }
}

template <bool L2, bool Stops>
void scan_int8_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries,
                      int nq, Sink* sink, int64_t* stopped) {
  const size_t bytes = static_cast<size_t>(rows.groups) * 64;
  StopTest test(queries, Stops ? nq : 0, rows.stop);
  uint32_t b = begin;
  if (nq < 4) {  // memory answers four streams faster than one: quarters go side by side
    const uint32_t quarter = (end - begin) / 4;
    for (; b < begin + quarter; ++b)
      int8_blocks<L2, Stops, 4>(rows, b, quarter, queries, nq, sink, test, Ahead(), stopped);
    b = begin + 4 * quarter;
  }
  const int tiles = nq / 4;
  for (; b < end; ++b) {
    const uint8_t* next = rows.codes + (b + 1) * bytes;
    Ahead ahead;
    if (tiles) ahead = {next, next + bytes, (kWindow + tiles - 1) / tiles};
    int8_blocks<L2, Stops, 1>(rows, b, 0, queries, nq, sink, test, ahead, stopped);
  }
}

void scan_int8(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, Sink* sink, int64_t* stopped) {
  const bool stops = rows.stop < kStops && rows.groups >= 64;
  auto* scan = l2 ? (stops ? scan_int8_metric<true, true> : scan_int8_metric<true, false>)
                  : (stops ? scan_int8_metric<false, true> : scan_int8_metric<false, false>);
  scan(rows, begin, end, queries, nq, sink, stopped);
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
  for (uint32_t b = begin; b < end; ++b) {
    const size_t first = static_cast<size_t>(b) * kBlockRows;
    if (rows.live && !rows.live[b]) continue;
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
          } else {  // exact products: fused or not, the same bits
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
    } else {  // exact products: fused or not, the same bits
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

extern const Kernels kAvx2 = {"avx2",
                              kWindow,
                              false,
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
                              matmul};

}  // namespace knnfast
