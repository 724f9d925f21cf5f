// SPDX-License-Identifier: Apache-2.0
// Transition loss on the CPU: one pass over the logits gives the loss and its gradient.
#include <atomic>
#include <vector>

#include "common/exact_floats.h"
#include "common/thread_pool.h"
#include "ops/ops_cpu.h"

namespace knnfast {

int64_t transition_loss(int64_t B, int64_t L, int K, int dtype, const void* logits, int64_t stride,
                        const int64_t* x_0, const int64_t* x_t, const double* steps,
                        const double* weight, const double* auxiliary, void* grad,
                        int64_t grad_stride, double* loss, double* kl) {
  const ExactFloats mode;
  const OpsKernels& kernels = ops_kernels();
  constexpr int64_t kChunk = 16;
  const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  const size_t padded = size_t((K + kPad - 1) / kPad * kPad);
  std::vector<double> row_kl(size_t(B * L)), row_nll(size_t(B * L));
  std::atomic<int64_t> bad{0};
  const double share = 1.0 / double(B * L);
  auto work = [&](int, int64_t task) {
    std::vector<double> scratch(padded + 8);  // doubles: enough for either width
    void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) &
                                            ~uintptr_t(63));
    for (int64_t r = task * kChunk; r < B * L && r < (task + 1) * kChunk; ++r) {
      const int64_t b = r / L;
      const double* s = steps + 7 * b;
      const LossStep step = {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
      if (!kernels.loss_row(step, static_cast<const char*>(logits) + r * stride * size, dtype, K,
                            x_0[r], x_t[r], weight[b] * share, auxiliary[b],
                            static_cast<char*>(grad) + r * grad_stride * size, aligned,
                            &row_kl[size_t(r)], &row_nll[size_t(r)]))
        ++bad;
    }
  };
  parallel_for((B * L + kChunk - 1) / kChunk, work);
  // Summed in order, so that the result does not depend on the threads.
  *loss = 0;
  for (int64_t b = 0; b < B; ++b) {
    double sum_kl = 0, sum_nll = 0;
    for (int64_t r = b * L; r < (b + 1) * L; ++r) {
      sum_kl += row_kl[size_t(r)];
      sum_nll += row_nll[size_t(r)];
    }
    kl[b] = sum_kl / double(L);
    *loss += weight[b] * (sum_kl + auxiliary[b] * sum_nll) * share;
  }
  return bad;
}

}  // namespace knnfast
