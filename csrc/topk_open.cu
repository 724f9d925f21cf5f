// SPDX-License-Identifier: Apache-2.0
// After the scan: threshold, opening, canonical scores, order.
//
//   threshold[m] = k-th largest of lower[m, :]           (a certified lower bound of the k-th
//   score) open every bin with upper >= threshold; inside, bound each row again with the unrounded
//   query (FP32 dot product with the FP16 row or its codes) and rescore the rows that still reach
//   it: canonical score, FP64: lane l = 0..31 sums j = l, l+32, ..., lanes combine by the tree 16,
//   8, 4, 2, 1; ip Σ x·q, l2 Σ (q-x)², cosine dot/(√xx·√qq), 0 if a norm is 0. No contraction.
//   Order: score, then the lower id; rounding to FP32 comes last.
// Bytes: lower once, upper once, 128·slices·32 for an open bin, 2d for a rescored row (found in
// cache in FP16 scans). Nothing is ever dropped for want of room: a block keeps the best k of what
// it has rescored, sorting when its buffer fills, and hands on at most k. If every row ties, every
// row is rescored: the exact answer at the price of one more pass, bound by FP64 conversions (16 a
// clock of a multiprocessor, two an element or, of four rows at once, five for four). Never run on
// a GPU yet.
#include <type_traits>

#include "topk_canonical.cuh"
#include "topk_cuda.cuh"
#include "topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

// --- threshold

constexpr int kSelectThreads = 512;
constexpr int kGroups = 8192;
constexpr int kHeld = kGroups / kSelectThreads;  // maxima a thread holds
static_assert(kMaxK <= kGroups, "else the k-th largest maximum is not there");

// Maxima of kGroups groups of bins (any partition gives a certified bound; a group without bins is
// -inf), then a radix selection of the k-th largest, eight bits at a time. A thread's kHeld loads
// are in flight together: with 32 KiB a block, latency does not bind.
__global__ void __launch_bounds__(kSelectThreads)
    topk_threshold_kernel(const float* lower, int count, int k, float* threshold, int* counts) {
  KNN_DYN_SMEM(shared);
  int* histogram = reinterpret_cast<int*>(shared);
  uint32_t* found = reinterpret_cast<uint32_t*>(histogram + 256);  // prefix, what is left of k
  const float* values = lower + static_cast<int64_t>(blockIdx.x) * count;
  const int thread = threadIdx.x;
  float best[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) best[j] = kMinusInf;
  for (int base = thread; base < count; base += kGroups) {
    float next[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = base + j * kSelectThreads;
      next[j] = i < count ? values[i] : kMinusInf;
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) best[j] = fmaxf(best[j], next[j]);
  }
  uint32_t keys[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) keys[j] = float_key(best[j]);
  if (thread == 0) {
    found[0] = 0;
    found[1] = static_cast<uint32_t>(k);
    counts[blockIdx.x] = 0;
  }
  for (int digit = 24; digit >= 0; digit -= 8) {
    if (thread < 256) histogram[thread] = 0;
    __syncthreads();
    const uint32_t prefix = found[0], high = digit == 24 ? 0u : ~0u << (digit + 8);
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if ((keys[j] & high) == prefix) atomicAdd(&histogram[keys[j] >> digit & 255], 1);
    __syncthreads();
    if (thread < 32) {  // lane l sums bins 255-8l ... 248-8l
      int sums[8], total = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) total += sums[i] = histogram[255 - thread * 8 - i];
      int before = total;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const int other = __shfl_up_sync(~0u, before, d);
        if (thread >= d) before += other;
      }
      before -= total;
      const int want = static_cast<int>(found[1]);
      __syncwarp();
      if (before < want && want <= before + total) {
        int bin = 0;
        while (before + sums[bin] < want) before += sums[bin++];
        found[0] = prefix | static_cast<uint32_t>(255 - thread * 8 - bin) << digit;
        found[1] = static_cast<uint32_t>(want - before);
      }
    }
    __syncthreads();
  }
  if (thread == 0) threshold[blockIdx.x] = key_float(found[0]);
}

// --- the k best of a stream, in shared memory

constexpr int kThreads = 256;
constexpr int kLoads = 4;                   // candidates a thread of the merge loads at a time
constexpr int kMerged = kLoads * kThreads;  // of a round of the merge
constexpr int kOpened = kThreads;           // of a round of the opening: a row a thread

// Room for the k best and a round of candidates.
__host__ __device__ inline int buffer_size(int k, int round) {
  int size = 2 * round;
  while (size < k + round) size *= 2;
  return size;
}

struct Best {
  uint64_t* keys;
  int64_t* ids;
  int* count;
  int capacity, k;
  // The k-th best so far: what comes after it cannot enter.
  uint64_t worst_key = 0;
  int64_t worst_id = INT64_MAX;

  __device__ bool enters(uint64_t key, int64_t id) const {
    return key > worst_key || (key == worst_key && id < worst_id);
  }
  __device__ bool before(int a, int b) const {
    return keys[a] > keys[b] || (keys[a] == keys[b] && ids[a] < ids[b]);
  }
  __device__ void push(uint64_t key, int64_t id) {
    const int at = atomicAdd(count, 1);
    keys[at] = key;
    ids[at] = id;
  }
  // All threads, after each round.
  __device__ __forceinline__ void make_room(int round) {
    __syncthreads();
    if (*count > capacity - round) settle();
    __syncthreads();
  }
  // All threads: orders what is there and keeps the k best.
  __device__ __forceinline__ void settle() {
    __syncthreads();
    const int n = *count;
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += kThreads) {
      keys[i] = 0;
      ids[i] = INT64_MAX;
    }
    for (int length = 2; length <= size; length *= 2) {
      for (int stride = length / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < size / 2; i += kThreads) {
          const int a = i / stride * 2 * stride + i % stride, b = a + stride;
          if (((a & length) == 0) == before(b, a)) {
            const uint64_t key = keys[a];
            keys[a] = keys[b];
            keys[b] = key;
            const int64_t id = ids[a];
            ids[a] = ids[b];
            ids[b] = id;
          }
        }
      }
    }
    __syncthreads();
    if (n >= k) {
      worst_key = keys[k - 1];
      worst_id = ids[k - 1];
    }
    if (threadIdx.x == 0) *count = min(n, k);
    __syncthreads();
  }
};

// --- opening

// Dot products of 32 rows with the query: lane l works on rows 4g + l/8, unit l%8 of each slice, so
// that a warp reads whole slices. Returns the one of row 4(l%8) + l/8.
template <class Scan>
__device__ __forceinline__ float dots(const unsigned char* tile, int first, int slices,
                                      const float* values) {
  float sums[8];
  constexpr int kPerUnit = Scan::kIsInt8 ? 16 : 8;
  const int lane = threadIdx.x % 32, unit = lane % 8;
#pragma unroll
  for (int g = 0; g < 8; ++g) sums[g] = 0;
  for (int slice = 0; slice < slices; ++slice) {
    const unsigned char* base = tile + static_cast<int64_t>(slice) * kTileRows * kSlice;
    const float* v = values + (slice * 8 + unit) * kPerUnit;
    uint4 words[8];
#pragma unroll
    for (int g = 0; g < 8; ++g)
      words[g] =
          *reinterpret_cast<const uint4*>(base + unit_offset(first + g * 4 + lane / 8, unit));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float q[kPerUnit / 4];
#pragma unroll
      for (int e = 0; e < kPerUnit / 4; ++e) q[e] = v[w * (kPerUnit / 4) + e];
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        const uint32_t word = w == 0   ? words[g].x
                              : w == 1 ? words[g].y
                              : w == 2 ? words[g].z
                                       : words[g].w;
#pragma unroll
        for (int e = 0; e < kPerUnit / 4; ++e) {
          const float x = Scan::kIsInt8
                              ? static_cast<float>(static_cast<int8_t>(word >> (e * 8)))
                              : half_bits_to_float(static_cast<uint16_t>(word >> (e * 16)));
          sums[g] += x * q[e];
        }
      }
    }
  }
  // Eight sums over eight lanes: each step halves the sums a lane is responsible for.
#pragma unroll
  for (int x = 4; x; x >>= 1) {
#pragma unroll
    for (int g = 0; g < x; ++g) {
      const bool high = lane & x;
      const float keep = high ? sums[g + x] : sums[g], give = high ? sums[g] : sums[g + x];
      sums[g] = keep + __shfl_xor_sync(~0u, give, x);
    }
  }
  return sums[0];
}

struct OpenArgs {
  IndexView index;
  const QueryState* states;
  const float *values, *raw, *upper, *threshold;
  int* counts;
  Candidate* candidates;
  int bins, shares, padded, k;
};

// The bounds of 1,024 queries over 10M rows are 1.3 GB, 0.3 ms at 4.3 TB/s: 16 KiB a block and two
// blocks a multiprocessor in flight come near it.
constexpr int kVectors = 4;                     // of upper bounds, that a thread loads at a time
constexpr int kLook = kThreads * kVectors * 4;  // bins the block looks at before it meets
constexpr int kOpenList = 2 * kThreads;         // bins found open that wait

// One block a query and a share of its bins.
template <class Scan>
__global__ void __launch_bounds__(kThreads, 2) topk_open_kernel(OpenArgs a) {
  KNN_DYN_SMEM(shared);
  const int capacity = buffer_size(a.k, kOpened);
  Best best;
  best.keys = reinterpret_cast<uint64_t*>(shared);
  best.ids = reinterpret_cast<int64_t*>(best.keys + capacity);
  int* open = reinterpret_cast<int*>(best.ids + capacity);  // [kOpenList]
  int* counters = open + kOpenList;                         // candidates, open bins, place of them
  float* raw = reinterpret_cast<float*>(counters + 4);
  best.count = counters;
  best.capacity = capacity;
  best.k = a.k;

  const int m = blockIdx.y, share = blockIdx.x, thread = threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  const QueryState state = a.states[m];
  if (state.bad) return;
  const IndexView& index = a.index;
  const float threshold = a.threshold[m];
  const float* upper = a.upper + static_cast<int64_t>(m) * a.bins;
  const float* values = a.values + static_cast<int64_t>(m) * a.padded;
  const int slices = a.padded / (Scan::kIsInt8 ? 128 : 64), half_of = half_slices(index.dim);
  const int64_t bins_per_segment = index.rows_per_segment / kBinRows;
  QueryState unrounded = state;  // the bounds of this pass
  unrounded.err_row = state.open_row;
  unrounded.err_code = state.open_code;
  unrounded.scale = 1;
  for (int j = thread; j < index.dim; j += kThreads)
    raw[j] = a.raw[static_cast<int64_t>(m) * index.dim + j];
  if (thread < 2) counters[thread] = 0;
  __syncthreads();

  auto open_bin = [&](int bin) {
    const SegmentView& segment = index.segments[bin / bins_per_segment];
    const int64_t row = bin % bins_per_segment * kBinRows;
    const uint32_t alive = bin_mask(segment, index.filter, index.rows, bin, row);
    const int in_tile = static_cast<int>(row % kTileRows);
    const int64_t tile_row = row - in_tile;
    const float sum = dots<Scan>(Scan::matrix(segment) + slice_offset(tile_row, 0, slices), in_tile,
                                 slices, values);
    // Lane l judges row 4(l%8) + l/8 of the bin.
    const int mine = lane % 8 * 4 + lane / 8;
    const Bounds b = Scan::bounds(sum, Scan::terms(segment)[row + mine], unrounded, index.metric);
    uint32_t reached = __ballot_sync(~0u, (alive >> mine & 1) && b.upper >= threshold);
    const unsigned char* tile = segment.half + slice_offset(tile_row, 0, half_of);
    auto rescore = [&](auto together) {  // the next so many rows
      constexpr int kRows = decltype(together)::value;
      int rows[kRows];
      double scores[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i, reached &= reached - 1) {
        const int judge = __ffs(static_cast<int>(reached)) - 1;
        rows[i] = in_tile + judge % 8 * 4 + judge / 8;
      }
      canonical_scores(tile, rows, raw, index.dim, index.metric, state.norm, scores);
      int r = rows[0];
      double score = scores[0];
#pragma unroll
      for (int i = 1; i < kRows; ++i) {
        r = lane == i ? rows[i] : r;
        score = lane == i ? scores[i] : score;
      }
      const uint64_t key = score_key(score, index.metric);
      if (lane < kRows && key >= best.worst_key) {
        const int64_t at = tile_row + r;
        const int64_t id = segment.ids ? segment.ids[at] : segment.first_id + at;
        if (best.enters(key, id)) best.push(key, id);
      }
    };
    while (__popc(reached) >= 4) rescore(std::integral_constant<int, 4>{});
    while (reached) rescore(std::integral_constant<int, 1>{});
  };

  // Shares are whole tiles: a tile's bounds are two aligned vectors.
  constexpr int kTileBins = kTileRows / kBinRows;
  const int64_t tiles = a.bins / kTileBins;
  const int begin = static_cast<int>(tiles * share / a.shares) * kTileBins;
  const int end = static_cast<int>(tiles * (share + 1) / a.shares) * kTileBins;
  for (int base = begin; base < end; base += kLook) {
    float4 bounds[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int bin = base + (v * kThreads + thread) * 4;
      bounds[v] = bin < end ? *reinterpret_cast<const float4*>(upper + bin)
                            : float4{kMinusInf, kMinusInf, kMinusInf, kMinusInf};
    }
    uint32_t reached = 0;  // bit 4v + e: element e of vector v
    auto look = [&](float bound, int bit) {
      if (bound >= threshold && bound > kMinusInf) reached |= 1u << bit;
    };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      look(bounds[v].x, v * 4);
      look(bounds[v].y, v * 4 + 1);
      look(bounds[v].z, v * 4 + 2);
      look(bounds[v].w, v * 4 + 3);
    }
    const bool last = base + kLook >= end;
    bool more;  // bins found open beyond the list's room wait for the next turn
    do {
      int at = reached ? atomicAdd(&counters[1], __popc(reached)) : kOpenList;
      for (; reached && at < kOpenList; ++at, reached &= reached - 1) {
        const int bit = __ffs(static_cast<int>(reached)) - 1;
        open[at] = base + (bit / 4 * kThreads + thread) * 4 + bit % 4;
      }
      more = __syncthreads_or(reached != 0);
      const int found = min(counters[1], kOpenList);
      if (found >= kThreads || (last && found > 0)) {
        for (int i = 0; i < found; i += kThreads / 32) {  // a bin a warp, at most 256 rows a round
          if (i + warp < found) open_bin(open[i + warp]);
          best.make_room(kOpened);
        }
        if (thread == 0) counters[1] = 0;
      }
      __syncthreads();
    } while (more);
  }
  best.settle();
  const int count = *best.count;
  if (thread == 0) counters[2] = atomicAdd(&a.counts[m], count);
  __syncthreads();
  Candidate* out = a.candidates + static_cast<int64_t>(m) * a.shares * a.k + counters[2];
  for (int i = thread; i < count; i += kThreads) out[i] = {best.keys[i], best.ids[i]};
}

// --- the final order

struct MergeArgs {
  const QueryState* states;
  const int* counts;
  const Candidate* candidates;
  int shares, k;
  Metric metric;
  float* scores;
  int64_t* ids;
  double* exact;
};

__global__ void __launch_bounds__(kThreads) topk_merge_kernel(MergeArgs a) {
  KNN_DYN_SMEM(shared);
  const int capacity = buffer_size(a.k, kMerged);
  Best best;
  best.keys = reinterpret_cast<uint64_t*>(shared);
  best.ids = reinterpret_cast<int64_t*>(best.keys + capacity);
  best.count = reinterpret_cast<int*>(best.ids + capacity);
  best.capacity = capacity;
  best.k = a.k;
  const int m = blockIdx.x, thread = threadIdx.x;
  const int total = a.counts[m];
  const Candidate* in = a.candidates + static_cast<int64_t>(m) * a.shares * a.k;
  if (thread == 0) *best.count = 0;
  __syncthreads();
  for (int base = 0; base < total; base += kMerged) {
    Candidate next[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = base + i * kThreads + thread;
      next[i] = at < total ? in[at] : Candidate{0, INT64_MAX};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (best.enters(next[i].key, next[i].id)) best.push(next[i].key, next[i].id);
    best.make_room(kMerged);
  }
  best.settle();
  const int count = *best.count;
  const bool bad = a.states[m].bad != 0;
  const double missing = a.metric == kL2 ? -static_cast<double>(kMinusInf) : kMinusInf;
  for (int i = thread; i < a.k; i += kThreads) {
    const int64_t at = static_cast<int64_t>(m) * a.k + i;
    const bool real = i < count && !bad;
    const double score = bad    ? __longlong_as_double(0x7ff8000000000000ll)
                         : real ? key_score(best.keys[i], a.metric)
                                : missing;
    a.scores[at] = static_cast<float>(score);
    a.ids[at] = real ? best.ids[i] : -1;
    if (a.exact) a.exact[at] = score;
  }
}

}  // namespace

size_t open_shared_bytes(int dim, int k) {
  return static_cast<size_t>(buffer_size(k, kOpened)) * sizeof(Candidate) +
         kOpenList * sizeof(int) + 4 * sizeof(int) + static_cast<size_t>(dim) * sizeof(float);
}

size_t merge_shared_bytes(int k) {
  return static_cast<size_t>(buffer_size(k, kMerged)) * sizeof(Candidate) + sizeof(int);
}

int launch_threshold(const TopkPlan& plan, const Workspace& w, int count, void* stream) {
  const int bounds = plan.bins >> plan.lower_shift;
  const size_t shared = 256 * 4 + 8;
  return KNN_LAUNCH(topk_threshold_kernel, static_cast<unsigned>(count), kSelectThreads, shared,
                    stream, w.lower, bounds, plan.k, w.threshold, w.counts);
}

int launch_open(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int count,
                void* stream) {
  const OpenArgs args{params.index,
                      w.states,
                      w.values,
                      w.raw,
                      w.upper,
                      w.threshold,
                      w.counts,
                      w.candidates,
                      plan.bins,
                      plan.shares,
                      padded_dim(params.index),
                      plan.k};
  const size_t shared = open_shared_bytes(params.index.dim, plan.k);
  auto kernel =
      params.index.scan == kInt8 ? topk_open_kernel<CodeScan> : topk_open_kernel<HalfScan>;
  const cudaError_t allowed = allow_shared(kernel);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.shares), static_cast<unsigned>(count));
  return KNN_LAUNCH(kernel, grid, kThreads, shared, stream, args);
}

int launch_merge(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int first,
                 int count, void* stream) {
  const int64_t at = static_cast<int64_t>(first) * plan.k;
  const MergeArgs args{
      w.states,           w.counts,        w.candidates,
      plan.shares,        plan.k,          params.index.metric,
      params.scores + at, params.ids + at, params.exact ? params.exact + at : nullptr};
  const size_t shared = merge_shared_bytes(plan.k);
  const cudaError_t allowed = allow_shared(topk_merge_kernel);
  if (allowed != cudaSuccess) return allowed;
  return KNN_LAUNCH(topk_merge_kernel, static_cast<unsigned>(count), kThreads, shared, stream,
                    args);
}

}  // namespace cuda
}  // namespace knnfast
