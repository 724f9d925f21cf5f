// SPDX-License-Identifier: Apache-2.0
// Transition step on the CPU: choices first, then the rows that need logits, in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "common/exact_floats.h"
#include "common/thread_pool.h"
#include "ops/ops_cpu.h"
#include "ops/philox.h"

namespace knnfast {
namespace {

enum Weight { kT, kMaskP, kMaskU, kRealP, kRealU0, kRealU1, kKeep };
constexpr int64_t kChunk = 16;  // rows of a task

struct Row {
  const double* w;
  RowPlace place;
  Words words;
  double u;
};

Row row_at(const StepGrid& g, int64_t flat, Stream stream) {
  const int64_t b = flat / g.L;
  Row r;
  r.w = g.weights + b * g.weights_stride;
  r.place = {uint32_t(flat % g.L), uint32_t(g.image_indices[b]),
             uint32_t(int64_t(r.w[kT])) | (uint32_t(kGumbel) << kStreamShift), g.seed};
  const uint32_t c3 = uint32_t(int64_t(r.w[kT])) | (uint32_t(stream) << kStreamShift);
  r.words = philox(0, r.place.position, r.place.image, c3, g.seed);
  r.u = unit52(r.words.w[0], r.words.w[1]);
  return r;
}

void* aligned(void* p) {  // to a vector
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
}

// Scratch per thread.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : store_(bytes + 64) {}
  void* get() { return aligned(store_.data()); }

 private:
  std::vector<char> store_;
};

size_t scratch_size(int K) { return 2 * sizeof(float) * size_t((K + kPad - 1) / kPad * kPad); }

const char* at_row(const void* base, int64_t row, int64_t stride, int dtype) {
  return static_cast<const char*>(base) + row * stride * (dtype == kFloat32 ? 4 : 2);
}

// 0, or what ops_cpu.h says of bad input.
int64_t refused(const StepGrid& g, const int64_t* x_t) {
  bool tokens = true, images = true, weights = true;
  for (int64_t flat = 0; flat < g.B * g.L; ++flat) tokens &= x_t[flat] >= 0 && x_t[flat] <= g.K;
  for (int64_t b = 0; b < g.B; ++b) {
    images &= g.image_indices[b] >= 0 && g.image_indices[b] <= UINT32_MAX;
    for (int64_t i = 0; i < 7; ++i) weights &= std::isfinite(g.weights[b * g.weights_stride + i]);
  }
  return !tokens ? -1 : !images ? -2 : !weights ? -3 : 0;
}

}  // namespace

int64_t transition_choose(const StepGrid& g, const int64_t* x_t, int64_t* x_s, int64_t* rows) {
  if (const int64_t why = refused(g, x_t)) return why;
  int64_t count = 0;
  for (int64_t flat = 0; flat < g.B * g.L; ++flat) {
    const bool masked = x_t[flat] == g.K;
    const double* w = g.weights + (flat / g.L) * g.weights_stride;
    x_s[flat] = x_t[flat];
    // Nothing can move where every weight is zero (real tokens of a schedule without B).
    const double w_p = masked ? w[kMaskP] : w[kRealP];
    const double most = masked ? w[kMaskU] : std::max(w[kRealU0], w[kRealU1]);
    if (w_p + most <= 0) continue;
    const Row r = row_at(g, flat, kChoice);
    if (r.u < w_p) {
      rows[count++] = flat;
    } else if (r.u < w_p + most) {
      // Real tokens: the network decides only between the weights at p_i = 1 and p_i = 0.
      const double least = masked ? w[kMaskU] : std::min(w[kRealU0], w[kRealU1]);
      if (r.u < w_p + least)
        x_s[flat] = below(r.words.w[2], r.words.w[3], uint32_t(g.K));
      else
        rows[count++] = flat;
    }
  }
  return count;
}

void head_rows(const HeadShape& s, const void* features, const int64_t* rows, int64_t count,
               const void* weight, const void* bias, float* logits) {
  const ExactFloats mode;
  const OpsKernels& k = ops_kernels();
  const int64_t whole = (count + k.block_rows - 1) / k.block_rows * k.block_rows;
  std::vector<float> gathered(size_t(whole * s.D));  // zeros beyond the rows
  for (int64_t i = 0; i < count; ++i)
    k.widen(at_row(features, rows[i], s.D, s.dtype), s.dtype, gathered.data() + i * s.D, s.D);
  parallel_for((s.K + k.head_classes - 1) / k.head_classes, [&](int, int64_t panel) {
    static thread_local std::vector<char>
        store;  // kept: fresh pages would cost more than the panel
    if (store.size() < k.head_scratch(s) + 64) store.resize(k.head_scratch(s) + 64);
    k.head_panel(s, gathered.data(), count, weight, bias, int(panel) * k.head_classes,
                 aligned(store.data()), logits);
  });
}

int64_t transition_rows(const StepGrid& g, const RowRule& rule, const void* logits,
                        const void* null, int64_t stride, int64_t null_stride, bool compact,
                        const int64_t* x_t, const int64_t* rows, int64_t count, int64_t* x_s) {
  if (const int64_t why = refused(g, x_t)) return why;
  const ExactFloats mode;
  const OpsKernels& k = ops_kernels();
  std::atomic<int64_t> bad{0};
  auto work = [&](int, int64_t task) {
    Scratch scratch(scratch_size(rule.K));
    for (int64_t i = task * kChunk; i < std::min(count, (task + 1) * kChunk); ++i) {
      const int64_t flat = rows[i], at = compact ? i : flat;
      float maximum;
      const float* l = k.scores(rule, at_row(logits, at, stride, rule.dtype),
                                null ? at_row(null, at, null_stride, rule.dtype) : nullptr,
                                static_cast<float*>(scratch.get()), &maximum);
      if (!l) {
        x_s[flat] = -1;
        ++bad;
        continue;
      }
      const Row r = row_at(g, flat, kChoice);
      const int64_t x = x_t[flat];
      if (r.u < (x == g.K ? r.w[kMaskP] : r.w[kRealP])) {
        x_s[flat] = k.draw(l, rule.K, maximum, 1.0f, r.place);
      } else {  // a real token between the two weights
        const double p = std::exp(double(l[x]) - maximum) / k.sum_exp(l, rule.K, maximum);
        const double w_u = r.w[kRealU0] * (1 - p) + r.w[kRealU1] * p;
        if (r.u < r.w[kRealP] + w_u) x_s[flat] = below(r.words.w[2], r.words.w[3], uint32_t(g.K));
      }
    }
  };
  parallel_for((count + kChunk - 1) / kChunk, work);
  return bad;
}

int64_t transition_purity(const StepGrid& g, const RowRule& rule, double purity, const void* logits,
                          const void* null, int64_t stride, int64_t null_stride, const int64_t* x_t,
                          int64_t* x_s) {
  if (const int64_t why = refused(g, x_t)) return why;
  const ExactFloats mode;
  const OpsKernels& k = ops_kernels();
  const int64_t total = g.B * g.L;
  std::vector<double> score(size_t(total), -INFINITY);
  std::vector<float> best(static_cast<size_t>(total));  // max p of a row
  std::atomic<int64_t> bad{0};
  auto prepare = [&](int64_t flat, float* scratch, float* maximum) {
    return k.scores(rule, at_row(logits, flat, stride, rule.dtype),
                    null ? at_row(null, flat, null_stride, rule.dtype) : nullptr, scratch, maximum);
  };
  auto rank = [&](int, int64_t task) {
    Scratch scratch(scratch_size(rule.K));
    for (int64_t flat = task * kChunk; flat < std::min(total, (task + 1) * kChunk); ++flat) {
      x_s[flat] = x_t[flat];
      if (x_t[flat] != g.K) continue;
      float maximum;
      const float* l = prepare(flat, static_cast<float*>(scratch.get()), &maximum);
      if (!l) {
        x_s[flat] = -1;
        ++bad;
        continue;
      }
      const double sum = k.sum_exp(l, rule.K, maximum);
      best[size_t(flat)] = float(1 / sum);
      const double v = (double(row_at(g, flat, kPurity).words.w[0]) + 0.5) * 0x1p-32;
      score[size_t(flat)] = -std::log(sum) - std::log(-std::log1p(-v));
    }
  };
  parallel_for((total + kChunk - 1) / kChunk, rank);
  if (bad) return bad;
  std::vector<int64_t> chosen;
  for (int64_t b = 0; b < g.B; ++b) {
    std::vector<int64_t> order;
    for (int64_t flat = b * g.L; flat < (b + 1) * g.L; ++flat)
      if (x_t[flat] == g.K) order.push_back(flat);
    const double share = std::clamp(g.weights[b * g.weights_stride + kKeep], 0.0, 1.0);
    const auto keep = static_cast<int64_t>(std::nearbyint(double(g.L) * share));
    const int64_t n = std::max<int64_t>(0, int64_t(order.size()) - keep);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t c) { return score[size_t(a)] > score[size_t(c)]; });
    chosen.insert(chosen.end(), order.begin(), order.begin() + n);
  }
  const int64_t count = int64_t(chosen.size());
  auto draw = [&](int, int64_t task) {
    Scratch scratch(scratch_size(rule.K));
    for (int64_t i = task * kChunk; i < std::min(count, (task + 1) * kChunk); ++i) {
      const int64_t flat = chosen[size_t(i)];
      float maximum;
      const float* l = prepare(flat, static_cast<float*>(scratch.get()), &maximum);
      const float sharp = float(1 + purity * best[size_t(flat)]);
      x_s[flat] = k.draw(l, rule.K, maximum, sharp, row_at(g, flat, kGumbel).place);
    }
  };
  parallel_for((count + kChunk - 1) / kChunk, draw);
  return 0;
}

}  // namespace knnfast
