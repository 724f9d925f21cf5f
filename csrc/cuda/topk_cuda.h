// SPDX-License-Identifier: Apache-2.0
// Exact top-k on a CUDA device: plain structs and a few functions. No CUDA, torch or Python header
// is needed to call them; every pointer is device memory unless it says otherwise, every function
// only enqueues work on the caller's stream and returns a cudaError_t as int (0: fine).
// csrc/cuda/topk_cuda.cu tells how the launches fit together.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace knnfast {
namespace cuda {

enum Metric : int { kIp = 0, kCosine = 1, kL2 = 2 };
enum Scan : int { kFp16 = 0, kInt8 = 1, kAuto = 2 };  // kAuto: what choose_scan says
enum DType : int { kF16 = 0, kBf16 = 1, kF32 = 2 };

constexpr int kTileRows = 256;  // rows stored together; a segment's capacity is a multiple of it
constexpr int kBinRows = 32;    // rows that share one pair of bounds
constexpr int kSlice = 128;     // bytes of a row that lie together: 64 FP16 or 128 int8 dimensions
constexpr int kMaxK = 2048;
constexpr int kMaxDim = 8192;

#if defined(__CUDACC__)
#define KNN_BOTH __host__ __device__
#else
#define KNN_BOTH
#endif
KNN_BOTH inline int half_slices(int dim) { return (dim + 63) / 64; }
KNN_BOTH inline int code_slices(int dim) { return (dim + 127) / 128; }

// What a row's bound needs beside its dot product. All are rounded so that the bound holds.
struct HalfTerm {
  float norm;    // ‖x‖, rounded up
  float weight;  // cosine: 1/‖x‖ (0 for a zero row); l2: ‖x‖²/2; ip: 0
};
struct CodeTerm {
  float scale;     // a: y ≈ a·c
  float residual;  // ‖y - a·c‖, rounded up
  float norm;      // ‖a·c‖, rounded up
  float weight;    // l2: ‖y‖²/2, else 0
};

// One segment of fixed capacity: rows are appended, never moved. Both matrices lie as
//   [tile of 256 rows][slice of 128 bytes][256 rows][128 bytes],
// the 16-byte unit u of row r standing at place u ^ (r & 7) of its 128 bytes, zero-filled at the
// end: tensor-core operands without bank conflicts, and any part of a slice is one contiguous copy.
struct SegmentView {
  const unsigned char* half;   // FP16 rows
  const unsigned char* codes;  // int8 codes of y, or null (scan fp16)
  const HalfTerm* half_terms;
  const CodeTerm* code_terms;
  const uint32_t* alive;  // one bit a row
  const int64_t* ids;     // user ids, or null: first_id + row
  int64_t first_id;
};

// The rows a search sees: all segments but the last are full up to `rows_per_segment`.
struct IndexView {
  const SegmentView* segments;
  const float* mean;       // int8: μ, [128·code_slices]; y = x - μ, cosine: y = x/‖x‖ - μ
  const uint32_t* filter;  // one bit a row over all segments, or null: every live row may be found
  int64_t rows;            // slots in use, removed ones included
  int64_t rows_per_segment;
  int dim;
  Metric metric;
  Scan scan;  // what to scan with; not kAuto
};

struct Device {
  int multiprocessors;
  int shared_bytes;  // most dynamic shared memory of a block
  int capability;    // 80, 90, 100, ...
};

enum class Kernel : int { kStream = 0, kTiled = 1, kSm90 = 2 };

// How a search runs: computed on the host from sizes alone, so that it can be captured in a graph.
struct TopkPlan {
  int64_t rows;
  int batch, k;
  int chunk;  // queries per round of launches; a larger batch makes several rounds
  Kernel kernel;
  int columns;            // queries of a panel (operand columns are columns·planes)
  int planes;             // int8 numbers per query element: 2 halves the query's rounding away
  int bins, lower_shift;  // 32-row bins; 2^shift of them share one lower bound
  int shares;             // blocks that open bins for one query
  int stages;             // depth of the copy ring
  int grid;               // most blocks of the scan at once
  int resident;           // sm90: query panel stays in shared memory
  size_t workspace_bytes;
};

struct TopkParams {
  IndexView index;
  const void* queries;
  DType dtype;
  int64_t query_stride;  // elements
  float* scores;         // [batch, k]
  int64_t* ids;          // [batch, k]
  double* exact;         // [batch, k] scores before rounding, or null
  void* workspace;       // plan.workspace_bytes, 256-byte aligned
};

// What to scan of rows that have codes, when nobody says. Codes halve the scan, but their bounds
// are wide once a query has one number an element (batches above 32, TopkPlan::planes): of 1M
// isotropic rows about 13·k bins reach the first threshold and half of those the risen one, in FP16
// about k. Reading them back takes longer than the scan saves when k exceeds a 50,000th of the
// rows: an estimate by the roofline of an H200, for any dim, that no GPU has confirmed yet.
inline Scan choose_scan(int64_t rows, int batch, int k) {
  return batch > 32 && k > rows / 50000 ? kFp16 : kInt8;
}

// The plan of a search. `memory` bounds the workspace (it decides the chunk); an impossible request
// (k or dim beyond the limits above) gives workspace_bytes = 0.
TopkPlan plan_topk(const IndexView& index, int batch, int k, const Device& device, size_t memory,
                   int force_kernel = -1);
int launch_topk(const TopkPlan& plan, const TopkParams& params, void* stream);

// Rows in. Converts n rows to FP16 at rows [start, start + n) of one segment (all of them inside
// it), fills their half terms and sets their alive bits; *bad becomes 1 if a value is NaN or beyond
// ±65504 (the caller looks before it lets anyone search).
struct PackParams {
  const void* rows;
  DType dtype;
  int64_t stride, n;
  unsigned char* half;
  HalfTerm* half_terms;
  uint32_t* alive;
  int64_t start;
  int dim;
  Metric metric;
  int* bad;
};
int launch_pack(const PackParams& params, void* stream);

// The mean of a sample of a segment's first n rows (cosine: of x/‖x‖), as float [128·code_slices].
int launch_mean(const SegmentView& segment, int64_t n, int dim, Metric metric, float* mean,
                void* stream);

// Codes of rows [start, start + n) of a segment.
struct QuantizeParams {
  SegmentView segment;
  const float* mean;
  unsigned char* codes;
  CodeTerm* code_terms;
  int64_t start, n;
  int dim;
  Metric metric;
};
int launch_quantize(const QuantizeParams& params, void* stream);

// FP16 rows at global positions (segment · rows_per_segment + row) to row-major out; a negative
// position gives a row of zeros.
int launch_gather(const IndexView& index, const int64_t* positions, int64_t n, uint16_t* out,
                  void* stream);

// Which rows a search may return: sorted ids, or a packed little-endian bitset over ids.
struct IdSet {
  const int64_t* ids;
  const uint8_t* bits;
  int64_t count;  // ids, or bytes of the bitset
};
// filter[row/32] bit row%32 = live, allowed (if allow is set) and not denied.
int launch_filter(const IndexView& index, const IdSet& allow, const IdSet& deny, uint32_t* filter,
                  void* stream);

}  // namespace cuda
}  // namespace knnfast
