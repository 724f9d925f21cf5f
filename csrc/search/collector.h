// SPDX-License-Identifier: Apache-2.0
// One query's state: its canonical form, and what one thread has found for it so far.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "knnfast/index.h"
#include "search/rank.h"
#include "search/segment.h"

namespace knnfast {

constexpr float kNoThreshold = -std::numeric_limits<float>::infinity();

// The largest float <= x.
inline float round_down(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? std::nextafter(f, kNoThreshold) : f;
}
inline float round_up(double x) { return -round_down(-x); }

// Floors of different rows' scores that one thread has found and the others do not know yet.
struct FreshFloors {
  std::vector<float> values;
  size_t count = 0;

  // No branch on floors: about half of them reach the threshold.
  void offer(float floor, float tau) {
    if (count == values.size()) values.resize(2 * count + 64);
    values[count] = floor;
    count += floor > tau;
  }
};

// The best floors from all threads, down to the one that sets the threshold.
class Floors {
 public:
  void start(size_t k, const Rank* rank);
  // Moves `fresh` here and returns that one; while another thread is at it, does nothing.
  float take(FreshFloors& fresh);

 private:
  std::mutex busy_;
  const Rank* rank_ = nullptr;
  std::vector<float> values_;
};

struct Query {
  const double* q = nullptr;             // [dim] and zeros: what the canonical score takes
  double norm = 0;                       // √qq
  double scale = 1;                      // q is scanned as q·scale
  double key_scale = 1;                  // key · key_scale is the score as the scan sees it
  std::atomic<float> tau{kNoThreshold};  // the best threshold of any thread
  Floors floors, scores;                 // of rows opened, of rows rescored

  void start(size_t k, const Rank* rank);
  void raise(float threshold);  // tau
};

// The canonical key: larger is better, the score, or minus the squared distance.
struct CanonicalKeys {
  const Kernels* kernels = nullptr;
  Metric metric = Metric::ip;
  int dim = 0;
  size_t stride = 0;  // of rows and queries as doubles

  // keys[r * nq + i] of row r and query i, both as doubles.
  void operator()(const double* rows, int nx, const Query* queries, int nq, double* keys) const {
    const bool l2 = metric == Metric::l2;
    (l2 ? kernels->l2 : kernels->dot)(rows, nx, queries->q, nq, stride, dim, keys);
    if (metric == Metric::ip) return;
    for (int r = 0; r < nx; ++r, rows += stride, keys += nq) {
      double norm2 = 0;
      if (!l2) kernels->dot(rows, 1, rows, 1, stride, dim, &norm2);
      for (int i = 0; i < nq; ++i) keys[i] = l2 ? -keys[i] : cosine(keys[i], norm2, queries[i]);
    }
  }
  // Of one row as it lies.
  double operator()(const uint16_t* row, const Query& query) const {
    if (metric == Metric::l2) return -kernels->l2_row(row, query.q, dim);
    const double dot = kernels->dot_row(row, query.q, dim);
    if (metric == Metric::ip) return dot;
    return cosine(dot, kernels->norm2_row(row, nullptr, dim), query);
  }

 private:
  static double cosine(double dot, double norm2, const Query& query) {
    const double norms = std::sqrt(norm2) * query.norm;
    return norms > 0 ? dot / norms : 0.0;
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

  // So that a new one is written to its place: copied, what was just stored in parts would be read
  // as a whole, and waited for.
  Candidate(float upper, uint32_t segment, uint32_t row)
      : upper(upper), segment(segment), row(row) {}
};

// Keeps rows whose upper bound reaches tau, the k-th best *floor* that any thread has found so far,
// or an earlier one (rank.h): while rows are scanned no row itself is read. When the buffer fills
// with rows that tau cannot drop, the best k of it are rescored, which raises tau to the k-th
// canonical score so far, and then what is left; so the memory is bounded whatever the data. A
// floor is a score's lower bound, or a value that the score hardly lies below. `certain` says
// whether the result stands. With `radius` it keeps all rows above a fixed threshold instead.
class alignas(64) Collector {
 public:
  void start(const SegmentView* segments, const CanonicalKeys& keys, Query* query, size_t k);
  void start_range(const SegmentView* segments, const CanonicalKeys& keys, Query* query,
                   double radius_key);

  float tau() const { return tau_; }
  void add(float floor, float upper, uint32_t segment, uint32_t row) {
    pending_.emplace_back(upper, segment, row);
    __builtin_prefetch(pending_.data() + pending_.size() + 5, 1);  // the next line: for later
    if (!range_) {
      fresh_floors_.offer(floor, tau_);
      if (fresh_floors_.count >= enough_) share(query_->floors, fresh_floors_);
    }
    if (pending_.size() >= capacity_) shrink();
  }
  // A canonical key, and how to find the row's id. Only a damaged file holds rows that score NaN:
  // they are left out.
  template <class Id>
  void offer(double key, Id id) {
    ++rescored;
    if (range_) {
      if (key > radius_key_) best_.push_back({key, id()});
    } else if (key >= worst_.key) {
      const Found found{key, id()};
      if (!better(found, worst_)) return;
      keep(found);
      fresh_scores_.offer(round_down(key * query_->key_scale), tau_);
    }
  }
  // Before rows are scanned: the threshold of that time, and the rank that sets it.
  void start_scan(size_t rank) {
    refresh();
    enough_ = std::max((rank + 3) / 4, std::min<size_t>((rank + 1) / 2, 64));
  }
  void refresh() { tau_ = std::max(tau_, query_->tau.load(std::memory_order_relaxed)); }
  void raise();                 // tau to what is known by now
  void take(Collector& other);  // moves everything found by another thread here
  void finish();                // rescores what still matters
  const std::vector<Found>& result() const { return best_; }  // best first, then
  // Whether no row that tau kept out could be in the result: tau was never above its last score.
  bool certain() const;

  int64_t opened = 0, rescored = 0;

 private:
  void keep(const Found& found);
  void share(Floors& floors, FreshFloors& fresh);
  void shrink();
  void rescore(uint32_t segment, uint32_t row);
  void rescore_first(size_t count);  // of pending_, and forget them
  void drop_below();

  // What a row that is opened touches lies side by side.
  float tau_ = kNoThreshold;
  bool range_ = false;
  std::vector<Candidate> pending_;
  FreshFloors fresh_floors_;  // of rows opened
  size_t enough_ = 0;         // of them are shared at once
  size_t k_ = 0, capacity_ = 0;

  FreshFloors fresh_scores_;  // of rows rescored
  const SegmentView* segments_ = nullptr;
  CanonicalKeys keys_;
  Query* query_ = nullptr;
  double radius_key_ = 0;
  Found worst_{};            // of best_, as soon as there are k
  std::vector<Found> best_;  // a heap with the worst on top (range: a list)
};

}  // namespace knnfast
