// SPDX-License-Identifier: Apache-2.0
// Range search: every row that scores better than a radius.
//
//   hit (m, i)  iff  ip, cosine: s > radius     l2: s < radius     with the canonical score s
//
// A warp scores a bin of 32 rows canonically and appends the hits; the host orders them. Bytes: 2d
// a row and query, from cache for all but the first query of a bin's turn; FP64 sums, d a pair. No
// bounds: what a radius keeps cannot be told before its hits are counted. Never run on a GPU yet.
#include "cuda/topk_canonical.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct RangeArgs {
  IndexView index;
  const QueryState* states;
  const float* raw;
  double radius;
  int bins;
  RangeHits out;
};

// One block: eight bins and one query.
__global__ void __launch_bounds__(kThreads) topk_range_kernel(RangeArgs a) {
  const int bin =
      static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  const int m = static_cast<int>(blockIdx.y);
  if (a.states[m].bad) {
    if (threadIdx.x == 0) *a.out.bad = 1;
    return;
  }
  if (bin >= a.bins) return;
  const IndexView& index = a.index;
  const int64_t bins_per_segment = index.rows_per_segment / kBinRows;
  const SegmentView& segment = index.segments[bin / bins_per_segment];
  const int64_t row = bin % bins_per_segment * kBinRows;
  const int in_tile = static_cast<int>(row % kTileRows);
  const unsigned char* tile = segment.half + slice_offset(row - in_tile, 0, half_slices(index.dim));
  const float* q = a.raw + static_cast<int64_t>(m) * half_slices(index.dim) * 64;
  uint32_t alive = bin_mask(segment, index.filter, index.rows, bin, row);
  while (alive) {
    const int r = __ffs(static_cast<int>(alive)) - 1;
    alive &= alive - 1;
    double score[1];
    canonical_scores(tile, {in_tile + r}, q, index.dim, index.metric, a.states[m].norm, score);
    const bool hit = index.metric == kL2 ? score[0] < a.radius : score[0] > a.radius;
    if (!hit || threadIdx.x % 32 != 0) continue;
    const unsigned long long at = atomicAdd(a.out.count, 1ull);
    if (at < a.out.capacity)
      a.out.hits[at] = {score[0], segment.ids ? segment.ids[row + r] : segment.first_id + row + r,
                        m, 0};
  }
}

}  // namespace

int launch_range(const TopkPlan& plan, const TopkParams& params, double radius, int first,
                 int count, const RangeHits& out, void* stream) {
  const Workspace w = carve(plan, params.index, params.workspace, nullptr);
  const int error = launch_prepare(plan, params, w, first, count, stream);
  if (error || plan.bins == 0) return error;
  const dim3 grid(static_cast<unsigned>((plan.bins + kThreads / 32 - 1) / (kThreads / 32)),
                  static_cast<unsigned>(count));
  return KNN_LAUNCH(topk_range_kernel, grid, kThreads, 0, stream,
                    (RangeArgs{params.index, w.states, w.raw, radius, plan.bins, out}));
}

}  // namespace cuda
}  // namespace knnfast
