// SPDX-License-Identifier: Apache-2.0
// The denoiser on one sequence: codes to the rows that the head reads, all layers, one thread. Its
// activations stay in L2 and its packed weights pass through once, whatever the batch; sums run in
// the register tile's fixed order, so a sequence's bits depend on that sequence alone. Operations:
// 2 N (12 D^2 + 2 N D) a layer, at the FMA rate; bytes: the weights, from L3, N / 2 operations
// each.
#pragma once

#include "ops/attention_rows.h"

namespace knnfast {
namespace KNNFAST_ISA {

// y = a w^T, a panel at a time: finish(row, column, width, part) takes [kRows, width] of it. Rows
// of a are readable up to a multiple of kRows.
template <int NV, class F>
KF_INLINE void dense_panel(const Dense& w, const float* panel, int c, const float* a, int lda,
                           int rows, const F& finish) {
  constexpr int width = NV * kLanes<float>;
  alignas(64) float part[kRows * width];
  for (int r = 0; r < rows; r += kRows) {
    tile<float, NV>(a + size_t(r) * size_t(lda), lda, panel, w.in, part, width);
    finish(r, c, width, part);
  }
}

template <class F>
static void dense(const Dense& w, const float* a, int lda, int rows, const F& finish) {
  constexpr int wide = kPanel * kLanes<float>;
  const int all = round_up<float>(w.out);
  int c = 0;
  for (; c + wide <= all; c += wide)
    dense_panel<kPanel>(w, w.panels + size_t(c) * size_t(w.in), c, a, lda, rows, finish);
  const float* last = w.panels + size_t(c) * size_t(w.in);
  if ((all - c) / kLanes<float> == 2) dense_panel<2>(w, last, c, a, lda, rows, finish);
  if ((all - c) / kLanes<float> == 1) dense_panel<1>(w, last, c, a, lda, rows, finish);
}

// What becomes of a tile once its bias is added.
enum class Into { kSet, kAdd, kSquaredRelu };

template <Into into>
static void dense_to(const Dense& w, const float* a, int lda, int rows, float* y, int ldy) {
  dense(w, a, lda, rows, [&](int r, int c, int width, const float* part) {
    for (int i = 0; i < kRows; ++i) {
      float* to = y + size_t(r + i) * size_t(ldy) + c;
      for (int j = 0; j < width; j += kLanes<float>) {
        vf v = load(part + i * width + j) + load(w.bias + c + j);
        if (into == Into::kAdd) v += load(to + j);
        if (into == Into::kSquaredRelu) {
          v = max<float>(vf{}, v);  // in this order NaN stays
          v = v * v;
        }
        store(to + j, v);
      }
    }
  });
}

static size_t dense_size(int in, int out) { return size_t(in) * size_t(round_up<float>(out)); }

// w [out, in] -> panels of w^T.
static void pack_dense(const float* w, int in, int out, float* to) {
  pack_panels(w, 1, size_t(in), in, out, to);
}

// e^(s - max) of n numbers, the rest of the vector 0; returns 1 / sum.
KF_INLINE float softmax_row(float* s, int n, float scale) {
  const int all = round_up<float>(n);
  for (int j = n; j < all; ++j) s[j] = -INFINITY;
  vf top = splat(-INFINITY), total{};
  for (int j = 0; j < all; j += kLanes<float>) top = max<float>(top, load(s + j));
  const vf most = splat(max_lane<float>(top)), by = splat(scale);
  for (int j = 0; j < all; j += kLanes<float>) {
    const vf e = exp((load(s + j) - most) * by);
    total += e;
    store(s + j, e);
  }
  return 1 / sum<float>(total);
}

// Where a sequence's buffers lie in its scratch, in floats.
struct DenoiserScratch {
  int Np, Dp, wide, Nw, Ww;
  size_t x, z, h, big, keys, values, score, part, end;
  explicit DenoiserScratch(const DenoiserNet& n) {
    auto most = [](int a, int b) { return a > b ? a : b; };
    const int pixels = n.patch * n.patch, d_h = n.D / n.heads;
    Np = (n.N + kRows - 1) / kRows * kRows;
    Dp = round_up<float>(n.D);
    Nw = round_up<float>(n.N);
    Ww = round_up<float>(d_h);
    wide = most(round_up<float>(3 * n.D), round_up<float>(n.mlp));
    wide = most(wide, round_up<float>(pixels * n.W));
    wide = most(wide, round_up<float>(pixels * n.narrow));
    wide = most(wide, round_up<float>(kCanvasKey * n.canvas_heads));
    x = 0;
    z = x + size_t(Np) * size_t(Dp);
    h = z + size_t(Np) * size_t(Dp);
    big = h + size_t(Np) * size_t(most(Dp, round_up<float>(n.canvas_width)));
    keys = big + size_t(Np) * size_t(wide);
    values = keys + size_t(d_h) * size_t(Nw);
    score = values + size_t(n.N) * size_t(Ww);
    part = score + size_t(kRows) * size_t(Nw);
    end = part + size_t(kRows) * size_t(Ww);
  }
};

static size_t denoiser_scratch(const DenoiserNet& n) {
  return (DenoiserScratch(n).end + 16) * sizeof(float);
}

static void normalise_rows(const DenoiserNet& n, const DenoiserScratch& at, const float* scale,
                           const float* shift, float* s) {
  AttentionShape shape{};
  shape.D = n.D;
  shape.eps = 1e-5;
  shape.norm = true;
  for (int r = 0; r < n.N; ++r)
    normalise(shape, s + at.x + size_t(r) * size_t(at.Dp), scale, shift,
              s + at.z + size_t(r) * size_t(at.Dp));
}

// x += W_o softmax(q k^T / sqrt(d_h)) v, each head apart; q | k | v lie in `big`.
static void self_attend(const DenoiserNet& n, const DenoiserLayer& layer, const DenoiserScratch& at,
                        float* s) {
  const int d_h = n.D / n.heads, ld = at.wide;
  for (int head = 0; head < n.heads; ++head) {
    const float* q = s + at.big + size_t(head) * size_t(d_h);
    const float *k = q + n.D, *v = k + n.D;
    pack_panels(k, 1, size_t(ld), d_h, n.N, s + at.keys);
    pack_panels(v, size_t(ld), 1, n.N, d_h, s + at.values);
    const float scale = float(1 / ::sqrt(double(d_h)));
    for (int r = 0; r < n.N; r += kRows) {
      float total[kRows] = {};
      product(q + size_t(r) * size_t(ld), ld, s + at.keys, d_h, s + at.score, at.Nw);
      for (int i = 0; i < kRows && r + i < n.N; ++i)
        total[i] = softmax_row(s + at.score + size_t(i) * size_t(at.Nw), n.N, scale);
      product(s + at.score, at.Nw, s + at.values, n.N, s + at.part, at.Ww);
      for (int i = 0; i < kRows && r + i < n.N; ++i) {
        float* h = s + at.h + size_t(r + i) * size_t(at.Dp) + size_t(head) * size_t(d_h);
        const float* from = s + at.part + size_t(i) * size_t(at.Ww);
        for (int j = 0; j < d_h; ++j) h[j] = from[j] * total[i];
      }
    }
  }
  dense_to<Into::kAdd>(layer.out, s + at.h, at.Dp, n.N, s + at.x, at.Dp);
}

// x += W_o sum_j softmax_j(q k_j / 4 + bias_j) painting_j: what the embeddings paint at each token.
// `score` holds as many numbers as there are embeddings, rounded up.
static void canvas_attend(const DenoiserNet& n, const DenoiserLayer& layer, const float* keys,
                          const DenoiserCondition& c, const DenoiserScratch& at, float* s,
                          float* score) {
  const int heads = n.canvas_heads, each = n.canvas_width / heads;
  const int ldh = round_up<float>(n.canvas_width);
  normalise_rows(n, at, n.ones, n.zeros, s);
  dense_to<Into::kSet>(layer.canvas_q, s + at.z, at.Dp, n.N, s + at.big, at.wide);
  for (int t = 0; t < n.N; ++t) {
    const float* q = s + at.big + size_t(t) * size_t(at.wide);
    float* h = s + at.h + size_t(t) * size_t(ldh);
    for (int head = 0; head < heads; ++head, q += kCanvasKey, h += each) {
      for (int j = 0; j < c.attention.N; ++j) {
        const float* key = keys + (size_t(j) * size_t(heads) + size_t(head)) * kCanvasKey;
        float dot = 0;
        for (int i = 0; i < kCanvasKey; ++i) dot += q[i] * key[i];
        score[j] = dot * 0.25f + c.bias[j];
      }
      const float by = softmax_row(score, c.attention.N, 1.0f);
      for (int i = 0; i < each; ++i) h[i] = 0;
      for (int j = 0; j < c.attention.N; ++j) {
        const float* paint = c.paintings +
                             (size_t(j) * size_t(n.N) + size_t(t)) * size_t(n.canvas_width) +
                             size_t(head) * size_t(each);
        const float mix = score[j] * by;
        for (int i = 0; i < each; ++i) h[i] += mix * paint[i];
      }
    }
  }
  dense_to<Into::kAdd>(layer.canvas_out, s + at.h, ldh, n.N, s + at.x, at.Dp);
}

// x += the neighbour attention that is packed for this layer.
static void cross_attend(const DenoiserCondition& c, const float* packed, const float* scale,
                         const float* shift, const DenoiserNet& n, const DenoiserScratch& at,
                         float* s, float* scratch) {
  AttentionShape shape = c.attention;
  shape.row_x = shape.row_y = at.Dp;
  for (int r = 0; r < n.N; r += kRows) {
    float* x = s + at.x + size_t(r) * size_t(at.Dp);
    const int rows = n.N - r < kRows ? n.N - r : kRows;
    attend_of<float>(shape, packed, scale, shift, x, x, rows, scratch);
  }
}

// Features [L, W] of the codes [L]. `modulation` is [depth, 6, D]: shift and 1 + scale of each
// norm.
static void denoise(const DenoiserNet& n, const DenoiserCondition& c, const int64_t* codes,
                    const float* modulation, float* features, float* s, float* scratch) {
  const DenoiserScratch at(n);
  const int p = n.patch, across = n.columns / p, ldp = round_up<float>(p * p * n.narrow);
  for (int t = 0; t < n.N; ++t) {
    float* to = s + at.big + size_t(t) * size_t(ldp);
    for (int i = 0; i < p; ++i)
      for (int j = 0; j < p; ++j, to += n.narrow) {
        const int64_t place = int64_t(t / across * p + i) * n.columns + t % across * p + j;
        memcpy(to, n.code_embedding + codes[place] * n.narrow, size_t(n.narrow) * sizeof(float));
      }
  }
  dense_to<Into::kSet>(n.patch_in, s + at.big, ldp, n.N, s + at.x, at.Dp);
  for (int t = 0; t < n.N; ++t) {
    float* x = s + at.x + size_t(t) * size_t(at.Dp);
    const float* place = n.position + size_t(t) * size_t(n.D);
    for (int d = 0; d < n.D; ++d) x[d] += place[d];
    if (const float* source = c.source_tokens)
      for (int d = 0; d < n.D; ++d) x[d] += source[size_t(t) * size_t(n.D) + size_t(d)];
  }
  for (int l = 0; l < n.depth; ++l, modulation += 6 * n.D) {
    const DenoiserLayer& layer = n.layers[l];
    const float* m = modulation;
    if (c.on && layer.canvas) canvas_attend(n, layer, c.canvas_keys[l], c, at, s, scratch);
    normalise_rows(n, at, m + n.D, m, s);
    dense_to<Into::kSet>(layer.qkv, s + at.z, at.Dp, n.N, s + at.big, at.wide);
    self_attend(n, layer, at, s);
    if (c.on) cross_attend(c, c.packed[l], m + 3 * n.D, m + 2 * n.D, n, at, s, scratch);
    normalise_rows(n, at, m + 5 * n.D, m + 4 * n.D, s);
    dense_to<Into::kSquaredRelu>(layer.mlp_in, s + at.z, at.Dp, n.N, s + at.big, at.wide);
    dense_to<Into::kAdd>(layer.mlp_out, s + at.big, at.wide, n.N, s + at.x, at.Dp);
  }
  normalise_rows(n, at, n.norm_weight, n.norm_bias, s);
  dense_to<Into::kSet>(n.patch_out, s + at.z, at.Dp, n.N, s + at.big, at.wide);
  for (int t = 0; t < n.N; ++t) {
    const float* from = s + at.big + size_t(t) * size_t(at.wide);
    for (int i = 0; i < p; ++i)
      for (int j = 0; j < p; ++j, from += n.W) {
        const size_t place =
            size_t(t / across * p + i) * size_t(n.columns) + size_t(t % across * p + j);
        float* to = features + place * size_t(n.W);
        memcpy(to, from, size_t(n.W) * sizeof(float));
        if (!c.source_copies) continue;
        float gate = n.gate_bias[0];
        for (int w = 0; w < n.W; ++w) gate += from[w] * n.gate_weight[w];
        for (int w = 0; w < n.W; ++w)
          to[w] += gate * c.source_copies[place * size_t(n.W) + size_t(w)];
      }
  }
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
