// SPDX-License-Identifier: Apache-2.0
// The launches of one search, between topk_cuda.cu (which orders them) and the kernels' files.
#pragma once
#include "cuda/topk_cuda.h"

namespace knnfast {
namespace cuda {

struct ScanArgs;
struct QueryState;

// A candidate: its place in the order (smaller code first) and its id.
struct Candidate {
  uint64_t key;  // of the canonical score, larger is better
  int64_t id;
};

// What a range search found, in no order: `count` hits, of which the first `capacity` are written.
struct RangeHit {
  double score;
  int64_t id;
  int query;  // of the round
  int pad;    // written too: what comes to the host is all initialised
};
struct RangeHits {
  RangeHit* hits;
  unsigned long long capacity;
  unsigned long long* count;
  int* bad;  // becomes 1 if a query has a NaN or an infinity
};

// The buffers of one round, carved out of the workspace.
struct Workspace {
  QueryState* states;     // [chunk]
  unsigned char* panels;  // operand form of the queries
  float* values;          // [chunk, padded] queries in their own unit, FP32, zero-filled
  float* raw;             // [chunk, 64·half_slices] queries as given, FP32, zero-filled
  float* upper;           // [chunk, bins]
  float* lower;           // [chunk, bins >> lower_shift]
  float* threshold;       // [chunk]
  int* counts;            // [chunk] candidates; the threshold kernel sets them to 0
  Candidate* candidates;  // [chunk, shares·k], in no order
};
Workspace carve(const TopkPlan& plan, const IndexView& index, void* memory, size_t* bytes);

int padded_dim(const IndexView& index);  // elements of a scanned row, zeros included

int launch_prepare(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int first,
                   int count, void* stream);
int launch_stream_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream);
int launch_tiled_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream);
int launch_sm90_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream);
int launch_threshold(const TopkPlan& plan, const Workspace& w, int count, void* stream);
int launch_open(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int count,
                void* stream);
int launch_merge(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int first,
                 int count, void* stream);
// Prepares queries [first, first + count) and finds their hits; `count` and `bad` start at 0.
int launch_range(const TopkPlan& plan, const TopkParams& params, double radius, int first,
                 int count, const RangeHits& out, void* stream);

// Shared memory the scan kernels ask for.
size_t stream_shared_bytes(bool int8, int operand_columns, int slices, int queries, int stages);
size_t tiled_shared_bytes(bool int8, int stages);
size_t sm90_shared_bytes(bool int8, int slices, int stages, bool resident);
size_t open_shared_bytes(int dim, int k);
size_t merge_shared_bytes(int k);

}  // namespace cuda
}  // namespace knnfast
