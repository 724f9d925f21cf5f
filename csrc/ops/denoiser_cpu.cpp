// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/exact_floats.h"
#include "common/thread_pool.h"
#include "knnfast/index.h"
#include "ops/denoiser.h"
#include "ops/ops_cpu.h"
#include "search/turn.h"

namespace knnfast {
namespace {

using Store = std::vector<std::unique_ptr<float[]>>;

// Room on a cache line for n floats, zeroed.
float* room(Store& own, size_t n) {
  own.emplace_back(new float[n + 16]());
  const uintptr_t at = reinterpret_cast<uintptr_t>(own.back().get());
  return reinterpret_cast<float*>((at + 63) & ~uintptr_t(63));
}

const float* copy(Store& own, const float* from, size_t n) {
  if (!from) return nullptr;
  float* to = room(own, n);
  std::memcpy(to, from, n * sizeof(float));
  return to;
}

}  // namespace

PackedDenoiser::PackedDenoiser(const DenoiserSizes& sizes, const std::vector<bool>& canvas,
                               const std::vector<const float*>& weights) {
  const OpsKernels& k = ops_kernels();
  static_cast<DenoiserSizes&>(net_) = sizes;
  auto weight = weights.begin();
  auto take = [&] {
    if (weight == weights.end()) throw std::logic_error("PackedDenoiser: too few weights");
    return *weight++;
  };
  auto next = [&](size_t n) { return copy(own_, take(), n); };
  auto dense = [&](int in, int out) {
    float* panels = room(own_, k.dense_size(in, out));
    k.pack_dense(take(), in, out, panels);
    float* bias = room(own_, k.dense_size(1, out));
    std::memcpy(bias, take(), size_t(out) * sizeof(float));
    return Dense{in, out, panels, bias};
  };
  const int D = sizes.D, pixels = sizes.patch * sizes.patch;
  net_.code_embedding = next(size_t(sizes.codes + 1) * size_t(sizes.narrow));
  net_.patch_in = dense(pixels * sizes.narrow, D);
  net_.position = next(size_t(sizes.N) * size_t(D));
  net_.norm_weight = next(size_t(D));
  net_.norm_bias = next(size_t(D));
  net_.patch_out = dense(D, pixels * sizes.W);
  if (sizes.source) {
    net_.gate_weight = next(size_t(sizes.W));
    net_.gate_bias = next(1);
  }
  for (int l = 0; l < sizes.depth; ++l) {
    DenoiserLayer layer;
    layer.qkv = dense(D, 3 * D);
    layer.out = dense(D, D);
    layer.mlp_in = dense(D, sizes.mlp);
    layer.mlp_out = dense(sizes.mlp, D);
    layer.canvas = canvas[size_t(l)];
    if (layer.canvas) {
      layer.canvas_q = dense(D, kCanvasKey * sizes.canvas_heads);
      layer.canvas_out = dense(sizes.canvas_width, D);
    }
    layers_.push_back(layer);
  }
  if (weight != weights.end()) throw std::logic_error("PackedDenoiser: too many weights");
  float* ones = room(own_, size_t(D));
  std::fill(ones, ones + D, 1.0f);
  net_.ones = ones;
  net_.zeros = room(own_, size_t(D));
  net_.layers = layers_.data();
}

PackedCondition::PackedCondition(const PackedDenoiser& denoiser, const Tensors& t) {
  const OpsKernels& k = ops_kernels();
  const DenoiserNet& net = denoiser.net();
  const size_t n = size_t(t.embeddings), L = size_t(net.N) * size_t(net.patch * net.patch);
  null_.source_tokens = copy(own_, t.source_tokens, size_t(net.N) * size_t(net.D));
  null_.source_copies = copy(own_, t.source_copies, L * size_t(net.W));
  view_ = null_;
  view_.on = std::any_of(t.mask, t.mask + n, [](bool on) { return on; });
  if (!view_.on) return;
  const AttentionShape shape = {net.D, t.embeddings, net.cross_heads, kFloat32, 0, 0, 1e-5,
                                true,  true};
  for (size_t l = 0; l < size_t(net.depth); ++l) {
    float* packed = room(own_, k.packed_size(shape) / sizeof(float));
    k.pack(shape, t.A[l], t.a[l], t.C[l], t.bias[l], t.mask, nullptr, nullptr, packed);
    packed_.push_back(packed);
    keys_.push_back(copy(own_, t.canvas_keys[l], n * size_t(kCanvasKey * net.canvas_heads)));
  }
  view_.attention = shape;
  view_.packed = packed_.data();
  view_.canvas_keys = keys_.data();
  view_.paintings = copy(own_, t.paintings, n * size_t(net.N) * size_t(net.canvas_width));
  view_.bias = copy(own_, t.canvas_bias, n);
}

bool PackedDenoiser::features(const int64_t* codes,
                              const std::vector<const PackedCondition*>& conditions, bool guided,
                              const float* modulation, float* out) const {
  const ExactFloats mode;
  const OpsKernels& k = ops_kernels();
  const int64_t B = int64_t(conditions.size()), L = int64_t(net_.N) * net_.patch * net_.patch;
  for (int64_t i = 0; i < B * L; ++i)
    if (codes[i] < 0 || codes[i] > net_.codes) return false;
  size_t attention = 0;
  for (const PackedCondition* c : conditions)
    if (c->view_.on) attention = std::max(attention, k.block_scratch(c->view_.attention));
  const size_t own = k.denoiser_scratch(net_) / sizeof(float);
  const size_t need = own + attention / sizeof(float) + 16;
  // One sequence a thread at a time: a search that waits for its turn waits for no more than that.
  const int64_t sequences = guided ? 2 * B : B, threads = num_threads();
  for (int64_t first = 0; first < sequences; first += threads) {
    Work alone;
    const Turn turn(alone, threads > 1);
    parallel_for(std::min(threads, sequences - first), [&](int, int64_t task) {
      static thread_local std::vector<float> store;  // kept: fresh pages cost time in every step
      if (store.size() < need) store.resize(need);
      const uintptr_t at = reinterpret_cast<uintptr_t>(store.data());
      float* scratch = reinterpret_cast<float*>((at + 63) & ~uintptr_t(63));
      const int64_t i = first + task, b = i % B;
      const PackedCondition& c = *conditions[size_t(b)];
      k.denoise(net_, i < B ? c.view_ : c.null_, codes + b * L, modulation, out + i * L * net_.W,
                scratch, scratch + own);
    });
  }
  return true;
}

}  // namespace knnfast
