// SPDX-License-Identifier: Apache-2.0
// The denoiser packed for the CPU: its weights once, a condition once an image, then a whole
// batch's features a step, a thread for each sequence. What bindings.cpp calls, and the plain
// structures that the kernel of denoiser_rows.h reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace knnfast {

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
  int cross_heads;
  int codes, narrow, patch, columns,
      W;  // K, their embedding's width, side of a patch, grid, output
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

// One image's condition; `on` is false without one, and then nothing else but the source is read.
struct DenoiserCondition {
  bool on = false;
  int embeddings = 0;
  float* const* packed = nullptr;  // [depth], OpsKernels::pack's; scale and shift rewritten
  const float* const* canvas_keys = nullptr;  // [depth], null without a canvas, else [N, heads, 16]
  const float *paintings = nullptr, *bias = nullptr;
  const float *source_tokens = nullptr, *source_copies = nullptr;
};

class PackedDenoiser;

// A condition, copied and packed for one image; the tensors are Denoiser.prepare's.
class PackedCondition {
 public:
  struct Tensors {
    int embeddings;
    const bool* mask;                            // [embeddings]
    std::vector<const float*> A, a, C, bias;     // each layer's, folded
    std::vector<const float*> canvas_keys;       // each layer's, null without a canvas
    const float *paintings, *canvas_bias;        // null without a condition
    const float *source_tokens, *source_copies;  // null but for an editor
  };
  PackedCondition(const PackedDenoiser&, const Tensors&);

 private:
  friend class PackedDenoiser;
  std::vector<std::unique_ptr<float[]>> own_;
  std::vector<float*> packed_;
  std::vector<const float*> keys_;
  DenoiserCondition view_, null_;
};

class PackedDenoiser {
 public:
  // Weights in the order of knnfast/diffusion/packed.py.
  PackedDenoiser(const DenoiserSizes&, const std::vector<bool>& canvas,
                 const std::vector<const float*>& weights);

  // features [2 or 1, B, L, W] of codes [B, L], with the conditions and, guided, without;
  // modulation [depth, 6, D]. False where a code is not in [0, K].
  bool features(const int64_t* codes, const std::vector<PackedCondition*>& conditions, bool guided,
                const float* modulation, float* out) const;

  const DenoiserNet& net() const { return net_; }

 private:
  std::vector<std::unique_ptr<float[]>> own_;
  std::vector<DenoiserLayer> layers_;
  DenoiserNet net_{};
};

}  // namespace knnfast
