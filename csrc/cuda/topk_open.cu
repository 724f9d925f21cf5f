// SPDX-License-Identifier: Apache-2.0
// After the scan: threshold, opening, canonical scores, order.
//
// - threshold[m] = k-th largest of lower[m, :], a certified lower bound of the k-th score.
// - Every bin with upper >= threshold is opened, the highest upper first: each row is bounded again
//   with the unrounded query (FP32 dot product with the FP16 row or its codes), and the rows that
//   still reach the threshold are rescored. It rises to a block's own k-th best.
// - Canonical score, FP64: lane l = 0..31 sums j = l, l+32, ..., lanes combine by the tree
//   16, 8, 4, 2, 1; ip Σ x·q, l2 Σ (q-x)², cosine dot/(√xx·√qq), 0 if a norm is 0. No contraction.
// - Order: score, then the lower id; rounding to FP32 comes last.
//
// Bytes: lower once, upper once, 128·slices·32 for an open bin, 2d for a rescored row (found in
// cache in FP16 scans). Nothing is ever dropped for want of room: a block keeps the best k of what
// it has rescored, sorting now and then, and hands on at most k. If every row ties, every
// row is rescored: the exact answer at the price of one more pass, bound by FP64 conversions (16 a
// clock of a multiprocessor, two an element or, of four rows at once, five for four). Never run on
// a GPU yet.
#include <type_traits>

#include "cuda/topk_canonical.cuh"
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

// --- threshold

constexpr int kSelectThreads = 512;
constexpr int kGroups = 8192;
constexpr int kHeld = kGroups / kSelectThreads;  // maxima a thread holds
constexpr int kInFlight = 2 * kHeld;             // bounds a thread loads at a time
static_assert(kMaxK <= kGroups, "else the k-th largest maximum is not there");

// Maxima of kGroups groups of bins (any partition gives a certified bound; a group without bins is
// -inf), then a radix selection of the k-th largest, eight bits at a time. With 64 KiB of loads in
// flight a block comes near what a multiprocessor gets from L2: of one query over 10M rows in the
// streaming scan, which leaves 1.25 MB, about 16 µs.
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
  for (int base = thread; base < count; base += kInFlight * kSelectThreads) {
    float next[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = base + j * kSelectThreads;
      next[j] = i < count ? values[i] : kMinusInf;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) best[j % kHeld] = fmaxf(best[j % kHeld], next[j]);
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
constexpr int kWarps = kThreads / 32;
constexpr int kTurn = 4;                   // most bins a warp opens between two meetings
constexpr int kOpened = kTurn * kThreads;  // rows of a round of the opening

// Room for the k best and a round of candidates.
__host__ __device__ inline int buffer_size(int k, int round) {
  int size = 2 * round;
  while (size < k + round) size *= 2;
  return size;
}

struct Best {
  Candidate* items;  // [capacity]
  Candidate* worst;  // the k-th best so far: what comes after it cannot enter
  int* count;
  int capacity, k;

  __device__ static bool before(const Candidate& a, const Candidate& b) {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
  }
  // One thread, before the others meet.
  __device__ void clear() {
    *count = 0;
    *worst = {0, INT64_MAX};
  }
  __device__ void push(const Candidate& c) {
    if (before(c, *worst)) items[atomicAdd(count, 1)] = c;
  }
  // All threads, after each round: room for the next one, and `worst` not far behind.
  __device__ __forceinline__ void meet(int round) {
    __syncthreads();
    if (*count > min(k + k / 4, capacity - round)) settle();
    __syncthreads();
  }
  // All threads: orders what is there and keeps the k best.
  __device__ __forceinline__ void settle() {
    __syncthreads();
    const int n = *count;
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += kThreads) items[i] = {0, INT64_MAX};
    for (int length = 2; length <= size; length *= 2) {
      for (int stride = length / 2; stride > 0; stride /= 2) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < size / 2; i += kThreads) {
          const int low = 2 * i - (i & (stride - 1)), high = low + stride;
          const Candidate a = items[low], b = items[high];
          if (((low & length) == 0) == before(b, a)) {
            items[low] = b;
            items[high] = a;
          }
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (n >= k) *worst = items[k - 1];
      *count = min(n, k);
    }
    __syncthreads();
  }
};

// --- opening

// An element of a word as a float. A code c takes no conversion, of which a multiprocessor does 16
// a clock: the float 2^23 + (c + 128) has c + 128 as its low byte.
template <class Scan>
__device__ __forceinline__ float element(uint32_t word, unsigned e) {
  if (Scan::kIsInt8)
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4B000000u, 0x7440u | e)) - 8388736.0f;
  return half_bits_to_float(static_cast<uint16_t>(word >> (e * 16)));
}

// Dot products of 32 rows with the query: lane l works on rows 4g + l/8, unit l%8 of each slice, so
// that a warp reads whole slices; half of a slice's loads are under way while the other half's rows
// are summed. Returns the one of row 4(l%8) + l/8.
template <class Scan>
__device__ __forceinline__ float dots(const unsigned char* tile, int first, int slices,
                                      const float* values) {
  constexpr int kPerWord = Scan::kIsInt8 ? 4 : 2, kPerUnit = 4 * kPerWord;
  const int lane = threadIdx.x % 32, unit = lane % 8;
  const unsigned char* from[2] = {tile + unit_offset(first + lane / 8, unit),
                                  tile + unit_offset(first + 4 + lane / 8, unit)};
  const float* v = values + unit * kPerUnit;
  float sums[8] = {};
  uint4 words[8];
  auto load = [&](int half) {
#pragma unroll
    for (int g = half; g < 8; g += 2)
      words[g] = *reinterpret_cast<const uint4*>(from[half] + g / 2 * 8 * kSlice);
    from[half] += kTileRows * kSlice;
  };
  load(0);
  load(1);
  for (int slice = 0; slice < slices; ++slice, v += 8 * kPerUnit) {
    float q[kPerUnit];
#pragma unroll
    for (int i = 0; i < kPerUnit / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(v)[i];
      q[4 * i] = four.x;
      q[4 * i + 1] = four.y;
      q[4 * i + 2] = four.z;
      q[4 * i + 3] = four.w;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = half; g < 8; g += 2) {
        const uint32_t word[4] = {words[g].x, words[g].y, words[g].z, words[g].w};
#pragma unroll
        for (int j = 0; j < kPerUnit; ++j)
          sums[g] += element<Scan>(word[j / kPerWord], j % kPerWord) * q[j];
      }
      if (slice + 1 < slices) load(half);
      __syncwarp();  // keeps the compiler from moving the loads to the end
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
constexpr int kTileBins = kTileRows / kBinRows;
constexpr int kVectors = 4;                     // of upper bounds, that a thread loads at a time
constexpr int kLook = kThreads * kVectors * 4;  // bins the block looks at before it meets
constexpr int kOpenList = kThreads;             // bins found open that wait

// What a block shares, before its candidates and the query as given.
struct OpenShared {
  QueryState state;  // with the errors of this pass
  Candidate worst;
  float threshold;
  int begin, end;         // its bins: whole tiles, whose bounds are two aligned vectors
  int found;              // open bins in the list
  int candidates, place;  // place: of the candidates among the query's
  int pad[2];
  uint64_t open[kOpenList];  // float_key of the bound, bin
};
static_assert(sizeof(OpenShared) % sizeof(Candidate) == 0, "candidates come next");

// Orders the list, the largest first, each entry by counting those before it. All threads.
__device__ __forceinline__ void sort_descending(uint64_t* list, int n) {
  static_assert(kOpenList <= kThreads, "an entry a thread");
  const uint64_t mine = static_cast<int>(threadIdx.x) < n ? list[threadIdx.x] : 0;
  int before = 0;
  for (int i = 0; i < n; ++i) before += list[i] > mine;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) list[before] = mine;
  __syncthreads();
}

// One block a query and a share of its bins.
template <class Scan>
__global__ void __launch_bounds__(kThreads, 2) topk_open_kernel(OpenArgs a) {
  KNN_DYN_SMEM(shared);
  OpenShared& head = *reinterpret_cast<OpenShared*>(shared);
  Best best{reinterpret_cast<Candidate*>(&head + 1), &head.worst, &head.candidates,
            buffer_size(a.k, kOpened), a.k};
  float* raw = reinterpret_cast<float*>(best.items + best.capacity);

  const int m = blockIdx.y, share = blockIdx.x, thread = threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  if (a.states[m].bad) return;
  const IndexView& index = a.index;
  const float* upper = a.upper + static_cast<int64_t>(m) * a.bins;
  const float* values = a.values + static_cast<int64_t>(m) * a.padded;
  const int slices = a.padded / (Scan::kIsInt8 ? 128 : 64), half_of = half_slices(index.dim);
  const int bins_per_segment = static_cast<int>(index.rows_per_segment / kBinRows);
  for (int j = thread; j < half_of * 64; j += kThreads)
    raw[j] = a.raw[static_cast<int64_t>(m) * half_of * 64 + j];
  if (thread == 0) {
    head.state = a.states[m];
    head.state.err_row = head.state.open_row;
    head.state.err_code = head.state.open_code;
    head.state.scale = 1;
    const int64_t tiles = a.bins / kTileBins;
    head.begin = static_cast<int>(tiles * share / a.shares) * kTileBins;
    head.end = static_cast<int>(tiles * (share + 1) / a.shares) * kTileBins;
    head.found = 0;
    head.threshold = a.threshold[m];
    best.clear();
  }
  __syncthreads();

  auto open_bin = [&](int bin) {
    const SegmentView& segment = index.segments[bin / bins_per_segment];
    const int64_t row = static_cast<int64_t>(bin % bins_per_segment) * kBinRows;
    const uint32_t alive = bin_mask(segment, index.filter, index.rows, bin, row);
    const int mine = lane % 8 * 4 + lane / 8;  // the row of the bin that this lane judges
    const auto term = Scan::terms(segment)[row + mine];
    const int in_tile = static_cast<int>(row % kTileRows);
    const int64_t tile_row = row - in_tile;
    const float sum = dots<Scan>(Scan::matrix(segment) + slice_offset(tile_row, 0, slices), in_tile,
                                 slices, values);
    const Bounds b = Scan::bounds(sum, term, head.state, index.metric);
    uint32_t reached = __ballot_sync(~0u, (alive >> mine & 1) && b.upper >= head.threshold);
    const unsigned char* tile = segment.half + slice_offset(tile_row, 0, half_of);
    auto rescore = [&](auto together) {  // so many rows, the last of fewer more than once
      constexpr int kRows = decltype(together)::value;
      const int count = min(kRows, __popc(reached));
      int rows[kRows], judge = 0;
      double scores[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (reached) judge = __ffs(static_cast<int>(reached)) - 1;
        reached &= reached - 1;
        rows[i] = in_tile + judge % 8 * 4 + judge / 8;
      }
      canonical_scores(tile, rows, raw, index.dim, index.metric, head.state.norm, scores);
      int r = rows[0];
      double score = scores[0];
#pragma unroll
      for (int i = 1; i < kRows; ++i) {
        r = lane == i ? rows[i] : r;
        score = lane == i ? scores[i] : score;
      }
      const uint64_t key = score_key(score, index.metric);
      if (lane < count && key >= best.worst->key) {
        const int64_t at = tile_row + r;
        best.push({key, segment.ids ? segment.ids[at] : segment.first_id + at});
      }
    };
    // Four rows take as long as two one after the other.
    while (__popc(reached) > 1) rescore(std::integral_constant<int, 4>{});
    if (reached) rescore(std::integral_constant<int, 1>{});
  };

  const int end = head.end;
  for (int base = head.begin; base < end; base += kLook) {
    float4 bounds[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int bin = base + (v * kThreads + thread) * 4;
      bounds[v] = bin < end ? *reinterpret_cast<const float4*>(upper + bin)
                            : float4{kMinusInf, kMinusInf, kMinusInf, kMinusInf};
    }
    uint32_t reached = 0;  // bit 4v + e: element e of vector v
    const float threshold = head.threshold;
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
    bool more;  // bins found open beyond the list's room wait for the next turn
    do {
      int at = reached ? atomicAdd(&head.found, __popc(reached)) : kOpenList;
      for (; reached && at < kOpenList; ++at, reached &= reached - 1) {
        const int bit = __ffs(static_cast<int>(reached)) - 1;
        const int bin = base + (bit / 4 * kThreads + thread) * 4 + bit % 4;
        head.open[at] = static_cast<uint64_t>(float_key(upper[bin])) << 32 | bin;
      }
      more = __syncthreads_or(reached != 0);
      if (head.found >= kOpenList / 2 || base + kLook >= end) {
        const int found = min(head.found, kOpenList);
        sort_descending(head.open, found);
        // The highest bounds first: they hold the best rows, and then most of the rest is shut.
        const auto reaches = [&](int i) {
          return key_float(static_cast<uint32_t>(head.open[i] >> 32)) >= head.threshold;
        };
        for (int i = 0, turn = 1; i < found && reaches(i); turn = min(2 * turn, kTurn)) {
          const int first = i;
          i = min(first + turn * kWarps, found);
          for (int j = first + warp; j < i; j += kWarps)
            if (reaches(j)) open_bin(static_cast<int>(head.open[j]));
          best.meet(kOpened);
          if (thread == 0 && head.worst.key)
            head.threshold =
                fmaxf(head.threshold, score_bound(key_score(head.worst.key, index.metric),
                                                  head.state, index.dim, index.metric));
          __syncthreads();
        }
        if (thread == 0 && found) head.found = 0;
      }
      __syncthreads();
    } while (more);
  }
  best.settle();
  const int count = *best.count;
  if (thread == 0) head.place = atomicAdd(&a.counts[m], count);
  __syncthreads();
  Candidate* out = a.candidates + static_cast<int64_t>(m) * a.shares * a.k + head.place;
  for (int i = thread; i < count; i += kThreads) out[i] = best.items[i];
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
  Candidate* worst = reinterpret_cast<Candidate*>(shared);
  int* count = reinterpret_cast<int*>(worst + 1);
  Best best{worst + 2, worst, count, buffer_size(a.k, kMerged), a.k};
  const int m = blockIdx.x, thread = threadIdx.x;
  const int total = a.counts[m];
  const Candidate* in = a.candidates + static_cast<int64_t>(m) * a.shares * a.k;
  if (thread == 0) best.clear();
  __syncthreads();
  for (int base = 0; base < total; base += kMerged) {
    Candidate next[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = base + i * kThreads + thread;
      next[i] = at < total ? in[at] : Candidate{0, INT64_MAX};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) best.push(next[i]);
    best.meet(kMerged);
  }
  best.settle();
  const bool bad = a.states[m].bad != 0;
  const double missing = a.metric == kL2 ? -static_cast<double>(kMinusInf) : kMinusInf;
  for (int i = thread; i < a.k; i += kThreads) {
    const int64_t at = static_cast<int64_t>(m) * a.k + i;
    const bool real = i < *count && !bad;
    const double score = bad    ? __longlong_as_double(0x7ff8000000000000ll)
                         : real ? key_score(best.items[i].key, a.metric)
                                : missing;
    a.scores[at] = static_cast<float>(score);
    a.ids[at] = real ? best.items[i].id : -1;
    if (a.exact) a.exact[at] = score;
  }
}

}  // namespace

size_t open_shared_bytes(int dim, int k) {
  return sizeof(OpenShared) + static_cast<size_t>(buffer_size(k, kOpened)) * sizeof(Candidate) +
         static_cast<size_t>(half_slices(dim)) * 64 * sizeof(float);
}

size_t merge_shared_bytes(int k) {
  return static_cast<size_t>(2 + buffer_size(k, kMerged)) * sizeof(Candidate);
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
  static std::atomic<uint64_t> done[2];  // of either kernel
  const cudaError_t allowed = allow_shared(kernel, done[params.index.scan]);
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
  static std::atomic<uint64_t> done{0};
  const cudaError_t allowed = allow_shared(topk_merge_kernel, done);
  if (allowed != cudaSuccess) return allowed;
  return KNN_LAUNCH(topk_merge_kernel, static_cast<unsigned>(count), kThreads, shared, stream,
                    args);
}

}  // namespace cuda
}  // namespace knnfast
