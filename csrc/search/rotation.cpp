// SPDX-License-Identifier: Apache-2.0
#include "search/rotation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/thread_pool.h"
#include "search/query_codes.h"

namespace knnfast {
namespace {

static_assert(kMaxRotated <= kMaxInner, "of products of rows");
constexpr double kFlat = 0.6;          // of dim: so many directions are all alike
constexpr double kGain = 0.2;          // of the rows' squares, before the first stop
constexpr double kBehind = 0.1;        // at most, behind the second one
constexpr double kMaxError = 0x1p-19;  // half of every margin of the bounds; FP32 has less
constexpr int kIterations = 3;
constexpr float kLargest = 32766;     // of whole numbers, with room for rounding
constexpr double kLongest = 1 << 16;  // kSumLength of W: then W and Y lose about as much

// b [inner, cols] into the panels that matmul takes.
AlignedVector<float> to_panels(const float* b, int64_t inner, int64_t cols) {
  AlignedVector<float> panels(static_cast<size_t>(inner * cols));
  float* out = panels.data();
  for (int64_t c = 0; c < cols; c += kPanel)
    for (int64_t j = 0; j < inner; ++j, out += kPanel) std::copy_n(b + j * cols + c, kPanel, out);
  return panels;
}

void matmul(const float* a, int64_t rows, int64_t inner, const AlignedVector<float>& b,
            int64_t cols, float* out) {
  constexpr int64_t kTask = 32;
  parallel_for((rows + kTask - 1) / kTask, [&](int, int64_t task) {
    const int64_t first = task * kTask;
    kernels().matmul(a + first * inner, static_cast<int>(std::min(kTask, rows - first)),
                     static_cast<int>(inner), b.data(), static_cast<int>(cols), out + first * cols);
  });
}

float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

double largest(const float* x, int64_t n) {
  float top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = std::max(top, std::fabs(x[j]));
  return static_cast<double>(top);
}

// The largest norm of kSumLength elements that matmul sums at a time, to 2e-6.
double longest_part(const float* x, int64_t n) {
  float square = 0;
  for (int64_t j = 0; j < n; j += kSumLength) {
    const int64_t length = std::min<int64_t>(kSumLength, n - j);
    square = std::max(square, dot(x + j, x + j, length));
  }
  return std::sqrt(static_cast<double>(square));
}

void add(float* x, float factor, const float* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] += factor * y[j];
}

// Gram and Schmidt's of rows [dim, padded]: each row less what lies along the ones before it, then
// normalised. A block's rows are taken in turn, and what lies along them from all rows behind it.
void orthonormalise(float* rows, int64_t dim) {
  constexpr int64_t kBlock = kSumLength;
  const int64_t pad = static_cast<int64_t>(padded(dim));
  AlignedVector<float> across(static_cast<size_t>(pad * kBlock)), along(across.size());
  AlignedVector<float> less(static_cast<size_t>(pad * pad));
  for (int64_t first = 0; first < dim; first += kBlock) {
    float* block = rows + first * pad;
    for (int64_t i = 0; i < std::min(kBlock, dim - first); ++i) {
      float* x = block + i * pad;
      for (int64_t j = 0; j < 2 * i; ++j) {  // twice, for little may be left after the first time
        const float* y = block + j % i * pad;
        add(x, -dot(x, y, dim), y, dim);
      }
      const float norm = std::sqrt(dot(x, x, dim));
      for (int64_t j = 0; j < dim; ++j) x[j] /= norm;
    }
    const int64_t behind = dim - first - kBlock;
    if (behind <= 0) return;
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t j = 0; j < pad; ++j)
        across[static_cast<size_t>(j * kBlock + i)] = block[i * pad + j];
    float* rest = block + kBlock * pad;
    matmul(rest, behind, pad, to_panels(across.data(), pad, kBlock), kBlock, along.data());
    matmul(along.data(), behind, kBlock, to_panels(block, kBlock, pad), pad, less.data());
    add(rest, -1, less.data(), behind * pad);
  }
}

// XXᵀ [dim, dim] of rows [dim, padded] with zeros behind dim.
std::vector<double> gram(const AlignedVector<double>& x, int64_t dim) {
  constexpr int64_t kTask = 8;
  const size_t pad = padded(dim);
  std::vector<double> products(static_cast<size_t>(dim * dim));
  parallel_for((dim + kTask - 1) / kTask, [&](int, int64_t task) {
    const int64_t first = task * kTask;
    kernels().dot(x.data() + static_cast<size_t>(first) * pad,
                  static_cast<int>(std::min(kTask, dim - first)), x.data(), static_cast<int>(dim),
                  pad, static_cast<int>(dim), products.data() + first * dim);
  });
  return products;
}

// RRᵀ - 1 [dim, dim] of rows [dim, padded] with zeros behind dim.
std::vector<double> off_orthogonal(const float* rows, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  std::vector<double> off = gram(AlignedVector<double>(rows, rows + dim * pad), dim);
  for (int64_t i = 0; i < dim; ++i) off[static_cast<size_t>(i * dim + i)] -= 1;
  return off;
}

// At least the norm of X, rows [dim, padded] with zeros behind dim: the 16th root of the sum of its
// singular values' 16th powers, (XXᵀ)⁴'s squares.
double norm_of(AlignedVector<double> x, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  for (int round = 0; round < 3; ++round) {
    const std::vector<double> products = gram(x, dim);
    for (int64_t i = 0; i < dim; ++i)
      std::copy_n(products.data() + i * dim, dim, x.data() + i * pad);
  }
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::pow(sum, 1.0 / 16) * (1 + 1e-9);
}

// Row k of the orthonormal cosine transform (DCT-II) of n values.
float cosine_entry(int64_t n, int64_t k, int64_t j) {
  const double pi = 3.14159265358979323846;
  const double size = std::sqrt((k ? 2.0 : 1.0) / static_cast<double>(n));
  // The angle's multiple of π/2n is exact; reduced, its cosine is accurate.
  const int64_t turn = (2 * j + 1) * k % (4 * n);
  return static_cast<float>(size *
                            std::cos(pi * static_cast<double>(turn) / static_cast<double>(2 * n)));
}

// YᵀY [padded, padded] of rows y [n, padded], each as if its norm were 1.
AlignedVector<float> covariance(const float* y, int64_t n, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  AlignedVector<float> units(static_cast<size_t>(n * pad)), across(units.size());
  for (int64_t i = 0; i < n; ++i) {
    const float* row = y + i * pad;
    const float length = std::sqrt(dot(row, row, dim));
    const float factor = length > 1e-15f ? 1 / length : 0;
    for (int64_t j = 0; j < dim; ++j)
      units[static_cast<size_t>(i * pad + j)] = across[static_cast<size_t>(j * n + i)] =
          row[j] * factor;
  }
  AlignedVector<float> c(static_cast<size_t>(pad * pad));
  matmul(across.data(), pad, n, to_panels(units.data(), n, pad), pad, c.data());
  return c;
}

// Makes C's trace 1; false where it is 0.
bool normalise_trace(AlignedVector<float>& c, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  double trace = 0;
  for (int64_t i = 0; i < dim; ++i)
    trace += static_cast<double>(c[static_cast<size_t>(i * pad + i)]);
  if (trace == 0) return false;
  for (float& x : c) x = static_cast<float>(static_cast<double>(x) / trace);
  return true;
}

// Whether C, whose trace is 1, has more in some directions than in others.
bool differs(const AlignedVector<float>& c, int64_t dim) {
  double squares = 0;
  for (const float x : c) squares += static_cast<double>(x) * x;
  return 1 / squares <= kFlat * static_cast<double>(dim);  // the number of directions in use
}

// The first dimension behind each stop of a scan.
std::array<int64_t, 2> stops(int64_t dim) {
  const int groups = code_groups(dim);
  return {stop_group(groups, 0) * kBlockDims, stop_group(groups, 1) * kBlockDims};
}

// The leading directions of C, whose trace is 1, as orthonormal rows [padded, padded]; empty where
// the stops would gain too little. By orthogonal iteration: they remain of C's powers. Directions
// in which the sample has nothing keep a little of what they were.
AlignedVector<float> leading_directions(const AlignedVector<float>& c, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  const auto [first, second] = stops(dim);
  const AlignedVector<float> panels = to_panels(c.data(), pad, pad);
  AlignedVector<float> q(c.size()), cq(c.size());
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < dim; ++j) q[static_cast<size_t>(i * pad + j)] = cosine_entry(dim, i, j);
  for (int round = 0; round < kIterations; ++round) {
    matmul(q.data(), pad, pad, panels, pad, cq.data());
    add(cq.data(), 1e-3f / static_cast<float>(dim), q.data(), pad * dim);
    std::swap(q, cq);
    orthonormalise(q.data(), dim);
  }
  matmul(q.data(), pad, pad, panels, pad, cq.data());
  double before = 0, after[2] = {};
  for (int64_t i = 0; i < first; ++i)
    before += static_cast<double>(c[static_cast<size_t>(i * pad + i)]);
  for (int64_t i = 0; i < second; ++i)
    after[i >= first] += static_cast<double>(dot(q.data() + i * pad, cq.data() + i * pad, dim));
  if (!(after[0] >= before + kGain && after[0] + after[1] >= 1 - kBehind)) return {};
  orthonormalise(q.data(), dim);
  return q;
}

// R [dim, dim]: directions mixed within the parts between the stops, then as orthogonal as floats
// can be, by a step of Newton and Schulz's.
std::vector<float> mixed(const AlignedVector<float>& directions, int64_t dim) {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  const auto [first, second] = stops(dim);
  AlignedVector<float> left(directions.size()), r(left.size()), step(left.size());
  const int64_t parts[] = {0, first, second, dim};
  for (int part = 0; part < 3; ++part) {
    const int64_t begin = parts[part], length = parts[part + 1] - begin;
    for (int64_t i = 0; i < length; ++i)
      for (int64_t j = 0; j < length; ++j)
        left[static_cast<size_t>((begin + i) * pad + begin + j)] = cosine_entry(length, i, j);
  }
  matmul(left.data(), pad, pad, to_panels(directions.data(), pad, pad), pad, r.data());
  const std::vector<double> off = off_orthogonal(r.data(), dim);
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < dim; ++j)
      left[static_cast<size_t>(i * pad + j)] =
          static_cast<float>(off[static_cast<size_t>(i * dim + j)]);
  matmul(left.data(), pad, pad, to_panels(r.data(), pad, pad), pad, step.data());
  add(r.data(), -0.5f, step.data(), pad * dim);
  std::vector<float> rows(static_cast<size_t>(dim * dim));
  for (int64_t i = 0; i < dim; ++i) std::copy_n(r.data() + i * pad, dim, rows.data() + i * dim);
  return rows;
}

}  // namespace

std::shared_ptr<const Rotation> Rotation::from_rows(const float* rows, int64_t dim,
                                                    const float* error) {
  auto r = std::make_shared<Rotation>();
  const int64_t pad = static_cast<int64_t>(padded(dim));
  r->dim = dim;
  AlignedVector<float> transposed(static_cast<size_t>(pad * pad));
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < dim; ++j)
      transposed[static_cast<size_t>(j * pad + i)] = rows[i * dim + j];
  r->panels = to_panels(transposed.data(), pad, pad);
  if (error) {
    r->error = static_cast<double>(*error);
    return r;
  }
  // The norm of RRᵀ - 1 is RᵀR - 1's; Frobenius' is above the largest singular value.
  AlignedVector<float> wide(static_cast<size_t>(pad * dim));
  for (int64_t i = 0; i < dim; ++i) std::copy_n(rows + i * dim, dim, wide.data() + i * pad);
  double squares = 0;
  for (const double off : off_orthogonal(wide.data(), dim)) squares += off * off;
  r->error = static_cast<double>(round_up(std::sqrt(squares) + 1e-10));
  return r;
}

void Rotation::rows(float* out) const {
  const int64_t pad = static_cast<int64_t>(padded(dim));
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < dim; ++j)
      out[i * dim + j] =
          panels[static_cast<size_t>(i / kPanel * kPanel * pad + j * kPanel + i % kPanel)];
}

bool Rotation::orthogonal() const {
  std::vector<float> r(static_cast<size_t>(dim * dim));
  rows(r.data());
  for (int64_t i = 0; i < dim; ++i) {
    const float* row = r.data() + i * dim;
    if (!(std::fabs(dot(row, row, dim) - 1) < 1e-3f)) return false;
  }
  return error > 0 && error <= kMaxError;
}

// A coordinate is a sum of products, kSumLength in a row and then the sums: it is off by a few more
// than so many roundings of Σ|r|·|y|, and the coordinates together by √dim·‖y‖ of that at most.
double Rotation::slack() const {
  const double roundings = kSumLength + static_cast<double>(padded(dim)) / kSumLength + 4;
  return error + roundings * 0x1p-24 * std::sqrt(static_cast<double>(dim));
}

int64_t settled_rows(int64_t dim) {
  constexpr int64_t kRows = 16384;
  return dim > kMaxRotated ? kRows : std::max(kRows, 64 * dim);
}

std::shared_ptr<const Rotation> find_rotation(const float* y, int64_t n, int64_t dim) {
  n = n / kSumLength * kSumLength;
  if (code_groups(dim) < kernels().stop_groups || dim > kMaxRotated || n < 2 * dim) return nullptr;
  AlignedVector<float> c = covariance(y, n, dim);
  if (!normalise_trace(c, dim) || !differs(c, dim)) return nullptr;
  const AlignedVector<float> directions = leading_directions(c, dim);
  if (directions.empty()) return nullptr;
  std::shared_ptr<const Rotation> found = Rotation::from_rows(mixed(directions, dim).data(), dim);
  return found->orthogonal() ? found : nullptr;
}

void rotate(const Rotation& rotation, const float* y, int64_t n, float* out) {
  const int pad = static_cast<int>(padded(rotation.dim));
  kernels().matmul(y, static_cast<int>(n), pad, rotation.panels.data(), pad, out);
}

const Rotation::Whole& Rotation::whole() const {
  std::call_once(once_, [this] {
    const size_t d = static_cast<size_t>(dim), pad = padded(dim);
    std::vector<float> r(d * d);
    rows(r.data());
    Whole made;
    made.panels.assign(pad * pad, 0);
    made.back.assign(pad, 0);
    AlignedVector<double> off(d * pad);
    double longest = 0;  // kSumLength elements of a row of W
    for (size_t i = 0; i < d; ++i) {
      const float* row = r.data() + i * d;
      const double w = std::min(kLargest / largest(row, dim), kLongest / longest_part(row, dim));
      made.back[i] = static_cast<float>(1 / w);
      double square = 0;
      for (size_t j = 0; j < d; ++j) {
        const double exact = static_cast<double>(row[j]), rounded = std::nearbyint(exact * w);
        off[i * pad + j] = exact - rounded / w;
        made.panels[i / kPanel * kPanel * pad + j / 2 * 2 * kPanel + i % kPanel * 2 + j % 2] =
            static_cast<int16_t>(rounded);
        square = (j % kSumLength ? square : 0) + rounded * rounded;
        longest = std::max(longest, std::sqrt(square));
      }
    }
    if (kernels().arrange)
      kernels().arrange(made.panels.data(), static_cast<int>(pad), static_cast<int>(pad));
    made.error = norm_of(std::move(off), dim);
    // Rounding makes kSumLength elements of u·y longer by half a unit each at most.
    made.most = static_cast<float>(0x1.fffffp30 / longest - std::sqrt(kSumLength) / 2);
    whole_ = std::move(made);
    whole_bytes_ = static_cast<int64_t>(pad * pad * sizeof(int16_t));
  });
  return whole_;
}

int64_t Rotation::bytes() const {
  return static_cast<int64_t>(panels.size()) * 4 + whole_bytes_.load();
}

// Sums become floats and are added up; 1/u, 1/w, their product and what is multiplied by it; u·y;
// and y itself. Those of a coordinate are within ‖y‖.
static double rounded_share(int64_t dim) {
  const double roundings = static_cast<double>(padded(dim) / kSumLength) + 6;
  return 1.01 * roundings * 0x1p-24 * std::sqrt(static_cast<double>(dim));
}

RotatedRows::RotatedRows(const Rotation& rotation, int64_t n)
    : rotation_(rotation),
      whole_(rotation.whole()),
      pad_(padded(rotation.dim)),
      share_(rotation.error + whole_.error + rounded_share(rotation.dim)),
      rounded_(static_cast<size_t>(n) * pad_),
      out_(static_cast<size_t>(n) * pad_),
      back_(static_cast<size_t>(n)),
      off_(static_cast<size_t>(n)) {}

void RotatedRows::put(int64_t i, const float* y, double norm) {
  const size_t at = static_cast<size_t>(i);
  float lost;
  const float u = kernels().round_row(y, static_cast<int>(rotation_.dim), kLargest, whole_.most,
                                      rounded_.data() + at * pad_, &lost);
  if (u == 0) {  // and so is all that there is of the row here
    off_[at] = 1.01 * norm;
    return;
  }
  back_[at] = 1 / u;
  off_[at] = share_ * norm + 1.01 * std::sqrt(static_cast<double>(lost)) / static_cast<double>(u);
}

void RotatedRows::rotate() {
  const int n = static_cast<int>(back_.size()), pad = static_cast<int>(pad_);
  kernels().matmul_int16(rounded_.data(), n, pad, whole_.panels.data(), pad, out_.data());
}

const float* RotatedRows::take(int64_t i) {
  const size_t at = static_cast<size_t>(i);
  float* row = out_.data() + at * pad_;
  kernels().scale_row(row, back_[at], whole_.back.data(), static_cast<int>(pad_));
  return row;
}

}  // namespace knnfast
