// SPDX-License-Identifier: Apache-2.0
// Neighbour attention, a block of tokens at a time: normalise, scores = z A, softmax over the
// embeddings, y = x + p C + b. Both products run on register tiles over packed panels of the folded
// weights (3 vectors wide, all of the inner axis); nothing leaves L1 but the panels, which stay in
// L2.
#pragma once

#include "ops/convert.h"

namespace knnfast {
namespace KNNFAST_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 8, kPanel = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kPanel = 3;
#else
constexpr int kRows = 4, kPanel = 2;
#endif

template <class S>
KF_INLINE int round_up(int n) {
  return (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// Where the parts of a packed image lie, in elements of S.
template <class S>
struct Layout {
  int HN, HNp, Dp;
  size_t A, C, a, bias, scale, shift, on, end;
  explicit Layout(const AttentionShape& s)
      : HN(s.H * s.N), HNp(round_up<S>(HN)), Dp(round_up<S>(s.D)) {
    A = 0;
    C = A + size_t(s.D) * HNp;
    a = C + size_t(HN) * Dp;
    bias = a + HNp;
    scale = bias + Dp;
    shift = scale + Dp;
    on = shift + Dp;
    end = on + kLanes<S>;
  }
};

// src [rows, cols], its elements `down` and `across` apart -> panels of kPanel vectors, each [rows,
// its width]; zeros fill the last columns.
template <class S>
static void pack_panels(const S* src, size_t down, size_t across, int rows, int cols, S* dst) {
  const int wide = kPanel * kLanes<S>, all = round_up<S>(cols);
  for (int c = 0; c < all; c += wide) {
    const int width = all - c < wide ? all - c : wide;
    const int real = cols - c < width ? cols - c : width;
    for (int r = 0; r < rows; ++r, dst += width) {
      const S* from = src + size_t(r) * down + size_t(c) * across;
      if (across == 1)
        memcpy(dst, from, size_t(real) * sizeof(S));
      else
        for (int j = 0; j < real; ++j) dst[j] = from[size_t(j) * across];
      for (int j = real; j < width; ++j) dst[j] = 0;
    }
  }
}

// out[kRows, NV vectors] = a[kRows, depth] panel[depth, NV vectors]. Long sums are taken in parts
// of kDepth: the rounding error then grows with kDepth and depth / kDepth, not with depth.
constexpr int kDepth = 128;

template <class S, int NV>
static void tile_part(const S* a, int lda, const S* panel, int first, int last, S* out, int ldo) {
  Vec<S> acc[kRows][NV] = {};
  for (int k = first; k < last; ++k) {
    Vec<S> b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = load(panel + (size_t(k) * NV + size_t(v)) * kLanes<S>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<S> s = splat(a[size_t(r) * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += s * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      S* o = out + size_t(r) * ldo + v * kLanes<S>;
      store(o, first ? load(o) + acc[r][v] : acc[r][v]);
    }
}

template <class S, int NV>
static void tile(const S* a, int lda, const S* panel, int depth, S* out, int ldo) {
  int k = 0;
  do {  // at depth 0, too: then out is 0
    tile_part<S, NV>(a, lda, panel, k, k + kDepth < depth ? k + kDepth : depth, out, ldo);
    k += kDepth;
  } while (k < depth);
}

template <class S>
static void product(const S* a, int lda, const S* panels, int depth, S* out, int ldo) {
  int c = 0;
  for (; c + kPanel * kLanes<S> <= ldo; c += kPanel * kLanes<S>) {
    tile<S, kPanel>(a, lda, panels, depth, out + c, ldo);
    panels += size_t(depth) * kPanel * kLanes<S>;
  }
  const int left = (ldo - c) / kLanes<S>;
  if (left == 2) tile<S, 2>(a, lda, panels, depth, out + c, ldo);
  if (left == 1) tile<S, 1>(a, lda, panels, depth, out + c, ldo);
}

template <class S>
static size_t packed_bytes(const AttentionShape& s) {
  // the packed image, and room to widen A or C of 16 bits before it is cut into panels
  const bool narrow = s.dtype == kFloat16 || s.dtype == kBFloat16;
  return (Layout<S>(s).end + (narrow ? size_t(s.D) * size_t(s.H) * size_t(s.N) : 0)) * sizeof(S);
}
static size_t packed_size(const AttentionShape& s) {
  return s.dtype == kFloat64 ? packed_bytes<double>(s) : packed_bytes<float>(s);
}
template <class S>
static size_t scratch_bytes(const AttentionShape& s) {
  const Layout<S> at(s);
  return size_t(kRows) * (3 * size_t(at.Dp) + size_t(at.HNp) + 2 * size_t(s.H)) * sizeof(S);
}
static size_t block_scratch(const AttentionShape& s) {
  return s.dtype == kFloat64 ? scratch_bytes<double>(s) : scratch_bytes<float>(s);
}

template <class S>
static void pack_of(const AttentionShape& s, const void* A, const void* a, const void* C,
                    const void* bias, const bool* mask, const void* scale, const void* shift,
                    S* to) {
  const Layout<S> at(s);
  to[at.on] = 0;
  for (int i = 0; i < s.N; ++i) to[at.on] = mask[i] ? S(1) : to[at.on];
  if (to[at.on] == 0) return;
  const bool narrow = s.dtype == kFloat16 || s.dtype == kBFloat16;
  auto widened = [&](const void* w) {
    if (!narrow) return static_cast<const S*>(w);
    to_float(w, s.dtype, to + at.end, int64_t(s.D) * at.HN);
    return static_cast<const S*>(to + at.end);
  };
  pack_panels(widened(A), size_t(at.HN), 1, s.D, at.HN, to + at.A);
  pack_panels(widened(C), size_t(s.D), 1, at.HN, s.D, to + at.C);
  to_float(a, s.dtype, to + at.a, at.HN);
  to_float(bias, s.dtype, to + at.bias, s.D);
  if (scale) to_float(scale, s.dtype, to + at.scale, s.D);
  if (shift) to_float(shift, s.dtype, to + at.shift, s.D);
  for (int d = 0; d < s.D; ++d) {
    to[at.scale + d] = scale ? to[at.scale + d] + 1 : S(1);
    if (!shift) to[at.shift + d] = 0;
  }
  for (int i = 0; i < s.N; ++i) {
    for (int h = 0; h < s.H; ++h)
      if (!mask[i]) to[at.a + size_t(i) * s.H + h] = S(-INFINITY);
  }
}
static void pack(const AttentionShape& s, const void* A, const void* a, const void* C,
                 const void* bias, const bool* mask, const void* scale, const void* shift,
                 void* packed) {
  if (s.dtype == kFloat64)
    pack_of<double>(s, A, a, C, bias, mask, scale, shift, static_cast<double*>(packed));
  else
    pack_of<float>(s, A, a, C, bias, mask, scale, shift, static_cast<float*>(packed));
}

// z = LN(x) (1 + scale) + shift over D, the variance in a second pass; padding stays out of it.
template <class S>
static void normalise(const AttentionShape& s, const S* x, const S* scale, const S* shift, S* z) {
  const int D = s.D, whole = D / kLanes<S> * kLanes<S>;
  S mean = 0, rstd = 1;
  if (s.norm) {
    Vec<S> t{};
    for (int d = 0; d < whole; d += kLanes<S>) t += load(x + d);
    S total = sum<S>(t);
    for (int d = whole; d < D; ++d) total += x[d];
    mean = total / S(D);
    Vec<S> q{};
    for (int d = 0; d < whole; d += kLanes<S>) {
      const Vec<S> c = load(x + d) - mean;
      q += c * c;
    }
    S square = sum<S>(q);
    for (int d = whole; d < D; ++d) square += (x[d] - mean) * (x[d] - mean);
    rstd = S(1 / ::sqrt(double(square) / D + s.eps));
  }
  for (int d = 0; d < whole; d += kLanes<S>)
    store(z + d, (load(x + d) - mean) * rstd * load(scale + d) + load(shift + d));
  for (int d = whole; d < D; ++d) z[d] = (x[d] - mean) * rstd * scale[d] + shift[d];
}

// Softmax over n of s[n * H + h], each head apart. Heads lie side by side, so the loops vectorise.
template <class S>
static void softmax(S* s, int N, int H, S* top, S* total) {
  for (int h = 0; h < H; ++h) top[h] = s[h];
  for (int n = 1; n < N; ++n)
    for (int h = 0; h < H; ++h) top[h] = s[n * H + h] > top[h] ? s[n * H + h] : top[h];
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < H; ++h) s[n * H + h] -= top[h];
  for (int j = 0; j < N * H; j += kLanes<S>) store(s + j, exp(load(s + j)));
  for (int h = 0; h < H; ++h) total[h] = 0;
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < H; ++h) total[h] += s[n * H + h];
  for (int h = 0; h < H; ++h) total[h] = 1 / total[h];
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < H; ++h) s[n * H + h] *= total[h];
}

template <class S>
static void attend_of(const AttentionShape& s, const S* packed, const S* scale, const S* shift,
                      const void* x_, void* y_, int rows, S* scratch) {
  const Layout<S> at(s);
  const size_t width = s.dtype == kFloat64 ? 8 : s.dtype == kFloat32 ? 4 : 2;
  const char* x = static_cast<const char*>(x_);
  char* y = static_cast<char*>(y_);
  S* z = scratch;  // [kRows, Dp], then the output
  S* raw = z + size_t(kRows) * at.Dp;
  S* out = raw + size_t(kRows) * at.Dp;
  S* score = out + size_t(kRows) * at.Dp;
  S* top = score + size_t(kRows) * at.HNp;
  for (int r = 0; r < rows; ++r)
    to_float(x + size_t(r) * size_t(s.row_x) * width, s.dtype, raw + size_t(r) * at.Dp, s.D);
  const bool on = packed[at.on] != 0;
  if (on) {
    for (int r = 0; r < kRows; ++r) {
      if (r < rows)
        normalise(s, raw + size_t(r) * at.Dp, scale, shift, z + size_t(r) * at.Dp);
      else
        memset(z + size_t(r) * at.Dp, 0, size_t(at.Dp) * sizeof(S));
    }
    product(z, at.Dp, packed + at.A, s.D, score, at.HNp);
    for (int r = 0; r < rows; ++r) {
      S* row = score + size_t(r) * at.HNp;
      const S* add = packed + at.a;  // -inf where the embedding is off, whatever its score is
      for (int j = 0; j < at.HN; ++j) row[j] = add[j] == S(-INFINITY) ? add[j] : row[j] + add[j];
      softmax(row, s.N, s.H, top, top + s.H);
    }
    product(score, at.HNp, packed + at.C, at.HN, out, at.Dp);
  }
  for (int r = 0; r < rows; ++r) {
    S* o = out + size_t(r) * at.Dp;
    const S* in = raw + size_t(r) * at.Dp;
    for (int d = 0; d < s.D; ++d) {
      const S add = on ? o[d] + packed[at.bias + size_t(d)] : S(0);
      o[d] = s.residual ? in[d] + add : add;
    }
    from_float(o, y + size_t(r) * size_t(s.row_y) * width, s.dtype, s.D);
  }
}
template <class S>
static void attend_packed(const AttentionShape& s, const void* packed_, const void* x, void* y,
                          int rows, void* scratch) {
  const Layout<S> at(s);
  const S* packed = static_cast<const S*>(packed_);
  attend_of<S>(s, packed, packed + at.scale, packed + at.shift, x, y, rows,
               static_cast<S*>(scratch));
}
static void attend(const AttentionShape& s, const void* packed, const void* x, void* y, int rows,
                   void* scratch) {
  if (s.dtype == kFloat64)
    attend_packed<double>(s, packed, x, y, rows, scratch);
  else
    attend_packed<float>(s, packed, x, y, rows, scratch);
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
