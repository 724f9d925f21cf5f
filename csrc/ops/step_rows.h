// SPDX-License-Identifier: Apache-2.0
// Transition step, one row: logits -> scores -> (sum, draw). Six passes at most, and with
// truncation about 35, all in L1.
#pragma once

#include "ops/convert.h"

namespace knnfast {
namespace KNNFAST_ISA {

static int32_t order_key(float f) {  // an integer in the order of the floats
  const int32_t i = int32_t(float_bits(f));
  return i ^ ((i >> 31) & 0x7fffffff);
}
static float order_value(int32_t k) { return bits_float(uint32_t(k ^ ((k >> 31) & 0x7fffffff))); }

// Exclude what truncation drops: the smallest kept value by bisection over the floats' order, then
// among its equals the first ones (ties by index).
static void truncate(float* l, int K, float maximum, double top_r, int top_k) {
  const int P = padded(K);
  double total = 0;
  for (int j = 0; j < P; j += kLanes<float>) total += sum<float>(exp(load(l + j) - maximum));
  const double mass_limit = top_r < 1.0 ? top_r * total : INFINITY;
  const double count_limit = top_k > 0 ? top_k : INFINITY;
  struct Above {
    double mass, count;
  };
  auto above = [&](float x) {
    vf mass{};
    vi count{};
    for (int j = 0; j < P; j += kLanes<float>) {
      const vf v = load(l + j);
      const vi over = v > x;
      mass += over ? exp(v - maximum) : vf{};
      count -= over;
    }
    double n = 0;
    for (int i = 0; i < kLanes<float>; ++i) n += count[i];
    return Above{double(sum<float>(mass)), n};
  };
  int32_t lo = order_key(-INFINITY), hi = order_key(maximum);  // hi always qualifies
  while (lo < hi) {
    const int32_t mid = int32_t((int64_t(lo) + hi) >> 1);
    const Above a = above(order_value(mid));
    if (a.mass < mass_limit && a.count < count_limit) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  const float cut = order_value(hi);
  Above before = above(cut);
  // The bisection may stop between two present values; the kept ones are the same.
  const double e = double(::expf(cut - maximum));
  for (int j = 0; j < K; ++j) {
    if (l[j] > cut) continue;
    if (l[j] == cut && before.mass < mass_limit && before.count < count_limit) {
      before.mass += e;
      before.count += 1;
    } else {
      l[j] = -INFINITY;
    }
  }
}

static const float* scores(const RowRule& rule, const void* cond, const void* null, float* scratch,
                           float* maximum) {
  const int K = rule.K, P = padded(K);
  auto greatest = [P](const float* row) {
    vf top = splat(-INFINITY);
    for (int j = 0; j < P; j += kLanes<float>) top = max<float>(top, load(row + j));
    return max_lane<float>(top);
  };
  const bool truncated = rule.top_r < 1.0 || (rule.top_k > 0 && rule.top_k < K);
  const bool direct =
      rule.dtype == kFloat32 && !null && rule.temperature == 1.0f && !truncated && K == P;
  const float* l = direct ? static_cast<const float*>(cond) : scratch;
  if (!direct) {
    to_float(cond, rule.dtype, scratch, K);
    for (int j = K; j < P; ++j) scratch[j] = -INFINITY;
  }
  vi bad{};
  // Maxima go before anything is multiplied: logits far from 0 would lose digits.
  if (null) {
    float* other = scratch + P;
    to_float(null, rule.dtype, other, K);
    for (int j = K; j < P; ++j) other[j] = -INFINITY;
    const float cond_top = greatest(scratch), null_top = greatest(other);
    for (int j = 0; j < P; j += kLanes<float>) {
      const vf c = load(scratch + j) - cond_top, n = load(other + j) - null_top;
      bad |= ~(c < INFINITY) | ~(n < INFINITY);
      const vf g = n + (c - n) * rule.guidance;
      const vi out = (c == -INFINITY) | (n == -INFINITY);
      store(scratch + j, out ? splat(-INFINITY) : g);
    }
  }
  vf top = splat(-INFINITY);
  for (int j = 0; j < P; j += kLanes<float>) {
    const vf v = load(l + j);
    bad |= ~(v < INFINITY);
    top = max<float>(top, v);
  }
  int any = 0;
  for (int i = 0; i < kLanes<float>; ++i) any |= bad[i];
  *maximum = max_lane<float>(top);
  if (any || *maximum == -INFINITY) return nullptr;
  if (rule.temperature != 1.0f) {
    const float inverse = 1.0f / rule.temperature;
    for (int j = 0; j < P; j += kLanes<float>)
      store(scratch + j, (load(scratch + j) - *maximum) * inverse);
    *maximum = 0;
  }
  if (truncated) truncate(scratch, K, *maximum, rule.top_r, rule.top_k);
  return l;
}

static double sum_exp(const float* l, int K, float maximum) {
  vf s{};
  for (int j = 0; j < padded(K); j += kLanes<float>) s += exp(load(l + j) - maximum);
  return sum<float>(s);
}

// argmax of sharpness (l - maximum) + Gumbel, ties to the lower class.
static int64_t draw(const float* l, int K, float maximum, float sharpness, const RowPlace& at) {
  vf best = splat(-INFINITY);
  vi where{}, index{};
  for (int i = 0; i < kLanes<float>; ++i) index[i] = i;
  for (int j = 0; j < padded(K); j += kWords) {
    const Noise noise = philox_blocks(uint32_t(j / 4), at.position, at.image, at.counter3, at.seed);
    const vf a = (load(l + j) - maximum) * sharpness + gumbel(noise.lo);
    const vf b = (load(l + j + kLanes<float>) - maximum) * sharpness + gumbel(noise.hi);
    vi better = a > best;
    best = better ? a : best;
    where = better ? index : where;
    index += kLanes<float>;
    better = b > best;
    best = better ? b : best;
    where = better ? index : where;
    index += kLanes<float>;
  }
  float top = best[0];
  int64_t at_top = where[0];
  for (int i = 1; i < kLanes<float>; ++i)
    if (best[i] > top || (best[i] == top && where[i] < at_top)) top = best[i], at_top = where[i];
  return at_top;
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
