// SPDX-License-Identifier: Apache-2.0
#include "search/turn.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

#include "common/thread_pool.h"
#include "knnfast/index.h"

namespace knnfast {
namespace {

int at_once() { return num_threads() > 1 ? 1 : cores(); }

bool same(const Kind& a, const Kind& b) {
  return a.object == b.object && a.k == b.k && a.filter == b.filter;
}

constexpr int kPatience = 4;       // waits for more work are at most 1/4 of what the last turn took
constexpr int kMostSkipped = 255;  // of such waits, after some in vain

}  // namespace

class Turn::Line {
 public:
  // Whether the turn has come; else the work is done.
  bool enter(Work& work) {
    std::unique_lock<std::mutex> lock(mutex_);
    work.state = Work::kWaits;
    work.place = entered_++;
    work.next = nullptr;
    if (!first_ && running_ < at_once()) {
      ++running_;
      began_ = Clock::now();
      return true;
    }
    (last_ ? last_->next : first_) = &work;
    last_ = &work;
    if (awaits_) arrived_.notify_one();
    work.wake.wait(lock, [&] { return work.state != Work::kWaits; });
    if (work.state == Work::kDone) return false;
    lock.unlock();
    // Whoever called has an answer to carry away, often on this very core: that goes first.
    std::this_thread::yield();
    return true;
  }

  bool empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    return !first_;
  }

  Work* take(const Work& own, int64_t size, Join joins) {
    std::unique_lock<std::mutex> lock(mutex_);
    await_more(lock, own);
    if (const int64_t servers = at_once(); servers > 1) {
      int64_t waiting = own.size;
      for (const Work* w = first_; w; w = w->next)
        if (same(w->kind, own.kind)) waiting += w->size;
      size = std::min(size, (waiting + servers - 1) / servers - own.size);
    }
    Work *taken = nullptr, **end = &taken, *before = nullptr;
    for (Work *w = first_, *next; w; w = next) {
      next = w->next;
      if (!same(w->kind, own.kind) || w->size > size || !joins(own, *w)) {
        before = w;
        continue;
      }
      (before ? before->next : first_) = next;
      if (w == last_) last_ = before;
      size -= w->size;
      w->next = nullptr;
      *end = w;
      end = &w->next;
    }
    return taken;
  }

  void give_back(Work* taken) {
    std::lock_guard<std::mutex> lock(mutex_);
    Work *waiting = first_, **end = &first_;
    while (taken || waiting) {
      const bool back = taken && (!waiting || taken->place < waiting->place);
      Work*& from = back ? taken : waiting;
      if (back) from->kind.object = nullptr;
      last_ = *end = from;
      from = from->next;
      end = &last_->next;
    }
    call_next();
  }

  // Those that are done go first, as in `enter`; frames live until their callers have the mutex.
  void leave(const Work& own, Work* finished) {
    std::lock_guard<std::mutex> lock(mutex_);
    answered_ = own.kind;
    callers_ = 1;
    took_ = Clock::now() - began_;
    for (Work* w = finished; w; w = w->next) {
      ++callers_;
      w->state = Work::kDone;
      w->wake.notify_one();
    }
    --running_;
    call_next();
  }

 private:
  using Clock = std::chrono::steady_clock;

  // Callers whom the last turn answered often ask again at once, and all in one search take little
  // longer than half of them: for who is missing it waits a little, unless others wait for it.
  void await_more(std::unique_lock<std::mutex>& lock, const Work& own) {
    if (at_once() > 1 || !same(own.kind, answered_)) return;
    int64_t callers = 0;
    const auto complete = [&] {
      bool others = false;
      callers = 1;
      for (const Work* w = first_; w; w = w->next)
        same(w->kind, own.kind) ? ++callers : others = true;
      return others || callers >= callers_;
    };
    if (complete() || (skipping_ > 0 && skipping_-- > 0)) return;
    const int64_t missing = callers_ - callers;
    awaits_ = true;
    arrived_.wait_for(lock, took_ / kPatience, complete);
    awaits_ = false;
    const bool in_vain = 2 * (callers_ - callers) > missing;
    waits_to_skip_ = in_vain ? std::min(2 * waits_to_skip_ + 1, kMostSkipped) : 0;
    skipping_ = waits_to_skip_;
    began_ = Clock::now();
  }

  void call_next() {
    for (; first_ && running_ < at_once(); ++running_) {
      Work* next = first_;
      first_ = next->next;
      if (!first_) last_ = nullptr;
      next->state = Work::kCalled;
      began_ = Clock::now();
      next->wake.notify_one();
    }
  }

  std::mutex mutex_;
  Work *first_ = nullptr, *last_ = nullptr;
  uint64_t entered_ = 0;
  int running_ = 0;  // where it is 0 nobody waits

  Kind answered_;        // by the last turn,
  int64_t callers_ = 0;  // of so many, in
  Clock::duration took_{};
  Clock::time_point began_;  // this one
  std::condition_variable arrived_;
  bool awaits_ = false;
  int waits_to_skip_ = 0, skipping_ = 0;
};

// Never destroyed: a search may still run while the process ends.
Turn::Line* Turn::line() {
  static Line* line = new Line;
  // The child of a fork may find it busy for ever: it is left behind.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { line = new Line; });
  (void)registered;
  return line;
}

Turn::Turn(Work& work, bool wait) : work_(work), line_(wait ? line() : nullptr) {
  if (!line_ || line_->enter(work)) return;
  done_ = true;
  line_ = nullptr;
}

Turn::~Turn() {
  give_back();
  if (line_) line_->leave(work_, finished_);
}

bool Turn::give_way() {
  if (!line_ || line_->empty()) return false;
  line_->leave(work_, nullptr);
  return line_->enter(work_);
}

Work* Turn::take(int64_t size, Join joins) {
  if (line_ && work_.kind.object) taken_ = line_->take(work_, size, joins);
  return taken_;
}

void Turn::finish() {
  finished_ = taken_;
  taken_ = nullptr;
}

void Turn::give_back() {
  if (taken_) line_->give_back(taken_);
  taken_ = nullptr;
}

}  // namespace knnfast
