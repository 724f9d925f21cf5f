// SPDX-License-Identifier: Apache-2.0
// The scan of codes with AVX-512, with and without VNNI. Sixteen rows fill one register: a block's
// sums need no horizontal additions, and the test against tau is one compare.
#pragma once

#include <immintrin.h>

#include "kernels_common.h"

namespace knnfast {
namespace {

// acc[b][q] += codes · query over one group of four dimensions.
template <bool VNNI>
inline __m512i dot_group(__m512i acc, __m512i codes, __m512i query) {
#ifdef __AVX512VNNI__
  if (VNNI) return _mm512_dpbusd_epi32(acc, codes, query);
#endif
  const __m512i even = _mm512_and_si512(codes, _mm512_set1_epi32(0x00ff00ff));
  const __m512i odd = _mm512_srli_epi16(codes, 8);
  const __m512i q_even = _mm512_srai_epi16(_mm512_slli_epi16(query, 8), 8);
  const __m512i q_odd = _mm512_srai_epi16(query, 8);
  return _mm512_add_epi32(
      acc, _mm512_add_epi32(_mm512_madd_epi16(even, q_even), _mm512_madd_epi16(odd, q_odd)));
}

struct BlockTerms {  // what the bound takes from 16 rows
  __m512 scale, residual, norm;
  __m512i bounds;
  __mmask16 live;
};

inline BlockTerms load_terms(const ScanRows& rows, uint32_t block) {
  const size_t first = static_cast<size_t>(block) * kBlockRows;
  BlockTerms t;
  t.scale = _mm512_loadu_ps(rows.scale + first);
  t.bounds = _mm512_loadu_si512(rows.bounds + first);
  t.residual = _mm512_castsi512_ps(
      _mm512_and_si512(t.bounds, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  t.norm = _mm512_loadu_ps(rows.norm + first);
  t.live = rows.live ? rows.live[block] : 0xffff;
  return t;
}

template <bool L2>
inline __m512 bound(const BlockTerms& t, __m512i sum, const ScanQuery& q) {
  __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(q.err), t.residual, _mm512_set1_ps(q.base));
  u = _mm512_fmadd_ps(_mm512_set1_ps(q.err_norm), t.norm, u);
  if (L2) u = _mm512_fmadd_ps(_mm512_set1_ps(q.sq), _mm512_mul_ps(t.norm, t.norm), u);
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), t.scale), _mm512_set1_ps(q.mul), u);
}

template <bool L2>
inline void test_block(const BlockTerms& t, __m512i sum, ScanQuery& q, int index, uint32_t block,
                       Sink* sink) {
  const __m512 u = bound<L2>(t, sum, q);
  const __mmask16 mask = _mm512_mask_cmp_ps_mask(t.live, u, _mm512_set1_ps(q.tau), _CMP_GE_OQ);
  if (__builtin_expect(mask != 0, 0)) {
    float upper[kBlockRows];
    _mm512_storeu_ps(upper, u);
    q.tau = sink->hit(sink, index, block, upper, mask);
  }
}

constexpr int kStep = 4;  // groups of an iteration

// Cache lines to ask for while tiles are summed: `lines` per iteration, in each of N places that
// lie `stride` bytes apart. With stops these are the blocks that come next, so that the sums up to
// the first stop have asked for what the next ones begin with.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  size_t stride = 0;
  int lines = 0;

  template <int N, _mm_hint Cache = _MM_HINT_T0>
  void ask() {
    if (at >= end) return;
#pragma GCC unroll 1
    for (int i = 0; i < lines; ++i, at += 64)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b)
        _mm_prefetch(reinterpret_cast<const char*>(at + b * stride), Cache);
  }
};

// sums[b][q] += codes of block `block + b·apart` · query codes at words[q], groups [first, end).
// Everything is unrolled, so that the sums stay in registers; queries are zero-filled, so that
// whole steps of four groups may run past the last one.
template <bool VNNI, int Streams, int NB, int NQ>
inline __attribute__((always_inline)) void int8_sums(const ScanRows& rows, uint32_t block,
                                                     uint32_t apart, const int8_t* (&words)[NQ],
                                                     int first, int end, Ahead& ahead_,
                                                     __m512i (&sums)[NB][NQ]) {
  Ahead ahead = ahead_;
  const size_t bytes = static_cast<size_t>(rows.groups) * 64, stride = bytes * apart;
  const uint8_t* codes = rows.codes + block * bytes + static_cast<size_t>(first) * 64;
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q) words[q] += first * kBlockDims;
  for (int left = end - first; left > 0; left -= kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
      __m512i c[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) c[b] = _mm512_loadu_si512(codes + b * stride + i * 64);
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q) {
        int32_t word;
        memcpy(&word, words[q] + i * kBlockDims, 4);
        const __m512i w = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) sums[b][q] = dot_group<VNNI>(sums[b][q], c[b], w);
      }
    }
    ahead.template ask<Streams>();
    codes += kStep * 64;
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) words[q] += kStep * kBlockDims;
  }
  ahead_.at = ahead.at;
}

// NB blocks, `apart` from each other, and NQ queries.
template <bool VNNI, bool L2, int NB, int NQ>
void int8_tile(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int index,
               Sink* sink, Ahead& ahead) {
  __m512i sums[NB][NQ];
  const int8_t* words[NQ];
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q) {
    words[q] = queries[index + q].codes;
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) sums[b][q] = _mm512_set1_epi32(queries[index + q].offset);
  }
  int8_sums<VNNI, 1, NB, NQ>(rows, block, apart, words, 0, rows.groups, ahead, sums);
  for (uint32_t b = 0; b < NB; ++b) {
    const uint32_t at = block + b * apart;
    const BlockTerms t = load_terms(rows, at);
    for (int q = 0; q < NQ; ++q)
      test_block<L2>(t, sums[b][q], queries[index + q], index + q, at, sink);
  }
}

// What is left of 16 rows behind a stop, in 255ths.
inline __m512 rest_of(const BlockTerms& t, int stop) {
  const __m512i share = _mm512_and_si512(stop == 0 ? _mm512_srli_epi32(t.bounds, 8) : t.bounds,
                                         _mm512_set1_epi32(255));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(share), t.norm);
}

// StopTest's inequality, all but the first term.
template <bool L2>
inline __m512 stop_terms(const StopTest& test, const BlockTerms& t) {
  __m512 u = _mm512_mul_ps(rest_of(t, test.stop), _mm512_set1_ps(1 + 0x1p-18f));
  u = _mm512_fmadd_ps(_mm512_set1_ps(test.err), t.residual, u);
  u = _mm512_fmadd_ps(_mm512_set1_ps(test.err_norm), t.norm, u);
  if (L2) u = _mm512_fmadd_ps(_mm512_set1_ps(test.sq), _mm512_mul_ps(t.norm, t.norm), u);
  return u;
}

// The queries that go on past a stop with one block, and their sums so far.
struct Going {
  __m512i* sums;
  int* query;
  uint32_t block;
  int count;

  void add(int q, __m512i sum) {
    sums[count] = sum;
    query[count++] = q;
  }
};

// Blocks whose sums up to the first stop come before the rest of any: what the rest needs is on its
// way from memory meanwhile.
struct Wave {
  static constexpr int kBlocks = 16, kPairs = 2 * kGroup;
  __m512i sums[kPairs];
  int query[kPairs];
  Going going[kBlocks];
  const int nq, most;
  int count = 0;

  explicit Wave(int queries) : nq(queries), most(queries < 8 ? kBlocks : 2) {}
  bool room(int blocks) const { return count + blocks <= most; }
  Going* take(int blocks, uint32_t block, uint32_t apart) {
    Going* first = going + count;
    for (int b = 0; b < blocks; ++b, ++count, block += apart)
      going[count] = {sums + count * nq, query + count * nq, block, 0};
    return first;
  }
};

// NB blocks, `apart` from each other, and NQ queries, up to the first stop that is tested. Where
// one goes on, the block's groups before `fetched` are asked for.
template <bool VNNI, bool L2, int NB, int NQ>
void int8_heads(const ScanRows& rows, uint32_t block, uint32_t apart, const ScanQuery* queries,
                int index, const StopTest& test, int fetched, Ahead& ahead, Going* going) {
  __m512i sums[NB][NQ];
  const int8_t* words[NQ];
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q) {
    const ScanQuery& s = queries[index + q];
    words[q] = s.codes;
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) sums[b][q] = _mm512_set1_epi32(s.offset + s.rest[test.stop]);
  }
  const int end = stop_group(rows.groups, test.stop);
  int8_sums<VNNI, NB, NB, NQ>(rows, block, apart, words, 0, end, ahead, sums);
#pragma GCC unroll 4
  for (uint32_t b = 0; b < NB; ++b) {
    const BlockTerms t = load_terms(rows, block + b * apart);
    const __m512 others = stop_terms<L2>(test, t);
    alignas(16) uint16_t masks[8] = {};
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[b][q]), t.scale);
      const __m512 u = _mm512_fmadd_ps(product, _mm512_set1_ps(test.ratio[index + q]), others);
      const __m512 need = _mm512_set1_ps(test.need[index + q]);
      masks[q] = _mm512_mask_cmp_ps_mask(t.live, u, need, _CMP_NLT_UQ);
    }
    const __m128i mask = _mm_load_si128(reinterpret_cast<const __m128i*>(masks));
    unsigned goes = _mm_test_epi16_mask(mask, mask);
    if (!goes) continue;
    if (going[b].count == 0) {
      const size_t at = static_cast<size_t>(block + b * apart) * rows.groups;
      for (int g = end; g < fetched; ++g)
        _mm_prefetch(reinterpret_cast<const char*>(rows.codes + (at + g) * 64), _MM_HINT_T1);
    }
    __m512i kept[NQ];
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) kept[q] = sums[b][q];
    for (; goes; goes &= goes - 1) {
      const int q = __builtin_ctz(goes);
      going[b].add(index + q, kept[q]);
    }
  }
}

// Up to NQ queries that go on, the `count` from `first` on, from one stop to the next or to the
// end.
template <bool VNNI, bool L2, int NQ>
void int8_rest(const ScanRows& rows, const BlockTerms& t, int stop, ScanQuery* queries, int first,
               int count, Sink* sink, StopTest& test, Going& going) {
  __m512i sums[1][NQ];
  const int8_t* words[NQ];
  int index[NQ];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) {
    const int at = first + (i < count ? i : 0);
    index[i] = going.query[at];
    const ScanQuery& s = queries[index[i]];
    words[i] = s.codes;
    const int rest = (stop + 1 < kStops ? s.rest[stop + 1] : 0) - s.rest[stop];
    sums[0][i] = _mm512_add_epi32(going.sums[at], _mm512_set1_epi32(rest));
  }
  const bool last = stop + 1 == kStops;
  const int end = last ? rows.groups : stop_group(rows.groups, stop + 1);
  Ahead none;
  int8_sums<VNNI, 1, 1, NQ>(rows, going.block, 0, words, stop_group(rows.groups, stop), end, none,
                            sums);
  const __m512 rest = last ? _mm512_setzero_ps() : rest_of(t, stop + 1);
  for (int i = 0; i < count; ++i) {
    ScanQuery& s = queries[index[i]];
    if (last) {
      const float tau = s.tau;
      test_block<L2>(t, sums[0][i], s, index[i], going.block, sink);
      if (s.tau != tau) test.raise(index[i], s);
    } else {
      const __m512 u =
          _mm512_fmadd_ps(_mm512_set1_ps(s.left[stop + 1]), rest, bound<L2>(t, sums[0][i], s));
      if (_mm512_mask_cmp_ps_mask(t.live, u, _mm512_set1_ps(s.tau), _CMP_GE_OQ))
        going.add(index[i], sums[0][i]);
    }
  }
}

// What is left of a block for the queries that go on.
template <bool VNNI, bool L2>
void int8_rests(const ScanRows& rows, ScanQuery* queries, Sink* sink, StopTest& test, Going& going,
                int64_t* stopped) {
  const BlockTerms t = load_terms(rows, going.block);
  for (int stop = test.stop; stop < kStops; ++stop) {
    const int count = going.count;
    going.count = 0;  // and never ahead of what is still to be read
    for (int i = 0; i < count; i += 8) {
      const int n = count - i < 8 ? count - i : 8;
      auto* rest = n > 4   ? int8_rest<VNNI, L2, 8>
                   : n > 1 ? int8_rest<VNNI, L2, 4>
                           : int8_rest<VNNI, L2, 1>;
      rest(rows, t, stop, queries, i, n, sink, test, going);
    }
    if (stop + 1 < kStops) stopped[stop + 1] += (count - going.count) * kBlockRows;
  }
}

// What is left of all blocks of a wave.
template <bool VNNI, bool L2>
void int8_finish(const ScanRows& rows, ScanQuery* queries, Sink* sink, StopTest& test, Wave& wave,
                 int64_t* stopped) {
  for (int b = 0; b < wave.count; ++b) {
    Going& going = wave.going[b];
    stopped[test.stop] += (wave.nq - going.count) * kBlockRows;
    if (going.count) int8_rests<VNNI, L2>(rows, queries, sink, test, going, stopped);
  }
  wave.count = 0;
}

// Tiles of NQ queries from q on.
template <bool VNNI, bool L2, bool Stops, int NB, int NQ>
inline void int8_tiles(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries,
                       int& q, int nq, Sink* sink, const StopTest& test, int fetched, Ahead& ahead,
                       Going* going) {
  for (; q + NQ <= nq; q += NQ)
    if (Stops)
      int8_heads<VNNI, L2, NB, NQ>(rows, block, apart, queries, q, test, fetched, ahead, going);
    else
      int8_tile<VNNI, L2, NB, NQ>(rows, block, apart, queries, q, sink, ahead);
}

// NB blocks, `apart` from each other, and all queries. The first tile of queries waits for its
// codes, the others find them in L1: so all of them together fetch the blocks that come next.
template <bool VNNI, bool L2, bool Stops, int NB>
void int8_blocks(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int nq,
                 Sink* sink, StopTest& test, Ahead ahead, Wave& wave, int64_t* stopped) {
  if (Stops && !wave.room(NB)) int8_finish<VNNI, L2>(rows, queries, sink, test, wave, stopped);
  Going* going = Stops ? wave.take(NB, block, apart) : nullptr;
  // Of many queries one will go on past the second stop, too.
  const int fetched = !Stops || nq >= 8 || test.stop + 1 == kStops
                          ? rows.groups
                          : stop_group(rows.groups, test.stop + 1);
  int q = 0;
  if constexpr (NB < 4) {
    int8_tiles<VNNI, L2, Stops, NB, 8>(rows, block, apart, queries, q, nq, sink, test, fetched,
                                       ahead, going);
    int8_tiles<VNNI, L2, Stops, NB, 4>(rows, block, apart, queries, q, nq, sink, test, fetched,
                                       ahead, going);
  }
  int8_tiles<VNNI, L2, Stops, NB, 1>(rows, block, apart, queries, q, nq, sink, test, fetched, ahead,
                                     going);
}

template <bool VNNI, bool L2, bool Stops>
void scan_int8_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries,
                      int nq, Sink* sink, int64_t* stopped) {
  const size_t bytes = static_cast<size_t>(rows.groups) * 64;
  const size_t heads = static_cast<size_t>(stop_group(rows.groups, rows.stop)) * 64;
  StopTest test(queries, Stops ? nq : 0, rows.stop);
  Wave wave(nq);
  uint32_t b = begin;
  if (nq < 4) {  // memory answers four streams faster than one: quarters go side by side
    const uint32_t quarter = (end - begin) / 4;
    for (; b < begin + quarter; ++b) {
      const uint8_t* next = rows.codes + (b + 1) * bytes;
      Ahead ahead;
      if (Stops)  // the processor does not foresee what comes next
        ahead = {next, next + heads, bytes * quarter, kStep};
      int8_blocks<VNNI, L2, Stops, 4>(rows, b, quarter, queries, nq, sink, test, ahead, wave,
                                      stopped);
    }
    b = begin + 4 * quarter;
  }
  const int tiles = nq >= 8 ? nq / 8 : 1;
  for (int count; b < end; b += count) {
    count = b + 2 <= end ? 2 : 1;
    const uint8_t* next = rows.codes + (b + count) * bytes;
    Ahead ahead;
    if (Stops && nq >= 8)
      ahead = {next, next + bytes, bytes, (kStep + tiles - 1) / tiles};
    else if (Stops && nq >= 4)
      ahead = {next, next + heads, bytes, kStep};
    else if (!Stops && nq >= 4)
      ahead = {next, next + count * bytes, 0, (count * kStep + tiles - 1) / tiles};
    auto* blocks = count == 2 ? int8_blocks<VNNI, L2, Stops, 2> : int8_blocks<VNNI, L2, Stops, 1>;
    blocks(rows, b, 1, queries, nq, sink, test, ahead, wave, stopped);
  }
  if (Stops) int8_finish<VNNI, L2>(rows, queries, sink, test, wave, stopped);
}

template <bool VNNI>
void scan_int8(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, Sink* sink, int64_t* stopped) {
  auto* scan = l2 ? (rows.stop < kStops ? scan_int8_metric<VNNI, true, true>
                                        : scan_int8_metric<VNNI, true, false>)
                  : (rows.stop < kStops ? scan_int8_metric<VNNI, false, true>
                                        : scan_int8_metric<VNNI, false, false>);
  scan(rows, begin, end, queries, nq, sink, stopped);
}

}  // namespace
}  // namespace knnfast
