// SPDX-License-Identifier: Apache-2.0
// The scan of codes with AVX2, and `report`, which the FP16 scan shares. vpmaddubsw gives 16-bit
// sums of two products; they are added up over a window of groups before they are widened: 1.125
// multiplications for 32 codes instead of 2. Nothing overflows: the queries are coded so that no
// sum of a window leaves 16 bits (kernels.h).
#pragma once

#include <immintrin.h>

#include "isa/common.h"

namespace knnfast {
namespace {

constexpr int kWindow = 8;        // groups
constexpr int kWindowStops = 64;  // groups of a row with stops
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

// What is left of 8 rows behind a stop, in 255ths.
inline __m256 rest_of(const BlockTerms& t, int h, int stop) {
  const __m256i shifted = stop == 0 ? _mm256_srli_epi32(t.bounds[h], 8) : t.bounds[h];
  const __m256i share = _mm256_and_si256(shifted, _mm256_set1_epi32(255));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(share), t.norm[h]);
}

// The bound of sums up to a stop, or kStops, without what is left.
template <bool L2>
inline __m256 bound(const BlockTerms& t, int h, __m256i sum, const ScanQuery& q, int stop) {
  __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(q.err[stop]), t.residual[h], _mm256_set1_ps(q.base));
  u = _mm256_fmadd_ps(_mm256_set1_ps(q.err_norm[stop]), t.norm[h], u);
  if (L2) u = _mm256_fmadd_ps(_mm256_set1_ps(q.sq), _mm256_mul_ps(t.norm[h], t.norm[h]), u);
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), t.scale[h]), _mm256_set1_ps(q.mul),
                         u);
}

template <bool L2>
inline void test_block(const ScanRows& rows, const BlockTerms& t, const __m256i* sum, ScanQuery& q,
                       int index, uint32_t block, Sink* sink) {
  report(rows, block, q, index, bound<L2>(t, 0, sum[0], q, kStops),
         bound<L2>(t, 1, sum[1], q, kStops), sink);
}

// NB blocks, `apart` from each other, and NQ queries, without stops.
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

// What the first test takes from rows 0 to 7 and 8 to 15.
struct StopTerms {
  __m256 inverse[2], left[2], gap[2];  // 1/scale, share·norm/scale, the last term
};

template <bool L2>
inline StopTerms stop_terms(const StopTest& test, const BlockTerms& t) {
  StopTerms s;
  for (int h = 0; h < 2; ++h) {
    s.inverse[h] = _mm256_div_ps(_mm256_set1_ps(1), t.scale[h]);
    s.left[h] = _mm256_mul_ps(rest_of(t, h, test.stop), s.inverse[h]);
    __m256 gap = _mm256_mul_ps(t.norm[h], _mm256_set1_ps(test.err_norm));
    gap = _mm256_fmadd_ps(t.residual[h], _mm256_set1_ps(test.err), gap);
    if (L2)
      gap = _mm256_fmadd_ps(_mm256_mul_ps(t.norm[h], t.norm[h]), _mm256_set1_ps(test.sq), gap);
    s.gap[h] = _mm256_mul_ps(gap, s.inverse[h]);
  }
  return s;
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
                int index, const StopTest& test, const StopTerms* terms, Ahead& ahead,
                Going* going) {
  __m256i sums[NB][NQ][2];
  first_sums<NB, NQ>(rows, block, apart, queries, index, stop_end(rows.groups, test.stop, kWindow),
                     ahead, sums);
  for (uint32_t b = 0; b < NB; ++b) {
    const StopTerms& t = terms[b];
    for (int q = 0; q < NQ; ++q) {
      const __m256 need = _mm256_set1_ps(test.needs[index + q]);
      const __m256 left = _mm256_set1_ps(test.left[index + q]);
      __m256 goes[2];
      for (int h = 0; h < 2; ++h) {
        __m256 least = _mm256_fmsub_ps(t.inverse[h], need, t.gap[h]);
        least = _mm256_fnmadd_ps(t.left[h], left, least);
        goes[h] = _mm256_cmp_ps(_mm256_cvtepi32_ps(sums[b][q][h]), least, _CMP_NLT_UQ);
      }
      if (live_rows(rows, block + b * apart, goes[0], goes[1])) going[b].add(index + q, sums[b][q]);
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
  const int next = stop + 1;
  const int end = next == kStops ? rows.groups : stop_end(rows.groups, next, kWindow);
  Ahead none;
  int8_sums<1, NQ>(rows, block, 0, queries, index, stop_end(rows.groups, stop, kWindow), end, none,
                   sums);
  for (int i = 0; i < count; ++i) {
    ScanQuery& q = queries[index[i]];
    if (next == kStops) {
      const float tau = q.tau;
      test_block<L2>(rows, t, sums[0][i], q, index[i], block, sink);
      if (q.tau != tau) test.needs[index[i]] = test.need(q);
      continue;
    }
    __m256 goes[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 u = _mm256_fmadd_ps(_mm256_set1_ps(q.left[next]), rest_of(t, h, next),
                                       bound<L2>(t, h, sums[0][i][h], q, next));
      goes[h] = _mm256_cmp_ps(u, _mm256_set1_ps(q.tau), _CMP_GE_OQ);
    }
    if (live_rows(rows, block, goes[0], goes[1])) going.add(index[i], sums[0][i]);
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
                       int& q, int nq, Sink* sink, const StopTest& test, const StopTerms* terms,
                       Ahead& ahead, Going* going) {
  for (; q + NQ <= nq; q += NQ)
    if (Stops)
      int8_heads<L2, NB, NQ>(rows, block, apart, queries, q, test, terms, ahead, going);
    else
      int8_tile<L2, NB, NQ>(rows, block, apart, queries, q, sink, ahead);
}

// NB blocks, `apart` from each other, and all queries. The first tile of queries waits for its
// codes, the others find them in L1: so all of them together fetch the block that comes next.
template <bool L2, bool Stops, int NB>
void int8_blocks(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int nq,
                 Sink* sink, StopTest& test, Ahead ahead, int64_t* stopped) {
  Going going[NB];
  StopTerms terms[NB];
  for (uint32_t b = 0; Stops && b < NB; ++b)
    terms[b] = stop_terms<L2>(test, load_terms(rows, block + b * apart));
  int q = 0;
  if constexpr (NB == 1)
    int8_tiles<L2, Stops, 1, 4>(rows, block, apart, queries, q, nq, sink, test, terms, ahead,
                                going);
  int8_tiles<L2, Stops, NB, 1>(rows, block, apart, queries, q, nq, sink, test, terms, ahead, going);
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
  // Memory answers four streams faster than one: quarters go side by side.
  if (nq < kQuarterBatch) {
    const uint32_t quarter = (end - begin) / 4;
    for (; b < begin + quarter; ++b)
      int8_blocks<L2, Stops, 4>(rows, b, quarter, queries, nq, sink, test, Ahead(), stopped);
    b = begin + 4 * quarter;
  }
  const int tiles = nq / 4;
  uint32_t next;
  for (b = next_live(rows, b, end); b < end; b = next) {
    next = next_live(rows, b + 1, end);
    const uint8_t* at = rows.codes + next * bytes;
    Ahead ahead;
    if (tiles && next < end) ahead = {at, at + bytes, (kWindow + tiles - 1) / tiles};
    int8_blocks<L2, Stops, 1>(rows, b, 0, queries, nq, sink, test, ahead, stopped);
  }
}

void scan_int8(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, Sink* sink, int64_t* stopped) {
  const bool stops = rows.stop < kStops;
  auto* scan = l2 ? (stops ? scan_int8_metric<true, true> : scan_int8_metric<true, false>)
                  : (stops ? scan_int8_metric<false, true> : scan_int8_metric<false, false>);
  scan(rows, begin, end, queries, nq, sink, stopped);
}

}  // namespace
}  // namespace knnfast
