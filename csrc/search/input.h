// SPDX-License-Identifier: Apache-2.0
// What the entries of Index do with what a caller gives them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/exact_floats.h"
#include "isa/kernels.h"
#include "knnfast/index.h"

namespace knnfast {

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Values [at, at + n) as FP32.
inline void to_floats(const void* from, DType dtype, int64_t at, int64_t n, float* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, static_cast<const float*>(from) + at, static_cast<size_t>(n) * 4);
  } else if (dtype == DType::f16) {
    kernels().to_float(static_cast<const uint16_t*>(from) + at, out, n);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
}

}  // namespace knnfast
