// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set: GCC's vector types, exp, log and Philox. Included only by units
// compiled for that instruction set; KNNFAST_ISA names the namespace that keeps the copies apart.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KF_INLINE static inline __attribute__((always_inline, unused))

namespace knnfast {
namespace KNNFAST_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kBytes), may_alias));
  typedef float loose __attribute__((vector_size(kBytes), may_alias, aligned(4)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kBytes), may_alias));
  typedef double loose __attribute__((vector_size(kBytes), may_alias, aligned(8)));
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanes = kBytes / int(sizeof(S));

typedef Vec<float> vf;
typedef int32_t vi __attribute__((vector_size(kBytes), may_alias));
typedef uint32_t vu __attribute__((vector_size(kBytes), may_alias));
typedef uint64_t vu64 __attribute__((vector_size(kBytes), may_alias));

template <class S>
KF_INLINE Vec<S> load(const S* p) {
  return Vec<S>(*reinterpret_cast<const typename VecOf<S>::loose*>(p));
}
template <class S>
KF_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename VecOf<S>::loose*>(p) = v;
}
// Broadcasts by name: from 0 + s the compiler makes an addition and a shuffle.
#if defined(__AVX512F__)
KF_INLINE Vec<float> splat(float s) { return (Vec<float>)_mm512_set1_ps(s); }
KF_INLINE Vec<double> splat(double s) { return (Vec<double>)_mm512_set1_pd(s); }
#elif defined(__AVX2__)
KF_INLINE Vec<float> splat(float s) { return (Vec<float>)_mm256_set1_ps(s); }
KF_INLINE Vec<double> splat(double s) { return (Vec<double>)_mm256_set1_pd(s); }
#else
KF_INLINE Vec<float> splat(float s) { return Vec<float>{s, s, s, s}; }
KF_INLINE Vec<double> splat(double s) { return Vec<double>{s, s}; }
#endif
template <class S>
KF_INLINE Vec<S> max(Vec<S> a, Vec<S> b) {
  return a > b ? a : b;
}
template <class S>
KF_INLINE S sum(Vec<S> v) {
  S s = 0;
  for (int l = 0; l < kLanes<S>; ++l) s += v[l];
  return s;
}
template <class S>
KF_INLINE S max_lane(Vec<S> v) {
  S m = v[0];
  for (int l = 1; l < kLanes<S>; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

KF_INLINE vf as_float(vi v) { return (vf)v; }
KF_INLINE vi as_int(vf v) { return (vi)v; }

// e^x for x <= 88, relative error below 2e-7; 0 below -87.3, NaN of NaN (as max's second).
KF_INLINE vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf y = max<float>(splat(-88.0f), x);
  const vf t = y * 1.44269504088896341f + magic;
  const vf n = t - magic;
  const vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const vi bits = (as_int(t) - as_int(magic) + 127) << 23;
  const vf e = p * as_float(bits);
  return x < -87.3f ? vf{} : e;
}

// ln x for normal x > 0, error below 2 ulp, and near 1 relative to the result.
KF_INLINE vf log(vf x) {
  const vi bits = as_int(x) - 0x3f3504f3;  // the exponent changes at sqrt(1/2)
  const vi e = bits >> 23;
  const vf f = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const vf n = __builtin_convertvector(e, vf);
  const vf f2 = f * f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vf y = p * f * f2 + n * -2.12194440e-4f - f2 * 0.5f;
  return (f + y) + n * 0.693359375f;
}

typedef Vec<double> vd;
KF_INLINE vd exp(vd x) {
  vd y = x;
  for (int l = 0; l < kLanes<double>; ++l) y[l] = ::exp(x[l]);
  return y;
}
KF_INLINE vd log(vd x) {
  vd y = x;
  for (int l = 0; l < kLanes<double>; ++l) y[l] = ::log(x[l]);
  return y;
}

// Products of the low halves of 64-bit lanes; the high halves are ignored.
KF_INLINE vu64 mul32(vu64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * uint64_t(m);
#endif
}

constexpr int kBlocks = kBytes / 8;  // Philox blocks at a time, one a 64-bit lane
constexpr int kWords = 4 * kBlocks;  // so many classes, two vectors of words
struct Noise {
  vu lo, hi;  // words of classes [0, kWords / 2) and [kWords / 2, kWords) from the first block's
};

// The words of blocks c0 .. c0 + kBlocks - 1, in class order.
KF_INLINE Noise philox_blocks(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  vu64 a{}, b = vu64{} + c1, c = vu64{} + c2, d = vu64{} + c3;
  // Even lanes hold blocks 0, 1, .., odd lanes those half a vector later: unpacking restores order.
  for (int l = 0; l < kBlocks; ++l) a[l] = uint32_t(c0 + l / 2 + (l & 1) * (kBlocks / 2));
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vu64 p0 = mul32(a, 0xD2511F53u), p1 = mul32(c, 0xCD9E8D57u);
    a = (p1 >> 32) ^ b ^ uint64_t(k0);
    c = (p0 >> 32) ^ d ^ uint64_t(k1);
    b = p1;
    d = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const vu64 low = vu64{} + 0xffffffffu;
  const vu64 ab = (a & low) | (b << 32), cd = (c & low) | (d << 32);
  Noise out;
#if defined(__AVX512F__)
  out.lo = (vu)_mm512_unpacklo_epi64((__m512i)ab, (__m512i)cd);
  out.hi = (vu)_mm512_unpackhi_epi64((__m512i)ab, (__m512i)cd);
#elif defined(__AVX2__)
  out.lo = (vu)_mm256_unpacklo_epi64((__m256i)ab, (__m256i)cd);
  out.hi = (vu)_mm256_unpackhi_epi64((__m256i)ab, (__m256i)cd);
#else
  out.lo = (vu)vu64{ab[0], cd[0]};
  out.hi = (vu)vu64{ab[1], cd[1]};
#endif
  return out;
}

// -ln(-ln(1 - v)), v = (word + 1/2) 2^-32. Above v = 1/2 the complemented word gives 1 - v exactly;
// below, the rounding of 1 - v is put back to first order. Neither end can occur.
KF_INLINE vf gumbel(vu word) {
  const vf scale = splat(0x1p-32f), half = splat(0x1p-33f);
  const vf v = __builtin_convertvector(word, vf) * scale + half;
  const vf u = __builtin_convertvector(~word, vf) * scale + half;
  const vf lost = v < 0.5f ? ((1.0f - u) - v) / u : vf{};
  return -log(-(log(u) + lost));
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
