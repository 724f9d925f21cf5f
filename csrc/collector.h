// SPDX-License-Identifier: Apache-2.0
// One query's state: its canonical form, and what one thread has found for it so far.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "knnfast/index.h"
#include "segment.h"

namespace knnfast {

constexpr float kNoThreshold = -std::numeric_limits<float>::infinity();

struct Query {
  const double* q = nullptr;             // [dim] and zeros: what the canonical score takes
  double norm = 0;                       // √qq
  double scale = 1;                      // q is scanned as q·scale
  double key_scale = 1;                  // key · key_scale is the score as the scan sees it
  std::atomic<float> tau{kNoThreshold};  // the best certified threshold of any thread
};

// Larger is better: the score, or minus the squared distance.
inline double canonical_key(const Kernels& k, Metric metric, const Query& query, const uint16_t* x,
                            int dim) {
  if (metric == Metric::l2) return -k.l2(x, query.q, dim);
  const double dot = k.dot(x, query.q, dim);
  if (metric == Metric::ip) return dot;
  const double norm = std::sqrt(k.norm2(x, dim));
  return norm > 0 && query.norm > 0 ? dot / (norm * query.norm) : 0.0;
}

struct Found {
  double key;
  int64_t id;
};
inline bool better(const Found& a, const Found& b) {
  return a.key > b.key || (a.key == b.key && a.id < b.id);
}

struct Candidate {
  float upper;
  uint32_t segment, row;
};

// Keeps rows whose upper bound reaches tau, the k-th best *lower* bound so far: while rows are
// scanned no row itself is read. When the buffer fills with rows that tau cannot drop, the best k
// of it are rescored, which raises tau to the k-th canonical score so far, and then what is left;
// so the memory is bounded whatever the data. With `radius` it keeps all rows above a fixed
// threshold instead.
class Collector {
 public:
  void start(const SegmentView* segments, const Kernels* kernels, Metric metric, int dim,
             Query* query, size_t k);
  void start_range(const SegmentView* segments, const Kernels* kernels, Metric metric, int dim,
                   Query* query, double radius_key);

  float tau() const { return tau_; }
  void add(float lower, float upper, uint32_t segment, uint32_t row) {
    pending_.push_back({upper, segment, row});
    floor(lower);
    if (pending_.size() >= capacity_) shrink();
  }
  void offer(double key, int64_t id);            // a canonical score
  void rescore(uint32_t segment, uint32_t row);  // at once
  void refresh() { tau_ = std::max(tau_, query_->tau.load(std::memory_order_relaxed)); }
  void raise();                 // tau to the k-th best of what is certain so far
  void take(Collector& other);  // moves everything found by another thread here
  // Rescores what still matters; the result, best first.
  const std::vector<Found>& finish();
  const std::vector<Found>& result() const { return best_; }

  int64_t opened = 0, rescored = 0;

 private:
  void floor(float lower);  // one more row scores at least this
  void raise_to(float tau);
  void shrink();
  void rescore_first(size_t count);  // of pending_, and forget them
  void drop_below();

  const SegmentView* segments_ = nullptr;
  const Kernels* kernels_ = nullptr;
  Query* query_ = nullptr;
  Metric metric_ = Metric::ip;
  int dim_ = 0;
  size_t k_ = 0, capacity_ = 0;
  bool range_ = false;
  double radius_key_ = 0;
  float tau_ = kNoThreshold;
  std::vector<Candidate> pending_;
  std::vector<float> floors_;  // the k best lower bounds, a heap with the worst on top
  std::vector<Found> best_;    // a heap with the worst on top (range: a list)
};

// The largest float <= x.
inline float round_down(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? std::nextafter(f, kNoThreshold) : f;
}
inline float round_up(double x) { return -round_down(-x); }

}  // namespace knnfast
