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

// Of one thing: doubted by 256 searches after one that was wrong. Where it is wrong again soon
// after, by four times as many, and so on: then a search that is repeated is a rare one at last.
class Doubt {
 public:
  bool doubted() const { return left_.load(std::memory_order_relaxed) > 0; }
  void start_search() {
    if (left_.load(std::memory_order_relaxed) > -kSoon)
      left_.fetch_sub(1, std::memory_order_relaxed);
  }
  void wrong() {
    const int last = last_.load(std::memory_order_relaxed);
    int left = left_.load(std::memory_order_relaxed), next;
    do {
      if (left > 0) return;  // another search was wrong at the same time
      next = left > -kSoon ? std::min(4 * last, kMost) : kLeast;
    } while (!left_.compare_exchange_weak(left, next + 1, std::memory_order_relaxed));
    last_.store(next, std::memory_order_relaxed);
  }

 private:
  static constexpr int kLeast = 256, kMost = 1 << 20, kSoon = 32;
  // Searches that doubt it, and one, as the next one takes one off; below 0, that have trusted it.
  std::atomic<int> left_{0};
  std::atomic<int> last_{kLeast / 4};  // length of the last doubt
};

struct Doubts {
  Doubt errors, order;
};

}  // namespace knnfast
