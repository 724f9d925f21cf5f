// SPDX-License-Identifier: Apache-2.0
// Other coordinates for the codes, in which scans stop early.
//
// Embeddings that a network has made lie near a few directions, which the coordinates do not
// follow: each holds about as much of a row as any other, and until most of the codes are read
// nothing can be said of the rest. In coordinates ordered by what the rows have there (the
// principal directions of a sample) the first stop sees most of every row. An orthogonal matrix R
// changes no product: q·y = (Rq)·(Ry).
//
// Within the parts between the stops the directions are mixed by a cosine transform, so that no
// coordinate is much larger than the others: the step of a row's codes is its largest one over 127.
// Rows in all directions alike have no rotation, nor have those with all their norm before the
// first stop as they are.
//
// Cost: dim² multiplications for each row that is added and for each query of a search; about
// 15·dim³ + 4096·dim² once, to find R. A scan saves up to two thirds of rows·dim for each query.
//
// Rows are rotated in whole numbers, of whose products a processor does twice as many as of FP32's,
// with AMX up to eight times as many (isa/amx.cpp): row i of R times w_i and y times u are rounded
// to int16, W and Y, and (Ry)_i ≈ (WY)_i/(w_i·u). Products are summed exactly, 64 of them in an
// int32 (AMX: all): w and u are so small that they fit. That is off by 2e-4 of ‖y‖, where the codes
// themselves are off by 3e-3 to 1e-2.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "search/segment.h"

namespace knnfast {

constexpr int64_t kMaxRotated = 1024;  // dimensions; beyond, adding rows would take too long

struct Rotation {
  int64_t dim = 0;
  AlignedVector<float> panels;  // Rᵀ, padded with zeros, as matmul takes it
  double error = 0;             // ‖RᵀR - 1‖, rounded up to a float: q·y and (Rq)·(Ry) are so far
                                // apart for vectors of norm 1

  // `error` is measured where it is not given.
  static std::shared_ptr<const Rotation> from_rows(const float* rows, int64_t dim,
                                                   const float* error = nullptr);
  void rows(float* out) const;  // R, [dim, dim]
  bool orthogonal() const;      // as nearly as the bounds of segment.h need it
  // What a vector may be off when it has been rotated, as a share of its norm; `error` is in it.
  double slack() const;

  // R in whole numbers, for rows.
  struct Whole {
    AlignedVector<int16_t> panels;  // Wᵀ, as matmul_int16 takes it
    std::vector<float> back;        // 1/w [padded dim]
    float most = 0;                 // u times the norm of kSumLength elements of y may be so much
    double error = 0;               // at least the norm of R less W's rows over w
  };
  const Whole& whole() const;  // made on the first call
  int64_t bytes() const;

 private:
  mutable std::once_flag once_;
  mutable Whole whole_;
  mutable std::atomic<int64_t> whole_bytes_{0};
};

// From so many rows on a segment's codes are final: they have seen enough for a mean, and for a
// rotation, which makes all rows cheaper to scan and every search dim² multiplications dearer.
int64_t settled_rows(int64_t dim);

// The rotation for rows like these, y [n, padded dim] with zeros behind dim, less their mean; null
// where none would pay. Reads the first n/64*64 rows.
std::shared_ptr<const Rotation> find_rotation(const float* y, int64_t n, int64_t dim);

// out = R·y for vectors [n, padded dim]; on the calling thread.
void rotate(const Rotation& rotation, const float* y, int64_t n, float* out);

// The same in whole numbers, for n rows; n is a multiple of 16.
class RotatedRows {
 public:
  RotatedRows(const Rotation& rotation, int64_t n);
  void put(int64_t i, const float* y, double norm);  // row i, [padded dim], and its norm
  void rotate();                                     // when all of them are there
  const float* take(int64_t i);                      // R·y, [padded dim]; once for each row
  // What it is off at most; the rotation's `error` is in it.
  double off(int64_t i) const { return off_[static_cast<size_t>(i)]; }

 private:
  const Rotation& rotation_;
  const Rotation::Whole& whole_;
  const size_t pad_;
  const double share_;  // of a row's norm that it is off by, but for what its rounding takes
  AlignedVector<int16_t> rounded_;
  AlignedVector<float> out_;
  std::vector<float> back_;  // 1/u
  std::vector<double> off_;
};

}  // namespace knnfast
