// SPDX-License-Identifier: Apache-2.0
// Matrix instructions with the fragment layouts of the PTX manual, and sums as rough as the
// hardware may make them: every addend of a step is cut (not rounded) to the last bit of the
// largest one, and so is the result. A product is as large as its operands' exponents say, before
// anything is normalised: a subnormal or a zero counts as 2^-14.
#pragma once
#include "warp.h"

inline float half_bits_to_float(uint16_t h) { return static_cast<float>(emu::bits<_Float16>(h)); }
inline uint16_t float_to_half_bits(float f) {
  return emu::bits<uint16_t>(static_cast<_Float16>(f));
}

namespace emu {

inline int half_exponent(float h) {
  return std::max(static_cast<int>(bits<uint32_t>(h) >> 23 & 255) - 127, -14);
}

inline float truncated_dot(float c, const float* a, const float* b, int n) {
  double products[32], largest = std::fabs(c);
  int exponent = -28;
  for (int i = 0; i < n; ++i) {
    products[i] = static_cast<double>(a[i]) * b[i];
    largest = std::max(largest, std::fabs(products[i]));
    exponent = std::max(exponent, half_exponent(a[i]) + half_exponent(b[i]));
  }
  if (!std::isfinite(largest)) {
    double sum = c;
    for (int i = 0; i < n; ++i) sum += products[i];
    return static_cast<float>(sum);
  }
  double ulp = std::ldexp(1.0, std::max(std::ilogb(largest), exponent) - 23);
  double sum = std::trunc(c / ulp);
  for (int i = 0; i < n; ++i) sum += std::trunc(products[i] / ulp);
  float rounded = static_cast<float>(sum * ulp);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum * ulp))
    rounded = std::nextafterf(rounded, 0.0f);
  return rounded;
}

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
T element(uint32_t word, int i) {
  T v;
  std::memcpy(&v, reinterpret_cast<const char*>(&word) + i * static_cast<int>(sizeof(T)), sizeof v);
  return v;
}

inline unsigned char* swizzled(unsigned char* tile, unsigned row, unsigned byte) {
  return tile + row * 128 + ((byte >> 4 ^ (row & 7)) << 4) + (byte & 15);
}

}  // namespace emu

// Four 8x8 matrices of 16-bit elements; lanes 8i...8i+7 give the row addresses of matrix i.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emu::fault("ldmatrix at an unaligned address");
  auto rows = emu::exchange(~0u, static_cast<const unsigned char*>(row), "ldmatrix");
  unsigned l = emu::lane();
  for (unsigned i = 0; i < 4; ++i) std::memcpy(&r[i], rows[8 * i + l / 4] + (l % 4) * 4, 4);
}

// c[16x8] += a[16x16] b[16x8], FP16 in, FP32 sums.
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emu::Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  auto all = emu::exchange(~0u, mine, "mma.sync f16");
  unsigned l = emu::lane();
  for (unsigned i = 0; i < 4; ++i) {
    unsigned row = l / 4 + (i >> 1) * 8, col = (l % 4) * 2 + (i & 1);
    float x[16], y[16];
    for (unsigned k = 0; k < 16; ++k) {
      auto from_a = all[(row % 8) * 4 + k % 8 / 2], from_b = all[col * 4 + k % 8 / 2];
      x[k] = half_bits_to_float(emu::element<uint16_t>(from_a.a[row / 8 + k / 8 * 2], k % 2));
      y[k] = half_bits_to_float(emu::element<uint16_t>(from_b.b[k / 8], k % 2));
    }
    c[i] = emu::truncated_dot(c[i], x, y, 16);
  }
}

// c[16x8] += a[16x32] b[32x8], int8 in, int32 sums.
inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emu::Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  auto all = emu::exchange(~0u, mine, "mma.sync s8");
  unsigned l = emu::lane();
  for (unsigned i = 0; i < 4; ++i) {
    unsigned row = l / 4 + (i >> 1) * 8, col = (l % 4) * 2 + (i & 1);
    for (unsigned k = 0; k < 32; ++k) {
      auto from_a = all[(row % 8) * 4 + k % 16 / 4], from_b = all[col * 4 + k % 16 / 4];
      c[i] += int{emu::element<int8_t>(from_a.a[row / 8 + k / 16 * 2], k % 4)} *
              int{emu::element<int8_t>(from_b.b[k / 16], k % 4)};
    }
  }
}

// Warpgroup products of 128-byte K-major slices with the 128-byte swizzle, 64 rows of A by 256 of
// B; one call covers 32 bytes of K starting at byte `k`. They run when waited for, or at once.
inline void wgmma_fence() {}
template <int Count>
void give_registers() {}
template <int Count>
void take_registers() {}
template <class T>
void wgmma_pin(T (&)[128]) {}

namespace emu {
template <class Work>
void issue(Work work) {
  // Products on one accumulator run in order: one that runs at once must not pass a delayed one.
  Fiber& f = self();
  f.matmul_open = true;
  if (f.matmuls.empty() && coin()) {
    work();
  } else {
    f.matmuls.push_back(work);
  }
}
}  // namespace emu

inline void wgmma_commit() {
  emu::Fiber& f = emu::self();
  size_t earlier = 0;
  for (size_t n : f.matmul_groups) earlier += n;
  f.matmul_groups.push_back(f.matmuls.size() - earlier);
  f.matmul_open = false;
}

// Waits until at most `Pending` of the latest committed groups are running.
template <int Pending>
inline void wgmma_wait() {
  emu::Fiber& f = emu::self();
  if (f.matmul_open) emu::fault("wgmma waited for before its commit");
  while (f.matmul_groups.size() > Pending) {
    auto end = f.matmuls.begin() + static_cast<long>(f.matmul_groups.front());
    for (auto it = f.matmuls.begin(); it != end; ++it) (*it)();
    f.matmuls.erase(f.matmuls.begin(), end);
    f.matmul_groups.erase(f.matmul_groups.begin());
  }
  __syncwarp();  // .sync.aligned: it returns to all lanes of a warp or to none
}

inline void wgmma_f16(float (&c)[128], unsigned char* a, unsigned char* b, unsigned k) {
  float* acc = c;
  unsigned l = emu::lane(), warp = emu::self().index / 32 % 4;
  emu::issue([=] {
    for (unsigned i = 0; i < 128; ++i) {
      unsigned row = warp * 16 + l / 4 + (i >> 1 & 1) * 8, col = i / 4 * 8 + (l % 4) * 2 + (i & 1);
      float x[16], y[16];
      for (unsigned j = 0; j < 16; ++j) {
        uint16_t p, q;
        std::memcpy(&p, emu::swizzled(a, row, k + 2 * j), 2);
        std::memcpy(&q, emu::swizzled(b, col, k + 2 * j), 2);
        x[j] = half_bits_to_float(p);
        y[j] = half_bits_to_float(q);
      }
      acc[i] = emu::truncated_dot(acc[i], x, y, 16);
    }
  });
}

inline void wgmma_s8(int (&c)[128], unsigned char* a, unsigned char* b, unsigned k) {
  int* acc = c;
  unsigned l = emu::lane(), warp = emu::self().index / 32 % 4;
  emu::issue([=] {
    for (unsigned i = 0; i < 128; ++i) {
      unsigned row = warp * 16 + l / 4 + (i >> 1 & 1) * 8, col = i / 4 * 8 + (l % 4) * 2 + (i & 1);
      for (unsigned j = 0; j < 32; ++j)
        acc[i] += int{static_cast<int8_t>(*emu::swizzled(a, row, k + j))} *
                  int{static_cast<int8_t>(*emu::swizzled(b, col, k + j))};
    }
  });
}
