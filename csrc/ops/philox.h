// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 and the maps from its words; knnfast/ops/philox.py defines them.
#pragma once

#include <stdint.h>

namespace knnfast {

enum Stream { kChoice = 0, kGumbel = 1, kPurity = 3 };  // those drawn here
constexpr int kStreamShift = 28;

struct Words {
  uint32_t w[4];
};

static inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform in (0, 1) with 52 bits.
static inline double unit52(uint32_t w0, uint32_t w1) {
  const int64_t m = (int64_t(w0) << 20) | (w1 >> 12);
  return (double(m) + 0.5) * 0x1p-52;
}

// A uniform integer in [0, n).
static inline int64_t below(uint32_t w0, uint32_t w1, uint32_t n) {
  return int64_t((uint64_t(w0) * n + ((uint64_t(w1) * n) >> 32)) >> 32);
}

}  // namespace knnfast
