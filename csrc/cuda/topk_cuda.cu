// SPDX-License-Identifier: Apache-2.0
// Plan and launch of a search. Per round of `chunk` queries, five launches in stream order:
//   prepare    queries to operand form, error factors
//   scan       topk_scan.cu (up to 64 queries), topk_scan_sm90.cu or topk_scan_tiled.cu
//   threshold  k-th largest lower bound of each query
//   open       bins whose upper bound reaches it; canonical scores; k best of each share
//   merge      final order, FP32 scores, user ids
// No allocation, no synchronisation, no read of device memory: all sizes come from the plan, so the
// launches can be captured in a CUDA graph. Workspace per query: 4 bytes per 32 rows for the upper
// bounds, the same or an eighth of it for the lower ones, 16·k·shares for candidates.
#include <algorithm>

#include "common/trace.h"
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

// Without code for sm_90a (csrc/cuda/topk_scan_sm90.cu) a Hopper GPU runs the tiled kernel.
#if defined(KNN_EMU_BUILD) || defined(KNN_SM90A)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

constexpr int kStreamBatch = 64;  // largest batch of the streaming kernel
// And on Hopper in FP16, where a panel of 64 leaves a multiprocessor one block of four warps: the
// Hopper kernel's panel, half empty, is still bound by memory.
constexpr int kHopperHalfBatch = 32;
constexpr int kMostQueries = 32768;  // of a round: a grid has at most 65,535 blocks along y

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int64_t tiles_of(const IndexView& index) { return (index.rows + kTileRows - 1) / kTileRows; }

// Fits the streaming kernel to the shared memory: narrower panels, then fewer stages.
bool fit_stream(TopkPlan& plan, bool int8, int slices, const Device& device) {
  plan.kernel = Kernel::kStream;
  plan.columns = plan.batch <= 8 ? 8 : plan.batch <= 16 ? 16 : plan.batch <= 32 ? 32 : 64;
  for (; plan.columns >= 8; plan.columns /= 2) {
    plan.planes = int8 && plan.columns <= 32 ? 2 : 1;
    // Two blocks on a multiprocessor hide each other's epilogues; one with a wide panel will do.
    for (int budget : {device.shared_bytes / 2 - 1024, device.shared_bytes})
      for (int stages : {8, 6, 4}) {
        plan.stages = stages;
        if (stream_shared_bytes(int8, plan.columns * plan.planes, slices, plan.columns, stages) <=
            static_cast<size_t>(budget < 0 ? 0 : budget))
          return true;
      }
  }
  return false;
}

bool fit_sm90(TopkPlan& plan, bool int8, int slices, const Device& device) {
  plan.kernel = Kernel::kSm90;
  plan.columns = 128;
  plan.planes = 1;
  for (int resident : {1, 0})
    for (int stages : {6, 5, 4, 3}) {
      plan.resident = resident;
      plan.stages = stages;
      if (sm90_shared_bytes(int8, slices, stages, resident != 0) <=
          static_cast<size_t>(device.shared_bytes))
        return true;
    }
  return false;
}

bool fit_tiled(TopkPlan& plan, bool int8, const Device& device) {
  plan.kernel = Kernel::kTiled;
  plan.columns = 128;
  plan.planes = 1;
  for (int stages : {4, 3, 2}) {  // two where a block gets 99 KiB (compute capability 8.6, 8.9, 12)
    plan.stages = stages;
    if (tiled_shared_bytes(int8, stages) <= static_cast<size_t>(device.shared_bytes)) return true;
  }
  return false;
}

// What blocks can share of one panel: tiles, or halves of them.
int64_t work_of(const TopkPlan& plan, int64_t tiles) {
  return plan.kernel == Kernel::kTiled ? 2 * tiles : tiles;
}

// Blocks that take the tiles of one panel; blocks of all panels walk the same tiles together, so
// that L2 serves all but the first.
int walkers_of(const TopkPlan& plan, int64_t tiles, int panels) {
  const int64_t work = work_of(plan, tiles);
  const int64_t walkers = plan.grid / panels < work ? plan.grid / panels : work;
  return walkers < 1 ? 1 : static_cast<int>(walkers);
}

// What a scan of `panels` panels takes, in the time of one block's tile: about 0.7 µs a slice, in
// either scan. The other launches of a round take about 45 µs.
int64_t round_cost(const TopkPlan& plan, int64_t tiles, int slices, int panels) {
  if (panels == 0) return 0;
  const int64_t waves = ceil_div(panels, plan.grid);
  return 64 / slices + waves * ceil_div(work_of(plan, tiles), walkers_of(plan, tiles, panels));
}

// Panels of a round: of `most` down to half of it, where the fewest blocks idle: 66 panels take 132
// multiprocessors, 67 would leave 65 of them without work.
int choose_panels(const TopkPlan& plan, int64_t tiles, int slices, int all, int most) {
  int best = most;
  int64_t least = INT64_MAX;
  for (int panels = most; 2 * panels > most; --panels) {
    const int64_t cost = all / panels * round_cost(plan, tiles, slices, panels) +
                         round_cost(plan, tiles, slices, all % panels);
    if (cost >= least) continue;
    least = cost;
    best = panels;
  }
  return best;
}

}  // namespace

int padded_dim(const IndexView& index) {
  return index.scan == kInt8 ? code_slices(index.dim) * 128 : half_slices(index.dim) * 64;
}

Workspace carve(const TopkPlan& plan, const IndexView& index, void* memory, size_t* bytes) {
  unsigned char* at = static_cast<unsigned char*>(memory);
  size_t used = 0;
  auto take = [&](size_t size) {
    unsigned char* p = at ? at + used : nullptr;
    used += align(size);
    return p;
  };
  const size_t chunk = static_cast<size_t>(plan.chunk), bins = static_cast<size_t>(plan.bins);
  const size_t columns = static_cast<size_t>(ceil_div(plan.chunk, plan.columns)) * plan.columns;
  const size_t row_bytes = static_cast<size_t>(padded_dim(index)) * (index.scan == kInt8 ? 1 : 2);
  Workspace w;
  w.states = reinterpret_cast<QueryState*>(take(chunk * sizeof(QueryState)));
  w.panels = take(columns * plan.planes * row_bytes);
  w.values = reinterpret_cast<float*>(take(chunk * padded_dim(index) * sizeof(float)));
  w.raw = reinterpret_cast<float*>(take(chunk * half_slices(index.dim) * 64 * sizeof(float)));
  w.upper = reinterpret_cast<float*>(take(chunk * bins * sizeof(float)));
  w.lower = reinterpret_cast<float*>(take(chunk * (bins >> plan.lower_shift) * sizeof(float)));
  w.threshold = reinterpret_cast<float*>(take(chunk * sizeof(float)));
  w.counts = reinterpret_cast<int*>(take(chunk * sizeof(int)));
  w.candidates =
      reinterpret_cast<Candidate*>(take(chunk * plan.shares * plan.k * sizeof(Candidate)));
  if (bytes) *bytes = used;
  return w;
}

TopkPlan plan_topk(const IndexView& index, int batch, int k, const Device& device, size_t memory,
                   int force_kernel) {
  TopkPlan plan{};
  plan.rows = index.rows;
  plan.batch = batch;
  plan.k = k;
  const bool int8 = index.scan == kInt8;
  const int slices = int8 ? code_slices(index.dim) : half_slices(index.dim);
  const int64_t tiles = tiles_of(index);
  // 2^31 bins are 2^36 rows: beyond any device's memory.
  if (batch < 1 || k < 1 || k > kMaxK || index.dim < 1 || index.dim > kMaxDim ||
      tiles > (int64_t{1} << 27))
    return plan;
  const bool hopper = kHasSm90 && device.capability >= 90 && device.capability < 100;
  bool fits = false;
  if (force_kernel < 0) {
    fits = batch <= (hopper && !int8 ? kHopperHalfBatch : kStreamBatch) &&
           fit_stream(plan, int8, slices, device);
    if (!fits) fits = hopper && fit_sm90(plan, int8, slices, device);
    if (!fits) fits = fit_tiled(plan, int8, device);
  } else {
    const Kernel kernel = static_cast<Kernel>(force_kernel);
    fits = kernel == Kernel::kStream  ? fit_stream(plan, int8, slices, device)
           : kernel == Kernel::kTiled ? fit_tiled(plan, int8, device)
                                      : hopper && fit_sm90(plan, int8, slices, device);
  }
  if (!fits || open_shared_bytes(index.dim, k) > static_cast<size_t>(device.shared_bytes))
    return plan;

  plan.bins = static_cast<int>(tiles) * (kTileRows / kBinRows);
  // Fewer, coarser lower bounds save traffic where k of them still hardly ever share a bin.
  const int coarse = plan.kernel == Kernel::kSm90 ? 3 : plan.kernel == Kernel::kTiled ? 1 : 0;
  plan.lower_shift = (plan.bins >> coarse) >= 16 * k ? coarse : 0;
  if (plan.kernel == Kernel::kStream) {
    const size_t shared =
        stream_shared_bytes(int8, plan.columns * plan.planes, slices, plan.columns, plan.stages);
    const int per_sm = 2 * (shared + 1024) <= static_cast<size_t>(device.shared_bytes) ? 2 : 1;
    const int64_t blocks = static_cast<int64_t>(device.multiprocessors) * per_sm;
    plan.grid = static_cast<int>(blocks < 2 * tiles ? blocks : 2 * tiles);
  } else {
    plan.grid = device.multiprocessors;
  }
  // The largest round that fits the memory, in whole panels.
  const int all = ceil_div(batch, plan.columns);
  auto set_panels = [&](int panels) {
    plan.chunk = batch < panels * plan.columns ? batch : panels * plan.columns;
    // Two blocks fit on a multiprocessor; twice as many even out where the open bins lie. Of many
    // queries one may open far more than the others: two blocks for it, not more, because each has
    // its own k best to shut bins by. A share of fewer than 64 bins is not worth a block.
    const int most = std::max(4 * device.multiprocessors / plan.chunk, 2);
    plan.shares = std::max(std::min(most, plan.bins / 64), 1);
    carve(plan, index, nullptr, &plan.workspace_bytes);
  };
  int panels = ceil_div(batch < kMostQueries ? batch : kMostQueries, plan.columns);
  for (set_panels(panels); panels > 1 && plan.workspace_bytes > memory;) set_panels(--panels);
  if (plan.kernel != Kernel::kStream) set_panels(choose_panels(plan, tiles, slices, all, panels));
  if (plan.workspace_bytes > memory) set_panels(panels);  // fewer queries may have more shares
  return plan;
}

namespace {

// The scan of one round of `count` queries.
int scan_round(const TopkPlan& plan, const IndexView& index, const Workspace& w, int count,
               void* stream) {
  const bool int8 = index.scan == kInt8;
  ScanArgs args{};
  args.segments = index.segments;
  args.filter = index.filter;
  args.panels = w.panels;
  args.queries = w.states;
  args.upper = w.upper;
  args.lower = w.lower;
  args.rows = index.rows;
  args.tiles_per_segment = static_cast<int>(index.rows_per_segment / kTileRows);
  args.tiles = plan.bins / (kTileRows / kBinRows);
  args.slices = int8 ? code_slices(index.dim) : half_slices(index.dim);
  args.bins = plan.bins;
  args.lower_shift = plan.lower_shift;
  args.batch = count;
  args.panels_count = ceil_div(count, plan.columns);
  args.metric = index.metric;
  TopkPlan round = plan;
  if (plan.kernel != Kernel::kStream)
    round.grid = walkers_of(plan, args.tiles, args.panels_count) * args.panels_count;
  return plan.kernel == Kernel::kStream  ? launch_stream_scan(round, args, int8, stream)
         : plan.kernel == Kernel::kTiled ? launch_tiled_scan(round, args, int8, stream)
                                         : launch_sm90_scan(round, args, int8, stream);
}

}  // namespace

int launch_topk(const TopkPlan& plan, const TopkParams& params, void* stream) {
  if (plan.workspace_bytes == 0 || params.index.rows != plan.rows) return cudaErrorInvalidValue;
  const IndexView& index = params.index;
  const Workspace w = carve(plan, index, params.workspace, nullptr);
  for (int first = 0; first < plan.batch; first += plan.chunk) {
    const int count = plan.batch - first < plan.chunk ? plan.batch - first : plan.chunk;
    int error = 0;
    {
      const TraceRange range("knnfast.scan");
      error = launch_prepare(plan, params, w, first, count, stream);
      if (!error && plan.bins > 0) error = scan_round(plan, index, w, count, stream);
    }
    if (!error) {
      const TraceRange range("knnfast.select");
      error = launch_threshold(plan, w, count, stream);
    }
    if (!error) {
      const TraceRange range("knnfast.rescore");
      error = launch_open(plan, params, w, count, stream);
    }
    if (!error) {
      const TraceRange range("knnfast.merge");
      error = launch_merge(plan, params, w, first, count, stream);
    }
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace knnfast
