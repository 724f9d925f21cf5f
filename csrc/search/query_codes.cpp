// SPDX-License-Identifier: Apache-2.0
#include "search/query_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/thread_pool.h"
#include "search/collector.h"
#include "search/rotation.h"

namespace knnfast {

size_t padded(int64_t dim) {
  return static_cast<size_t>((dim + kQueryPad - 1) / kQueryPad * kQueryPad);
}

// The smallest step that keeps a query's codes in range (kernels.h), rounding included.
static double query_step(const double* v, int64_t dim, int window) {
  if (window == 0) {
    double top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < dim; ++j) top = std::max(top, std::fabs(v[j]));
    return top / 127;
  }
  static_assert(kBlockDims == 4, "a half of a window: the first or the last two of each group");
  double pair = 0, sum = 0;
  for (int64_t first = 0; first < dim; first += window * kBlockDims) {
    double halves[2] = {};
    for (int64_t j = first; j < std::min(dim, first + window * kBlockDims); j += 2) {
      const double both = std::fabs(v[j]) + (j + 1 < dim ? std::fabs(v[j + 1]) : 0);
      halves[j / 2 % 2] += both;
      pair = std::max(pair, both);
    }
    sum = std::max(sum, std::max(halves[0], halves[1]));
  }
  return std::max(pair / (kPairSum - 1), sum / (kWindowSum - window));
}

// Codes p [dim] of v, and for a kernel with windows their offsets; without v's norm.
static QueryCodes quantize_query(const double* v, int64_t dim, int window, int8_t* p,
                                 int32_t* offsets) {
  const double least = query_step(v, dim, window);
  const bool tiny = !(least > 1e-27);
  QueryCodes c{tiny ? 1.0 : least, 0, 0, 0, 0};
  const double inverse = tiny ? 0.0 : 1 / least;
  double error = 0;
  int32_t sum = 0;
#pragma omp simd reduction(+ : error, sum)
  for (int64_t j = 0; j < dim; ++j) {
    const double t = v[j] * inverse;
    const int code = static_cast<int>(t + (t < 0 ? -0.5 : 0.5));
    const double w = v[j] - c.step * code;
    error += w * w;
    sum += code;
    p[j] = static_cast<int8_t>(code);
  }
  c.error = std::sqrt(error) * (1 + 1e-9);
  c.offset = -128 * sum;
  if (window == 0) return c;
  for (int64_t first = 0; first < dim; first += window * kBlockDims, ++offsets) {
    int halves[2] = {};
    for (int64_t j = first; j < std::min(dim, first + window * kBlockDims); ++j)
      halves[j / 2 % 2] += p[j];
    *offsets = static_cast<int32_t>((static_cast<uint32_t>(-128 * halves[0]) & 0xffff) |
                                    static_cast<uint32_t>(-128 * halves[1]) << 16);
  }
  return c;
}

// Codes [16, stride] as tiles.
static void to_tiles(const int8_t* codes, size_t stride, int8_t* tiles) {
  for (size_t j = 0; j < stride; j += kQueryPad)
    for (size_t q = 0; q < kTileQueries; ++q, tiles += kQueryPad)
      std::memcpy(tiles, codes + q * stride + j, kQueryPad);
}

void CodedQueries::code(int64_t n, int64_t dim, int window, bool tiled, const Rotation* rotation,
                        int threads) {
  const size_t pad = padded(dim), count = static_cast<size_t>(n);
  const size_t windows = window ? pad / (static_cast<size_t>(window) * kBlockDims) : 0;
  const size_t whole = (count + kTileQueries - 1) / kTileQueries * kTileQueries;  // tiles
  codes.assign((tiled ? whole : count) * pad, 0);
  if (tiled) tiles.resize(codes.size());
  offsets.resize(count * windows);
  quantized.resize(count);
  if (rotation) {
    straight_.assign(v.begin(), v.end());
    turned_.resize(v.size());
  }
  const auto work = [&](int, int64_t tile) {
    const size_t first = static_cast<size_t>(tile) * kTileQueries;
    const size_t end = std::min(count, first + kTileQueries), at = first * pad;
    if (rotation)
      rotate(*rotation, straight_.data() + at, static_cast<int64_t>(end - first),
             turned_.data() + at);
    for (size_t i = first; i < end; ++i) {
      double* x = v.data() + i * pad;
      double square = 0;
      kernels().dot(x, 1, x, 1, pad, static_cast<int>(dim), &square);
      if (rotation) std::copy_n(turned_.data() + i * pad, pad, x);
      QueryCodes& c = quantized[i] =
          quantize_query(x, dim, window, codes.data() + i * pad, offsets.data() + i * windows);
      c.norm = std::sqrt(square) * (1 + 1e-9);
      if (!rotation) continue;
      c.slack = rotation->slack() * c.norm;
      c.error += c.slack;
    }
    if (tiled) to_tiles(codes.data() + at, pad, tiles.data() + at);
  };
  parallel_for((n + kTileQueries - 1) / kTileQueries, work, threads);
}

void CodedQueries::code_centred(const AlignedVector<double>& straight, const CodedQueries& rotated,
                                const Codes& codes, const Query* queries, int64_t n, int64_t dim,
                                int window, bool tiled) {
  constexpr double kApart = 16;  // beyond, a difference of rotated vectors is too inaccurate
  const size_t pad = padded(dim), count = static_cast<size_t>(n), d = static_cast<size_t>(dim);
  const Rotation* rotation = codes.rotation.get();
  v.assign(straight.begin(), straight.end());
  norms_.resize(count);
  slacks_.assign(count, 0);
  for (size_t i = 0; i < count; ++i) {
    double* x = v.data() + i * pad;
    const double scale = queries[i].scale;
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (size_t j = 0; j < d; ++j) {
      x[j] -= static_cast<double>(codes.mean[j]) * scale;
      square += x[j] * x[j];
    }
    norms_[i] = std::sqrt(square) * (1 + 1e-9);
    if (!rotation) continue;
    const double sizes = rotated.quantized[i].norm + codes.mean_norm * scale * (1 + 1e-9);
    if (sizes <= kApart * norms_[i]) {
      for (size_t j = 0; j < d; ++j)
        x[j] = rotated.v[i * pad + j] - static_cast<double>(codes.turned_mean[j]) * scale;
      slacks_[i] = rotation->slack() * sizes;
    } else {
      straight_.assign(x, x + pad);
      turned_.resize(pad);
      rotate(*rotation, straight_.data(), 1, turned_.data());
      std::copy_n(turned_.data(), pad, x);
      slacks_[i] = rotation->slack() * norms_[i];
    }
  }
  code(n, dim, window, tiled, nullptr, 1);
  for (size_t i = 0; i < count; ++i) {
    quantized[i].norm = norms_[i];
    quantized[i].slack = slacks_[i];
    quantized[i].error += slacks_[i];
  }
}

void fill_stops(ScanQuery& q, const QueryCodes& c, const double* v, int64_t dim, int window,
                bool stops, double row_scale) {
  const double arithmetic = 0x1p-18 * (c.norm + c.error);
  q.rest[kStops] = 0;
  q.left[kStops] = 0;
  q.err[kStops] = round_up((c.norm + c.error + arithmetic) * row_scale);
  q.err_norm[kStops] = round_up((c.error + arithmetic) * row_scale);
  if (!stops) return;
  const int groups = code_groups(dim);
  double square = 0;
  int32_t sum = 0;
  int64_t end = dim;
  for (int stop = kStops - 1; stop >= 0; --stop) {
    const int64_t begin = stop_group(groups, stop) * kBlockDims;
#pragma omp simd reduction(+ : square, sum)
    for (int64_t j = begin; j < end; ++j) {
      square += v[j] * v[j];
      sum += q.codes[j];
    }
    end = begin;
    q.rest[stop] = 128 * sum;
    q.left[stop] =
        round_up((std::sqrt(square) + c.slack + 1e-30) * row_scale * (1 + 0x1p-18) / 255);
  }
  double head = 0, error = 0;  // of v and v - step·p up to a stop
  int64_t begin = 0;
  for (int stop = 0; stop < kStops; ++stop) {
    end = std::min<int64_t>(dim, stop_end(groups, stop, window) * kBlockDims);
#pragma omp simd reduction(+ : head, error)
    for (int64_t j = begin; j < end; ++j) {
      const double w = v[j] - c.step * q.codes[j];
      head += v[j] * v[j];
      error += w * w;
    }
    begin = std::max(begin, end);
    // The slack is of all of q: it also holds what R's own error makes of it.
    const double off = std::sqrt(error) * (1 + 1e-9) + c.slack + arithmetic;
    q.err[stop] = round_up((std::sqrt(head) * (1 + 1e-9) + c.slack + off) * row_scale);
    q.err_norm[stop] = round_up(off * row_scale);
  }
}

}  // namespace knnfast
