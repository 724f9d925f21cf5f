// SPDX-License-Identifier: Apache-2.0
// A query's int8 codes, as the scans take them (kernels.h).
#pragma once

#include "segment.h"

namespace knnfast {

struct QueryCodes {          // v = step·p + w
  double step, error, norm;  // of w and v: their norms, rounded up
  int32_t offset;            // -128·Σp
};

// Elements of a query with its padding.
size_t padded(int64_t dim);

// Codes p [dim] of v, and for a kernel with windows their offsets.
QueryCodes quantize_query(const double* v, int64_t dim, int window, int8_t* p, int32_t* offsets);

// What is left of v, coded in q, from each stop on, where a row counts `row_scale` times.
void fill_stops(ScanQuery& q, const double* v, int64_t dim, double row_scale);

// Codes [n, stride], n a multiple of 16, as tiles.
void to_tiles(const AlignedVector<int8_t>& codes, size_t stride, AlignedVector<int8_t>& tiles);

}  // namespace knnfast
