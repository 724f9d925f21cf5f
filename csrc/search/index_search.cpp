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

// The rows that there are, and which of them a search of `m` queries may return.
class Scope {
 public:
  Scope(const Index::Impl& impl, const SearchOptions& options, int64_t m) : options_(options) {
    filtered_ = filters(options);
    const bool lists = impl.scan == Scan::automatic;
    std::vector<int64_t> few;  // of a bitset: its ids
    Ids ids[] = {listed_ids(options.allow), listed_ids(options.deny)};
    if (lists && options.allow.bits && list_bits(options.allow, few))
      ids[0] = {true, few.data(), few.size()};
    std::vector<uint64_t> at[2];  // of listed ids
    for (int i = 0; i < 2; ++i) at[i].reserve(ids[i].count);
    std::shared_lock<std::shared_mutex> state(impl.state);
    snapshot_ = impl.current;
    if (!filtered_) return;
    const auto look_up = [&](auto find) {
      for (int i = 0; i < 2; ++i)
        for (size_t j = 0; j < ids[i].count; ++j) {
          const uint64_t found = find(ids[i].ids[j]);
          if (found != IdMap::kMissing) at[i].push_back(found);
        }
    };
    if (!impl.ascending) {
      look_up([&](int64_t id) { return impl.map.find(id); });
      state.unlock();  // what else there is to do may take long
    } else {
      state.unlock();
      look_up([&](int64_t id) { return bisect(*snapshot_, id); });
    }
    if (ids[0].listed && lists && list(at[0], at[1], m)) return;
    start(ids[0].listed ? &at[0] : nullptr);
    for (int i = 0; i < 2; ++i)
      for (const uint64_t row : at[i]) put(row, i == 0);
    if (options.allow.bits && !ids[0].listed) take(options.allow, 0);
    if (options.deny.bits) take(options.deny, 0xffff);
    for (Filter::Part& part : filter_.parts) trim(part);
  }

  const Snapshot& snapshot() const { return *snapshot_; }
  // Null where all of the snapshot may be returned.
  const Filter* filter() const { return filtered_ ? &filter_ : nullptr; }
  // Of the filter: equal ones have the same.
  uint64_t digest() const {
    uint64_t sum = 0;
    for (const Filter::Part& part : filter_.parts)
      sum = digest(part.rows, digest(part.mask, sum + part.first));
    return sum;
  }

 private:
  struct Ids {
    bool listed;
    const int64_t* ids;
    size_t count;
  };
  static Ids listed_ids(const IdSet& set) {
    if (!set.set() || set.bits) return {false, nullptr, 0};
    return {true, set.ids, static_cast<size_t>(set.count)};
  }

  template <class T>
  static uint64_t digest(const std::vector<T>& values, uint64_t start) {
    constexpr size_t kLanes = 4;  // side by side: a product waits for the one before it
    constexpr size_t kStep = kLanes * (sizeof(uint64_t) / sizeof(T));
    uint64_t sums[kLanes] = {start, 1, 2, 3}, parts[kLanes];
    for (size_t i = 0; i < values.size(); i += kStep) {
      std::memset(parts, 0, sizeof(parts));
      std::memcpy(parts, &values[i], std::min(sizeof(parts), (values.size() - i) * sizeof(T)));
      for (size_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] = (sums[lane] ^ parts[lane]) * 0x9e3779b97f4a7c15;
        sums[lane] ^= sums[lane] >> 32;
      }
    }
    uint64_t sum = values.size();
    for (const uint64_t lane : sums) sum = (sum ^ lane) * 0x9e3779b97f4a7c15;
    return sum;
  }

  // The ids of a bitset in which at most one of kFew bits is set; false of others.
  static bool list_bits(const IdSet& set, std::vector<int64_t>& ids) {
    const size_t most = static_cast<size_t>(set.count) * 8 / kFew;
    for (int64_t i = 0; i < set.count; i += 8) {
      uint64_t some[4];
      for (; i + int64_t{sizeof(some)} <= set.count; i += sizeof(some)) {
        std::memcpy(some, set.bits + i, sizeof(some));
        if (some[0] | some[1] | some[2] | some[3]) break;
      }
      uint64_t bits = 0;
      if (i >= set.count) break;
      std::memcpy(&bits, set.bits + i, static_cast<size_t>(std::min<int64_t>(8, set.count - i)));
      for (; bits; bits &= bits - 1) {
        if (ids.size() == most) return false;
        ids.push_back(i * 8 + __builtin_ctzll(bits));
      }
    }
    return true;
  }

  // Lists the rows `in` that are not `out`, where they are few and so sparse that they are scored
  // by themselves, or so few that it takes less than to code the queries for a scan.
  bool list(std::vector<uint64_t>& in, std::vector<uint64_t>& out, int64_t m) {
    int64_t all = 0, blocks = 0;
    for (const SegmentView& view : *snapshot_) all += view.n;
    const int64_t count = static_cast<int64_t>(in.size());
    if (count * kFew > all) return false;
    for (std::vector<uint64_t>* rows : {&in, &out})
      if (!std::is_sorted(rows->begin(), rows->end())) std::sort(rows->begin(), rows->end());
    in.erase(std::unique(in.begin(), in.end()), in.end());
    uint64_t last = IdMap::kMissing;
    for (const uint64_t at : in) {
      blocks += at / kBlockRows != last;
      last = at / kBlockRows;
    }
    const int64_t left = static_cast<int64_t>(in.size());
    if (left > kFewest && !sparse(left, blocks, m)) return false;
    filter_.listed = true;
    filter_.parts.resize(snapshot_->size());
    for (const uint64_t at : in) {
      const uint32_t row = static_cast<uint32_t>(at);
      if (std::binary_search(out.begin(), out.end(), at)) continue;
      if (options_.deny.bits && holds(options_.deny, (*snapshot_)[at >> 32].id(row))) continue;
      filter_.parts[at >> 32].rows.push_back(row);
    }
    return true;
  }

  static bool holds(const IdSet& set, int64_t id) {
    return id / 8 < set.count && (set.bits[id / 8] >> (id % 8) & 1);
  }

  // Of the first blocks of a mask whose rows' ids follow each other, as many as lie within the
  // bitset; returns how many. In one loop without branches: a filter has to take less than a
  // search.
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
    uint32_t bits = 0;
    if (!view.ids) {
      const auto byte = [&](int64_t at) { return at < set.count ? uint32_t{set.bits[at]} : 0; };
      const int64_t id = view.first_id + first, at = id / 8;
      bits = (byte(at) | byte(at + 1) << 8 | byte(at + 2) << 16) >> (id % 8);
    } else {
      for (uint32_t row = first; row < std::min(view.n, first + kBlockRows); ++row)
        bits |= uint32_t{holds(set, view.id(row))} << (row - first);
    }
    return static_cast<uint16_t>(bits);
  }

  // Leaves in the masks what is in a bitset (flip: what is not).
  void take(const IdSet& set, uint16_t flip) {
    for (size_t segment = 0; segment < filter_.parts.size(); ++segment) {
      const SegmentView& view = (*snapshot_)[segment];
      Filter::Part& part = filter_.parts[segment];
      const int64_t first_id = view.first_id + int64_t{part.first} * kBlockRows;
      size_t block = view.ids ? 0 : take_bits(set, first_id, flip, part.mask);
      for (; block < part.mask.size(); ++block) {
        const uint32_t at = part.first + static_cast<uint32_t>(block);
        part.mask[block] &= bits_of(set, view, at) ^ flip;
      }
    }
  }

  // Masks of all live rows; or, for `in`, empty ones that reach from the first of them to the last.
  void start(const std::vector<uint64_t>* in) {
    filter_.parts.resize(snapshot_->size());
    if (in) {
      std::vector<uint32_t> end(snapshot_->size());
      for (const uint64_t at : *in) {
        const uint32_t block = static_cast<uint32_t>(at) / kBlockRows;
        Filter::Part& part = filter_.parts[at >> 32];
        uint32_t& e = end[at >> 32];
        part.first = e ? std::min(part.first, block) : block;
        e = std::max(e, block + 1);
      }
      for (size_t i = 0; i < end.size(); ++i)
        filter_.parts[i].mask.assign(end[i] - filter_.parts[i].first, 0);
      return;
    }
    for (size_t i = 0; i < filter_.parts.size(); ++i) {
      const SegmentView& view = (*snapshot_)[i];
      LiveMask& mask = filter_.parts[i].mask;
      const size_t words = view.n / kBlockRows + 1;
      if (view.live)
        mask.assign(view.live->begin(), view.live->begin() + static_cast<std::ptrdiff_t>(words));
      else
        mask.assign(words, 0xffff);
    }
  }

  void put(uint64_t at, bool in) {
    const uint32_t row = static_cast<uint32_t>(at), block = row / kBlockRows;
    Filter::Part& part = filter_.parts[at >> 32];
    if (block - part.first >= part.mask.size()) return;  // is not in it
    uint16_t& word = part.mask[block - part.first];
    const auto bit = static_cast<uint16_t>(1u << row % kBlockRows);
    word = static_cast<uint16_t>(in ? word | bit : word & ~bit);
  }

  // From the first block to the last in which a row is left: of the same rows always the same mask.
  static void trim(Filter::Part& part) {
    LiveMask& mask = part.mask;
    const auto some = [](uint16_t word) { return word != 0; };
    mask.erase(std::find_if(mask.rbegin(), mask.rend(), some).base(), mask.end());
    const auto begin = std::find_if(mask.begin(), mask.end(), some);
    part.first = mask.empty() ? 0 : part.first + static_cast<uint32_t>(begin - mask.begin());
    mask.erase(mask.begin(), begin);
  }

  static constexpr int64_t kFew = 64;     // one row of so many may be listed, one bit of a bitset
  static constexpr int64_t kFewest = 64;  // rows that are listed wherever they lie

  const SearchOptions& options_;
  std::shared_ptr<const Snapshot> snapshot_;
  bool filtered_;
  Filter filter_;
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
  Answers answers;                 // to `size` queries
  const Filter* filter = nullptr;  // of the snapshot that is its kind's object
};

// Of requests of one kind: whether they may return the same rows.
bool same_rows(const Work& a, const Work& b) {
  const Filter *of_a = static_cast<const Request&>(a).filter,
               *of_b = static_cast<const Request&>(b).filter;
  return of_a == of_b || (of_a && of_b && *of_a == *of_b);
}

SearchTask task_of(const Index::Impl& impl, const Scope& scope, const float* queries, int64_t m,
                   Turn& turn) {
  return {&scope.snapshot(), scope.filter(), queries,      m,    impl.dim,
          impl.metric,       impl.scan,      &impl.doubts, &turn};
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
  if (filters(options)) scope.emplace(*impl_, options, m);
  const bool turns = scope ? worth_sharing(scope->snapshot(), scope->filter(), impl_->dim, m)
                           : worth_sharing(*impl_->snapshot(), nullptr, impl_->dim, m);
  own.size = m;
  own.kind.k = k;
  if (turns && m <= together(k)) own.kind.object = impl_.get();
  if (own.kind.object && scope) {
    own.kind.object = &scope->snapshot();
    own.kind.filter = scope->digest();
    own.filter = scope->filter();
  }
  Turn turn(own, turns);
  if (turn.done()) return;
  const Work* others = turn.take(together(k) - m, same_rows);
  if (!scope) scope.emplace(*impl_, options, m);
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
  const Scope scope(*impl_, options, m);
  RangeResult found;
  Stats stats;
  {
    Work alone;
    Turn turn(alone, worth_sharing(scope.snapshot(), scope.filter(), impl_->dim, m));
    found = search_range(task_of(*impl_, scope, floats, m, turn), radius, stats);
  }
  stats.searches = 1;
  count(*impl_, stats);
  return found;
}

}  // namespace knnfast
