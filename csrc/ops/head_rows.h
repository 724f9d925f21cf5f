// SPDX-License-Identifier: Apache-2.0
// The head of a few rows: out[r, j] = f[r] . w[j] + b[j]. Classes are cut into panels, transposed
// on the way from memory, and multiplied by attention_rows.h's register tiles. Bytes: K D for the
// weights, read once however many rows there are; they bind below about 30 rows. FP32 sums in the
// tile's fixed order: a row's bits depend on that row alone, never on how many others there are.
#pragma once

#include "ops/attention_rows.h"

namespace knnfast {
namespace KNNFAST_ISA {

// Classes of a panel. Where L1 has 32 KiB (AVX2) it should not be wider: D = 512 fills them.
constexpr int kHeadPanel = (kBytes == 32 ? 2 : kPanel) * kLanes<float>;

static size_t head_scratch(const HeadShape& s) {
  return (size_t(s.D) + kRows) * kHeadPanel * sizeof(float);
}

// w [classes, D] -> panel [D, width], zeros in the columns beyond the classes. Four classes by four
// columns at a time, in registers: element by element it took longer than the product of few rows.
static void transpose_panel(const HeadShape& s, const char* w, int classes, int width,
                            float* panel) {
  constexpr int kStep = 16;  // so many columns of w at a time: the part of the panel stays in L1
  const size_t size = s.dtype == kFloat32 ? 4 : 2;
  for (int k = 0; k < s.D; k += kStep) {
    const int depth = s.D - k < kStep ? s.D - k : kStep;
    for (int j = 0; j < width; j += 4) {
      float row[4][kStep] = {};
      for (int c = 0; c < 4 && j + c < classes; ++c)
        to_float(w + (size_t(j + c) * size_t(s.D) + size_t(k)) * size, s.dtype, row[c], depth);
      for (int i = 0; i < depth; i += 4) {
        float* to = panel + size_t(k + i) * size_t(width) + size_t(j);
#if defined(__SSE__)
        __m128 r[4];
        for (int c = 0; c < 4; ++c) r[c] = _mm_loadu_ps(row[c] + i);
        _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
        for (int t = 0; t < 4 && i + t < depth; ++t, to += width) _mm_storeu_ps(to, r[t]);
#else
        for (int t = 0; t < 4 && i + t < depth; ++t, to += width)
          for (int c = 0; c < 4; ++c) to[c] = row[c][i + t];
#endif
      }
    }
  }
}

// Classes [first, first + kHeadPanel) of all rows; f is [rows, D], a multiple of kRows of them
// readable, out [rows, K].
static void head_panel(const HeadShape& s, const float* f, int64_t rows, const void* weight,
                       const void* bias, int first, void* scratch, float* out) {
  const int left = s.K - first, classes = left < kHeadPanel ? left : kHeadPanel;
  const int width = round_up<float>(classes);
  const size_t size = s.dtype == kFloat32 ? 4 : 2;
  float* panel = static_cast<float*>(scratch);
  float* part = panel + size_t(s.D) * kHeadPanel;  // [kRows, width]
  const char* w = static_cast<const char*>(weight) + size_t(first) * size_t(s.D) * size;
  transpose_panel(s, w, classes, width, panel);
  float add[kHeadPanel] = {};
  if (bias) to_float(static_cast<const char*>(bias) + size_t(first) * size, s.dtype, add, classes);
  for (int64_t r = 0; r < rows; r += kRows) {
    product(f + r * s.D, s.D, panel, s.D, part, width);
    for (int i = 0; i < kRows && r + i < rows; ++i) {
      float* to = out + (r + i) * s.K + first;
      const float* from = part + size_t(i) * size_t(width);
      for (int j = 0; j < classes; ++j) to[j] = from[j] + add[j];
    }
  }
}

}  // namespace KNNFAST_ISA
}  // namespace knnfast
