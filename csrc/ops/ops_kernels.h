// SPDX-License-Identifier: Apache-2.0
// The row kernels of the fused ops, one table of them per instruction set (ops_isa.cpp is compiled
// once for each). Rows belong to threads; nothing here allocates or knows about threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace knnfast {

enum OpDType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
constexpr int kPad = 64;  // scratch rows are padded to a multiple of this

// How a row of logits becomes p: guidance, temperature, truncation (class_scores in
// knnfast/ops/reference.py).
struct RowRule {
  int K, dtype;
  float guidance, temperature;
  double top_r;
  int top_k;
};

struct RowPlace {
  uint32_t position, image, counter3;
  uint64_t seed;
};

// One image's step in the loss, for rows at MASK (i < 0 in the kernel) or real (i = x_t):
//   Q_j = u (delta_j + e0), P_j = u (p_j + e) for j != i
//   Q_i = v (delta_i + f0), P_i = v (p_i + f)
struct LossStep {
  double A_t, B_t, A_s, B_s;
  double mask_u;  // c A_s / C_t
  double real_u;  // b A_s / B_t
  double real_v;  // (a + b) A_s / (A_t + B_t)
};

struct AttentionShape {
  int D, N, H;           // width, embeddings, heads
  int dtype;             // of x and y
  int64_t row_x, row_y;  // elements from token to token
  double eps;
  bool norm, residual;
};

struct HeadShape {
  int D, K, dtype;  // of the features, weights and bias
};

constexpr int kCanvasKey = 16;  // numbers in a canvas head's query and key

// A linear layer: w^T [in, out] in panels, and its bias; zeros fill the last vector.
struct Dense {
  int in = 0, out = 0;
  const float *panels = nullptr, *bias = nullptr;
};

struct DenoiserLayer {
  Dense qkv, out, mlp_in, mlp_out;
  bool canvas = false;
  Dense canvas_q, canvas_out;
};

struct DenoiserSizes {
  int N, D, depth, heads, mlp;  // tokens, width, layers, heads of self-attention, hidden width
  int cross_heads;              // of the neighbour attention
  int codes, narrow;            // K, and the width of a code's embedding
  int patch, columns;           // side of a patch, columns of the grid of codes
  int W;                        // of a row of features
  int canvas_width, canvas_heads;
  bool source;
};

struct DenoiserNet : DenoiserSizes {
  const float *code_embedding, *position, *norm_weight, *norm_bias;
  const float *gate_weight, *gate_bias;  // of an editor
  const float *ones, *zeros;             // [D]
  Dense patch_in, patch_out;
  const DenoiserLayer* layers;
};

// One image's condition; where it is not `on` there is none, and only the source is read.
struct DenoiserCondition {
  bool on = false;
  AttentionShape attention{};                 // of the neighbour attention; N embeddings
  const float* const* packed = nullptr;       // [depth], what OpsKernels::pack made
  const float* const* canvas_keys = nullptr;  // [depth], null without a canvas, else [N, heads, 16]
  const float *paintings = nullptr, *bias = nullptr;
  const float *source_tokens = nullptr, *source_copies = nullptr;
};

struct OpsKernels {
  const char* name;
  // l [padded K] from the row; false if a value is NaN or +inf, or every class is excluded.
  // Returns where l is: `scratch`, or the row itself when nothing changes it.
  const float* (*scores)(const RowRule&, const void* cond, const void* null, float* scratch,
                         float* maximum);
  int64_t (*draw)(const float* l, int K, float maximum, float sharpness, const RowPlace&);
  double (*sum_exp)(const float* l, int K, float maximum);
  // Loss and gradient of one row; grad may be the row itself. False on NaN, +inf, no finite class.
  bool (*loss_row)(const LossStep&, const void* row, int dtype, int K, int64_t x_0, int64_t x_t,
                   double weight, double auxiliary, void* grad, void* scratch, double* kl,
                   double* nll);
  // Attention: weights packed once an image, then blocks of `block_rows` tokens.
  int block_rows;
  size_t (*packed_size)(const AttentionShape&);  // bytes
  size_t (*block_scratch)(const AttentionShape&);
  void (*pack)(const AttentionShape&, const void* A, const void* a, const void* C, const void* bias,
               const bool* mask, const void* scale, const void* shift, void* packed);
  void (*attend)(const AttentionShape&, const void* packed, const void* x, void* y, int rows,
                 void* scratch);
  // Logits of rows f [rows, D] (readable up to a multiple of block_rows) for the `head_classes`
  // classes from `first` on; out is [rows, K].
  int head_classes;
  size_t (*head_scratch)(const HeadShape&);
  void (*head_panel)(const HeadShape&, const float* f, int64_t rows, const void* weight,
                     const void* bias, int first, void* scratch, float* out);
  // The denoiser: linear layers packed once, then one sequence a call. Sizes are in floats, scratch
  // in bytes; `scratch` of denoise is block_scratch's for the condition's shape.
  size_t (*dense_size)(int in, int out);
  void (*pack_dense)(const float* w, int in, int out, float* to);
  size_t (*denoiser_scratch)(const DenoiserNet&);
  void (*denoise)(const DenoiserNet&, const DenoiserCondition&, const int64_t* codes,
                  const float* modulation, float* features, float* own, float* scratch);
  void (*widen)(const void* row, int dtype, float* out, int64_t n);
  void (*noise)(const uint32_t* words, int64_t n, float* gumbel);  // the map alone, to be checked
};

const OpsKernels& ops_kernels();  // the best this machine has, or KNNFAST_ISA's

}  // namespace knnfast
