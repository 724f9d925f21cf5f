// SPDX-License-Identifier: Apache-2.0
#include "search/collector.h"

#include <functional>

#include "common/trace.h"
#include "search/rows_ahead.h"

namespace knnfast {

namespace {

// Moves values that pass the test to the front, and returns where they end: no branch but the loop.
template <class Test>
float* front(float* begin, float* end, Test passes) {
  float* split = begin;
  for (float* i = begin; i < end; ++i) {
    const float value = *i;
    *i = *split;
    *split = value;
    split += passes(value);
  }
  return split;
}

// std::nth_element, so that x[k - 1] is the k-th largest of n: that one branches on every value,
// and half of its branches are mispredicted.
void select(float* x, size_t n, size_t k) {
  float *begin = x, *end = x + n, *last = x + k - 1;
  for (int round = 0; end - begin > 8 && round < 48; ++round) {
    const float a = *begin, b = begin[(end - begin) / 2], c = end[-1];
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    float* const larger = front(begin, end, [=](float v) { return v > pivot; });
    if (larger > last) {
      end = larger;
    } else if (larger > begin) {
      begin = larger;
    } else {
      begin = front(begin, end, [=](float v) { return v == pivot; });
      if (begin > last) return;
    }
  }
  std::nth_element(begin, last, end, std::greater<float>());
}

}  // namespace

void Floors::start(size_t k, const Rank* rank) {
  rank_ = rank;
  values_.clear();
  values_.reserve(2 * std::min<size_t>(k, 256));  // a search allocates nothing (see Collector)
}

float Floors::take(FreshFloors& fresh) {
  const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
  if (!lock) return kNoThreshold;
  const auto begin = fresh.values.begin();
  values_.insert(values_.end(), begin, begin + static_cast<std::ptrdiff_t>(fresh.count));
  fresh.count = 0;
  const size_t rank = rank_->now();
  if (values_.size() < rank) return kNoThreshold;
  select(values_.data(), values_.size(), rank);
  values_.resize(rank);  // a later threshold is above this one, too
  return values_.back();
}

void Query::start(size_t k, const Rank* rank) {
  tau.store(kNoThreshold, std::memory_order_relaxed);
  floors.start(k, rank);
  scores.start(k, rank);
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
  enough_ = k_ = k;
  range_ = false;
  worst_ = {-std::numeric_limits<double>::infinity(), INT64_MAX};
  capacity_ = std::max<size_t>(512, 16 * k);
  tau_ = kNoThreshold;
  pending_.clear();
  fresh_floors_.count = fresh_scores_.count = 0;
  // So that searches after the first allocate nothing, unless they ask for very many rows.
  const size_t most = std::min<size_t>(k, 256);
  pending_.reserve(std::min(capacity_, 16 * most));
  fresh_floors_.values.resize(std::max(fresh_floors_.values.size(), most + 1));
  fresh_scores_.values.resize(std::max(fresh_scores_.values.size(), most + 1));
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
  offer(keys_(x, *query_), [&] { return s.id(row); });
}

void Collector::share(Floors& floors, FreshFloors& fresh) {
  query_->raise(floors.take(fresh));
  refresh();
}

void Collector::raise() {
  if (range_) return;
  if (fresh_floors_.count > 0) share(query_->floors, fresh_floors_);
  if (fresh_scores_.count > 0) share(query_->scores, fresh_scores_);
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
  const size_t bytes = static_cast<size_t>(keys_.dim) * 2;
  RowsAhead ahead(count, bytes, [&](size_t i) {
    const Candidate& c = pending_[i];
    return segments_[c.segment].segment->rows.as<char>() + c.row * bytes;
  });
  for (size_t i = 0; i < count; ++i) {
    ahead.before(i);
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

void Collector::finish() {
  capacity_ = 0;
  raise();
  shrink();
  std::sort(best_.begin(), best_.end(), better);
}

bool Collector::certain() const {
  const float tau = query_->tau.load(std::memory_order_relaxed);
  return range_ || tau == kNoThreshold ||
         (best_.size() == k_ && best_.back().key * query_->key_scale >= tau);
}

}  // namespace knnfast
