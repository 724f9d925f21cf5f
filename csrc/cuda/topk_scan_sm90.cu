// SPDX-License-Identifier: Apache-2.0
// Scan for large batches on Hopper (sm_90a): topk_scan_tiled.cu with wgmma and bulk copies.
//
//   upper[m, bin], lower[m, bin]: as in topk_scan.cu; bytes, operations and errors as in the tiled
// kernel. At 790 TFLOP/s 10M x 512 takes 13.3 ms for 1024 queries; where L2 cannot keep up with
// that (below), longer.
//
// Shape: 128 queries x 256 rows a block. One producer thread feeds a ring of stages by bulk copies
// (a slice of a tile is one contiguous 32 KiB piece, so no tensor maps are needed); two warpgroups
// own 64 queries each and read the same rows. When the query panel fits beside three stages it
// stays in shared memory (d <= 448 in FP16, <= 768 in int8): 32 KiB of rows from L2 for 4.2
// MFLOP, 6.2 TB/s at 790 TFLOP/s. Else its slices travel with the rows': 48 KiB, 5.9 TB/s at 500
// TFLOP/s. If a GPU shows that this binds, two blocks of a cluster can share the rows by multicast.
// Epilogue: queries along M, rows along N, so bins are maxima inside a thread and over four lanes.
//
// Never run on a GPU yet: descriptors and phases are checked by the compiler and the emulator only.
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kGiven = 24, kTaken = 240;  // registers a thread: the producer's, a consumer's
constexpr int kQueries = 128;
constexpr int kQueryBytes = kQueries * kSlice;  // of a slice of the panel
constexpr int kRowBytes = kTileRows * kSlice;   // of a slice of a tile
constexpr int kAlign = 1024;                    // the swizzle repeats every eight rows

constexpr int align_up(int bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
template <class Term>
KNN_BOTH constexpr int stage_bytes(bool resident) {
  return kRowBytes + (resident ? 0 : kQueryBytes) + kTileRows * static_cast<int>(sizeof(Term));
}

#if defined(KNN_EMU_BUILD) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KNN_HAS_WGMMA 1
#endif

#if defined(KNN_HAS_WGMMA)
__device__ __forceinline__ void product(float (&c)[128], unsigned char* a, unsigned char* b,
                                        unsigned k) {
  wgmma_f16(c, a, b, k);
}
__device__ __forceinline__ void product(int (&c)[128], unsigned char* a, unsigned char* b,
                                        unsigned k) {
  wgmma_s8(c, a, b, k);
}
#endif

// The metric is a constant, so that ip and cosine do without the arithmetic of l2: 64 rows times
// two queries a thread, while its warpgroup's wgmma waits.
template <class Scan, Metric kMetric, bool CoarseLower>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_topk_kernel(ScanArgs a, int stages, int resident) {
#if defined(KNN_HAS_WGMMA)
  using Term = typename Scan::Term;
  KNN_DYN_SMEM(shared);
  // Barriers and query states first, then the operands from the next 1024-byte boundary on.
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + 8;  // at most six stages are planned
  uint64_t* panel_full = empty + 8;
  QueryState* states = reinterpret_cast<QueryState*>(shared + 256);
  unsigned char* panel = shared + 256 + kQueries * sizeof(QueryState);
  panel += (kAlign - reinterpret_cast<uintptr_t>(panel) % kAlign) % kAlign;
  unsigned char* ring = panel + (resident ? a.slices * kQueryBytes : 0);
  const int stage_size = stage_bytes<Term>(resident);

  const int thread = threadIdx.x, lane = thread % 32;
  const int panel_index = blockIdx.x % a.panels_count;
  const int start = blockIdx.x / a.panels_count, step = gridDim.x / a.panels_count;
  const int first_query = panel_index * kQueries;
  const unsigned char* panel_in =
      a.panels + static_cast<int64_t>(panel_index) * a.slices * kQueryBytes;

  if (thread == 0) {
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kConsumers / 32);  // one arrival a warp
    }
    mbarrier_init(panel_full, 1);
    mbarrier_fence_init();
  }
  for (int i = thread; i < kQueries; i += kThreads)
    states[i] = a.queries[min(first_query + i, a.batch - 1)];
  __syncthreads();

  if (thread >= kConsumers) {  // the producer: one thread; its warpgroup lends its registers
    give_registers<kGiven>();
    if (thread == kConsumers) {
      if (resident) {
        mbarrier_arrive_expect(panel_full, static_cast<unsigned>(a.slices * kQueryBytes));
        for (int slice = 0; slice < a.slices; ++slice)
          bulk_copy(panel + slice * kQueryBytes, panel_in + slice * kQueryBytes, kQueryBytes,
                    panel_full);
      }
      int stage = 0;
      unsigned lap = 0;
      for (int tile = start; tile < a.tiles; tile += step) {
        const TilePlace place = place_tile(a, tile);
        const SegmentView& segment = a.segments[place.segment];
        for (int slice = 0; slice < a.slices; ++slice) {
          if (lap) mbarrier_wait(&empty[stage], (lap - 1) & 1);
          const bool last = slice == a.slices - 1;
          constexpr int kTermBytes = kTileRows * static_cast<int>(sizeof(Term));
          mbarrier_arrive_expect(&full[stage],
                                 static_cast<unsigned>(kRowBytes + (resident ? 0 : kQueryBytes) +
                                                       (last ? kTermBytes : 0)));
          unsigned char* to = ring + stage * stage_size;
          bulk_copy(to, Scan::matrix(segment) + slice_offset(place.row, slice, a.slices), kRowBytes,
                    &full[stage]);
          if (!resident)
            bulk_copy(to + kRowBytes, panel_in + slice * kQueryBytes, kQueryBytes, &full[stage]);
          if (last)
            bulk_copy(to + stage_size - kTermBytes, Scan::terms(segment) + place.row, kTermBytes,
                      &full[stage]);
          if (++stage == stages) {
            stage = 0;
            ++lap;
          }
        }
      }
    }
    return;
  }
  take_registers<kTaken>();

  const int group = thread / 128, warp = thread / 32 % 4;
  const int query_base = group * 64 + warp * 16 + lane / 4;  // and that + 8
  const QueryState q[2] = {states[query_base], states[query_base + 8]};
  if (resident) mbarrier_wait(panel_full, 0);

  typename Scan::Sum sums[128];
  int stage = 0;
  unsigned lap = 0;
  for (int tile = start; tile < a.tiles; tile += step) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0;
    uint4 alive[2]{};   // a bit a row, of the bins of the tile
    int previous = -1;  // the stage whose products may still run
    for (int slice = 0; slice < a.slices; ++slice) {
      mbarrier_wait(&full[stage], lap & 1);
      unsigned char* rows = ring + stage * stage_size;
      unsigned char* queries =
          (resident ? panel + slice * kQueryBytes : rows + kRowBytes) + group * 64 * kSlice;
      wgmma_pin(sums);
      wgmma_fence();
#pragma unroll
      for (unsigned k = 0; k < kSlice; k += 32) product(sums, queries, rows, k);
      wgmma_commit();
      wgmma_pin(sums);
      if (slice == 0) {  // a segment, then its bits: two latencies of memory beside the products
        const TilePlace place = place_tile(a, tile);
        const uint32_t* bits = a.filter ? a.filter + static_cast<int64_t>(tile) * 8
                                        : a.segments[place.segment].alive + place.row / kBinRows;
        alive[0] = reinterpret_cast<const uint4*>(bits)[0];
        alive[1] = reinterpret_cast<const uint4*>(bits)[1];
      }
      if (previous >= 0) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(&empty[previous]);
      }
      previous = stage;
      if (++stage == stages) {
        stage = 0;
        ++lap;
      }
    }
    wgmma_wait<0>();
    wgmma_pin(sums);

    // Lane l holds queries l/4 and l/4 + 8 of its warp and rows 8j + 2(l%4) + {0, 1}.
    const uint32_t words[8] = {alive[0].x, alive[0].y, alive[0].z, alive[0].w,
                               alive[1].x, alive[1].y, alive[1].z, alive[1].w};
    const Term* terms =
        reinterpret_cast<const Term*>(ring + previous * stage_size + stage_size) - kTileRows;
    float upper[2][2], lower[2][2];  // [query][bins 2(l%4), 2(l%4) + 1]: what this lane writes
    float coarse[2] = {kMinusInf, kMinusInf};
#pragma unroll
    for (int bin = 0; bin < 8; ++bin) {
      const uint32_t live = words[bin] & bin_rows(a.rows, tile * 8 + bin);
      Bounds best[2] = {{kMinusInf, kMinusInf}, {kMinusInf, kMinusInf}};
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = r / 2 * 8 + lane % 4 * 2 + r % 2;
        const Term term = term_if(live >> row & 1, terms[bin * kBinRows + row]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = static_cast<float>(sums[(bin * 4 + r / 2) * 4 + i * 2 + r % 2]);
          const Bounds b = Scan::template bounds<kMetric == kL2>(sum, term, q[i], kMetric);
          best[i].upper = fmaxf(best[i].upper, b.upper);
          best[i].lower = fmaxf(best[i].lower, b.lower);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int x = 1; x < 4; x <<= 1) {
          best[i].upper = fmaxf(best[i].upper, __shfl_xor_sync(~0u, best[i].upper, x));
          if (!CoarseLower)
            best[i].lower = fmaxf(best[i].lower, __shfl_xor_sync(~0u, best[i].lower, x));
        }
        if (CoarseLower) coarse[i] = fmaxf(coarse[i], best[i].lower);
        if (lane % 4 == bin / 2) {
          upper[i][bin % 2] = best[i].upper;
          lower[i][bin % 2] = best[i].lower;
        }
      }
    }
    // The terms have been read, with plain loads: a copy may now overwrite them.
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[previous]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (CoarseLower) {
        coarse[i] = fmaxf(coarse[i], __shfl_xor_sync(~0u, coarse[i], 1));
        coarse[i] = fmaxf(coarse[i], __shfl_xor_sync(~0u, coarse[i], 2));
      }
      const int query = first_query + query_base + i * 8;
      if (query >= a.batch) continue;
      const int64_t at = static_cast<int64_t>(query) * a.bins + tile * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(a.upper + at) = {upper[i][0], upper[i][1]};
      if (!CoarseLower) {
        *reinterpret_cast<float2*>(a.lower + at) = {lower[i][0], lower[i][1]};
      } else if (lane % 4 == 0) {
        a.lower[static_cast<int64_t>(query) * a.tiles + tile] = coarse[i];
      }
    }
  }
#else
  __trap();  // plan_topk does not choose it in a build without sm_90a
#endif
}

template <class Scan, Metric kMetric, bool CoarseLower>
int launch_one(const TopkPlan& plan, const ScanArgs& args, void* stream) {
  auto kernel = sm90_topk_kernel<Scan, kMetric, CoarseLower>;
  const size_t shared =
      sm90_shared_bytes(Scan::kIsInt8, args.slices, plan.stages, plan.resident != 0);
  constexpr int kShared = kGiven * (kThreads - kConsumers) + kTaken * kConsumers;
  static std::atomic<uint64_t> done{0};
  const cudaError_t allowed = allow_shared(kernel, done, true, (kShared + kThreads - 1) / kThreads);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.grid));
  return KNN_LAUNCH(kernel, grid, kThreads, shared, stream, args, plan.stages, plan.resident);
}

template <class Scan, Metric kMetric>
int launch(const TopkPlan& plan, const ScanArgs& args, void* stream) {
  return args.lower_shift == 3 ? launch_one<Scan, kMetric, true>(plan, args, stream)
                               : launch_one<Scan, kMetric, false>(plan, args, stream);
}

}  // namespace

size_t sm90_shared_bytes(bool int8, int slices, int stages, bool resident) {
  const int stage = int8 ? stage_bytes<CodeTerm>(resident) : stage_bytes<HalfTerm>(resident);
  const int head = 256 + kQueries * static_cast<int>(sizeof(QueryState)) + kAlign;
  return static_cast<size_t>(align_up(head)) + (resident ? slices * kQueryBytes : 0) +
         static_cast<size_t>(stages) * stage;
}

int launch_sm90_scan(const TopkPlan& plan, const ScanArgs& args, bool int8, void* stream) {
  if (int8)  // the codes of a cosine index are those of x/‖x‖: its bounds are ip's
    return args.metric == kL2 ? launch<CodeScan, kL2>(plan, args, stream)
                              : launch<CodeScan, kIp>(plan, args, stream);
  return args.metric == kL2       ? launch<HalfScan, kL2>(plan, args, stream)
         : args.metric == kCosine ? launch<HalfScan, kCosine>(plan, args, stream)
                                  : launch<HalfScan, kIp>(plan, args, stream);
}

}  // namespace cuda
}  // namespace knnfast
