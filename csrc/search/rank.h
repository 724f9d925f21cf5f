// SPDX-License-Identifier: Apache-2.0
// Which of the best rows seen so far sets the threshold.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace knnfast {

// The k-th best: so many rows score at least that. But few of the k best rows of all are among the
// first of them. Where rows come in no order that matters to the query, of these k the share f of
// all rows that has been seen holds a binomial number: k·f of them, and at any one moment with a
// probability of about 2·10⁻⁹ as many as 6·√(k·f·(1-f)) + 6 more. So the row of that rank among
// those seen hardly ever scores more than the k-th of all.
class Rank {
 public:
  // Of `rows`, `first` are begun at once, at least. `early`: that their order does not matter is
  // taken on trust. Returns whether it makes a difference.
  bool start(size_t k, int64_t rows, int64_t first, bool early) {
    k_ = k;
    begun_.store(0, std::memory_order_relaxed);
    rows_ = rows;
    // Where the first rank is k all later ones are.
    early_ = early && rows > static_cast<int64_t>(k) && of(first) < k;
    return early_;
  }
  // Some of these rows are seen from now on; all of them count.
  void begin(int64_t rows) { begun_.fetch_add(rows, std::memory_order_relaxed); }
  size_t now() const { return early_ ? of(begun_.load(std::memory_order_relaxed)) : k_; }

 private:
  size_t of(int64_t begun) const {
    const double share = static_cast<double>(begun) / static_cast<double>(rows_);
    const double mean = share * static_cast<double>(k_);
    const double most = mean + 6 * std::sqrt(mean * std::max(0.0, 1 - share)) + 6;
    return std::min(k_, static_cast<size_t>(most));
  }

  size_t k_ = 0;
  int64_t rows_ = 0;
  bool early_ = false;
  std::atomic<int64_t> begun_{0};
};

}  // namespace knnfast
