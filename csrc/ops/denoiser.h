// SPDX-License-Identifier: Apache-2.0
// The denoiser packed for the CPU: its weights once, a condition once an image, then a whole
// batch's features a step, a thread for each sequence. The kernel is in denoiser_rows.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/ops_kernels.h"

namespace knnfast {

class PackedDenoiser;

// A condition, copied and packed for one image; the tensors are Denoiser.prepare's.
class PackedCondition {
 public:
  struct Tensors {
    int embeddings;
    const bool* mask;                         // [embeddings]
    std::vector<const float*> A, a, C, bias;  // each layer's, folded
    std::vector<const float*> canvas_keys;    // each layer's, null without a canvas
    const float *paintings, *canvas_bias;
    const float *source_tokens, *source_copies;  // null but for an editor
  };
  PackedCondition(const PackedDenoiser&, const Tensors&);

 private:
  friend class PackedDenoiser;
  std::vector<std::unique_ptr<float[]>> own_;
  std::vector<const float*> packed_, keys_;
  DenoiserCondition view_, null_;
};

class PackedDenoiser {
 public:
  // Weights in the order of knnfast/diffusion/packed.py. Throws where they are too few or too many.
  PackedDenoiser(const DenoiserSizes&, const std::vector<bool>& canvas,
                 const std::vector<const float*>& weights);

  // features [2 or 1, B, L, W] of codes [B, L], with the conditions and, guided, without;
  // modulation [depth, 6, D]. False where a code is not in [0, K].
  bool features(const int64_t* codes, const std::vector<const PackedCondition*>& conditions,
                bool guided, const float* modulation, float* out) const;

  const DenoiserNet& net() const { return net_; }

 private:
  std::vector<std::unique_ptr<float[]>> own_;
  std::vector<DenoiserLayer> layers_;
  DenoiserNet net_{};
};

}  // namespace knnfast
