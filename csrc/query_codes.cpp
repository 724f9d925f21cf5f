// SPDX-License-Identifier: Apache-2.0
#include "query_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "collector.h"
#include "rotation.h"

namespace knnfast {

size_t padded(int64_t dim) {
  return static_cast<size_t>((dim + kQueryPad - 1) / kQueryPad * kQueryPad);
}

// The smallest step that keeps a query's codes in range (kernels.h), rounding included.
static double query_step(const double* v, int64_t dim, int window) {
  if (window == 0) {
    double top = 0;
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

// Codes p [dim] of v, and for a kernel with windows their offsets.
static QueryCodes quantize_query(const double* v, int64_t dim, int window, int8_t* p,
                                 int32_t* offsets) {
  const double least = query_step(v, dim, window);
  const bool tiny = !(least > 1e-27);
  QueryCodes c{tiny ? 1.0 : least, 0, 0, 0, 0};
  const double inverse = tiny ? 0.0 : 1 / least;
  double norm = 0, error = 0;
  int32_t sum = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const double t = v[j] * inverse;
    const int code = static_cast<int>(t + (t < 0 ? -0.5 : 0.5));
    const double w = v[j] - c.step * code;
    norm += v[j] * v[j];
    error += w * w;
    sum += code;
    p[j] = static_cast<int8_t>(code);
  }
  c.norm = std::sqrt(norm) * (1 + 1e-9);
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

// Codes [n, stride], n a multiple of 16, as tiles.
static void to_tiles(const AlignedVector<int8_t>& codes, size_t stride,
                     AlignedVector<int8_t>& tiles) {
  tiles.resize(codes.size());
  int8_t* out = tiles.data();
  for (size_t first = 0; first < codes.size(); first += kTileQueries * stride)
    for (size_t j = 0; j < stride; j += kQueryPad)
      for (size_t q = 0; q < kTileQueries; ++q, out += kQueryPad)
        std::memcpy(out, codes.data() + first + q * stride + j, kQueryPad);
}

void CodedQueries::code(int64_t n, int64_t dim, int window, bool tiled, const Rotation* rotation) {
  const size_t pad = padded(dim), count = static_cast<size_t>(n);
  const size_t windows = window ? pad / (static_cast<size_t>(window) * kBlockDims) : 0;
  codes.assign(v.size(), 0);
  offsets.resize(count * windows);
  quantized.resize(count);
  if (rotation) {
    norms_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      double square = 0;
      for (size_t j = i * pad; j < (i + 1) * pad; ++j) square += v[j] * v[j];
      norms_[i] = std::sqrt(square) * (1 + 1e-9);
    }
    straight_.assign(v.begin(), v.end());
    turned_.resize(count * pad);
    rotate(*rotation, straight_.data(), n, turned_.data());
    std::copy(turned_.begin(), turned_.end(), v.begin());
  }
  for (size_t i = 0; i < count; ++i) {
    QueryCodes& c = quantized[i] = quantize_query(
        v.data() + i * pad, dim, window, codes.data() + i * pad, offsets.data() + i * windows);
    if (!rotation) continue;
    c.norm = norms_[i];
    c.slack = rotation->slack() * norms_[i];
    c.error += c.slack;
  }
  if (tiled) to_tiles(codes, pad, tiles);
}

void fill_stops(ScanQuery& q, const double* v, int64_t dim, double slack, double row_scale) {
  // Kernels divide by what is left, and only the largest quotients of a batch count (StopTest).
  double least = 1e-30;
  for (int64_t j = 0; j < dim; ++j) least += 0x1p-8 * v[j] * v[j];
  double square = 0;
  int sum = 0;
  int64_t end = dim;
  for (int stop = kStops - 1; stop >= 0; --stop) {
    const int64_t begin = stop_group(code_groups(dim), stop) * kBlockDims;
    for (int64_t j = begin; j < end; ++j) {
      square += v[j] * v[j];
      sum += q.codes[j];
    }
    end = begin;
    q.rest[stop] = 128 * sum;
    const double norm = std::sqrt(std::max(square, least)) + slack;
    q.left[stop] = round_up(norm * row_scale * (1 + 0x1p-18) / 255);
  }
}

}  // namespace knnfast
