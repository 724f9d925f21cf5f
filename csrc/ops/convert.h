// SPDX-License-Identifier: Apache-2.0
// Rows of FP16 and BF16 to FP32 and back, for one instruction set.
#pragma once

#include "ops/ops_kernels.h"
#include "ops/vec.h"

namespace knnfast {
namespace KNNFAST_ISA {

KF_INLINE float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
KF_INLINE uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

KF_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  // Scaling by 2^112 restores the exponent, subnormals included.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
#endif
}
KF_INLINE uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000;
  const uint32_t rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: let the FP32 adder round at 2^-24
    const float magic = 0.5f;
    return uint16_t(sign | (float_bits(bits_float(rest) + magic) - float_bits(magic)));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
#endif
}
KF_INLINE float bfloat_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }
KF_INLINE uint16_t float_to_bfloat(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

KF_INLINE void to_float(const void* src, int dtype, float* dst, int64_t n) {
  if (dtype == kFloat32) {
    memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (int64_t j = 0; j < n; ++j) dst[j] = bfloat_to_float(p[j]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= n; j += 16)
      _mm512_storeu_ps(dst + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + j))));
#elif defined(__AVX2__)
    for (; j + 8 <= n; j += 8)
      _mm256_storeu_ps(dst + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + j))));
#endif
    for (; j < n; ++j) dst[j] = half_to_float(p[j]);
  }
}
KF_INLINE void to_float(const void* src, int, double* dst, int64_t n) {
  memcpy(dst, src, size_t(n) * 8);
}

KF_INLINE void from_float(const float* src, void* dst, int dtype, int64_t n) {
  if (dtype == kFloat32) {
    if (dst != src) memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == kBFloat16) {
    uint16_t* p = static_cast<uint16_t*>(dst);
    for (int64_t j = 0; j < n; ++j) p[j] = float_to_bfloat(src[j]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst);
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= n; j += 16)
      _mm256_storeu_si256((__m256i*)(p + j), _mm512_cvtps_ph(_mm512_loadu_ps(src + j), 0));
#elif defined(__AVX2__)
    for (; j + 8 <= n; j += 8)
      _mm_storeu_si128((__m128i*)(p + j), _mm256_cvtps_ph(_mm256_loadu_ps(src + j), 0));
#endif
    for (; j < n; ++j) p[j] = float_to_half(src[j]);
  }
}
KF_INLINE void from_float(const double* src, void* dst, int, int64_t n) {
  if (dst != src) memcpy(dst, src, size_t(n) * 8);
}

KF_INLINE int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

}  // namespace KNNFAST_ISA
}  // namespace knnfast
