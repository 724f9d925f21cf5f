// SPDX-License-Identifier: Apache-2.0
// The fused ops on the CPU, over plain pointers: what bindings.cpp calls.
#pragma once

#include <cstdint>

#include "ops/ops_kernels.h"

namespace knnfast {

// weights [7] or [B, 7] (step = 0 or 7): t, MASK_P, MASK_U, REAL_P, REAL_U0, REAL_U1, KEEP.
struct StepGrid {
  int64_t B, L;
  int K;
  const double* weights;
  int64_t weights_stride;
  const int64_t* image_indices;
  uint64_t seed;
};

// The three of the transition step return, and have written nothing, -1 where a token is not in
// [0, K], -2 where an image index is not in [0, 2^32), -3 where a weight is not finite.

// Draws the mixture's choice for every position: writes x_s where no logits are needed and lists
// the flat positions [<= B L] that need them. Returns how many.
int64_t transition_choose(const StepGrid&, const int64_t* x_t, int64_t* x_s, int64_t* rows);

// The head on the listed rows alone: logits[i] = features[rows[i]] W^T + bias, [count, K] FP32.
void head_rows(const HeadShape&, const void* features, const int64_t* rows, int64_t count,
               const void* weight, const void* bias, float* logits);

// Finishes the listed rows; row r's logits are `logits + row_of(r) * stride`, row_of(r) = r when
// compact, else rows[r]. Returns how many rows held NaN, +inf or no finite class.
int64_t transition_rows(const StepGrid&, const RowRule&, const void* logits, const void* null,
                        int64_t stride, int64_t null_stride, bool compact, const int64_t* x_t,
                        const int64_t* rows, int64_t count, int64_t* x_s);

// Purity sampling over dense logits: writes x_s.
int64_t transition_purity(const StepGrid&, const RowRule&, double purity, const void* logits,
                          const void* null, int64_t stride, int64_t null_stride, const int64_t* x_t,
                          int64_t* x_s);

// steps [B, 7] doubles in LossStep's order; out[0] = loss, kl [B] means. Returns bad rows.
int64_t transition_loss(int64_t B, int64_t L, int K, int dtype, const void* logits, int64_t stride,
                        const int64_t* x_0, const int64_t* x_t, const double* steps,
                        const double* weight, const double* auxiliary, void* grad,
                        int64_t grad_stride, double* loss, double* kl);

struct AttentionCall {
  AttentionShape shape;
  int64_t B, L;
  const void *x, *A, *a, *C, *bias, *scale, *shift;
  const bool* mask;
  int64_t image_x, image_A, image_a, image_C, image_scale, image_shift;  // elements
  void* y;
};
void neighbour_attention(const AttentionCall&);

}  // namespace knnfast
