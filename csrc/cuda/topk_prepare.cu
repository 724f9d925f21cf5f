// SPDX-License-Identifier: Apache-2.0
// What happens before a scan: queries to operand form with their error factors, id sets to row
// bits.
//
//   q' = 2^p q,  h = FP16(q') or t = b·p + w;   factors: topk_cuda.cuh.
// Bytes: the queries, a few times over (they stay in cache): negligible beside the scan. All sums
// in FP64, all factors rounded up. Never run on a GPU yet.
#include "cuda/topk_cuda.cuh"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
  if (dtype == kF32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return dtype == kF16 ? half_bits_to_float(bits)
                       : __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ __forceinline__ float round_up(double v) {
  return static_cast<float>(v * (1 + 0x1p-22)) + 0x1p-126f;
}

// Sum or maximum over the block; every thread gets it. `scratch`: one double a warp.
template <bool Max>
__device__ double reduce(double v, double* scratch) {
#pragma unroll
  for (int x = 16; x; x >>= 1) {
    const double other = __shfl_xor_sync(~0u, v, x);
    v = Max ? fmax(v, other) : v + other;
  }
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  double all = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) all = Max ? fmax(all, scratch[w]) : all + scratch[w];
  return all;
}

struct PrepareArgs {
  const void* queries;
  DType dtype;
  int64_t stride;
  const float* mean;
  int dim, padded, columns, planes, int8;
  Metric metric;
  int first, batch;  // queries of this round
  QueryState* states;
  unsigned char* panels;
  float *values, *raw;
};

// One block a column of the panels; columns past the batch are filled with zeros.
__global__ void __launch_bounds__(kThreads) topk_prepare_kernel(PrepareArgs a) {
  KNN_DYN_SMEM(shared);
  double* scratch = reinterpret_cast<double*>(shared);
  const int m = blockIdx.x, thread = threadIdx.x, lane = thread % 32;
  const bool real = m < a.batch;
  const int64_t base = (a.first + m) * a.stride;
  const bool centred = a.int8 && a.metric == kL2;

  double top = 0, bad = 0;
  if (real) {
    const int width = half_slices(a.dim) * 64;
    for (int j = thread; j < width; j += kThreads) {
      const float q = j < a.dim ? load_float(a.queries, a.dtype, base + j) : 0.0f;
      a.raw[static_cast<int64_t>(m) * width + j] = q;
      if (j >= a.dim) break;
      if (!(fabsf(q) <= 0x1.fffffep127f)) bad = 1;
      top = fmax(top, fabs(centred ? static_cast<double>(q) - a.mean[j] : static_cast<double>(q)));
    }
  }
  bad = reduce<true>(bad, scratch);
  top = reduce<true>(top, scratch);
  const bool finite = real && bad == 0, usable = finite && top > 0;
  // 2^p brings the largest element to [64, 128); p <= 64 keeps γ·weight finite for tiny queries.
  int exponent = 0;
  if (usable) {
    exponent = 6 - (static_cast<int>(__double_as_longlong(top) >> 52 & 2047) - 1023);
    exponent = min(exponent, 64);
  }
  const double unit = __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
  const float scale =
      a.int8 && usable ? static_cast<float>(top * unit / (a.planes == 2 ? 16256 : 127)) : 1.0f;

  // The operand: row m of the panel, or rows for its high and its low numbers.
  const int panel = m / a.columns, column = m % a.columns;
  const int row = column / 8 * 8 * a.planes + column % 8;
  const int slices = a.padded / (a.int8 ? 128 : 64);
  unsigned char* operand =
      a.panels + static_cast<int64_t>(panel) * slices * a.columns * a.planes * kSlice;
  double tt = 0, ww = 0, ff = 0, qq = 0, mu = 0, dot = 0;  // sums of squares, and t·μ
  for (int j = thread; j < a.padded; j += kThreads) {
    const double q =
        finite && j < a.dim ? static_cast<double>(load_float(a.queries, a.dtype, base + j)) : 0;
    const double mean = a.int8 ? static_cast<double>(a.mean[j]) : 0;
    const double t = (centred && finite ? q - mean : q) * unit;
    const float f = static_cast<float>(t);
    if (real) a.values[static_cast<int64_t>(m) * a.padded + j] = f;
    double rounded;
    const int per_slice = a.int8 ? 128 : 64;
    unsigned char* slice =
        operand + static_cast<int64_t>(j / per_slice) * a.columns * a.planes * kSlice;
    if (a.int8) {
      const int limit = a.planes == 2 ? 16319 : 127;
      int p = static_cast<int>(rint(t / scale));
      p = max(-limit, min(limit, p));
      rounded = static_cast<double>(p) * scale;
      const int at = j % 128;
      if (a.planes == 2) {
        const int high = (p + 64) >> 7, low = p - high * 128;  // low in [-64, 63]
        slice[unit_offset(row, at / 16) + at % 16] = static_cast<unsigned char>(high);
        slice[unit_offset(row + 8, at / 16) + at % 16] = static_cast<unsigned char>(low);
      } else {
        slice[unit_offset(row, at / 16) + at % 16] = static_cast<unsigned char>(p);
      }
    } else {
      const uint16_t h = float_to_half_bits(f);
      rounded = half_bits_to_float(h);
      const int at = j % 64;
      *reinterpret_cast<uint16_t*>(slice + unit_offset(row, at / 8) + at % 8 * 2) = h;
    }
    tt += t * t;
    ww += (t - rounded) * (t - rounded);
    ff += (t - f) * (t - f);
    qq += q * q;
    mu += mean * mean;
    dot += t * mean;
  }
  tt = reduce<false>(tt, scratch);
  ww = reduce<false>(ww, scratch);
  ff = reduce<false>(ff, scratch);
  qq = reduce<false>(qq, scratch);
  mu = reduce<false>(mu, scratch);
  dot = reduce<false>(dot, scratch);

  // √(q·q) in the canonical order, for cosine: lanes of one warp, then the tree.
  double norm = 0;
  if (a.metric == kCosine && thread < 32 && finite) {
    for (int j = lane; j < a.dim; j += 32) {
      const double q = load_float(a.queries, a.dtype, base + j);
      norm = __dadd_rn(norm, __dmul_rn(q, q));
    }
#pragma unroll
    for (int x = 16; x; x >>= 1) norm = __dadd_rn(norm, __shfl_xor_sync(~0u, norm, x));
  }
  if (thread || !real) return;

  const double length = sqrt(tt), rest = sqrt(ww), inexact = sqrt(ff);
  const double canonical = (a.dim + 8) * 0x1p-52;  // relative rounding of a canonical score
  QueryState s;
  s.scale = scale;
  s.gamma = a.metric == kL2 ? static_cast<float>(unit) : 0.0f;
  s.center = a.int8 && a.metric != kL2 ? static_cast<float>(dot) : 0.0f;
  double fixed = 0x1p-80;
  if (a.metric == kL2) fixed += canonical * unit * (qq + 2 * mu);
  if (a.int8) {
    fixed += 0x1p-22 * fabs(static_cast<double>(s.center)) + canonical * length * sqrt(mu);
    s.err_row = round_up(length);
    s.err_code = round_up(rest + 0x1p-20 * (length + rest));
    s.open_row = s.err_row;
    s.open_code = round_up(inexact + (a.dim + 64) * 0x1p-23 * length);
  } else {
    const double cut = (2 * a.dim + 64) * 0x1p-23 * (length + rest + 0x1p-14);
    fixed += cut * 0x1p-14;
    s.err_row = round_up(rest + cut + 0x1p-22 * length);
    s.err_code = s.open_code = 0;
    s.open_row = round_up(inexact + (a.dim + 64) * 0x1p-23 * length);
  }
  s.err_fixed = round_up(fixed);
  s.norm = a.metric == kL2 ? tt : __dsqrt_rn(norm);
  s.bad = bad != 0;
  s.exponent = exponent;
  a.states[m] = s;
}

__device__ bool contains(const IdSet& set, int64_t id) {
  if (set.bits) return id / 8 < set.count && set.bits[id / 8] >> (id % 8) & 1;
  int64_t low = 0, high = set.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (set.ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < set.count && set.ids[low] == id;
}

// One thread a row, one word a warp.
__global__ void __launch_bounds__(256)
    topk_filter_kernel(IndexView index, IdSet allow, IdSet deny, uint32_t* filter) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  bool keep = false;
  if (row < index.rows) {
    const SegmentView& s = index.segments[row / index.rows_per_segment];
    const int64_t r = row % index.rows_per_segment;
    keep = s.alive[r / 32] >> (r % 32) & 1;
    if (keep) {
      const int64_t id = s.ids ? s.ids[r] : s.first_id + r;
      keep = (!(allow.ids || allow.bits) || contains(allow, id)) &&
             !((deny.ids || deny.bits) && contains(deny, id));
    }
  }
  const uint32_t word = __ballot_sync(~0u, keep);
  if (threadIdx.x % 32 == 0) filter[row / 32] = word;
}

}  // namespace

int launch_prepare(const TopkPlan& plan, const TopkParams& params, const Workspace& w, int first,
                   int count, void* stream) {
  const IndexView& index = params.index;
  const PrepareArgs args{params.queries, params.dtype, params.query_stride,
                         index.mean,     index.dim,    padded_dim(index),
                         plan.columns,   plan.planes,  index.scan == kInt8,
                         index.metric,   first,        count,
                         w.states,       w.panels,     w.values,
                         w.raw};
  const int columns = (count + plan.columns - 1) / plan.columns * plan.columns;
  const dim3 grid(static_cast<unsigned>(columns));
  return KNN_LAUNCH(topk_prepare_kernel, grid, kThreads, 128, stream, args);
}

int launch_filter(const IndexView& index, const IdSet& allow, const IdSet& deny, uint32_t* filter,
                  void* stream) {
  if (index.rows == 0) return cudaSuccess;
  // Whole tiles: the scan reads the words of a tile's eight bins.
  const dim3 grid(static_cast<unsigned>((index.rows + kTileRows - 1) / kTileRows));
  return KNN_LAUNCH(topk_filter_kernel, grid, 256, 0, stream, index, allow, deny, filter);
}

}  // namespace cuda
}  // namespace knnfast
