// SPDX-License-Identifier: Apache-2.0
// AMX int8 for batches: a block of codes (16 groups of 16 rows × 4 dimensions) is a B tile as it
// lies, 16 queries × 64 dimensions are an A tile, and one instruction does 16×16×64.
#include "isa/avx512.h"

namespace knnfast {
namespace {

constexpr int kTile = kTileQueries, kAmxBatch = 4, kStreams = 4;
constexpr int kStopBatch = 16;  // beyond, all codes are multiplied in less time than with stops

// Tiles 0-3: sums [query tile][block]; 4, 5: queries; 6, 7: codes. All are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {  // the thread's, while it lives
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// The blocks that come next go to the second cache: the first one is full of queries and codes.
// They are asked for in kStreams places at a time, as the hardware follows streams, none past a
// page. Where rows are left out the two may lie apart: then each is a stream.
struct Next : Ahead {
  bool apart;

  Next(const ScanRows& rows, const Blocks& next, int tiles) : apart(next.apart > 1) {
    const size_t bytes = static_cast<size_t>(rows.groups) * 64, all = next.count * bytes;
    const int streams = apart ? 2 : kStreams;
    at = rows.codes + next.first * bytes;
    end = at + all / streams;
    stride = apart ? next.apart * bytes : all / streams;
    lines = (next.count * 16 / streams + tiles - 1) / tiles;  // a step of multiply() is 16 groups
  }
  void ask() {
    if (apart)
      Ahead::ask<2, _MM_HINT_T1>();
    else
      Ahead::ask<kStreams, _MM_HINT_T1>();
  }
};

template <int NA, int NB>
inline void multiply(const ScanRows& rows, const Blocks& blocks, const int8_t* queries,
                     const int8_t* next, Next& ahead, int32_t (*sums)[NA * kTile][kBlockRows]) {
  const size_t block_bytes = static_cast<size_t>(rows.groups) * 64;
  const uint8_t* codes = rows.codes + blocks.first * block_bytes;
  const uint8_t* second = codes + blocks.apart * block_bytes;
  _tile_zero(0);
  if (NB > 1) _tile_zero(1);
  if (NA > 1) _tile_zero(2);
  if (NA > 1 && NB > 1) _tile_zero(3);
  for (int g = 0; g < rows.groups; g += 16) {
    _tile_loadd(6, codes + g * 64, 64);
    if (NB > 1) _tile_loadd(7, second + g * 64, 64);
    _tile_loadd(4, queries + g * 64, 64);
    _tile_dpbsud(0, 4, 6);
    if (NB > 1) _tile_dpbsud(1, 4, 7);
    if (NA > 1) {
      _tile_loadd(5, next + g * 64, 64);
      _tile_dpbsud(2, 5, 6);
      if (NB > 1) _tile_dpbsud(3, 5, 7);
    }
    ahead.ask();
  }
  _tile_stored(0, sums[0][0], 64);
  if (NB > 1) _tile_stored(1, sums[1][0], 64);
  if (NA > 1) _tile_stored(2, sums[0][kTile], 64);
  if (NA > 1 && NB > 1) _tile_stored(3, sums[1][kTile], 64);
}

// The first test of two tiles of queries, at the end of a row. What is not filled is read, too.
struct TileTest : FirstTerms {
  static constexpr int kQueries = 2 * kTile;
  float needs[kQueries] = {}, rest[kQueries] = {};  // need() of each, -offset

  void start(const ScanQuery* queries, int nq) {
    for (int q = 0; q < nq; ++q) {
      const ScanQuery& s = queries[q];
      const float offset = static_cast<float>(s.offset);
      rest[q] = -offset - fabsf(offset) * 0x1p-18f - 1;  // 1: of sums of small terms, too
      needs[q] = need(s);
      add(s, kStops);
    }
  }
};

// What passed in two blocks of rows: bounds that reached tau, as the sink takes them.
struct Found {
  static constexpr int kMost = 2 * kGroup;
  alignas(64) float upper[kMost + 1][kBlockRows];
  struct {
    int query;
    uint32_t block, mask;
  } line[kMost + 1];
  int count = 0;
};

template <bool L2, int NA, int NB>
void amx_tile(const ScanRows& rows, const Blocks& blocks, ScanQuery* queries, int index, int nq,
              const BlockTerms* terms, const __m512* inverses, const TileTest& test, Next& ahead,
              Found& found) {
  alignas(64) int32_t sums[NB][NA * kTile][kBlockRows];
  alignas(64) uint16_t masks[NB][2 * kTile] = {};
  multiply<NA, NB>(rows, blocks, queries[0].tiles, queries[NA > 1 ? kTile : 0].tiles, ahead, sums);
#pragma GCC unroll 2
  for (int b = 0; b < NB; ++b) {
    const BlockTerms& t = terms[b];
    const __m512 inverse = inverses[b];
    __m512 gap = _mm512_mul_ps(t.norm, _mm512_set1_ps(test.err_norm));
    gap = _mm512_fmadd_ps(t.residual, _mm512_set1_ps(test.err), gap);
    if (L2) gap = _mm512_fmadd_ps(_mm512_mul_ps(t.norm, t.norm), _mm512_set1_ps(test.sq), gap);
    gap = _mm512_mul_ps(gap, inverse);
#pragma GCC unroll 8
    for (int q = 0; q < NA * kTile; ++q) {
      __m512 least = _mm512_fmsub_ps(inverse, _mm512_set1_ps(test.needs[q]), gap);
      least = _mm512_add_ps(least, _mm512_set1_ps(test.rest[q]));
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[b][q]));
      masks[b][q] = _mm512_mask_cmp_ps_mask(t.live, sum, least, _CMP_NLT_UQ);  // a NaN passes
    }
  }
  uint64_t passed = 0;
  for (int b = 0; b < NB; ++b) {
    const __m512i mask = _mm512_load_si512(masks[b]);
    uint32_t some = _mm512_test_epi16_mask(mask, mask);
    if (nq < 2 * kTile) some &= (1u << nq) - 1;
    passed |= uint64_t{some} << (2 * kTile * b);
  }
  for (; passed; passed &= passed - 1) {
    const int at = __builtin_ctzll(passed), q = at % (2 * kTile), b = at / (2 * kTile);
    const ScanQuery& s = queries[q];
    const __m512i sum =
        _mm512_add_epi32(_mm512_load_si512(sums[b][q]), _mm512_set1_epi32(s.offset));
    const __m512 u = bound<L2>(terms[b], sum, s, kStops);
    const uint32_t reached =
        _mm512_mask_cmp_ps_mask(terms[b].live, u, _mm512_set1_ps(s.tau), _CMP_GE_OQ);
    _mm512_store_ps(found.upper[found.count], u);
    found.line[found.count] = {index + q, blocks.first + (b ? blocks.apart : 0), reached};
    found.count += reached != 0;
  }
}

template <bool L2, int NB>
void amx_blocks(const ScanRows& rows, const Blocks& blocks, const Blocks& next, bool reverse,
                ScanQuery* queries, int nq, TileTest* tests, Found& found, Sink* sink) {
  BlockTerms terms[NB];
  __m512 inverses[NB];  // of the scales
  for (int b = 0; b < NB; ++b) {
    terms[b] = load_terms(rows, blocks.first + (b ? blocks.apart : 0));
    inverses[b] = _mm512_div_ps(_mm512_set1_ps(1), terms[b].scale);
  }
  const int tiles = (nq + 2 * kTile - 1) / (2 * kTile);
  Next ahead(rows, next, tiles);
  for (int i = 0; i < tiles; ++i) {
    const int tile = reverse ? tiles - 1 - i : i, q = tile * 2 * kTile, left = nq - q;
    if (left > kTile)
      amx_tile<L2, 2, NB>(rows, blocks, queries + q, q, left, terms, inverses, tests[tile], ahead,
                          found);
    else
      amx_tile<L2, 1, NB>(rows, blocks, queries + q, q, left, terms, inverses, tests[tile], ahead,
                          found);
  }
  for (int i = 0; i < found.count; ++i) {
    const int q = found.line[i].query;
    const float tau = sink->hit(sink, q, found.line[i].block, found.upper[i], found.line[i].mask);
    if (tau == queries[q].tau) continue;
    queries[q].tau = tau;
    tests[q / TileTest::kQueries].needs[q % TileTest::kQueries] = TileTest::need(queries[q]);
  }
  found.count = 0;
}

template <bool L2>
void scan_metric(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
                 Sink* sink) {
  TileTest tests[kGroup / TileTest::kQueries];
  for (int q = 0; q < nq; q += TileTest::kQueries)
    tests[q / TileTest::kQueries].start(queries + q,
                                        nq - q < TileTest::kQueries ? nq - q : TileTest::kQueries);
  Found found;
  const Tiles tiles;
  bool reverse = false;  // every other pair meets the queries so: the last ones are still at hand
  for (Blocks now(rows, begin, end), next = now; now.count; now = next, reverse = !reverse) {
    next = Blocks(rows, now.behind(), end);
    auto* blocks = now.count == 2 ? amx_blocks<L2, 2> : amx_blocks<L2, 1>;
    blocks(rows, now, next, reverse, queries, nq, tests, found, sink);
  }
}

void scan_int8_amx(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
                   bool l2, Sink* sink, int64_t* stopped) {
  if (nq < kAmxBatch || rows.stop < kStops)
    return scan_int8<true>(rows, begin, end, queries, nq, l2, sink, stopped);
  auto* scan = l2 ? scan_metric<true> : scan_metric<false>;
  scan(rows, begin, end, queries, nq, sink);
}

// Products of int16 by bytes: x = 256·h + l, h with a sign and l without. That is four products of
// tiles, whose sums over a whole row fit into 32 bits. Floor: 4·16 cycles for 16·16 sums of 64, a
// quarter of what pairs of int16 take.
constexpr int kTileBytes = kTile * 64;
static_assert(kSumLength == 64 && kPanel == 2 * kTile, "a tile's bytes of a row, its columns");

// Of 64 rows of a panel, in place: of its first 16 columns the high bytes, four rows' side by side,
// and the low ones; then of the others.
void arrange(int16_t* b, int inner, int cols) {
  constexpr int kWords = kSumLength * kPanel;
  for (int16_t* end = b + static_cast<size_t>(inner) * cols; b < end; b += kWords) {
    uint8_t bytes[2][2][kTileBytes];
    for (int row = 0; row < kSumLength; ++row)
      for (int col = 0; col < kPanel; ++col) {
        const int word = b[row / 2 * 2 * kPanel + 2 * col + row % 2];
        const int half = col / kTile, at = row / 4 * 64 + col % kTile * 4 + row % 4;
        bytes[half][0][at] = static_cast<uint8_t>(word >> 8);
        bytes[half][1][at] = static_cast<uint8_t>(word);
      }
    memcpy(b, bytes, sizeof(bytes));
  }
}

// The high bytes of 64 words, and then the low ones, in place.
inline void split(int16_t* words) {
  const __m512i x = _mm512_loadu_si512(words), y = _mm512_loadu_si512(words + 32);
  const auto join = [](__m512i low, __m512i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)),
                              _mm512_cvtepi16_epi8(high), 1);
  };
  _mm512_storeu_si512(words, join(_mm512_srai_epi16(x, 8), _mm512_srai_epi16(y, 8)));
  _mm512_storeu_si512(words + 32, join(x, y));
}

// 256·(256·hh + mixed) + ll, rounded once.
inline __m256 joined(__m256i hh, __m256i mixed, __m256i ll) {
  const __m512d scale = _mm512_set1_pd(256);
  const __m512d high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(hh), scale, _mm512_cvtepi32_pd(mixed));
  return _mm512_cvtpd_ps(_mm512_fmadd_pd(high, scale, _mm512_cvtepi32_pd(ll)));
}

// A tile of rows, 16 columns. b: both bytes' tiles of 64 rows, then of the next ones.
inline void multiply_words(const int16_t* a, int inner, const int16_t* b, int cols, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int j = 0; j < inner; j += kSumLength, b += kPanel * kSumLength) {
    _tile_loadd(4, a + j, static_cast<size_t>(inner) * 2);
    _tile_loadd(5, a + j + kSumLength / 2, static_cast<size_t>(inner) * 2);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileBytes / 2, 64);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbuud(2, 5, 7);
    _tile_dpbusd(3, 5, 6);  // of its own: a product waits for the one before it in the same sum
  }
  alignas(64) int32_t sums[4][2 * kTile][8];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  const auto load = [](const int32_t* x) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
  };
  for (int i = 0; i < 2 * kTile; ++i)
    _mm256_storeu_ps(out + static_cast<size_t>(i / 2) * cols + i % 2 * 8,
                     joined(load(sums[0][i]), _mm256_add_epi32(load(sums[1][i]), load(sums[3][i])),
                            load(sums[2][i])));
}

void matmul_tiles(int16_t* a, int rows, int inner, const int16_t* b, int cols, float* out) {
  for (int64_t j = 0; j < int64_t{rows} * inner; j += kSumLength) split(a + j);
  __asm__ volatile("" ::: "memory");  // _tile_loadd does not say that it reads
  const Tiles tiles;
  for (int col = 0; col < cols; col += kTile) {
    const int16_t* columns =
        b + static_cast<size_t>(col / kPanel * kPanel) * inner + col % kPanel / kTile * kTileBytes;
    for (int r = 0; r < rows; r += kTile)
      multiply_words(a + static_cast<size_t>(r) * inner, inner, columns, cols,
                     out + static_cast<size_t>(r) * cols + col);
  }
}

}  // namespace

extern const Kernels kAmx = {
    "amx",
    0,            // window
    kAmxBatch,    // tile_batch
    kAmxBatch,    // matrix_batch
    kStopGroups,  // stop_groups
    kStopBatch,   // stop_batch
    scan_int8_amx,
    scan_fp16,
    canonical<false>,
    canonical<true>,
    widen,
    row_sum<kDot>,
    row_sum<kL2>,
    row_sum<kNorm2>,
    to_half,
    to_float,
    centre_row,
    quantize_row,
    squares,
    round_row,
    scale_row,
    matmul,
    matmul_tiles,
    arrange,
};

}  // namespace knnfast
