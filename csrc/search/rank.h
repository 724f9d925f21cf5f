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
// all rows that has been seen holds a binomial number: k·f of them, and hardly ever more than
// 6·√(k·f·(1-f)) + 6 above (about 10⁻⁹). So a row of that rank among those seen hardly ever scores
// more than the k-th of all.
class Rank {
 public:
  // `rows` will be seen. `predicts`: that their order does not matter is taken on trust.
  void start(size_t k, int64_t rows, bool predicts) {
    k_ = k;
    rows_ = predicts && rows > static_cast<int64_t>(k) ? rows : 0;
    begun_.store(0, std::memory_order_relaxed);
  }
  // From now on some of these rows are seen.
  void begin(int64_t rows) { begun_.fetch_add(rows, std::memory_order_relaxed); }
  size_t now() const {
    const int64_t begun = begun_.load(std::memory_order_relaxed);
    if (begun >= rows_) return k_;
    const double share = static_cast<double>(begun) / static_cast<double>(rows_);
    const double mean = share * static_cast<double>(k_);
    const double most = mean + 6 * std::sqrt(mean * (1 - share)) + 6;
    return std::min(k_, static_cast<size_t>(most));
  }

 private:
  size_t k_ = 0;
  int64_t rows_ = 0;
  std::atomic<int64_t> begun_{0};
};

}  // namespace knnfast
