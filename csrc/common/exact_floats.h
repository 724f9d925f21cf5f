// SPDX-License-Identifier: Apache-2.0
// How a thread rounds: to nearest, and subnormals count. A caller's flush-to-zero mode, which new
// threads inherit, would change the canonical score.
#pragma once

#include <cstdint>
#ifdef KNNFAST_X86
#include <xmmintrin.h>
#endif

namespace knnfast {

#if defined(KNNFAST_X86)
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
constexpr uint64_t kExactFloats = 0x1f80;  // no exception traps
#elif defined(__aarch64__)
inline uint64_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
constexpr uint64_t kExactFloats = 0;
#else  // IEEE 754 as it comes
inline uint64_t float_mode() { return 0; }
inline void set_float_mode(uint64_t) {}
constexpr uint64_t kExactFloats = 0;
#endif

// While it lives, its thread computes so.
class ExactFloats {
 public:
  ExactFloats() : saved_(float_mode()) { set_float_mode(kExactFloats); }
  ~ExactFloats() { set_float_mode(saved_); }
  ExactFloats(const ExactFloats&) = delete;
  ExactFloats& operator=(const ExactFloats&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace knnfast
