// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with KNNFAST_ISA naming it: the table of row kernels.
#include "ops/attention_rows.h"
#include "ops/denoiser_rows.h"
#include "ops/head_rows.h"
#include "ops/loss_rows.h"
#include "ops/step_rows.h"

#define KF_STRING_(x) #x
#define KF_STRING(x) KF_STRING_(x)

namespace knnfast {
namespace KNNFAST_ISA {

static void widen(const void* row, int dtype, float* out, int64_t n) {
  to_float(row, dtype, out, n);
}

static void noise(const uint32_t* words, int64_t n, float* out) {
  for (int64_t j = 0; j < n; j += kLanes<float>) {
    const int64_t left = n - j < kLanes<float> ? n - j : kLanes<float>;
    vu w{};
    memcpy(&w, words + j, size_t(left) * 4);
    const vf g = gumbel(w);
    memcpy(out + j, &g, size_t(left) * 4);
  }
}

extern const OpsKernels kTable;
const OpsKernels kTable = {KF_STRING(KNNFAST_ISA),
                           scores,
                           draw,
                           sum_exp,
                           loss_row,
                           kRows,
                           packed_size,
                           block_scratch,
                           pack,
                           attend,
                           kHeadPanel,
                           head_scratch,
                           head_panel,
                           dense_size,
                           pack_dense,
                           denoiser_scratch,
                           denoise,
                           widen,
                           noise};

}  // namespace KNNFAST_ISA
}  // namespace knnfast
