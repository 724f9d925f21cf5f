// SPDX-License-Identifier: Apache-2.0
// A query's int8 codes, as the scans take them (kernels.h).
#pragma once

#include "search/collector.h"
#include "search/segment.h"

namespace knnfast {

struct QueryCodes {          // v = step·p + w
  double step, error, norm;  // of w and v: their norms, rounded up
  double slack;              // v has been rotated, and may be off by this; it is in `error`, too
  int32_t offset;            // -128·Σp
};

// Elements of a query with its padding.
size_t padded(int64_t dim);

// Queries as a scan of codes takes them.
struct CodedQueries {
  AlignedVector<double> v;      // [n, padded]: what is coded
  AlignedVector<int8_t> codes;  // of v
  AlignedVector<int8_t> tiles;  // of them (kernels.h)
  std::vector<int32_t> offsets;
  std::vector<QueryCodes> quantized;

  // All of it from v for the first n queries, on so many threads. With a rotation v is rotated
  // first; the norms stay those before.
  void code(int64_t n, int64_t dim, int window, bool tiled, const Rotation* rotation, int threads);
  // l2: of queries `straight` less a segment's mean. Rotated: `rotated` less the rotated mean.
  void code_centred(const AlignedVector<double>& straight, const CodedQueries& rotated,
                    const Codes& codes, const Query* queries, int64_t n, int64_t dim, int window,
                    bool tiled);

 private:
  std::vector<double> norms_, slacks_;
  AlignedVector<float> straight_, turned_;
};

// What has a value for each stop, if any is tested, and for the end of a row, in q, which holds the
// codes c of v, for a kernel of `window`; a row counts `row_scale` times.
void fill_stops(ScanQuery& q, const QueryCodes& c, const double* v, int64_t dim, int window,
                bool stops, double row_scale);

}  // namespace knnfast
