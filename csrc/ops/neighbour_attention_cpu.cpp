// SPDX-License-Identifier: Apache-2.0
// Neighbour attention on the CPU. A task packs one image's folded weights into its thread's L2 and
// runs all of the image's tokens on them, or a share of them when there are fewer images than
// threads: packing twice costs less than waking the threads twice.
#include <algorithm>
#include <vector>

#include "common/exact_floats.h"
#include "common/thread_pool.h"
#include "knnfast/index.h"
#include "ops/ops_cpu.h"

namespace knnfast {

void neighbour_attention(const AttentionCall& c) {
  const ExactFloats mode;
  const OpsKernels& k = ops_kernels();
  const int64_t size = c.shape.dtype == kFloat64 ? 8 : c.shape.dtype == kFloat32 ? 4 : 2;
  const size_t packed_bytes = (k.packed_size(c.shape) + 63) / 64 * 64;
  const size_t room = packed_bytes + k.block_scratch(c.shape) + 64;
  auto at = [&](const void* base, int64_t elements) -> const void* {
    return base ? static_cast<const char*>(base) + elements * size : nullptr;
  };
  const int64_t shares = c.B < num_threads() ? (num_threads() + c.B - 1) / c.B : 1;
  const int64_t blocks = (c.L + k.block_rows - 1) / k.block_rows;
  const int64_t rows = (blocks + shares - 1) / shares * k.block_rows;
  parallel_for(c.B * shares, [&](int, int64_t task) {
    static thread_local std::vector<char> store;  // kept: fresh pages would cost more than packing
    if (store.size() < room) store.resize(room);
    char* packed =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(store.data()) + 63) & ~uintptr_t(63));
    const int64_t b = task / shares, first = task % shares * rows;
    if (first >= c.L) return;
    k.pack(c.shape, at(c.A, b * c.image_A), at(c.a, b * c.image_a), at(c.C, b * c.image_C), c.bias,
           c.mask + b * c.shape.N, at(c.scale, b * c.image_scale), at(c.shift, b * c.image_shift),
           packed);
    for (int64_t l = first; l < std::min(c.L, first + rows); l += k.block_rows) {
      const int n = int(std::min<int64_t>(c.L - l, k.block_rows));
      char* y = static_cast<char*>(c.y) + (b * c.L + l) * c.shape.row_y * size;
      k.attend(c.shape, packed, at(c.x, b * c.image_x + l * c.shape.row_x), y, n,
               packed + packed_bytes);
    }
  });
}

}  // namespace knnfast
