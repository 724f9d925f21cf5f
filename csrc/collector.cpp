// SPDX-License-Identifier: Apache-2.0
#include "collector.h"

#include <functional>

#include "trace.h"

namespace knnfast {

void Floors::start(size_t k) {
  k_ = k;
  values_.clear();
  values_.reserve(2 * std::min<size_t>(k, 256));  // a search allocates nothing (see Collector)
}

float Floors::take(std::vector<float>& fresh) {
  const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
  if (!lock) return kNoThreshold;
  values_.insert(values_.end(), fresh.begin(), fresh.end());
  fresh.clear();
  if (values_.size() < k_) return kNoThreshold;
  const auto last = values_.begin() + static_cast<std::ptrdiff_t>(k_) - 1;
  std::nth_element(values_.begin(), last, values_.end(), std::greater<float>());
  values_.resize(k_);
  return values_.back();
}

void Query::start(size_t k) {
  tau.store(kNoThreshold, std::memory_order_relaxed);
  floors.start(k);
  scores.start(k);
}

void Query::raise(float threshold) {
  float shared = tau.load(std::memory_order_relaxed);
  while (shared < threshold &&
         !tau.compare_exchange_weak(shared, threshold, std::memory_order_relaxed)) {
  }
}

void Collector::start(const SegmentView* segments, const CanonicalKeys& keys, Query* query,
                      size_t k) {
  segments_ = segments;
  keys_ = keys;
  query_ = query;
  k_ = k;
  range_ = false;
  worst_ = {-std::numeric_limits<double>::infinity(), INT64_MAX};
  capacity_ = std::max<size_t>(512, 16 * k);
  wide_.resize(keys.stride);
  tau_ = kNoThreshold;
  pending_.clear();
  fresh_floors_.clear();
  fresh_scores_.clear();
  // So that searches after the first allocate nothing, unless they ask for very many rows.
  const size_t most = std::min<size_t>(k, 256);
  pending_.reserve(std::min(capacity_, 16 * most));
  fresh_floors_.reserve(most + 1);
  fresh_scores_.reserve(most + 1);
  best_.reserve(most + 1);
  best_.clear();
  opened = rescored = 0;
}

void Collector::start_range(const SegmentView* segments, const CanonicalKeys& keys, Query* query,
                            double radius_key) {
  start(segments, keys, query, 0);
  range_ = true;
  radius_key_ = radius_key;
  capacity_ = 256;
  tau_ = round_down(radius_key * query->key_scale);
}

void Collector::keep(const Found& found) {
  if (best_.size() == k_) {
    std::pop_heap(best_.begin(), best_.end(), better);
    best_.back() = found;
  } else {
    best_.push_back(found);
  }
  std::push_heap(best_.begin(), best_.end(), better);
  if (best_.size() == k_) worst_ = best_.front();
}

void Collector::rescore(uint32_t segment, uint32_t row) {
  const SegmentView& s = segments_[segment];
  const uint16_t* x = s.segment->rows.as<uint16_t>() + static_cast<size_t>(row) * keys_.dim;
  double key;
  keys_.kernels->widen(x, keys_.dim, wide_.data());
  keys_(wide_.data(), 1, query_, 1, &key);
  offer(key, [&] { return s.id(row); });
}

void Collector::share(Floors& floors, std::vector<float>& fresh) {
  query_->raise(floors.take(fresh));
  refresh();
}

void Collector::raise() {
  if (range_) return;
  if (!fresh_floors_.empty()) share(query_->floors, fresh_floors_);
  if (!fresh_scores_.empty()) share(query_->scores, fresh_scores_);
}

void Collector::drop_below() {
  const TraceRange range("knnfast.select");
  refresh();
  const float tau = tau_;
  pending_.erase(std::remove_if(pending_.begin(), pending_.end(),
                                [tau](const Candidate& c) { return !(c.upper >= tau); }),
                 pending_.end());
}

void Collector::rescore_first(size_t count) {
  const TraceRange range("knnfast.rescore");
  // Rows lie anywhere in memory: ask for the ones after next while this one is summed.
  constexpr size_t kAhead = 3;
  // Inlined always: GCC takes a function that only prefetches for one without effect, and drops it.
  const auto fetch = [&](const Candidate& c) __attribute__((always_inline)) {
    const char* x = reinterpret_cast<const char*>(
        segments_[c.segment].segment->rows.as<uint16_t>() + static_cast<size_t>(c.row) * keys_.dim);
    for (int line = 0; line < std::min(keys_.dim * 2, 4096); line += 64)
      __builtin_prefetch(x + line);
  };
  for (size_t i = 0; i < std::min(kAhead, count); ++i) fetch(pending_[i]);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(pending_[i + kAhead]);
    if (pending_[i].upper >= tau_) rescore(pending_[i].segment, pending_[i].row);
    if (i % 64 == 63) raise();
  }
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(count));
  raise();
}

void Collector::shrink() {
  drop_below();
  if (!range_ && pending_.size() >= capacity_ / 2 && pending_.size() > k_) {
    // The k best by bound first: they make tau what it can be.
    std::nth_element(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(k_),
                     pending_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
    rescore_first(k_);
    drop_below();
  }
  if (pending_.size() > capacity_ * 3 / 4) rescore_first(pending_.size());
}

void Collector::take(Collector& other) {
  if (range_)
    best_.insert(best_.end(), other.best_.begin(), other.best_.end());
  else
    for (const Found& f : other.best_)
      if (better(f, worst_)) keep(f);
  other.raise();
  raise();
  drop_below();
  for (const Candidate& c : other.pending_)
    if (c.upper >= tau_) pending_.push_back(c);
  opened += other.opened;
  rescored += other.rescored;
}

const std::vector<Found>& Collector::finish() {
  capacity_ = 0;
  raise();
  shrink();
  std::sort(best_.begin(), best_.end(), better);
  return best_;
}

bool Collector::certain() const {
  const float tau = query_->tau.load(std::memory_order_relaxed);
  return range_ || tau == kNoThreshold ||
         (best_.size() == k_ && best_.back().key * query_->key_scale >= tau);
}

}  // namespace knnfast
