// SPDX-License-Identifier: Apache-2.0
// Transition loss and gradient of one row in closed form (docs: the training loss). With
// rho_j = Q_j / P_j, KL = sum Q_j log rho_j and dKL/dp_j = -u rho_j, plus at j = i the way that e
// and f depend on p_i. Classes other than x_0 and i share one constant, so the loops hold a log and
// a division a class, both as differences from p = 0: what padding and empty classes add is exactly
// 0, and thousands of them hide nothing. x_0 and i are taken in FP64.
#pragma once

#include "ops/convert.h"

namespace knnfast {
namespace KNNFAST_ISA {

template <class S>
static bool loss_row_of(const LossStep& k, const void* row, int dtype, int K, int64_t x_0,
                        int64_t x_t, double weight, double auxiliary, void* grad, S* ex,
                        double* kl_out, double* nll_out) {
  typedef Vec<S> V;
  const int P = padded(K);
  to_float(row, dtype, ex, K);
  for (int j = K; j < P; ++j) ex[j] = S(-INFINITY);
  V top = splat(S(-INFINITY));
  decltype(top < top) bad{};
  for (int j = 0; j < P; j += kLanes<S>) {
    const V v = load(ex + j);
    bad |= ~(v < S(INFINITY));
    top = max<S>(top, v);
  }
  long any = 0;
  for (int i = 0; i < kLanes<S>; ++i) any |= long(bad[i]);
  const S maximum = max_lane<S>(top);
  if (any || maximum == S(-INFINITY)) return false;

  const bool real = x_t < K;
  const int64_t i = real ? x_t : -1;
  const double l_0 = double(ex[x_0]) - double(maximum);
  double total = 0;
  {
    V t0{}, t1{};
    for (int j = 0; j < P; j += 2 * kLanes<S>) {
      const V a = exp(load(ex + j) - maximum);
      const V b = exp(load(ex + j + kLanes<S>) - maximum);
      store(ex + j, a);
      store(ex + j + kLanes<S>, b);
      t0 += a;
      t1 += b;
    }
    total = double(sum<S>(t0 + t1));
  }
  const double nll = ::log(total) - l_0, p_0 = double(ex[x_0]) / total;

  // 1 - p_i without cancellation: when i holds nearly everything, sum the others.
  double p_i = 0, rest = 1;
  if (real) {
    p_i = double(ex[i]) / total;
    rest = 1 - p_i;
    if (rest < 0.5) {
      const S kept = ex[i];
      ex[i] = 0;
      V o{};
      for (int j = 0; j < P; j += kLanes<S>) o += load(ex + j);
      ex[i] = kept;
      rest = double(sum<S>(o)) / total;
    }
  }

  // Constants of the row.
  double u, v = 0, e0, e, f0 = 0, f = 0;
  const double ratio = k.B_s / k.A_s;
  if (!real) {
    u = k.mask_u;
    e0 = e = ratio;
  } else {
    u = k.real_u;
    v = k.real_v;
    const double G = k.B_t > 0 ? (k.A_t + k.B_t) / k.B_t : 1;
    const double S_p = rest + p_i / G, S_0 = x_0 == i ? 1 / G : 1;  // B_t S
    e0 = ratio * S_0;
    e = ratio * S_p;
    f0 = e0 * G;
    f = e * G;
  }
  // FP32 holds neither an e of nearly 0 nor its inverse; beside p it is nothing.
  if (sizeof(S) == sizeof(float) && e > 0) e = e > 1e-33 ? e : 1e-33;

  const S inverse = S(1 / total);
  // Sums over all classes but x_0 and i: log(q / e), 1 / q and p / q, q = p + e.
  double logs = 0, R = 0, shares = 0;
  const bool full = e0 > 0 && u > 0;
  if (full) {
    const S kept_0 = ex[x_0], kept_i = real ? ex[i] : S(0);
    ex[x_0] = 0;
    if (real) ex[i] = 0;
    V s_log{}, s_inv{}, s_share{};
    const V es = splat(S(e)), log_e = log(es), inv_e = S(1) / es;
    for (int j = 0; j < P; j += kLanes<S>) {
      const V p = load(ex + j) * inverse, q = p + es, r = S(1) / q;
      s_log += log(q) - log_e;
      s_inv += r - inv_e;
      s_share += p * r;
    }
    if (real) ex[i] = kept_i;
    ex[x_0] = kept_0;
    const double generic = K - (real && x_0 != i ? 2 : 1);
    logs = double(sum<S>(s_log));
    R = generic / e + double(sum<S>(s_inv));
    shares = double(sum<S>(s_share));
    logs -= generic * ::log(e0 / e);  // log(q / e0) from here on
  }
  const double q_0 = p_0 + e, q_i = p_i + f;

  double kl = full ? -u * e0 * logs : 0;
  const double log_p0 = -nll;
  if (x_0 != i && u > 0) kl += u * (1 + e0) * (::log1p(e0) - (e > 0 ? ::log(q_0) : log_p0));
  double rho_i = 0;
  if (real && v > 0) {
    if (x_0 == i) {
      // q_i = (1 + f0) - rest (1 + f0 - ratio G) in exact arithmetic: no cancellation near p_i = 1
      const double G = (k.A_t + k.B_t) / k.B_t;
      const double drop = rest * (1 - (ratio * (G - 1)));
      const double log_q = e > 0 ? ::log1p(f0) + ::log1p(-drop / (1 + f0)) : log_p0;
      kl += v * (1 + f0) * (::log1p(f0) - log_q);
      rho_i = (1 + f0) / (e > 0 ? q_i : p_i);
    } else if (f0 > 0) {
      kl += v * f0 * (::log(f0) - ::log(q_i));
      rho_i = f0 / q_i;
    }
  }

  // The gradient: g_j = dKL/dp_j, then through the softmax. G_p = sum p_m g_m.
  const double rho_0 = x_0 != i ? (1 + e0) / (e > 0 ? q_0 : 1) : 0;  // times p_0 below when e = 0
  const double share_0 = x_0 != i ? (e > 0 ? rho_0 * p_0 : 1.0) : 0;
  const double share_i = real && v > 0 ? (e > 0 ? rho_i * p_i : (x_0 == i ? 1.0 : 0.0)) : 0;
  double through = 0;  // p_i times the derivative through S, which f has where u = 0, too
  if (real && e > 0 && v > 0) {
    const double sum_rho = e0 * R + (x_0 != i ? rho_0 : 0);
    const double slope = ratio * k.A_t;
    through = p_i * (slope / (k.A_t + k.B_t) * u * sum_rho + slope / k.B_t * v * rho_i);
  }
  const double G_p = -u * (e0 * shares + share_0) - v * share_i + through;
  const double alpha = weight * (auxiliary - G_p), beta = full ? weight * u * e0 : 0;
  const S as = S(alpha), bs = S(beta), es = S(e);
  S* out = dtype == kFloat32 || dtype == kFloat64 ? static_cast<S*>(grad) : ex;
  const double at_0 = weight * (-u * share_0 - auxiliary) + alpha * p_0;
  const double at_i =
      real ? weight * (-v * share_i + through - (x_0 == i ? auxiliary : 0)) + alpha * p_i : 0;
  int j = 0;
  for (; j + kLanes<S> <= K; j += kLanes<S>) {
    const V p = load(ex + j) * inverse;
    store(out + j, full ? p * (as - bs / (p + es)) : p * as);
  }
  for (; j < K; ++j) {
    const S p = ex[j] * inverse;
    out[j] = full ? p * (as - bs / (p + es)) : p * as;
  }
  if (x_0 != i) out[x_0] = S(at_0);
  if (real) out[i] = S(at_i);
  from_float(out, grad, dtype, K);
  *kl_out = kl;
  *nll_out = nll;
  return true;
}

static bool loss_row(const LossStep& k, const void* row, int dtype, int K, int64_t x_0, int64_t x_t,
                     double weight, double auxiliary, void* grad, void* scratch, double* kl,
                     double* nll) {
  if (dtype == kFloat64)
    return loss_row_of<double>(k, row, dtype, K, x_0, x_t, weight, auxiliary, grad,
                               static_cast<double*>(scratch), kl, nll);
  return loss_row_of<float>(k, row, dtype, K, x_0, x_t, weight, auxiliary, grad,
                            static_cast<float*>(scratch), kl, nll);
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
