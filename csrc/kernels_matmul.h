// SPDX-License-Identifier: Apache-2.0
// FP32 matrix products, for rotations (rotation.h). Floor: rows·inner·cols multiplications at the
// unit's rate. A tile is some rows of `a` by two registers of columns; kSumLength products are
// summed in registers, and b's part for them stays in the first cache while all rows pass.
#pragma once

#include <stddef.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace knnfast {
namespace {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
typedef __m512 Floats;
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats multiply_add(float a, Floats b, Floats c) {
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
}
#elif defined(__AVX2__)
constexpr int kFloats = 8;
typedef __m256 Floats;
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats multiply_add(float a, Floats b, Floats c) {
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
}
#else
constexpr int kFloats = 4;
typedef float Floats __attribute__((vector_size(16)));
inline Floats load_floats(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store_floats(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline Floats multiply_add(float a, Floats b, Floats c) { return a * b + c; }
#endif

template <int NR>
inline void matmul_tile(const float* a, int inner, const float* b, int cols, bool first,
                        float* out) {
  Floats sums[NR][2] = {};
  for (int j = 0; j < kSumLength; ++j, b += kPanel) {
    const Floats b0 = load_floats(b), b1 = load_floats(b + kFloats);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const float x = a[static_cast<size_t>(r) * inner + j];
      sums[r][0] = multiply_add(x, b0, sums[r][0]);
      sums[r][1] = multiply_add(x, b1, sums[r][1]);
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int i = 0; i < 2; ++i) {
      float* to = out + static_cast<size_t>(r) * cols + i * kFloats;
      store_floats(to, first ? sums[r][i] : load_floats(to) + sums[r][i]);
    }
}

void matmul(const float* a, int rows, int inner, const float* b, int cols, float* out) {
  constexpr int kRows = kFloats == 16 ? 8 : 4;
  for (int panel = 0; panel < cols; panel += kPanel, b += static_cast<size_t>(inner) * kPanel)
    for (int j = 0; j < inner; j += kSumLength)
      for (int i = 0; i < kPanel; i += 2 * kFloats) {
        const float* part = b + static_cast<size_t>(j) * kPanel + i;
        int r = 0;
        for (; r + kRows <= rows; r += kRows)
          matmul_tile<kRows>(a + static_cast<size_t>(r) * inner + j, inner, part, cols, j == 0,
                             out + static_cast<size_t>(r) * cols + panel + i);
        for (; r < rows; ++r)
          matmul_tile<1>(a + static_cast<size_t>(r) * inner + j, inner, part, cols, j == 0,
                         out + static_cast<size_t>(r) * cols + panel + i);
      }
}

}  // namespace
}  // namespace knnfast
