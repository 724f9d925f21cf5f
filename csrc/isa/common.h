// SPDX-License-Identifier: Apache-2.0
// Loops that every instruction set shares: plain C++ that the compiler vectorises for the unit that
// includes it. All of it is static, so that no unit's code leaks into another.
#pragma once

#include <math.h>
#include <string.h>

#include "isa/kernels.h"

namespace knnfast {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    memcpy(&bits, &value, 4);
  } else {
    bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  bits |= sign;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest, ties to even; overflow gives infinity, NaN stays NaN.
inline uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // ulp of 0.5 is 2^-24: the addition rounds for us
    memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float larger(float a, float b) { return a > b ? a : b; }  // fmaxf would be called

// The residual of a row from rr = Σ(y - a·c)² and yy = Σy². y - a·c is computed in float (each step
// correctly rounded), the sums in double; what rounding may have hidden is added: 2^-22·‖y‖ for the
// two steps and for y itself, and a crumb for squares that underflow.
inline float residual_bound(double rr, double yy, int dim) {
  return static_cast<float>(
      (sqrt(rr) + 0x1p-22 * sqrt(yy) + 1e-18 * sqrt(static_cast<double>(dim))) * (1 + 1e-6));
}

template <void (*ToFloat)(const uint16_t*, float*, int64_t)>
void centre_row_plain(const uint16_t* x, float factor, const float* mean, int dim, float* y) {
  ToFloat(x, y, dim);
#pragma omp simd
  for (int j = 0; j < dim; ++j) y[j] = y[j] * factor - mean[j];
  for (int j = dim; j % 16; ++j) y[j] = 0;
}

inline void quantize_row_plain(const float* y, int dim, uint8_t* codes, float* scale,
                               float* residual, float* norm) {
  float top = 0;
#pragma omp simd reduction(max : top)
  for (int j = 0; j < dim; ++j) {
    const float size = fabsf(y[j]);
    top = larger(size, top);
  }
  const bool tiny = !(top > 1e-30f);
  const float a = tiny ? 0 : top / 127, inverse = tiny ? 0 : 127 / top;
  double rr = 0, yy = 0;
  constexpr int kStep = 256;
  for (int begin = 0; begin < dim; begin += kStep) {
    const int n = dim - begin < kStep ? dim - begin : kStep;
    uint8_t c[kStep];
    const float* part = y + begin;
#pragma omp simd reduction(+ : rr, yy)
    for (int j = 0; j < n; ++j) {
      const float t = part[j] * inverse;
      const int code = static_cast<int>(t + (t < 0 ? -0.5f : 0.5f));
      const float r = part[j] - a * static_cast<float>(code);
      rr += static_cast<double>(r) * r;
      yy += static_cast<double>(part[j]) * part[j];
      c[j] = static_cast<uint8_t>(code + 128);
    }
    for (int j = n; j % kBlockDims; ++j) c[j] = 128;
    uint8_t* out = codes + begin / kBlockDims * (kBlockRows * kBlockDims);
    for (int j = 0; j < n; j += kBlockDims, out += kBlockRows * kBlockDims) memcpy(out, c + j, 4);
  }
  *scale = a;
  *norm = static_cast<float>(sqrt(yy));
  *residual = residual_bound(rr, yy, dim);
}

inline double squares(const float* x, int n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < n; ++j) sum += static_cast<double>(x[j]) * x[j];
  return sum;
}

inline float round_row(const float* y, int dim, float largest, float longest, int16_t* out,
                       float* lost) {
  float top = 0, most = 0;  // of squares, kSumLength of them
  for (int begin = 0; begin < dim; begin += kSumLength) {
    const int n = dim - begin < kSumLength ? dim - begin : kSumLength;
    const float* part = y + begin;
    float square = 0;
#pragma omp simd reduction(max : top) reduction(+ : square)
    for (int j = 0; j < n; ++j) {
      top = larger(fabsf(part[j]), top);
      square += part[j] * part[j];
    }
    most = larger(square, most);
  }
  if (!(top > 1e-15f)) return 0;
  const float by_top = largest / top, by_part = longest / sqrtf(most);
  const float u = (by_top < by_part ? by_top : by_part) * (1 - 1e-5f);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < dim; ++j) {
    const float x = y[j] * u;
    const int nearest = static_cast<int>(x + (x < 0 ? -0.5f : 0.5f));
    const float rest = x - static_cast<float>(nearest);
    sum += rest * rest;
    out[j] = static_cast<int16_t>(nearest);
  }
  *lost = sum;
  return u;
}

inline void scale_row(float* x, float factor, const float* factors, int n) {
#pragma omp simd
  for (int j = 0; j < n; ++j) x[j] *= factor * factors[j];
}

// The first test of a pair, at a stop or at the end: bounds of all pairs would cost as much as
// their sums. Divided by mul·scale, u >= tau (kernels.h) says
//   c·p >= (tau - base)/mul · 1/scale - left/mul · share·norm/scale
//          - (err·residual + err_norm·norm + sq·norm²)/mul · 1/scale
// and with the largest err/mul, err_norm/mul and sq/mul of a test's queries the last term is the
// row's alone: four operations a pair. Every term is on the safe side by 2^-18 of itself, more than
// the rounding of floats can take away, here and in bound(). Rows of scale 0 give a NaN or
// -infinity, and pass.
struct FirstTerms {
  float err = 0, err_norm = 0, sq = -INFINITY;  // over mul, the largest; sq is negative

  void add(const ScanQuery& s, int stop) {
    err = larger(err, s.err[stop] / s.mul * (1 + 0x1p-18f));
    err_norm = larger(err_norm, s.err_norm[stop] / s.mul * (1 + 0x1p-18f));
    sq = larger(sq, s.sq / s.mul * (1 - 0x1p-18f));
  }
  static float need(const ScanQuery& s) {  // (tau - base)/mul
    const float rounding = (fabsf(s.tau) + fabsf(s.base)) * 0x1p-18f;
    const float quotient = (s.tau - s.base - rounding) / s.mul;
    return quotient - fabsf(quotient) * 0x1p-18f;
  }
};

struct StopTest : FirstTerms {
  const int stop;
  int32_t start[kGroup];              // of sums, without windows
  float needs[kGroup], left[kGroup];  // need() of each, left/mul

  StopTest(const ScanQuery* queries, int nq, int first_stop) : stop(first_stop) {
    for (int q = 0; q < nq; ++q) {
      const ScanQuery& s = queries[q];
      start[q] = s.offset + s.rest[stop];
      left[q] = s.left[stop] / s.mul * (1 + 0x1p-18f);
      needs[q] = need(s);
      add(s, stop);
    }
  }
};

// The first block from `block` on with a live row, or `end`.
inline uint32_t next_live(const ScanRows& rows, uint32_t block, uint32_t end) {
  if (rows.live)
    while (block < end && !rows.live[block]) ++block;
  return block < end ? block : end;
}

// Blocks that are scanned together: two with live rows, one where there is no other, or none.
struct Blocks {
  uint32_t first, apart = 0;
  int count = 0;

  Blocks(const ScanRows& rows, uint32_t from, uint32_t end) : first(next_live(rows, from, end)) {
    if (first == end) return;
    const uint32_t second = next_live(rows, first + 1, end);
    count = second < end ? 2 : 1;
    if (count == 2) apart = second - first;
  }
  uint32_t behind() const { return first + apart + 1; }
};

}  // namespace
}  // namespace knnfast
