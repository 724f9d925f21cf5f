// SPDX-License-Identifier: Apache-2.0
// Scan for small batches (up to 64 queries): streams the database once, bounds every row.
//
//   upper[m, bin] = max over the live rows of a bin of v + e,  lower[m, bin] = the same of v - e
// (v, e: topk_cuda.cuh). Bytes: N·(128·slices + term), term 8 (fp16) or 16 (int8); operations:
// 2·N·d·columns·planes. Bound by memory up to 64 queries: at 4.3 TB/s 1M x 512 takes 0.24 ms in
// FP16 and 0.123 ms in int8. Sums: FP32 in FP16 scans (error budget in topk_cuda.cuh), exact int32.
//
// Shape: a persistent block takes half tiles of 128 rows; slices of 128 rows x 128 bytes pass
// through a ring of cp.async stages. Four warps own 32 rows each, one bin; rows are the M operand
// of mma.sync, so that eight queries ride free, and int8 queries may be given as two numbers each
// (128·high + low), which removes most of their rounding error at no cost in memory traffic.
// Never run on a GPU yet: timings, the ring's depth and blocks per multiprocessor are untuned.
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 128;                   // rows of a stage
constexpr int kStageBytes = kRows * kSlice;  // without the row terms

// NT: operand columns / 8. Planes: operand columns per query.
template <class Scan, int NT, int Planes>
__global__ void __launch_bounds__(kThreads) topk_scan_kernel(ScanArgs a, int stages) {
  using Term = typename Scan::Term;
  using Sum = typename Scan::Sum;
  constexpr int kColumns = NT * 8, kQueries = kColumns / Planes;
  constexpr int kStage = kStageBytes + kRows * static_cast<int>(sizeof(Term));
  KNN_DYN_SMEM(shared);
  const int panel_bytes = a.slices * kColumns * kSlice;
  unsigned char* panel = shared;
  unsigned char* ring = panel + panel_bytes;
  QueryState* states = reinterpret_cast<QueryState*>(ring + stages * kStage);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first_query = blockIdx.y * kQueries;
  const int halves = a.tiles * (kTileRows / kRows);

  // The panel and its queries stay for the whole kernel.
  const uint4* panel_in =
      reinterpret_cast<const uint4*>(a.panels + static_cast<int64_t>(blockIdx.y) * panel_bytes);
  for (int i = thread; i < panel_bytes / 16; i += kThreads)
    reinterpret_cast<uint4*>(panel)[i] = panel_in[i];
  for (int i = thread; i < kQueries; i += kThreads)
    states[i] = a.queries[min(first_query + i, a.batch - 1)];

  // Copies of the steps to come; a step is one slice of one half tile.
  int load_half = blockIdx.x, load_slice = 0, load_stage = 0;
  auto load_next = [&] {
    if (load_half < halves) {
      const TilePlace tile = place_tile(a, load_half / 2);
      const SegmentView& segment = a.segments[tile.segment];
      const int row = load_half % 2 * kRows;
      unsigned char* stage = ring + load_stage * kStage;
      const unsigned char* from =
          Scan::matrix(segment) + slice_offset(tile.row, load_slice, a.slices) + row * kSlice;
#pragma unroll
      for (int i = 0; i < kStageBytes / 16 / kThreads; ++i) {
        const int at = (i * kThreads + thread) * 16;
        cp_async16(stage + at, from + at);
      }
      if (load_slice == a.slices - 1 && thread * 16 < kRows * static_cast<int>(sizeof(Term))) {
        const unsigned char* terms =
            reinterpret_cast<const unsigned char*>(Scan::terms(segment) + tile.row + row);
        cp_async16(stage + kStageBytes + thread * 16, terms + thread * 16);
      }
      if (++load_slice == a.slices) {
        load_slice = 0;
        load_half += gridDim.x;
      }
      if (++load_stage == stages) load_stage = 0;
    }
    cp_async_commit();
  };
  // cp_async_wait takes a constant, so the ring is at least four deep and waits for the oldest but
  // two: with a deeper ring the copies beyond are simply issued earlier.
  for (int s = 0; s < stages - 1; ++s) load_next();

  int stage_index = 0;
  for (int half = blockIdx.x; half < halves; half += gridDim.x) {
    Sum sums[2][NT][4];
#pragma unroll
    for (int i = 0; i < 2 * NT * 4; ++i) sums[i / (NT * 4)][i / 4 % NT][i % 4] = 0;

    const unsigned char* stage = ring;
    for (int slice = 0; slice < a.slices; ++slice) {
      if (stages >= 8) {
        cp_async_wait<6>();
      } else if (stages >= 6) {
        cp_async_wait<4>();
      } else {
        cp_async_wait<2>();
      }
      __syncthreads();  // the stage has landed for all, and all have left the one refilled next
      load_next();
      stage = ring + stage_index * kStage;
      if (++stage_index == stages) stage_index = 0;
      const unsigned char* queries = panel + slice * kColumns * kSlice;
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // 64 bytes of the slice at a time
        uint32_t rows[2][2][4];      // [rows 0-15, 16-31][first, second 32 bytes]
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp * 32 + i / 2 * 16 + lane % 16;
          ldmatrix_x4(rows[i / 2][i % 2], stage + unit_offset(row, k * 4 + i % 2 * 2 + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint32_t columns[4];
          ldmatrix_x4(columns, queries + unit_offset(n * 8 + lane % 8, k * 4 + lane / 8));
#pragma unroll
          for (int i = 0; i < 4; ++i)
            Scan::mma(sums[i / 2][n], rows[i / 2][i % 2], columns + i % 2 * 2);
        }
      }
    }

    // This warp's 32 rows are one bin. Lane l holds rows l/4 + 8i and columns 2(l%4), 2(l%4) + 1.
    const TilePlace tile = place_tile(a, half / 2);
    const SegmentView& segment = a.segments[tile.segment];
    const int row_in_tile = half % 2 * kRows + warp * 32;
    const int bin = half * (kRows / kBinRows) + warp;
    const uint32_t alive = bin_mask(segment, a.filter, a.rows, bin, tile.row + row_in_tile);
    const Term* terms = reinterpret_cast<const Term*>(stage + kStageBytes) + warp * 32;
    Term row_terms[4];
    bool live[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_terms[i] = terms[i * 8 + lane / 4];
      live[i] = alive >> (i * 8 + lane / 4) & 1;
    }
#pragma unroll
    for (int column = 0; column < kQueries / 4; ++column) {
      // Columns of one query's planes are eight apart: high first, then low.
      const int n = column / 2 * Planes, j = column % 2;
      const int query = column / 2 * 8 + lane % 4 * 2 + j;
      const QueryState& q = states[query];
      Bounds best{kMinusInf, kMinusInf};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = static_cast<float>(sums[i / 2][n][i % 2 * 2 + j]);
        if (Planes == 2)
          sum = 128.0f * sum + static_cast<float>(sums[i / 2][(n + 1) % NT][i % 2 * 2 + j]);
        const Bounds b = Scan::bounds(sum, row_terms[i], q, a.metric);
        if (live[i]) {
          best.upper = fmaxf(best.upper, b.upper);
          best.lower = fmaxf(best.lower, b.lower);
        }
      }
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) {
        best.upper = fmaxf(best.upper, __shfl_xor_sync(~0u, best.upper, x));
        best.lower = fmaxf(best.lower, __shfl_xor_sync(~0u, best.lower, x));
      }
      if (lane < 4 && first_query + query < a.batch) {
        const int64_t at = static_cast<int64_t>(first_query + query) * a.bins + bin;
        a.upper[at] = best.upper;
        a.lower[at] = best.lower;
      }
    }
  }
}

template <class Scan, int NT, int Planes>
int launch(const TopkPlan& plan, const ScanArgs& args, void* stream) {
  auto kernel = topk_scan_kernel<Scan, NT, Planes>;
  const size_t shared = stream_shared_bytes(Scan::kIsInt8, plan.columns * plan.planes, args.slices,
                                            plan.columns, plan.stages);
  static std::atomic<uint64_t> done{0};
  const cudaError_t allowed = allow_shared(kernel, done, true);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.grid), static_cast<unsigned>(args.panels_count));
  return KNN_LAUNCH(kernel, grid, kThreads, shared, stream, args, plan.stages);
}

}  // namespace

size_t stream_shared_bytes(bool int8, int operand_columns, int slices, int queries, int stages) {
  const size_t term = int8 ? sizeof(CodeTerm) : sizeof(HalfTerm);
  return static_cast<size_t>(slices) * operand_columns * kSlice +
         stages * (kStageBytes + kRows * term) + queries * sizeof(QueryState);
}

int launch_stream_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream) {
  if (!int8) {
    switch (plan.columns) {
      case 8:
        return launch<HalfScan, 1, 1>(plan, args, stream);
      case 16:
        return launch<HalfScan, 2, 1>(plan, args, stream);
      case 32:
        return launch<HalfScan, 4, 1>(plan, args, stream);
      case 64:
        return launch<HalfScan, 8, 1>(plan, args, stream);
    }
  } else {
    switch (plan.columns) {
      case 8:
        return launch<CodeScan, 2, 2>(plan, args, stream);
      case 16:
        return launch<CodeScan, 4, 2>(plan, args, stream);
      case 32:
        return launch<CodeScan, 8, 2>(plan, args, stream);
      case 64:
        return launch<CodeScan, 8, 1>(plan, args, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace knnfast
