// SPDX-License-Identifier: Apache-2.0
// The queries of a group: scaled, coded, and with what the bounds of segment.h need of them.
#include <algorithm>
#include <cmath>

#include "search/group_search.h"

namespace knnfast {
namespace {

constexpr double kSpeck = 1e-30;  // over everything that underflows in a scan

}  // namespace

void GroupSearch::prepare(const float* queries) {
  if (s_.capacity < n_) {
    s_.queries.reset(new Query[static_cast<size_t>(n_)]);
    s_.capacity = n_;
  }
  s_.q.resize(static_cast<size_t>(n_) * pad_);
  for (int64_t i = 0; i < n_; ++i) {
    double* q = s_.q.data() + i * pad_;
    double top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < dim_; ++j) {
      q[j] = static_cast<double>(queries[i * dim_ + j]);
      top = std::max(top, std::fabs(q[j]));
    }
    std::fill(q + dim_, q + pad_, 0);
    Query& query = s_.queries[static_cast<size_t>(i)];
    query.q = q;
    double norm2;
    kernels_.dot(q, 1, q, 1, pad_, static_cast<int>(dim_), &norm2);
    query.norm = std::sqrt(norm2);
    int exponent = 0;
    std::frexp(top, &exponent);
    if (task_.metric == Metric::ip) {
      query.scale = query.key_scale = top > 0 ? std::ldexp(1.0, -exponent) : 1.0;
    } else if (task_.metric == Metric::cosine) {
      query.scale = query.norm > 0 ? 1 / query.norm : 0.0;
      query.key_scale = 1;
    } else {  // -s/2, scaled only where float would overflow
      query.scale = std::ldexp(1.0, -std::max(0, exponent - 20));
      query.key_scale = query.scale * query.scale / 2;
    }
  }
  if (!listed()) code_queries();
}

void GroupSearch::code_queries() {
  s_.coded.v.resize(s_.q.size());
  s_.values.resize(s_.q.size());
  for (int64_t i = 0; i < n_; ++i) {
    const double* q = s_.q.data() + i * pad_;
    double* v = s_.coded.v.data() + i * pad_;
    float* values = s_.values.data() + i * pad_;
    const double scale = s_.queries[static_cast<size_t>(i)].scale;
    for (int64_t j = 0; j < dim_; ++j) {
      v[j] = q[j] * scale;
      values[j] = static_cast<float>(v[j]);
    }
    std::fill(v + dim_, v + pad_, 0);
    std::fill(values + dim_, values + pad_, 0);
  }
  const Rotation* rotation = nullptr;  // there is one at most
  bool straight = false;
  for (const SegmentView& view : *task_.snapshot) {
    if (!view.codes) continue;
    if (view.codes->rotation)
      rotation = view.codes->rotation.get();
    else
      straight = true;
  }
  if (straight && task_.metric != Metric::l2)
    s_.coded.code(n_, dim_, kernels_.window, tiles_, nullptr, threads_);
  if (!rotation) return;
  s_.rotated.v.assign(s_.coded.v.begin(), s_.coded.v.end());
  const bool scanned = task_.metric != Metric::l2;  // l2: less a segment's mean first
  s_.rotated.code(n_, dim_, kernels_.window, tiles_ && scanned, rotation, threads_);
}

// The queries for a segment's codes.
const CodedQueries& GroupSearch::coded_for(Worker& w, const Codes& codes) {
  if (task_.metric != Metric::l2) return codes.rotation ? s_.rotated : s_.coded;
  w.centred.code_centred(s_.coded.v, s_.rotated, codes, s_.queries.get(), n_, dim_, kernels_.window,
                         tiles_);
  return w.centred;
}

// The bounds of segment.h for every query of the group.
void GroupSearch::fill_queries(Worker& w, uint32_t segment) {
  const SegmentView& view = (*task_.snapshot)[segment];
  w.segment = segment;
  const Rotation* rotation = view.codes ? view.codes->rotation.get() : nullptr;
  if (w.rotation != rotation) w.stop.start();  // other codes stop elsewhere
  w.rotation = rotation;
  w.int8.resize(static_cast<size_t>(n_));
  w.fp16.resize(static_cast<size_t>(n_));
  const double float_sum = static_cast<double>(dim_) * 0x1p-23;   // a float dot product's error
  const double exact = static_cast<double>(dim_ + 64) * 0x1p-51;  // the canonical one's
  const double two_scales = 1 - 0x1p-20;  // sq·norm² is an upper bound for it
  for (int64_t i = 0; i < n_; ++i) {
    const Query& query = s_.queries[static_cast<size_t>(i)];
    const double norm = query.norm * query.scale * (1 + 1e-9), norm2 = norm * norm;
    const bool l2 = task_.metric == Metric::l2;
    const double row_scale = l2 ? query.scale : 1;
    ScanQuery& f = w.fp16[static_cast<size_t>(i)];
    f.codes = f.tiles = nullptr;
    f.values = s_.values.data() + i * pad_;
    f.offset = 0;
    f.offsets = nullptr;
    std::fill_n(f.rest, kStops + 1, 0);
    std::fill_n(f.left, kStops + 1, 0.0f);
    std::fill_n(f.err, kStops + 1, round_up((float_sum + 0x1p-20) * norm * row_scale));
    std::fill_n(f.err_norm, kStops + 1, 0.0f);
    f.mul = static_cast<float>(row_scale);
    f.sq = l2 ? static_cast<float>(-0.5 * row_scale * row_scale * two_scales) : 0;
    f.base = round_up((l2 ? -0.5 * norm2 * (1 - 0x1p-20) : 0) + kSpeck);
    f.slack = round_up((l2 ? 0x1p-19 * norm2 : 0) + kSpeck);
  }
  if (view.codes) fill_int8(w, *view.codes, exact, two_scales);
}

void GroupSearch::fill_int8(Worker& w, const Codes& codes, double exact, double two_scales) {
  const bool l2 = task_.metric == Metric::l2;
  const CodedQueries& coded = coded_for(w, codes);
  double on_mean[kGroup];  // the queries' products with the mean
  if (!l2) {
    w.wide.assign(pad_, 0);
    std::copy(codes.mean.begin(), codes.mean.end(), w.wide.begin());
    kernels_.dot(s_.coded.v.data(), static_cast<int>(n_), w.wide.data(), 1, pad_,
                 static_cast<int>(dim_), on_mean);
  }
  for (int64_t i = 0; i < n_; ++i) {
    const size_t at = static_cast<size_t>(i);
    const Query& query = s_.queries[at];
    const QueryCodes& c = coded.quantized[at];
    const double base = l2 ? -0.5 * c.norm * c.norm : on_mean[at];
    const double row_scale = l2 ? query.scale : 1;
    ScanQuery& q = w.int8[at];
    q.codes = coded.codes.data() + at * pad_;
    q.tiles = tiles_ ? coded.tiles.data() + at / kTileQueries * kTileQueries * pad_ +
                           at % kTileQueries * kQueryPad
                     : nullptr;
    q.values = nullptr;
    q.offset = c.offset;
    q.offsets = windows_ ? coded.offsets.data() + at * windows_ : nullptr;
    fill_stops(q, c, coded.v.data() + at * pad_, dim_, kernels_.window, stops_, row_scale);
    q.mul = static_cast<float>(c.step * row_scale);
    q.sq = l2 ? static_cast<float>(-0.5 * row_scale * row_scale * two_scales) : 0;
    // A share is of ν at most, and a cosine row's y may be longer than that by what its own
    // normalisation in float has lost.
    const double longer = task_.metric == Metric::cosine ? 0x1p-21 * c.norm : 0;
    const double rounding =
        exact * c.norm * (c.norm + codes.mean_norm * row_scale) + longer + kSpeck;
    q.base = round_up(base + 0x1p-20 * std::fabs(base) + rounding);
    q.slack = round_up(0x1p-19 * std::fabs(base) + rounding);
  }
}

}  // namespace knnfast
