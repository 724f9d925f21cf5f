// SPDX-License-Identifier: Apache-2.0
// Searching an index: the rows that are there now, those that a filter leaves, and searches that
// wait for the same rows together.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <optional>
#include <string>

#include "search/index_impl.h"
#include "search/input.h"
#include "search/turn.h"

namespace knnfast {
namespace {

// The queries as FP32: a few in memory that the thread's next search takes over, a bulk in `bulk`.
const float* query_floats(const void* queries, DType dtype, int64_t m, int64_t dim, int64_t stride,
                          std::vector<float>& bulk) {
  if (m < 0) refuse("queries: a negative number of rows");
  if (m > 0 && !queries) refuse("queries: no data");
  thread_local std::vector<float> few;
  std::vector<float>& out = m <= kGroup ? few : bulk;
  out.resize(static_cast<size_t>(m * dim));
  bool finite = true;
  for (int64_t i = 0; i < m; ++i) {
    float* row = out.data() + i * dim;
    to_floats(queries, dtype, i * (stride ? stride : dim), dim, row);
    for (int64_t j = 0; j < dim; ++j) finite &= std::isfinite(row[j]);
    if (!finite) refuse("queries: row " + std::to_string(i) + " holds NaN or infinity");
  }
  return out.data();
}

bool filters(const SearchOptions& options) { return options.allow.set() || options.deny.set(); }

// The rows that there are, and which of them a search may return.
class Scope {
 public:
  Scope(const Index::Impl& impl, const SearchOptions& options) : options_(options) {
    std::shared_lock<std::shared_mutex> state(impl.state);
    snapshot_ = impl.current;
    if (!filters(options)) return;
    const bool mapped = !impl.ascending;
    std::vector<uint64_t> at[2];  // of listed ids, from the map
    for (int i = 0; mapped && i < 2; ++i)
      if (listed(set(i)))
        for (int64_t j = 0; j < set(i).count; ++j) at[i].push_back(impl.map.find(set(i).ids[j]));
    state.unlock();  // what else there is to do may take long
    start();
    for (int i = 0; i < 2; ++i) {
      const uint16_t flip = i == 0 ? 0 : 0xffff;  // of a deny bitset
      for (int64_t j = 0; listed(set(i)) && j < set(i).count; ++j)
        put(mapped ? at[i][static_cast<size_t>(j)] : bisect(*snapshot_, set(i).ids[j]), i == 0);
      for (size_t segment = 0; set(i).bits && segment < masks_.size(); ++segment) {
        const SegmentView& view = (*snapshot_)[segment];
        LiveMask& mask = masks_[segment];
        size_t block = view.ids ? 0 : take_bits(set(i), view.first_id, flip, mask);
        for (; block < mask.size(); ++block)
          mask[block] &= bits_of(set(i), view, static_cast<uint32_t>(block)) ^ flip;
      }
    }
  }

  const Snapshot& snapshot() const { return *snapshot_; }
  // Of the masks: equal ones have the same.
  uint64_t digest() const {
    constexpr size_t kLanes = 4;  // side by side: a product waits for the one before it
    uint64_t sums[kLanes] = {0, 1, 2, 3}, parts[kLanes];
    for (const LiveMask& mask : masks_) {
      for (size_t i = 0; i < mask.size(); i += sizeof(parts) / sizeof(mask[0])) {
        std::memset(parts, 0, sizeof(parts));
        std::memcpy(parts, &mask[i], std::min(sizeof(parts), (mask.size() - i) * sizeof(mask[0])));
        for (size_t lane = 0; lane < kLanes; ++lane) {
          sums[lane] = (sums[lane] ^ parts[lane]) * 0x9e3779b97f4a7c15;
          sums[lane] ^= sums[lane] >> 32;
        }
      }
    }
    uint64_t sum = 0;
    for (const uint64_t part : sums) sum = (sum ^ part) * 0x9e3779b97f4a7c15;
    return sum;
  }
  // One mask a segment; null where all of the snapshot may be returned.
  const std::vector<LiveMask>* masks() const { return filters(options_) ? &masks_ : nullptr; }

 private:
  static bool listed(const IdSet& set) { return set.set() && !set.bits; }

  // Of the first blocks of a segment whose ids follow each other, as many as lie within the bitset;
  // returns how many. In one loop without branches: a filter has to take less than a search.
  static size_t take_bits(const IdSet& set, int64_t first_id, uint16_t flip, LiveMask& mask) {
    const int64_t first = first_id / 8, blocks = (set.count - first) / 2 - 1;
    if (blocks <= 0) return 0;
    const int shift = static_cast<int>(first_id % 8);
    const size_t n = std::min(mask.size(), static_cast<size_t>(blocks));
    const uint8_t* bits = set.bits + first;
    for (size_t block = 0; block < n; ++block) {
      uint16_t low, high;
      std::memcpy(&low, bits + 2 * block, sizeof(low));
      std::memcpy(&high, bits + 2 * block + 2, sizeof(high));
      const uint32_t both = low | static_cast<uint32_t>(high) << 16;
      mask[block] &= static_cast<uint16_t>(both >> shift) ^ flip;
    }
    return n;
  }

  // Of a block's rows; ids behind the bitset's end are not in it.
  static uint16_t bits_of(const IdSet& set, const SegmentView& view, uint32_t block) {
    const uint32_t first = block * kBlockRows;
    const auto byte = [&](int64_t at) { return at < set.count ? uint32_t{set.bits[at]} : 0; };
    uint32_t bits = 0;
    if (!view.ids) {
      const int64_t id = view.first_id + first, at = id / 8;
      bits = (byte(at) | byte(at + 1) << 8 | byte(at + 2) << 16) >> (id % 8);
    } else {
      for (uint32_t row = first; row < std::min(view.n, first + kBlockRows); ++row)
        bits |= (byte(view.id(row) / 8) >> (view.id(row) % 8) & 1) << (row - first);
    }
    return static_cast<uint16_t>(bits);
  }
  const IdSet& set(int i) const { return i == 0 ? options_.allow : options_.deny; }

  void start() {
    masks_.resize(snapshot_->size());
    for (size_t i = 0; i < masks_.size(); ++i) {
      const SegmentView& view = (*snapshot_)[i];
      const size_t words = view.n / kBlockRows + 1;
      if (listed(options_.allow))
        masks_[i].assign(words, 0);
      else if (view.live)
        masks_[i].assign(view.live->begin(),
                         view.live->begin() + static_cast<std::ptrdiff_t>(words));
      else
        masks_[i].assign(words, 0xffff);
    }
  }

  void put(uint64_t at, bool in) {
    if (at == IdMap::kMissing) return;
    const uint32_t row = static_cast<uint32_t>(at);
    uint16_t& word = masks_[at >> 32][row / kBlockRows];
    const auto bit = static_cast<uint16_t>(1u << row % kBlockRows);
    word = static_cast<uint16_t>(in ? word | bit : word & ~bit);
  }

  const SearchOptions& options_;
  std::shared_ptr<const Snapshot> snapshot_;
  std::vector<LiveMask> masks_;
};

void check_set(const IdSet& set, const char* name) {
  if (set.count < 0 ? set.ids || set.bits : set.count && !set.ids && !set.bits)
    refuse(std::string(name) + ": count must be that of its ids, or of its bitset's bytes");
  if (set.ids && set.bits) refuse(std::string(name) + ": ids or bits, not both");
}

// How many queries of searches that wait are answered together, at most. What they share is reading
// the rows; the more each finds, the less that is, and the more memory each takes.
int64_t together(int64_t k) {
  constexpr int64_t kQueries = 32, kFound = 8 << 10;
  return std::min(kQueries, kFound / k);
}

struct Request : Work {
  const float* queries;
  Answers answers;                               // to `size` queries
  const std::vector<LiveMask>* masks = nullptr;  // of the snapshot that is its kind's object
};

// Of requests of one kind: whether they may return the same rows.
bool same_rows(const Work& a, const Work& b) {
  const auto *of_a = static_cast<const Request&>(a).masks,
             *of_b = static_cast<const Request&>(b).masks;
  return of_a == of_b || (of_a && of_b && *of_a == *of_b);
}

SearchTask task_of(const Index::Impl& impl, const Scope& scope, const float* queries, int64_t m,
                   Turn& turn) {
  return {&scope.snapshot(), scope.masks(), queries,     m,    impl.dim,
          impl.metric,       impl.scan,     &impl.doubt, &turn};
}

void count(const Index::Impl& impl, const Stats& stats) {
  const std::lock_guard<std::mutex> lock(impl.stats_mutex);
  impl.stats += stats;
}

void search_now(const Index::Impl& impl, const SearchTask& task, int64_t k,
                const std::vector<Answers>& answers) {
  Stats stats;
  search_topk(task, k, answers.data(), stats);
  stats.searches = static_cast<int64_t>(answers.size());
  stats.searches_joined = stats.searches - 1;
  count(impl, stats);
}

// `own`, whose turn it is, and the list `others` in one search.
void search_together(const Index::Impl& impl, const Scope& scope, const Request& own,
                     const Work* others, Turn& turn) {
  thread_local std::vector<float> queries;
  queries.assign(own.queries, own.queries + own.size * impl.dim);
  std::vector<Answers> answers{own.answers};
  int64_t m = own.size;
  for (; others; others = others->next) {
    const auto& r = static_cast<const Request&>(*others);
    queries.insert(queries.end(), r.queries, r.queries + r.size * impl.dim);
    answers.push_back(r.answers);
    m += r.size;
  }
  search_now(impl, task_of(impl, scope, queries.data(), m, turn), own.kind.k, answers);
}

}  // namespace

void Index::search(const void* queries, DType dtype, int64_t m, int64_t k, float* scores,
                   int64_t* ids, const SearchOptions& options, int64_t stride,
                   double* exact) const {
  if (k < 1 || k > INT32_MAX)
    refuse("k must be 1 to " + std::to_string(INT32_MAX) + ", got " + std::to_string(k));
  const ExactFloats mode;
  Request own;
  std::vector<float> bulk;
  own.queries = query_floats(queries, dtype, m, impl_->dim, stride, bulk);
  own.answers = {m, scores, ids, exact};
  check_set(options.allow, "allow");
  check_set(options.deny, "deny");
  // With a filter the scope is that of the call, or making it would hold up the line; without one
  // it is that of the turn, so that who joins finds what was added before its call.
  std::optional<Scope> scope;
  if (filters(options)) scope.emplace(*impl_, options);
  const bool turns = worth_sharing(scope ? scope->snapshot() : *impl_->snapshot(), impl_->dim);
  own.size = m;
  own.kind.k = k;
  if (turns && m <= together(k)) own.kind.object = impl_.get();
  if (own.kind.object && scope) {
    own.kind.object = &scope->snapshot();
    own.kind.filter = scope->digest();
    own.masks = scope->masks();
  }
  Turn turn(own, turns);
  if (turn.done()) return;
  const Work* others = turn.take(together(k) - m, same_rows);
  if (!scope) scope.emplace(*impl_, options);
  if (others) {
    try {
      search_together(*impl_, *scope, own, others, turn);
      return turn.finish();
    } catch (const std::exception&) {  // memory for all of them may have run out: each alone, then
      turn.give_back();
    }
  }
  search_now(*impl_, task_of(*impl_, *scope, own.queries, m, turn), k, {own.answers});
}

RangeResult Index::range_search(const void* queries, DType dtype, int64_t m, double radius,
                                const SearchOptions& options, int64_t stride) const {
  if (std::isnan(radius)) refuse("radius must be a number, got NaN");
  const ExactFloats mode;
  std::vector<float> bulk;
  const float* floats = query_floats(queries, dtype, m, impl_->dim, stride, bulk);
  check_set(options.allow, "allow");
  check_set(options.deny, "deny");
  const Scope scope(*impl_, options);
  RangeResult found;
  Stats stats;
  {
    Work alone;
    Turn turn(alone, worth_sharing(scope.snapshot(), impl_->dim));
    found = search_range(task_of(*impl_, scope, floats, m, turn), radius, stats);
  }
  stats.searches = 1;
  count(*impl_, stats);
  return found;
}

}  // namespace knnfast
