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

class Doubt {
 public:
  void start_search() {
    errors_.start_search();
    order_.start_search();
  }
  Trust trust() const { return {!errors_.doubted(), !order_.doubted()}; }
  // Takes the first thing off that a search may have been wrong about. A wrong order is likelier.
  void wrong(Trust& trust) {
    (trust.order ? order_ : errors_).wrong();
    (trust.order ? trust.order : trust.errors) = false;
  }

 private:
  class Thing {
   public:
    bool doubted() const { return searches_.load(std::memory_order_relaxed) > 0; }
    void start_search() {
      if (doubted()) searches_.fetch_sub(1, std::memory_order_relaxed);
    }
    void wrong() {
      constexpr int kMost = 1 << 20;
      const int next = next_.load(std::memory_order_relaxed);
      searches_.store(next + 1, std::memory_order_relaxed);  // one is taken off first
      next_.store(std::min(4 * next, kMost), std::memory_order_relaxed);
    }

   private:
    std::atomic<int> searches_{0}, next_{256};  // that doubt it; that will the next time
  };
  Thing errors_, order_;
};

}  // namespace knnfast
