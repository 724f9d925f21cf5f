// SPDX-License-Identifier: Apache-2.0
// Rows into the device layout of topk_cuda.h and out of it: conversion, codes, mean, gather.
//
//   y = x - μ (cosine: x/‖x‖ - μ),  a = max|y_j| / 127,  c_j = round(y_j / a),  r = y - a·c
// Each is one pass over the rows, one warp a row, bound by memory. Norms and residuals are FP64
// sums of the stored numbers, rounded up. Never run on a GPU yet.
#include "cuda/topk_cuda.cuh"

namespace knnfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int x = 16; x; x >>= 1) v += __shfl_xor_sync(~0u, v, x);
  return v;
}

__device__ __forceinline__ float norm_up(double squares) {
  return static_cast<float>(sqrt(squares) * (1 + 0x1p-22)) + (squares > 0 ? 0x1p-126f : 0.0f);
}

__device__ __forceinline__ const unsigned char* half_unit(const unsigned char* half, int64_t row,
                                                          int unit, int slices) {
  const int in_tile = static_cast<int>(row % kTileRows);
  return half + slice_offset(row - in_tile, unit / 8, slices) + unit_offset(in_tile, unit % 8);
}

__device__ __forceinline__ uint16_t word_half(const uint4& w, int i) {
  const uint32_t part = i < 2 ? w.x : i < 4 ? w.y : i < 6 ? w.z : w.w;
  return static_cast<uint16_t>(part >> (i % 2 * 16));
}

// `1/‖x‖` as the codes of a cosine index mean it: FP64, 0 for a zero row.
__device__ __forceinline__ double unit_factor(double squares) {
  return squares > 0 ? 1 / sqrt(squares) : 0;
}

__global__ void __launch_bounds__(kThreads) topk_pack_kernel(PackParams a, int slices) {
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= a.n) return;
  const int64_t row = a.start + i;
  double squares = 0;
  bool bad = false;
  for (int unit = lane; unit < slices * 8; unit += 32) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = unit * 8 + w * 2 + e;
        if (j >= a.dim) continue;
        const int64_t at = i * a.stride + j;
        float v;
        if (a.dtype == kF32) {
          v = static_cast<const float*>(a.rows)[at];
        } else {
          const uint16_t bits = static_cast<const uint16_t*>(a.rows)[at];
          v = a.dtype == kF16 ? half_bits_to_float(bits)
                              : __uint_as_float(static_cast<unsigned>(bits) << 16);
        }
        const uint16_t h = float_to_half_bits(v);
        bad |= (h & 0x7c00) == 0x7c00;
        const double x = half_bits_to_float(h);
        squares += x * x;
        words[w] |= static_cast<uint32_t>(h) << (16 * e);
      }
    }
    *reinterpret_cast<uint4*>(const_cast<unsigned char*>(half_unit(a.half, row, unit, slices))) = {
        words[0], words[1], words[2], words[3]};
  }
  squares = warp_sum(squares);
  if (__any_sync(~0u, bad) && lane == 0) atomicOr(a.bad, 1);
  if (lane == 0) {
    const double weight = a.metric == kCosine ? unit_factor(squares)
                          : a.metric == kL2   ? squares / 2
                                              : 0;
    a.half_terms[row] = {norm_up(squares), static_cast<float>(weight)};
    atomicOr(&a.alive[row / 32], 1u << (row % 32));
  }
}

__global__ void __launch_bounds__(kThreads) topk_quantize_kernel(QuantizeParams a, int slices) {
  const int lane = threadIdx.x % 32, half_of = half_slices(a.dim);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= a.n) return;
  const int64_t row = a.start + i;
  auto element = [&](int j) -> double {
    if (j >= a.dim) return 0;
    const unsigned char* unit = half_unit(a.segment.half, row, j / 8, half_of);
    return half_bits_to_float(reinterpret_cast<const uint16_t*>(unit)[j % 8]);
  };
  double factor = 1;
  if (a.metric == kCosine) {
    double squares = 0;
    for (int j = lane; j < a.dim; j += 32) squares += element(j) * element(j);
    factor = unit_factor(warp_sum(squares));
  }
  double top = 0;
  for (int j = lane; j < a.dim; j += 32)
    top = fmax(top, fabs(element(j) * factor - static_cast<double>(a.mean[j])));
#pragma unroll
  for (int x = 16; x; x >>= 1) top = fmax(top, __shfl_xor_sync(~0u, top, x));
  const float scale = top > 1e-30 ? static_cast<float>(top / 127) : 0.0f;

  const int in_tile = static_cast<int>(row % kTileRows);
  double rr = 0, cc = 0, yy = 0;
  for (int unit = lane; unit < slices * 8; unit += 32) {
    uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int j = unit * 16 + e;
      const double y = j < a.dim ? element(j) * factor - static_cast<double>(a.mean[j]) : 0;
      int c = scale > 0 ? static_cast<int>(rint(y / scale)) : 0;
      c = max(-127, min(127, c));
      const double approximate = static_cast<double>(scale) * c;
      rr += (y - approximate) * (y - approximate);
      cc += approximate * approximate;
      yy += y * y;
      words[e / 4] |= static_cast<uint32_t>(c & 255) << (e % 4 * 8);
    }
    *reinterpret_cast<uint4*>(a.codes + slice_offset(row - in_tile, unit / 8, slices) +
                              unit_offset(in_tile, unit % 8)) = {words[0], words[1], words[2],
                                                                 words[3]};
  }
  rr = warp_sum(rr);
  cc = warp_sum(cc);
  yy = warp_sum(yy);
  if (lane == 0)
    a.code_terms[row] = {scale, norm_up(rr), norm_up(cc),
                         a.metric == kL2 ? static_cast<float>(yy / 2) : 0.0f};
}

constexpr int kMeanRows = 4096;  // of a sample: the mean needs no more

// One block a unit of eight dimensions.
__global__ void __launch_bounds__(kThreads)
    topk_mean_kernel(SegmentView segment, int64_t n, int dim, Metric metric, float* mean) {
  KNN_DYN_SMEM(shared);
  double* partial = reinterpret_cast<double*>(shared);  // [warps][8]
  const int unit = blockIdx.x, thread = threadIdx.x, slices = half_slices(dim);
  const int64_t samples = n < kMeanRows ? n : kMeanRows;
  double sums[8] = {};
  if (unit * 8 < dim) {
    for (int64_t i = thread; i < samples; i += kThreads) {
      const int64_t row = i * n / samples;
      const uint4 words =
          *reinterpret_cast<const uint4*>(half_unit(segment.half, row, unit, slices));
      const double factor =
          metric == kCosine ? static_cast<double>(segment.half_terms[row].weight) : 1;
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e] += half_bits_to_float(word_half(words, e)) * factor;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const double sum = warp_sum(sums[e]);
    if (thread % 32 == 0) partial[thread / 32 * 8 + e] = sum;
  }
  __syncthreads();
  if (thread < 8) {
    double sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w * 8 + thread];
    mean[unit * 8 + thread] = samples ? static_cast<float>(sum / static_cast<double>(samples)) : 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    topk_gather_kernel(IndexView index, const int64_t* positions, int64_t n, uint16_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= n) return;
  const int64_t position = positions[i];
  const int slices = half_slices(index.dim);
  for (int j = threadIdx.x % 32; j < index.dim; j += 32) {
    uint16_t value = 0;
    if (position >= 0) {
      const SegmentView& s = index.segments[position / index.rows_per_segment];
      const unsigned char* unit =
          half_unit(s.half, position % index.rows_per_segment, j / 8, slices);
      value = reinterpret_cast<const uint16_t*>(unit)[j % 8];
    }
    out[i * index.dim + j] = value;
  }
}

unsigned warps_grid(int64_t n) {
  return static_cast<unsigned>((n + kThreads / 32 - 1) / (kThreads / 32));
}

}  // namespace

int launch_pack(const PackParams& params, void* stream) {
  if (params.n == 0) return cudaSuccess;
  return KNN_LAUNCH(topk_pack_kernel, warps_grid(params.n), kThreads, 0, stream, params,
                    half_slices(params.dim));
}

int launch_quantize(const QuantizeParams& params, void* stream) {
  if (params.n == 0) return cudaSuccess;
  return KNN_LAUNCH(topk_quantize_kernel, warps_grid(params.n), kThreads, 0, stream, params,
                    code_slices(params.dim));
}

int launch_mean(const SegmentView& segment, int64_t n, int dim, Metric metric, float* mean,
                void* stream) {
  const unsigned units = static_cast<unsigned>(code_slices(dim)) * 16;
  return KNN_LAUNCH(topk_mean_kernel, units, kThreads, kThreads / 32 * 8 * sizeof(double), stream,
                    segment, n, dim, metric, mean);
}

int launch_gather(const IndexView& index, const int64_t* positions, int64_t n, uint16_t* out,
                  void* stream) {
  if (n == 0) return cudaSuccess;
  return KNN_LAUNCH(topk_gather_kernel, warps_grid(n), kThreads, 0, stream, index, positions, n,
                    out);
}

}  // namespace cuda
}  // namespace knnfast
