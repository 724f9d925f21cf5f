// SPDX-License-Identifier: Apache-2.0
// What searches take on trust. It is checked at the end of each, and what a search was wrong about
// is doubted by the index's next ones.
#pragma once

#include <algorithm>
#include <atomic>

namespace knnfast {

struct Trust {
  bool errors = false;  // of codes are hardly ever parallel to a query (group_search.cpp)
  bool order = false;   // of rows has nothing to do with a query (rank.h)

  bool any() const { return errors || order; }
};

// Of one thing: doubted by 256 searches after one that was wrong, after each further failure by
// four times as many, and by a quarter after as many searches that trusted it and were right.
class Doubt {
 public:
  bool doubted() const { return left_.load(std::memory_order_relaxed) > 0; }
  void start_search() {
    const int length = length_.load(std::memory_order_relaxed);
    if (left_.fetch_sub(1, std::memory_order_relaxed) > -length) return;
    left_.store(0, std::memory_order_relaxed);
    length_.store(std::max(length / 4, kLeast), std::memory_order_relaxed);
  }
  void wrong() {
    const int length = length_.load(std::memory_order_relaxed);
    int left = left_.load(std::memory_order_relaxed);
    do {
      if (left > 0) return;  // another search was wrong at the same time
    } while (!left_.compare_exchange_weak(left, length + 1, std::memory_order_relaxed));
    length_.store(std::min(4 * length, kMost), std::memory_order_relaxed);
  }

 private:
  static constexpr int kLeast = 256, kMost = 1 << 20;
  // Searches that doubt it, and one, as the next one takes one off; below 0, that have trusted it.
  std::atomic<int> left_{0};
  std::atomic<int> length_{kLeast};  // of the next doubt
};

struct Doubts {
  Doubt errors, order;
};

}  // namespace knnfast
