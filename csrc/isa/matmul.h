// SPDX-License-Identifier: Apache-2.0
// FP32 and int16 matrix products, for rotations (rotation.h). Floor: rows·inner·cols
// multiplications at the unit's rate, of which int16 has twice FP32's. A tile is some rows of `a`
// by two registers of columns; kSumLength products are summed in registers, and b's part for them
// stays in the first cache while all rows pass.
#pragma once

#include <stddef.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa/kernels.h"

namespace knnfast {
namespace {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
typedef __m512 Floats;
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats multiply_add(float a, Floats b, Floats c) {
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
}
typedef __m512i Words;
inline Words load(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Words multiply_add(int32_t a, Words b, Words c) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(c, _mm512_set1_epi32(a), b);
#else
  return _mm512_add_epi32(c, _mm512_madd_epi16(_mm512_set1_epi32(a), b));
#endif
}
inline Floats to_floats(Words v) { return _mm512_cvtepi32_ps(v); }
#elif defined(__AVX2__)
constexpr int kFloats = 8;
typedef __m256 Floats;
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats multiply_add(float a, Floats b, Floats c) {
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
}
typedef __m256i Words;
inline Words load(const int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words multiply_add(int32_t a, Words b, Words c) {
  return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_set1_epi32(a), b));
}
inline Floats to_floats(Words v) { return _mm256_cvtepi32_ps(v); }
#else
constexpr int kFloats = 4;
typedef float Floats __attribute__((vector_size(16)));
inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store_floats(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline Floats multiply_add(float a, Floats b, Floats c) { return a * b + c; }
typedef int32_t Words __attribute__((vector_size(16)));
inline Words load(const int16_t* p) {
  Words v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Words multiply_add(int32_t a, Words b, Words c) {
  typedef int16_t Halves __attribute__((vector_size(16)));
  const Words pair = Words{} + a;
  Halves x, y;
  memcpy(&x, &pair, sizeof x);
  memcpy(&y, &b, sizeof y);
  for (int i = 0; i < 4; ++i) c[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return c;
}
inline Floats to_floats(Words v) { return __builtin_convertvector(v, Floats); }
#endif

inline Floats to_floats(Floats v) { return v; }

// What a row of `a` gives at a time: a float, or a pair of whole numbers.
inline float factor(const float* a) { return *a; }
inline int32_t factor(const int16_t* a) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return pair;
}

template <int NR, class T>
inline void matmul_tile(const T* a, int inner, const T* b, int cols, bool first, float* out) {
  constexpr int kStep = sizeof(float) / sizeof(T);
  decltype(load(b)) sums[NR][2] = {};
  for (int j = 0; j < kSumLength; j += kStep, b += kPanel * kStep) {
    const auto b0 = load(b), b1 = load(b + kFloats * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const auto x = factor(a + static_cast<size_t>(r) * inner + j);
      sums[r][0] = multiply_add(x, b0, sums[r][0]);
      sums[r][1] = multiply_add(x, b1, sums[r][1]);
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int i = 0; i < 2; ++i) {
      const Floats sum = to_floats(sums[r][i]);
      float* to = out + static_cast<size_t>(r) * cols + i * kFloats;
      store_floats(to, first ? sum : load(to) + sum);
    }
}

template <class A, class T>
void matmul(A* a, int rows, int inner, const T* b, int cols, float* out) {
  constexpr int kRows = kFloats == 16 ? 8 : 4, kStep = sizeof(float) / sizeof(T);
  for (int panel = 0; panel < cols; panel += kPanel, b += static_cast<size_t>(inner) * kPanel)
    for (int j = 0; j < inner; j += kSumLength)
      for (int i = 0; i < kPanel; i += 2 * kFloats) {
        const T* part = b + static_cast<size_t>(j) * kPanel + i * kStep;
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
