// SPDX-License-Identifier: Apache-2.0
// AMX int8 for batches: a block of codes (16 groups of 16 rows × 4 dimensions) is a B tile as it
// lies, 16 queries × 64 dimensions are an A tile, and one instruction does 16×16×64.
#include "kernels_avx512.h"

namespace knnfast {
namespace {

constexpr int kTile = kTileQueries;

// Tiles 0-3: sums [query tile][block]; 4, 5: queries; 6, 7: codes. All are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int NA, int NB>
inline void multiply(const ScanRows& rows, uint32_t block, const int8_t* queries,
                     const int8_t* next, Ahead& ahead, int32_t (*sums)[NA * kTile][kBlockRows]) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * 64;
  const uint8_t* codes = rows.codes + block * block_bytes;
  _tile_zero(0);
  if (NB > 1) _tile_zero(1);
  if (NA > 1) _tile_zero(2);
  if (NA > 1 && NB > 1) _tile_zero(3);
  for (int g = 0; g < rows.groups; g += 16) {
    _tile_loadd(6, codes + g * 64, 64);
    if (NB > 1) _tile_loadd(7, codes + block_bytes + g * 64, 64);
    _tile_loadd(4, queries + g * 64, 64);
    _tile_dpbsud(0, 4, 6);
    if (NB > 1) _tile_dpbsud(1, 4, 7);
    if (NA > 1) {
      _tile_loadd(5, next + g * 64, 64);
      _tile_dpbsud(2, 5, 6);
      if (NB > 1) _tile_dpbsud(3, 5, 7);
    }
    ahead.ask<1>();
  }
  _tile_stored(0, sums[0][0], 64);
  if (NB > 1) _tile_stored(1, sums[1][0], 64);
  if (NA > 1) _tile_stored(2, sums[0][kTile], 64);
  if (NA > 1 && NB > 1) _tile_stored(3, sums[1][kTile], 64);
}

// A tile's tests do not branch on what they find, which nobody could foresee and which would hold
// up the next tile's sums: what reaches tau is written down first.
template <bool L2, int NA, int NB>
void amx_tile(const ScanRows& rows, uint32_t block, ScanQuery* queries, int index, int nq,
              const BlockTerms* terms, Ahead& ahead, Sink* sink) {
  alignas(64) int32_t sums[NB][NA * kTile][kBlockRows];
  alignas(64) float upper[NB * NA * kTile + 1][kBlockRows];
  uint32_t found[NB * NA * kTile + 1];  // mask, query << 16, block << 24
  multiply<NA, NB>(rows, block, queries[0].tiles, queries[NA > 1 ? kTile : 0].tiles, ahead, sums);
  size_t count = 0;
#pragma GCC unroll 1
  for (uint32_t b = 0; b < NB; ++b) {
    const BlockTerms t = terms[b];
    uint32_t at = b << 24;
#pragma GCC unroll 1
    for (int q = 0; q < nq; ++q, at += 1 << 16) {
      const __m512i sum =
          _mm512_add_epi32(_mm512_load_si512(sums[b][q]), _mm512_set1_epi32(queries[q].offset));
      const __m512 u = bound<L2>(t, sum, queries[q]);
      const uint32_t mask =
          _mm512_mask_cmp_ps_mask(t.live, u, _mm512_set1_ps(queries[q].tau), _CMP_GE_OQ);
      _mm512_store_ps(upper[count], u);
      found[count] = at | mask;
      count += mask != 0;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    const int q = found[i] >> 16 & 255;
    queries[q].tau =
        sink->hit(sink, index + q, block + (found[i] >> 24), upper[i], found[i] & 0xffff);
  }
}

template <bool L2, int NB>
void amx_blocks(const ScanRows& rows, uint32_t block, ScanQuery* queries, int nq, Sink* sink) {
  BlockTerms terms[NB];
  for (int b = 0; b < NB; ++b) terms[b] = load_terms(rows, block + b);
  const size_t bytes = static_cast<size_t>(rows.groups) * 64;
  const uint8_t* next = rows.codes + (block + NB) * bytes;
  const int tiles = (nq + 2 * kTile - 1) / (2 * kTile);
  Ahead ahead{next, next + NB * bytes, 0, (NB * 16 + tiles - 1) / tiles};
  for (int q = 0; q < nq; q += 2 * kTile) {
    const int left = nq - q;
    if (left > kTile)
      amx_tile<L2, 2, NB>(rows, block, queries + q, q, left < 2 * kTile ? left : 2 * kTile, terms,
                          ahead, sink);
    else
      amx_tile<L2, 1, NB>(rows, block, queries + q, q, left, terms, ahead, sink);
  }
}

template <bool L2>
void scan_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
                 Sink* sink) {
  const TileConfig config;
  _tile_loadconfig(&config);
  uint32_t b = begin;
  for (; b + 2 <= end; b += 2) amx_blocks<L2, 2>(rows, b, queries, nq, sink);
  for (; b < end; ++b) amx_blocks<L2, 1>(rows, b, queries, nq, sink);
  _tile_release();
}

int64_t scan_int8_amx(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries,
                      int nq, bool l2, Sink* sink) {
  // A tile ends at a stop only where none of its pairs goes on: with 32 queries hardly ever.
  constexpr int kStopBatch = 16;
  if (nq < kTileBatch || (rows.stops && nq <= kStopBatch))
    return scan_int8<true>(rows, begin, end, queries, nq, l2, sink);
  auto* scan = l2 ? scan_metric<true> : scan_metric<false>;
  scan(rows, begin, end, queries, nq, sink);
  return 0;
}

}  // namespace

extern const Kernels kAmx = {
    "amx",           0,     true,    scan_int8_amx, scan_fp16,   canonical<false>,
    canonical<true>, widen, to_half, to_float,      quantize_row};

}  // namespace knnfast
