// SPDX-License-Identifier: Apache-2.0
// Arithmetic intrinsics and atomics (only one fiber runs at a time, so plain code is atomic).
// Compile with -ffp-contract=off: the __d*_rn and __f*_rn functions must round once each.
#pragma once
#include "fibers.h"

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

namespace emu {
template <class To, class From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
}  // namespace emu

inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
inline long long __double_as_longlong(double v) { return emu::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emu::bits<double>(v); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7))) & 255;
    if (pick & 8) byte = byte >> 7 ? 255 : 0;  // its sign, spread
    out |= byte << (8 * i);
  }
  return out;
}

inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __fadd_rn(float a, float b) { return a + b; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}

template <class T, class U>
T atomicAdd(T* p, U v) {
  T old = *p;
  *p = old + static_cast<T>(v);
  return old;
}
template <class T, class U>
T atomicMax(T* p, U v) {
  T old = *p;
  *p = std::max(old, static_cast<T>(v));
  return old;
}
template <class T, class U>
T atomicOr(T* p, U v) {
  T old = *p;
  *p = old | static_cast<T>(v);
  return old;
}
