// SPDX-License-Identifier: Apache-2.0
// The inner loops, one table of them per instruction set. The units that are compiled for an
// instruction set include this file and intrinsics only: an inline function of the standard library
// compiled there could be linked into code that runs everywhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace knnfast {

constexpr int kGroup = 256;       // queries at most that a scan takes through the rows together
constexpr int kBlockRows = 16;    // rows of a block of codes
constexpr int kBlockDims = 4;     // dimensions of a group, side by side for one dot-product unit
constexpr int kQuarterBatch = 4;  // fewer queries take four quarters of the blocks side by side
constexpr int kQueryPad = 64;     // codes and values of a query are zero-filled to a multiple

// A kernel may sum the products of `window` groups in 16 bits, the first two and the last two
// dimensions of the groups apart. Queries for it are coded so that this is exact, with c in
// [-127, 127]: in each such half of a window Σ|p| <= 258, and |p| + |p'| <= 128 for two neighbours,
// which one instruction multiplies with c + 128.
constexpr int kWindowSum = 258, kPairSum = 128;
static_assert(127 * kWindowSum <= 32767 && 255 * kPairSum <= 32767, "sums of 16 bits");

// A scan of codes may stop after five or ten sixteenths of a row's groups, rounded up to a multiple
// of four, where what is left of the row cannot lift it to tau any more. Rows of fewer groups than
// kStopGroups have no stops.
constexpr int kStops = 2, kStopGroups = 32;
static inline int stop_group(int groups, int stop) {
  return groups < kStopGroups ? 0 : (groups * 5 * (stop + 1) + 63) / 64 * 4;
}
// Where a kernel with windows (below) tests it. What is left, from the stop itself on, is more.
static inline int stop_end(int groups, int stop, int window) {
  const int group = stop_group(groups, stop);
  return window ? (group + window - 1) / window * window : group;
}

// A row's word of bounds (segment.h): its residual, a bfloat16, and how one is rounded up to it.
static inline uint32_t residual_up(uint32_t word) { return (word + 0xffff) & 0xffff0000; }
static inline float residual_of(uint32_t bounds) {
  bounds &= 0xffff0000;
  float residual;
  __builtin_memcpy(&residual, &bounds, 4);
  return residual;
}

// One segment as a scan sees it (segment.h says what the arrays are).
struct ScanRows {
  const uint8_t* codes;
  const float *scale, *norm;
  const uint32_t* bounds;
  const uint16_t* rows;
  const float* row_norm;
  const uint16_t* live;  // 16 bits a block, or null: all live
  int dim, groups;
  int stop;  // of a scan of codes: the first one that is tested; kStops: none is
};

// One query prepared for one segment and one scan. The upper bound of a row's score is
//   int8:  u = mul·scale·(c·p) + err·residual + err_norm·norm + sq·norm² + base
//   fp16:  u = mul·(x·v)·inv + err·n + sq·row_norm² + base, inv = 1 and n = row_norm
//          (cosine: inv = 1/row_norm, or 0 for a zero row, and n = 1)
// and u - 2·(err·residual + err_norm·norm + slack - 2^-18·sq·norm²) is a lower one (fp16 likewise).
// At a stop c·p runs over the groups up to stop_end, and left·share·norm is added, the share in
// 255ths. What depends on that has one value a stop, and one for the end of the row behind them.
struct ScanQuery {
  const int8_t* codes;  // p, [groups·4] and zeros
  const int8_t* tiles;  // where p begins in its tile (below), or null
  const float* values;  // v, [dim] and zeros
  int32_t offset;       // -128·Σp: codes are stored plus 128
  // With windows: -128·Σp of each window's halves, modulo 2^16, two in a word; `offset` is unused.
  const int32_t* offsets;
  int32_t rest[kStops + 1];  // 128·Σp from the stop on
  float left[kStops + 1];    // 1/255 of the query's norm from there on
  float err[kStops + 1], err_norm[kStops + 1];
  float mul, sq, base, slack;
  float tau;  // rows with u < tau are out
};

constexpr int kPanel = 32, kSumLength = 64, kMaxInner = 1 << 14;  // of matmul

// A kernel may take the codes of batches as tiles: 16 queries' codes of 64 dimensions, side by
// side, then the next 64 dimensions.
constexpr int kTileQueries = 16;
static_assert(kQueryPad == 64, "tiles are whole");

// Gets the rows whose bound reached tau; returns the query's new tau.
struct Sink {
  float (*hit)(Sink* self, int query, uint32_t block, const float* upper, uint32_t mask);
};

struct Kernels {
  const char* name;
  int window;        // of scan_int8 (see above); 0: it sums in 32 bits
  int tile_batch;    // scan_int8 takes tiles from so many queries on; 0: never
  int matrix_batch;  // where it tests no stop it multiplies matrices from so many on; 0: never
  int stop_groups;   // it tests stops in rows of so many groups or more (kStopGroups at least),
  int stop_batch;    // for up to so many queries
  // Bounds of the rows of blocks [begin, end) for `nq` queries. The one over codes adds to
  // `stopped` how many pairs it left at each stop.
  void (*scan_int8)(const ScanRows&, uint32_t begin, uint32_t end, ScanQuery*, int nq, bool l2,
                    Sink*, int64_t* stopped);
  void (*scan_fp16)(const ScanRows&, uint32_t begin, uint32_t end, ScanQuery*, int nq, bool l2,
                    bool cosine, Sink*);
  // Canonical sums over d elements: 32 FP64 lanes, combined by the tree 16, 8, 4, 2, 1.
  // sums[r·nq + i] is that of row r and query i; each begins at a cache line, `stride` after the
  // last one, and is zero-filled to a multiple of 32.
  void (*dot)(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
              double* sums);
  void (*l2)(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
             double* sums);
  void (*widen)(const uint16_t* x, int dim, double* out);  // one row for them
  // The same sums of one FP16 row as it lies: with a query, and with itself.
  double (*dot_row)(const uint16_t* x, const double* q, int dim);
  double (*l2_row)(const uint16_t* x, const double* q, int dim);
  double (*norm2_row)(const uint16_t* x, const double* unused, int dim);
  // Conversions. to_half returns false if a value is NaN or beyond ±65504 after rounding.
  bool (*to_half)(const float* x, uint16_t* out, int64_t n);
  void (*to_float)(const uint16_t* x, float* out, int64_t n);
  // y = x·factor - mean, each step rounded to float, and zeros up to a multiple of 16.
  void (*centre_row)(const uint16_t* x, float factor, const float* mean, int dim, float* y);
  // Codes (stride 64 bytes a group), scale, residual and norm of such a y.
  void (*quantize_row)(const float* y, int dim, uint8_t* codes, float* scale, float* residual,
                       float* norm);
  double (*squares)(const float* x, int n);  // Σx²
  // y·u in whole numbers, with the largest u, nearly, by which none is above `largest` and the norm
  // of kSumLength of them not above `longest`; `lost` is the sum of the squares of what rounding
  // takes. Returns u. It is 0, and nothing is written, where all of y is as good as 0.
  float (*round_row)(const float* y, int dim, float largest, float longest, int16_t* out,
                     float* lost);
  void (*scale_row)(float* x, float factor, const float* factors, int n);  // x *= factor·factors
  // out [rows, cols] = a [rows, inner] · b, with b in panels [cols/32][inner][32]; cols is a
  // multiple of 32, inner of kSumLength: so many products are summed at a time.
  void (*matmul)(const float* a, int rows, int inner, const float* b, int cols, float* out);
  // The same of whole numbers, b's rows in pairs, panels [cols/32][inner/2][32][2], and then as
  // `arrange` leaves them; rows are a multiple of 16, and a is overwritten. What is summed at a
  // time has to fit into an int32, and becomes a float then. inner is kMaxInner at most: sums of
  // products of their bytes fit.
  void (*matmul_int16)(int16_t* a, int rows, int inner, const int16_t* b, int cols, float* out);
  void (*arrange)(int16_t* b, int inner, int cols);  // or null: they stay as they are
};

const Kernels& kernels();  // the best this machine has, or KNNFAST_ISA's

}  // namespace knnfast
