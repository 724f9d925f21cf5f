// SPDX-License-Identifier: Apache-2.0
// Which stop a thread's scan tests first (kernels.h), or none. How much of the rows a stop leaves
// depends on the queries and rises with their thresholds; what that is worth depends on the
// machine: a stop costs time and leaves gaps in what is read. So chunks with each are timed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace knnfast {

class StopChoice {
 public:
  void start() { *this = StopChoice(); }
  int next() const { return next_; }

  // After a chunk that took so many seconds a block: of `pairs` of rows and queries, `stopped` were
  // left at each stop. The first chunk, in which nothing is known yet, tells nothing.
  void judge(double seconds, const int64_t* stopped, int64_t pairs) {
    if (best_ < 0) {
      best_ = next_ = 0;
      return;
    }
    Way& way = ways_[next_];
    way.seconds = next_ == best_ && way.tried() ? (way.seconds + seconds) / 2 : seconds;
    for (int i = 0; i <= kStops; ++i)
      if (ways_[i].tried() && ways_[i].seconds < ways_[best_].seconds) best_ = i;
    if (next_ == best_) {
      way.patience = kPatience;
    } else {
      // What lost clearly is tried again much later; thresholds rise fast at first only.
      way.wait = way.patience;
      const bool clearly = way.seconds > 1.25 * ways_[best_].seconds;
      way.patience = std::min(way.patience * (clearly ? 4 : 2), 512);
    }
    next_ = best_;
    // A stop that leaves most is hard to beat.
    if (best_ == 0 && ways_[kStops].tried() && stopped[0] * 4 >= pairs * 3) return;
    for (int i = 0; i <= kStops; ++i)
      if (i != best_ && --ways_[i].wait < 0) next_ = i;
  }

 private:
  static_assert(kStops == 2, "the first stop, or the second alone, or none");
  static constexpr int kPatience = 4;
  struct Way {
    double seconds = -1;                 // a block; below 0: not tried yet
    int wait = 0, patience = kPatience;  // chunks before the next trial, and from then on
    bool tried() const { return seconds >= 0; }
  };
  Way ways_[kStops + 1];
  int best_ = -1, next_ = kStops;
};

}  // namespace knnfast
