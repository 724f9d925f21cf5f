// SPDX-License-Identifier: Apache-2.0
// The scan of codes with AVX-512, with and without VNNI. Sixteen rows fill one register: a block's
// sums need no horizontal additions, and the test against tau is one compare.
#pragma once

#include <immintrin.h>

#include "isa/common.h"

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

// What is left of 16 rows behind a stop, in 255ths.
inline __m512 rest_of(const BlockTerms& t, int stop) {
  const __m512i share = _mm512_and_si512(stop == 0 ? _mm512_srli_epi32(t.bounds, 8) : t.bounds,
                                         _mm512_set1_epi32(255));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(share), t.norm);
}

// The bound of sums up to a stop, or kStops, without what is left.
template <bool L2>
inline __m512 bound(const BlockTerms& t, __m512i sum, const ScanQuery& q, int stop) {
  __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(q.err[stop]), t.residual, _mm512_set1_ps(q.base));
  u = _mm512_fmadd_ps(_mm512_set1_ps(q.err_norm[stop]), t.norm, u);
  if (L2) u = _mm512_fmadd_ps(_mm512_set1_ps(q.sq), _mm512_mul_ps(t.norm, t.norm), u);
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), t.scale), _mm512_set1_ps(q.mul), u);
}

template <bool L2>
inline void test_block(const BlockTerms& t, __m512i sum, ScanQuery& q, int index, uint32_t block,
                       Sink* sink) {
  const __m512 u = bound<L2>(t, sum, q, kStops);
  const __mmask16 mask = _mm512_mask_cmp_ps_mask(t.live, u, _mm512_set1_ps(q.tau), _CMP_GE_OQ);
  if (__builtin_expect(mask != 0, 0)) {
    float upper[kBlockRows];
    _mm512_storeu_ps(upper, u);
    q.tau = sink->hit(sink, index, block, upper, mask);
  }
}

constexpr int kStep = 4;         // groups of an iteration
constexpr int kTiledBatch = 16;  // so many queries' codes are one line after another
constexpr int kWholeBatch = 48;  // from so many queries on blocks are fetched whole

// Cache lines to ask for while tiles are summed, of the blocks that come next: per iteration
// `lines` times one in each of N places that lie `stride` bytes apart, `step` bytes after the last
// one.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  size_t stride = 0;
  int lines = 0;
  size_t step = 64;

  template <int N, _mm_hint Cache = _MM_HINT_T0>
  void ask() {
    if (at >= end) return;
#pragma GCC unroll 1
    for (int i = 0; i < lines; ++i, at += step)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b)
        _mm_prefetch(reinterpret_cast<const char*>(at + b * stride), Cache);
  }
};

// The codes of NQ queries, one step of groups after another: wherever they lie, or in a tile.
template <int NQ>
struct CodesApart {
  const int8_t* at[NQ];
  const int8_t* of(int q) const { return at[q]; }
  void advance() {
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) at[q] += kStep * kBlockDims;
  }
};
struct CodesTiled {
  const int8_t* at;  // tiles begin at cache lines
  const int8_t* of(int q) const { return at + q * kQueryPad; }
  void advance() {
    constexpr int kBytes = kStep * kBlockDims, kLast = kQueryPad - kBytes;
    const bool last = (reinterpret_cast<uintptr_t>(at) & (kQueryPad - 1)) == kLast;
    at += last ? kTileQueries * kQueryPad - kLast : kBytes;
  }
};

// sums[b][q] += codes of block `block + b·apart` · query codes, groups [first, end). Everything is
// unrolled, so that the sums stay in registers; queries are zero-filled, so that whole steps of
// four groups may run past the last one.
template <bool VNNI, int NB, int NQ, class Queries>
inline __attribute__((always_inline)) void int8_sums(const ScanRows& rows, uint32_t block,
                                                     uint32_t apart, Queries queries, int first,
                                                     int end, Ahead& ahead_,
                                                     __m512i (&sums)[NB][NQ]) {
  // One instruction waits four cycles for the one before it in the same sum.
  constexpr int kParts = NB * NQ >= 4 ? 1 : 4 / (NB * NQ);
  __m512i parts[kParts][NB][NQ] = {};
  Ahead ahead = ahead_;
  const size_t bytes = static_cast<size_t>(rows.groups) * 64, stride = bytes * apart;
  const uint8_t* codes = rows.codes + block * bytes + static_cast<size_t>(first) * 64;
  for (int left = end - first; left > 0; left -= kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
      __m512i c[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) c[b] = _mm512_loadu_si512(codes + b * stride + i * 64);
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q) {
        int32_t word;
        memcpy(&word, queries.of(q) + i * kBlockDims, 4);
        const __m512i w = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) {
          __m512i& sum = i % kParts ? parts[i % kParts][b][q] : sums[b][q];
          sum = dot_group<VNNI>(sum, c[b], w);
        }
      }
    }
    ahead.template ask<NB>();
    codes += kStep * 64;
    queries.advance();
  }
#pragma GCC unroll 4
  for (int i = 1; i < kParts; ++i)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 8
      for (int q = 0; q < NQ; ++q) sums[b][q] = _mm512_add_epi32(sums[b][q], parts[i][b][q]);
  ahead_.at = ahead.at;
}

// Sums of NB blocks, `apart` from each other, and NQ queries, from the first group on.
template <bool VNNI, int NB, int NQ>
inline void first_sums(const ScanRows& rows, uint32_t block, uint32_t apart,
                       const ScanQuery* queries, int end, Ahead& ahead, __m512i (&sums)[NB][NQ]) {
  if (NQ > 1 && queries->tiles)
    return int8_sums<VNNI, NB, NQ>(rows, block, apart, CodesTiled{queries->tiles}, 0, end, ahead,
                                   sums);
  CodesApart<NQ> codes;
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q) codes.at[q] = queries[q].codes;
  int8_sums<VNNI, NB, NQ>(rows, block, apart, codes, 0, end, ahead, sums);
}

// NB blocks, `apart` from each other, and NQ queries, without stops.
template <bool VNNI, bool L2, int NB, int NQ>
void int8_tile(const ScanRows& rows, uint32_t block, uint32_t apart, ScanQuery* queries, int index,
               Sink* sink, Ahead& ahead) {
  __m512i sums[NB][NQ];
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) sums[b][q] = _mm512_set1_epi32(queries[index + q].offset);
  first_sums<VNNI>(rows, block, apart, queries + index, rows.groups, ahead, sums);
  for (uint32_t b = 0; b < NB; ++b) {
    const uint32_t at = block + b * apart;
    const BlockTerms t = load_terms(rows, at);
    for (int q = 0; q < NQ; ++q)
      test_block<L2>(t, sums[b][q], queries[index + q], index + q, at, sink);
  }
}

// What the first test takes from 16 rows.
struct StopTerms {
  __m512 inverse, left, gap;  // 1/scale, share·norm/scale, the last term
  __mmask16 live;
};

template <bool L2>
inline StopTerms stop_terms(const StopTest& test, const BlockTerms& t) {
  StopTerms s;
  s.inverse = _mm512_div_ps(_mm512_set1_ps(1), t.scale);
  s.left = _mm512_mul_ps(rest_of(t, test.stop), s.inverse);
  __m512 gap = _mm512_mul_ps(t.norm, _mm512_set1_ps(test.err_norm));
  gap = _mm512_fmadd_ps(t.residual, _mm512_set1_ps(test.err), gap);
  if (L2) gap = _mm512_fmadd_ps(_mm512_mul_ps(t.norm, t.norm), _mm512_set1_ps(test.sq), gap);
  s.gap = _mm512_mul_ps(gap, s.inverse);
  s.live = t.live;
  return s;
}

// The queries that go on with one block, and their sums so far.
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

// Blocks whose first tests come before the rest of any: what the rest needs is on its way from
// memory meanwhile.
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

// Four masks of 16 rows as one.
inline uint64_t joined(const __mmask16* m) {
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0])));
}

// NB blocks, `apart` from each other, and NQ queries, up to the first stop that is tested. Where
// one goes on, the block's groups before `fetched` are asked for.
template <bool VNNI, int NB, int NQ>
void int8_heads(const ScanRows& rows, uint32_t block, uint32_t apart, const ScanQuery* queries,
                int index, const StopTest& test, const StopTerms* terms, int fetched, Ahead& ahead,
                Going* going) {
  const int end = stop_group(rows.groups, test.stop);
  __m512i sums[NB][NQ];
#pragma GCC unroll 8
  for (int q = 0; q < NQ; ++q)
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) sums[b][q] = _mm512_set1_epi32(test.start[index + q]);
  first_sums<VNNI>(rows, block, apart, queries + index, end, ahead, sums);
#pragma GCC unroll 4
  for (uint32_t b = 0; b < NB; ++b) {
    const StopTerms& t = terms[b];
    __mmask16 masks[8] = {};
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) {
      __m512 least = _mm512_fmsub_ps(t.inverse, _mm512_set1_ps(test.needs[index + q]), t.gap);
      least = _mm512_fnmadd_ps(t.left, _mm512_set1_ps(test.left[index + q]), least);
      masks[q] =
          _mm512_mask_cmp_ps_mask(t.live, _mm512_cvtepi32_ps(sums[b][q]), least, _CMP_NLT_UQ);
    }
    const uint64_t goes[2] = {joined(masks), joined(masks + 4)};
    if (!(goes[0] | goes[1])) continue;
    if (going[b].count == 0) {
      const size_t at = static_cast<size_t>(block + b * apart) * rows.groups;
      for (int g = end; g < fetched; ++g)
        _mm_prefetch(reinterpret_cast<const char*>(rows.codes + (at + g) * 64), _MM_HINT_T1);
    }
    __m512i kept[NQ];
#pragma GCC unroll 8
    for (int q = 0; q < NQ; ++q) kept[q] = sums[b][q];
    for (int half = 0; half < (NQ + 3) / 4; ++half)
      for (uint64_t left = goes[half]; left;) {
        const int q = __builtin_ctzll(left) / kBlockRows;
        left &= ~(uint64_t{0xffff} << q * kBlockRows);
        going[b].add(index + 4 * half + q, kept[4 * half + q]);
      }
  }
}

// Up to NQ queries that go on, the `count` from `first` on, from one stop to the next or to the
// end.
template <bool VNNI, bool L2, int NQ>
void int8_rest(const ScanRows& rows, const BlockTerms& t, int stop, ScanQuery* queries, int first,
               int count, Sink* sink, StopTest& test, Going& going) {
  __m512i sums[1][NQ];
  CodesApart<NQ> codes;
  int index[NQ];
  const int begin = stop_group(rows.groups, stop), next = stop + 1;
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) {
    const int at = first + (i < count ? i : 0);
    index[i] = going.query[at];
    const ScanQuery& s = queries[index[i]];
    codes.at[i] = s.codes + begin * kBlockDims;
    sums[0][i] = _mm512_add_epi32(going.sums[at], _mm512_set1_epi32(s.rest[next] - s.rest[stop]));
  }
  const int end = next == kStops ? rows.groups : stop_group(rows.groups, next);
  Ahead none;
  int8_sums<VNNI, 1, NQ>(rows, going.block, 0, codes, begin, end, none, sums);
  const __m512 rest = next == kStops ? _mm512_setzero_ps() : rest_of(t, next);
  for (int i = 0; i < count; ++i) {
    ScanQuery& s = queries[index[i]];
    if (next == kStops) {
      const float tau = s.tau;
      test_block<L2>(t, sums[0][i], s, index[i], going.block, sink);
      if (s.tau != tau) test.needs[index[i]] = test.need(s);
      continue;
    }
    const __m512 u =
        _mm512_fmadd_ps(_mm512_set1_ps(s.left[next]), rest, bound<L2>(t, sums[0][i], s, next));
    if (_mm512_mask_cmp_ps_mask(t.live, u, _mm512_set1_ps(s.tau), _CMP_GE_OQ))
      going.add(index[i], sums[0][i]);
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
                   : n > 2 ? int8_rest<VNNI, L2, 4>
                   : n > 1 ? int8_rest<VNNI, L2, 2>
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
                       int& q, int nq, Sink* sink, const StopTest& test, const StopTerms* terms,
                       int fetched, Ahead& ahead, Going* going) {
  for (; q + NQ <= nq; q += NQ)
    if (Stops)
      int8_heads<VNNI, NB, NQ>(rows, block, apart, queries, q, test, terms, fetched, ahead, going);
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
  StopTerms terms[NB];
  for (uint32_t b = 0; Stops && b < NB; ++b)
    terms[b] = stop_terms<L2>(test, load_terms(rows, block + b * apart));
  const int fetched = nq >= kWholeBatch                    ? 0
                      : nq >= 8 || test.stop + 1 >= kStops ? rows.groups
                                                           : stop_group(rows.groups, test.stop + 1);
  int q = 0;
  if constexpr (NB < 4) {
    int8_tiles<VNNI, L2, Stops, NB, 8>(rows, block, apart, queries, q, nq, sink, test, terms,
                                       fetched, ahead, going);
    int8_tiles<VNNI, L2, Stops, NB, 4>(rows, block, apart, queries, q, nq, sink, test, terms,
                                       fetched, ahead, going);
  }
  int8_tiles<VNNI, L2, Stops, NB, 1>(rows, block, apart, queries, q, nq, sink, test, terms, fetched,
                                     ahead, going);
}

template <bool VNNI, bool L2, bool Stops>
void scan_int8_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries,
                      int nq, Sink* sink, int64_t* stopped) {
  const size_t bytes = static_cast<size_t>(rows.groups) * 64;
  const size_t heads = Stops ? static_cast<size_t>(stop_group(rows.groups, rows.stop)) * 64 : bytes;
  StopTest test(queries, Stops ? nq : 0, rows.stop);
  Wave wave(nq);
  uint32_t b = begin;
  // Memory answers four streams faster than one: quarters go side by side.
  if (nq < kQuarterBatch) {
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
  // Of many queries one will need all of a block. Lines for each step of groups of all tiles:
  const size_t wanted = nq >= kWholeBatch ? bytes : heads;
  const size_t steps = (heads / 64 + kStep - 1) / kStep * (nq < 8 ? 1 : nq / 8);
  const int lines = static_cast<int>((wanted / 64 + steps - 1) / steps);
  for (Blocks now(rows, b, end), next = now; now.count; now = next) {
    next = Blocks(rows, now.behind(), end);
    const uint8_t* at = rows.codes + next.first * bytes;
    Ahead ahead;
    if (next.count && nq >= kQuarterBatch) {
      if (Stops || rows.live || nq >= kTiledBatch)
        ahead = {at, at + wanted, next.apart * bytes, lines};
      else
        ahead = {at, at + next.count * bytes, 64, lines, now.count * size_t{64}};
    }
    auto* blocks =
        now.count == 2 ? int8_blocks<VNNI, L2, Stops, 2> : int8_blocks<VNNI, L2, Stops, 1>;
    blocks(rows, now.first, now.apart, queries, nq, sink, test, ahead, wave, stopped);
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
