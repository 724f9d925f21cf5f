// SPDX-License-Identifier: Apache-2.0
// The line in which long work waits for cores: searches, steps of sampling. What all threads share
// has them all, one after another: it ends sooner, and in a narrower range of times, than side by
// side on a core each. With one thread (num_threads) as many searches are at work as there are
// cores, and sampling stands in no line.
#pragma once

#include <condition_variable>
#include <cstdint>

namespace knnfast {

// What can be done together is of one kind.
struct Kind {
  const void* object = nullptr;  // null: only its own caller does it
  int64_t k = 0;
  uint64_t filter = 0;  // a digest of it: `Join` knows
};

// What a caller waits in line with. Another whose turn comes first may do it along with its own.
struct Work {
  Kind kind;
  int64_t size = 0;

  // The line's.
  enum State { kWaits, kCalled, kDone };
  State state = kWaits;
  uint64_t place = 0;
  Work* next = nullptr;
  std::condition_variable wake;
};

// Whether work of one kind is what can be done together, and no digest that happens to be the same.
using Join = bool (*)(const Work&, const Work&);

// While it lives, and does not give way, its owner works; first come, first served.
class Turn {
 public:
  // Returns when the turn has come, or when `work` has been done. Without `wait` it stands in no
  // line.
  Turn(Work& work, bool wait);
  // Tells the callers of what was finished, and calls the next. What was taken and is not goes
  // back.
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  bool done() const { return done_; }  // by another: there is no turn

  // Between parts of long work that no other may do: whoever waits goes first. Whether one did.
  bool give_way();

  // Takes work of the same kind that `joins` out of the line, those that came first, up to `size`
  // in all, but where several are at work at once no more than its share of what waits; returns it
  // as a list. Its callers wait on. Where the last turn had more callers, it waits a little for
  // them. Once a turn.
  Work* take(int64_t size, Join joins);
  void finish();     // all of it is done
  void give_back();  // it is not: each stands where it stood, now for its own caller

 private:
  class Line;
  static Line* line();

  Work& work_;
  Line* line_;  // null: it did not wait
  Work *taken_ = nullptr, *finished_ = nullptr;
  bool done_ = false;
};

}  // namespace knnfast
