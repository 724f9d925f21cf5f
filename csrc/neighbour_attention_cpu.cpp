// SPDX-License-Identifier: Apache-2.0
// Neighbour attention on the CPU: pack each image's folded weights once, then blocks of tokens.
#include <vector>

#include "ops_cpu.h"
#include "thread_pool.h"

namespace knnfast {

void neighbour_attention(const AttentionCall& c) {
  const OpsKernels& k = ops_kernels();
  const int64_t size = c.shape.dtype == kFloat64 ? 8 : c.shape.dtype == kFloat32 ? 4 : 2;
  const size_t image_bytes = (k.packed_size(c.shape) + 63) / 64 * 64;
  auto at = [&](const void* base, int64_t elements) -> const void* {
    return base ? static_cast<const char*>(base) + elements * size : nullptr;
  };
  auto align = [](void* p) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
  };
  static thread_local std::vector<char> panels;  // kept: packing would else fault pages in anew
  if (panels.size() < image_bytes * size_t(c.B) + 64) panels.resize(image_bytes * size_t(c.B) + 64);
  char* packed = align(panels.data());
  parallel_for(c.B, [&](int, int64_t b) {
    k.pack(c.shape, at(c.A, b * c.image_A), at(c.a, b * c.image_a), at(c.C, b * c.image_C), c.bias,
           c.mask + b * c.shape.N, at(c.scale, b * c.image_scale), at(c.shift, b * c.image_shift),
           packed + image_bytes * size_t(b));
  });
  constexpr int kBlocks = 4;  // token blocks of a task
  const int64_t rows = k.block_rows * kBlocks, tasks = (c.L + rows - 1) / rows;
  parallel_for(c.B * tasks, [&](int, int64_t task) {
    std::vector<char> room(k.block_scratch(c.shape) + 64);
    const int64_t b = task / tasks, first = task % tasks * rows;
    for (int64_t l = first; l < c.L && l < first + rows; l += k.block_rows) {
      const int n = int(c.L - l < k.block_rows ? c.L - l : k.block_rows);
      char* y = static_cast<char*>(c.y) + (b * c.L + l) * c.shape.row_y * size;
      k.attend(c.shape, packed + image_bytes * size_t(b),
               at(c.x, b * c.image_x + l * c.shape.row_x), y, n, align(room.data()));
    }
  });
}

}  // namespace knnfast
