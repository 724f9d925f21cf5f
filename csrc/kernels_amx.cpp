// SPDX-License-Identifier: Apache-2.0
// AMX int8 for batches: a block of codes (16 groups of 16 rows × 4 dimensions) is a B tile as it
// lies, 16 queries × 64 dimensions are an A tile, and one instruction does 16×16×64. The queries'
// codes lie at one stride, zero-filled to a multiple of 64, and whole tiles of 16 may be read.
#include "kernels_avx512.h"

namespace knnfast {
namespace {

constexpr int kTile = 16;

// Tiles 0-3: sums [query tile][block]; 4, 5: queries; 6, 7: codes. All are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int NA, int NB>
inline void multiply(const ScanRows& rows, uint32_t block, const int8_t* queries, size_t stride,
                     int32_t (*sums)[kTile][kTile]) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * 64;
  const uint8_t* codes = rows.codes + block * block_bytes;
  _tile_zero(0);
  if (NB > 1) _tile_zero(1);
  if (NA > 1) _tile_zero(2);
  if (NA > 1 && NB > 1) _tile_zero(3);
  for (int g = 0; g < rows.groups; g += 16) {
    _tile_loadd(6, codes + g * 64, 64);
    if (NB > 1) _tile_loadd(7, codes + block_bytes + g * 64, 64);
    _tile_loadd(4, queries + g * 4, stride);
    _tile_dpbsud(0, 4, 6);
    if (NB > 1) _tile_dpbsud(1, 4, 7);
    if (NA > 1) {
      _tile_loadd(5, queries + kTile * stride + g * 4, stride);
      _tile_dpbsud(2, 5, 6);
      if (NB > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  if (NB > 1) _tile_stored(1, sums[1], 64);
  if (NA > 1) _tile_stored(2, sums[2], 64);
  if (NA > 1 && NB > 1) _tile_stored(3, sums[3], 64);
}

template <bool L2, int NA, int NB>
void amx_tile(const ScanRows& rows, uint32_t block, ScanQuery* queries, int index, int nq,
              size_t stride, const BlockTerms* terms, Sink* sink) {
  alignas(64) int32_t sums[4][kTile][kTile];
  multiply<NA, NB>(rows, block, queries[0].codes, stride, sums);
  for (int b = 0; b < NB; ++b)
    for (int q = 0; q < nq; ++q) {
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums[q / kTile * 2 + b][q % kTile]),
                                           _mm512_set1_epi32(queries[q].offset));
      test_block<L2>(terms[b], sum, queries[q], index + q, block + b, sink);
    }
}

template <bool L2, int NB>
void amx_blocks(const ScanRows& rows, uint32_t block, ScanQuery* queries, int nq, size_t stride,
                Sink* sink) {
  BlockTerms terms[NB];
  for (int b = 0; b < NB; ++b) terms[b] = load_terms(rows, block + b);
  for (int q = 0; q < nq; q += 2 * kTile) {
    const int left = nq - q;
    if (left > kTile)
      amx_tile<L2, 2, NB>(rows, block, queries + q, q, left < 2 * kTile ? left : 2 * kTile, stride,
                          terms, sink);
    else
      amx_tile<L2, 1, NB>(rows, block, queries + q, q, left, stride, terms, sink);
  }
}

template <bool L2>
void scan_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
                 Sink* sink) {
  const size_t stride = static_cast<size_t>(queries[1].codes - queries[0].codes);
  const TileConfig config;
  _tile_loadconfig(&config);
  uint32_t b = begin;
  for (; b + 2 <= end; b += 2) amx_blocks<L2, 2>(rows, b, queries, nq, stride, sink);
  for (; b < end; ++b) amx_blocks<L2, 1>(rows, b, queries, nq, stride, sink);
  _tile_release();
}

int64_t scan_int8_amx(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries,
                      int nq, bool l2, Sink* sink) {
  if (nq < 4) return scan_int8<true>(rows, begin, end, queries, nq, l2, sink);
  auto* scan = l2 ? scan_metric<true> : scan_metric<false>;
  scan(rows, begin, end, queries, nq, sink);
  return 0;
}

}  // namespace

extern const Kernels kAmx = {"amx",           0,     scan_int8_amx, scan_fp16, canonical<false>,
                             canonical<true>, widen, to_half,       to_float,  quantize_row};

}  // namespace knnfast
