// SPDX-License-Identifier: Apache-2.0
// Which stop a thread's scan tests first (kernels.h), or none. How much of the rows a stop leaves
// depends on the queries and rises with their thresholds; what that is worth depends on the
// machine: a stop costs time and leaves gaps in what is read. So chunks with each are timed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa/kernels.h"

namespace knnfast {

class StopChoice {
 public:
  void start() { *this = StopChoice(); }
  int next() const { return next_; }

  // After a scan of some blocks: of `pairs` of rows and queries, `stopped` were left at each stop.
  void add(double seconds, int64_t blocks, const int64_t* stopped, int64_t pairs) {
    seen_.seconds += seconds;
    seen_.blocks += blocks;
    seen_.stopped += stopped[0];
    seen_.pairs += pairs;
  }
  int64_t blocks() const { return seen_.blocks; }  // added since it was judged last

  // What was added is enough to tell. The first time, when nothing is known yet, it tells nothing.
  void judge() {
    const Seen seen = seen_;
    seen_ = Seen();
    if (best_ < 0) {
      best_ = next_ = 0;
      return;
    }
    const double seconds = seen.seconds / static_cast<double>(seen.blocks);
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
    if (best_ == 0 && ways_[kStops].tried() && seen.stopped * 4 >= seen.pairs * 3) return;
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
  struct Seen {
    double seconds = 0;
    int64_t blocks = 0, stopped = 0, pairs = 0;  // stopped: at the first stop
  };
  Way ways_[kStops + 1];
  Seen seen_;
  int best_ = -1, next_ = kStops;
};

}  // namespace knnfast
