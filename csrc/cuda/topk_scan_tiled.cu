// SPDX-License-Identifier: Apache-2.0
// Scan for large batches with mma.sync (sm_80 and up, sm_100 included): a tiled product of queries
// and rows whose epilogue is the bounds of topk_cuda.cuh instead of a store.
//
//   upper[m, bin], lower[m, bin]: as in topk_scan.cu.
// Bytes: N·(128·slices + term) once from memory; every panel of 128 queries reads the tiles again
// from L2, because the blocks of all panels walk through the same tiles together. Operations:
// 2·N·d·batch, bound by the tensor cores from about 200 queries. Sums and error budget as there.
//
// Shape: 128 queries (M) x 128 rows (N) a block, eight warps of 32 x 64, a ring of cp.async stages
// that hold one slice of both operands. Bins are along N: their maxima are mostly in one thread.
// Never run on a GPU yet.
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 128;  // queries, and rows, of a block's tile
constexpr int kOperand = kSide * kSlice;

template <class Scan, bool CoarseLower>
__global__ void __launch_bounds__(kThreads) topk_tiled_kernel(ScanArgs a, int stages) {
  using Term = typename Scan::Term;
  using Sum = typename Scan::Sum;
  constexpr int kStage = 2 * kOperand + kSide * static_cast<int>(sizeof(Term));
  KNN_DYN_SMEM(shared);
  unsigned char* ring = shared;
  QueryState* states = reinterpret_cast<QueryState*>(ring + stages * kStage);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int query_base = warp % 4 * 32, row_base = warp / 4 * 64;
  const int panel = blockIdx.x % a.panels_count;
  const int start = blockIdx.x / a.panels_count, step = gridDim.x / a.panels_count;
  const int first_query = panel * kSide;
  const int halves = a.tiles * (kTileRows / kSide);
  const unsigned char* panel_in = a.panels + static_cast<int64_t>(panel) * a.slices * kOperand;
  for (int i = thread; i < kSide; i += kThreads)
    states[i] = a.queries[min(first_query + i, a.batch - 1)];

  int load_half = start, load_slice = 0, load_stage = 0;
  auto load_next = [&] {
    if (load_half < halves) {
      const TilePlace tile = place_tile(a, load_half / 2);
      const SegmentView& segment = a.segments[tile.segment];
      const int row = load_half % 2 * kSide;
      unsigned char* stage = ring + load_stage * kStage;
      const unsigned char* queries = panel_in + load_slice * kOperand;
      const unsigned char* rows =
          Scan::matrix(segment) + slice_offset(tile.row, load_slice, a.slices) + row * kSlice;
#pragma unroll
      for (int i = 0; i < kOperand / 16 / kThreads; ++i) {
        const int at = (i * kThreads + thread) * 16;
        cp_async16(stage + at, queries + at);
        cp_async16(stage + kOperand + at, rows + at);
      }
      if (load_slice == a.slices - 1 && thread * 16 < kSide * static_cast<int>(sizeof(Term))) {
        const unsigned char* terms =
            reinterpret_cast<const unsigned char*>(Scan::terms(segment) + tile.row + row);
        cp_async16(stage + 2 * kOperand + thread * 16, terms + thread * 16);
      }
      if (++load_slice == a.slices) {
        load_slice = 0;
        load_half += step;
      }
      if (++load_stage == stages) load_stage = 0;
    }
    cp_async_commit();
  };
  for (int s = 0; s < stages - 1; ++s) load_next();

  int stage_index = 0;
  for (int half = start; half < halves; half += step) {
    Sum sums[2][8][4];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0;

    const unsigned char* stage = ring;
    for (int slice = 0; slice < a.slices; ++slice) {
      if (stages >= 4) {
        cp_async_wait<2>();
      } else if (stages == 3) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();
      load_next();
      stage = ring + stage_index * kStage;
      if (++stage_index == stages) stage_index = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 32 bytes of the slice at a time
        uint32_t queries[2][4], rows[4][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          ldmatrix_x4(queries[i],
                      stage + unit_offset(query_base + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ldmatrix_x4(rows[i], stage + kOperand +
                                   unit_offset(row_base + i * 16 + lane / 16 * 8 + lane % 8,
                                               k * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int n = 0; n < 8; ++n) Scan::mma(sums[i][n], queries[i], rows[n / 2] + n % 2 * 2);
      }
    }

    // This warp's 64 rows are two bins. Lane l holds queries l/4 + 8i, rows 8n + 2(l%4) + {0, 1}.
    const TilePlace tile = place_tile(a, half / 2);
    const SegmentView& segment = a.segments[tile.segment];
    const Term* terms = reinterpret_cast<const Term*>(stage + 2 * kOperand) + row_base;
    const int first_bin = half * (kSide / kBinRows) + row_base / kBinRows;
    Bounds coarse[4];
#pragma unroll
    for (int bin = 0; bin < 2; ++bin) {
      Bounds best[4] = {{kMinusInf, kMinusInf},
                        {kMinusInf, kMinusInf},
                        {kMinusInf, kMinusInf},
                        {kMinusInf, kMinusInf}};
      const uint32_t alive = bin_mask(segment, a.filter, a.rows, first_bin + bin,
                                      tile.row + half % 2 * kSide + row_base + bin * kBinRows);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = r / 2 * 8 + lane % 4 * 2 + r % 2;
        const Term term = term_if(alive >> row & 1, terms[bin * kBinRows + row]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const QueryState& q = states[query_base + i * 8 + lane / 4];
          const float sum = static_cast<float>(sums[i / 2][bin * 4 + r / 2][i % 2 * 2 + r % 2]);
          const Bounds b = Scan::bounds(sum, term, q, a.metric);
          best[i].upper = fmaxf(best[i].upper, b.upper);
          best[i].lower = fmaxf(best[i].lower, b.lower);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int x = 1; x < 4; x <<= 1) {
          best[i].upper = fmaxf(best[i].upper, __shfl_xor_sync(~0u, best[i].upper, x));
          best[i].lower = fmaxf(best[i].lower, __shfl_xor_sync(~0u, best[i].lower, x));
        }
        const int query = first_query + query_base + i * 8 + lane / 4;
        if (lane % 4 == 0 && query < a.batch) {
          a.upper[static_cast<int64_t>(query) * a.bins + first_bin + bin] = best[i].upper;
          if (!CoarseLower)
            a.lower[static_cast<int64_t>(query) * a.bins + first_bin + bin] = best[i].lower;
        }
        if (CoarseLower)
          coarse[i].lower = bin ? fmaxf(coarse[i].lower, best[i].lower) : best[i].lower;
      }
    }
    if (CoarseLower) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = first_query + query_base + i * 8 + lane / 4;
        if (lane % 4 == 0 && query < a.batch)
          a.lower[static_cast<int64_t>(query) * (a.bins / 2) + first_bin / 2] = coarse[i].lower;
      }
    }
  }
}

template <class Scan, bool CoarseLower>
int launch(const TopkPlan& plan, const ScanArgs& args, void* stream) {
  auto kernel = topk_tiled_kernel<Scan, CoarseLower>;
  const size_t shared = tiled_shared_bytes(Scan::kIsInt8, plan.stages);
  static std::atomic<uint64_t> done{0};
  const cudaError_t allowed = allow_shared(kernel, done, true);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.grid));
  return KNN_LAUNCH(kernel, grid, kThreads, shared, stream, args, plan.stages);
}

}  // namespace

size_t tiled_shared_bytes(bool int8, int stages) {
  const size_t term = int8 ? sizeof(CodeTerm) : sizeof(HalfTerm);
  return stages * (2 * kOperand + kSide * term) + kSide * sizeof(QueryState);
}

int launch_tiled_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream) {
  const bool coarse = args.lower_shift == 1;
  if (int8)
    return coarse ? launch<CodeScan, true>(plan, args, stream)
                  : launch<CodeScan, false>(plan, args, stream);
  return coarse ? launch<HalfScan, true>(plan, args, stream)
                : launch<HalfScan, false>(plan, args, stream);
}

}  // namespace cuda
}  // namespace knnfast
