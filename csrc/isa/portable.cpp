// SPDX-License-Identifier: Apache-2.0
// The kernels in plain C++: any machine, and the form to read first.
#include "isa/common.h"
#include "isa/matmul.h"

namespace knnfast {
namespace {

// Which rows of a block may be among the best.
uint32_t reaching(const ScanRows& rows, uint32_t block, const ScanQuery& query,
                  const float* upper) {
  uint32_t mask = 0;
  for (int r = 0; r < kBlockRows; ++r) mask |= static_cast<uint32_t>(upper[r] >= query.tau) << r;
  return rows.live ? mask & rows.live[block] : mask;
}

void report(const ScanRows& rows, uint32_t block, ScanQuery& query, int index, const float* upper,
            Sink* sink) {
  const uint32_t mask = reaching(rows, block, query, upper);
  if (mask) query.tau = sink->hit(sink, index, block, upper, mask);
}

// Upper bounds of a block's rows from their sums; at a stop with what is left of them.
void bound(const ScanRows& rows, uint32_t block, const ScanQuery& q, const int32_t* sum, int stop,
           bool l2, float* upper) {
  const size_t first = static_cast<size_t>(block) * kBlockRows;
  for (int r = 0; r < kBlockRows; ++r) {
    const uint32_t bounds = rows.bounds[first + r];
    const float norm = rows.norm[first + r];
    const float codes = static_cast<float>(sum[r] + q.rest[stop]);
    upper[r] = q.err[stop] * residual_of(bounds) + q.err_norm[stop] * norm + q.base;
    if (stop < kStops)
      upper[r] += q.left[stop] * (static_cast<float>(bounds >> (8 - 8 * stop) & 255) * norm);
    upper[r] += q.mul * (codes * rows.scale[first + r]);
    if (l2) upper[r] += q.sq * (norm * norm);
  }
}

void scan_int8(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, Sink* sink, int64_t* stopped) {
  for (uint32_t b = next_live(rows, begin, end); b < end; b = next_live(rows, b + 1, end)) {
    const uint8_t* codes = rows.codes + static_cast<size_t>(b) * rows.groups * 64;
    for (int q = 0; q < nq; ++q) {
      int32_t sum[kBlockRows];
      float upper[kBlockRows];
      for (int32_t& s : sum) s = queries[q].offset;
      int g = 0;
      for (int stop = rows.stop; stop <= kStops; ++stop) {
        for (const int to = stop < kStops ? stop_group(rows.groups, stop) : rows.groups; g < to;
             ++g) {
          const int8_t* p = queries[q].codes + g * kBlockDims;
          const uint8_t* c = codes + g * 64;
          for (int r = 0; r < kBlockRows; ++r)
            sum[r] +=
                c[4 * r] * p[0] + c[4 * r + 1] * p[1] + c[4 * r + 2] * p[2] + c[4 * r + 3] * p[3];
        }
        bound(rows, b, queries[q], sum, stop, l2, upper);
        if (stop == kStops)
          report(rows, b, queries[q], q, upper, sink);
        else if (!reaching(rows, b, queries[q], upper)) {
          stopped[stop] += kBlockRows;
          break;
        }
      }
    }
  }
}

void scan_fp16(const ScanRows& rows, uint32_t begin, uint32_t end, ScanQuery* queries, int nq,
               bool l2, bool cosine, Sink* sink) {
  constexpr int kStep = 256;
  for (uint32_t b = next_live(rows, begin, end); b < end; b = next_live(rows, b + 1, end)) {
    const size_t first = static_cast<size_t>(b) * kBlockRows;
    for (int q0 = 0; q0 < nq; q0 += 8) {
      const int count = nq - q0 < 8 ? nq - q0 : 8;
      float sum[8][kBlockRows] = {};
      for (int r = 0; r < kBlockRows; ++r) {
        const uint16_t* x = rows.rows + (first + r) * rows.dim;
        for (int j0 = 0; j0 < rows.dim; j0 += kStep) {
          const int n = rows.dim - j0 < kStep ? rows.dim - j0 : kStep;
          float f[kStep];
          for (int j = 0; j < n; ++j) f[j] = half_to_float(x[j0 + j]);
          for (int q = 0; q < count; ++q) {
            const float* v = queries[q0 + q].values + j0;
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int j = 0; j < n; ++j) s += f[j] * v[j];
            sum[q][r] += s;
          }
        }
      }
      for (int q = 0; q < count; ++q) {
        ScanQuery& query = queries[q0 + q];
        float upper[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) {
          const float n = rows.row_norm[first + r];
          const float inverse = cosine ? (n > 0 ? 1 / n : 0) : 1;
          upper[r] = query.mul * (sum[q][r] * inverse) +
                     (query.err[kStops] * (cosine ? 1 : n) + query.base);
          if (l2) upper[r] += query.sq * (n * n);
        }
        report(rows, b, query, q0 + q, upper, sink);
      }
    }
  }
}

template <class Term>
double canonical(int dim, Term term) {
  double lanes[32] = {};
  for (int j = 0; j < dim; j += 32)
    for (int l = 0; l < 32; ++l) lanes[l] += term(j + l);
  for (int stride = 16; stride > 0; stride /= 2)
    for (int l = 0; l < stride; ++l) lanes[l] += lanes[l + stride];
  return lanes[0];
}

double dot(const double* x, const double* q, int dim) {
  return canonical(dim, [&](int j) { return x[j] * q[j]; });
}

double l2(const double* x, const double* q, int dim) {
  return canonical(dim, [&](int j) { return (q[j] - x[j]) * (q[j] - x[j]); });
}

double dot_row(const uint16_t* x, const double* q, int dim) {
  return canonical(
      dim, [&](int j) { return j < dim ? static_cast<double>(half_to_float(x[j])) * q[j] : 0; });
}

double l2_row(const uint16_t* x, const double* q, int dim) {
  return canonical(dim, [&](int j) {
    const double t = j < dim ? q[j] - static_cast<double>(half_to_float(x[j])) : 0;
    return t * t;
  });
}

double norm2_row(const uint16_t* x, const double*, int dim) {
  return canonical(dim, [&](int j) {
    const double v = j < dim ? static_cast<double>(half_to_float(x[j])) : 0;
    return v * v;
  });
}

// Canonical sums pair by pair.
template <double (*Sum)(const double*, const double*, int)>
void one_by_one(const double* x, int nx, const double* q, int nq, size_t stride, int dim,
                double* sums) {
  for (int r = 0; r < nx; ++r)
    for (int i = 0; i < nq; ++i) *sums++ = Sum(x + r * stride, q + i * stride, dim);
}

void widen(const uint16_t* x, int dim, double* out) {
  int j = 0;
  for (; j < dim; ++j) out[j] = half_to_float(x[j]);
  for (; j % 32; ++j) out[j] = 0;
}

bool to_half(const float* x, uint16_t* out, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = float_to_half(x[i]);
    finite &= (out[i] & 0x7c00) != 0x7c00;
  }
  return finite;
}

void to_float(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(x[i]);
}

}  // namespace

extern const Kernels kPortable = {
    "portable",
    0,            // window
    0,            // tile_batch
    0,            // matrix_batch
    kStopGroups,  // stop_groups
    kGroup,       // stop_batch
    scan_int8,
    scan_fp16,
    one_by_one<dot>,
    one_by_one<l2>,
    widen,
    dot_row,
    l2_row,
    norm2_row,
    to_half,
    to_float,
    centre_row_plain<to_float>,
    quantize_row_plain,
    squares,
    round_row,
    scale_row,
    matmul,
    matmul,
    nullptr,
};

}  // namespace knnfast
