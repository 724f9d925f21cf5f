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

// The canonical key: larger is better, the score, or minus the squared distance.
struct CanonicalKeys {
  const Kernels* kernels = nullptr;
  Metric metric = Metric::ip;
  int dim = 0;

  // What it takes from a row alone.
  double norm(const uint16_t* x) const {
    return metric == Metric::cosine ? std::sqrt(kernels->norm2(x, dim)) : 0.0;
  }

  // keys[i] of a row and `nq` queries, the elements of each `stride` after the last one's.
  void operator()(const uint16_t* x, double norm, const Query* queries, size_t stride, int nq,
                  double* keys) const {
    const bool l2 = metric == Metric::l2;
    (l2 ? kernels->l2 : kernels->dot)(x, queries->q, stride, nq, dim, keys);
    for (int i = 0; i < nq; ++i) {
      if (l2) keys[i] = -keys[i];
      if (metric != Metric::cosine) continue;
      keys[i] = norm > 0 && queries[i].norm > 0 ? keys[i] / (norm * queries[i].norm) : 0.0;
    }
  }
};

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
  void start(const SegmentView* segments, const CanonicalKeys& keys, Query* query, size_t k);
  void start_range(const SegmentView* segments, const CanonicalKeys& keys, Query* query,
                   double radius_key);

  float tau() const { return tau_; }
  void add(float lower, float upper, uint32_t segment, uint32_t row) {
    pending_.push_back({upper, segment, row});
    floor(lower);
    if (pending_.size() >= capacity_) shrink();
  }
  // A canonical key. Only a damaged file holds rows that score NaN: they are left out.
  void offer(double key, int64_t id) {
    ++rescored;
    if (range_) {
      if (key > radius_key_) best_.push_back({key, id});
    } else if (key >= worst_) {
      keep({key, id});
    }
  }
  void refresh() { tau_ = std::max(tau_, query_->tau.load(std::memory_order_relaxed)); }
  void raise();                 // tau to the k-th best of what is certain so far
  void take(Collector& other);  // moves everything found by another thread here
  // Rescores what still matters; the result, best first.
  const std::vector<Found>& finish();
  const std::vector<Found>& result() const { return best_; }

  int64_t opened = 0, rescored = 0;

 private:
  void keep(const Found& found);
  void floor(float lower);  // one more row scores at least this
  void raise_to(float tau);
  void shrink();
  void rescore(uint32_t segment, uint32_t row);
  void rescore_first(size_t count);  // of pending_, and forget them
  void drop_below();

  const SegmentView* segments_ = nullptr;
  CanonicalKeys keys_;
  Query* query_ = nullptr;
  size_t k_ = 0, capacity_ = 0;
  bool range_ = false;
  double radius_key_ = 0;
  double worst_ = 0;  // of best_, as soon as there are k
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
