// SPDX-License-Identifier: Apache-2.0
// Making, searching and reading an index. index_write.cpp changes one; index_save.cpp and
// index_open.cpp keep it in files.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "index_impl.h"
#include "input.h"
#include "rotation.h"

namespace knnfast {
namespace {

// The queries as FP32, in memory that the thread's next search takes over.
const float* query_floats(const void* queries, DType dtype, int64_t m, int64_t dim,
                          int64_t stride) {
  if (m < 0) refuse("queries: a negative number of rows");
  if (m > 0 && !queries) refuse("queries: no data");
  thread_local std::vector<float> out;
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

}  // namespace

// Where a live id is in a snapshot whose ids ascend.
static uint64_t bisect(const Snapshot& s, int64_t id) {
  // The last segment that does not begin after `id`.
  auto after = std::partition_point(
      s.begin(), s.end(), [&](const SegmentView& v) { return v.n == 0 || v.id(0) <= id; });
  while (after != s.begin() && (after - 1)->n == 0) --after;
  if (after == s.begin()) return IdMap::kMissing;
  const SegmentView& v = *--after;
  uint32_t row;
  if (v.ids) {
    const int64_t* ids = v.ids->as<int64_t>();
    row = static_cast<uint32_t>(std::lower_bound(ids, ids + v.n, id) - ids);
  } else {
    row = static_cast<uint32_t>(std::min<int64_t>(id - v.first_id, v.n));
  }
  if (row >= v.n || v.id(row) != id || !v.alive(row)) return IdMap::kMissing;
  return static_cast<uint64_t>(after - s.begin()) << 32 | row;
}

uint64_t Index::Impl::find(const Snapshot& s, int64_t id) const {
  return ascending ? bisect(s, id) : map.find(id);
}

namespace {

// The rows that a search may return, of one snapshot.
class Filter {
 public:
  // Under the index's `state`, which only the id map needs: what else there is to do may take long.
  Filter(const Index::Impl& impl, const SearchOptions& options)
      : options_(options), mapped_(!impl.ascending) {
    if (!mapped_) return;
    for (int i = 0; i < 2; ++i)
      if (listed(set(i)))
        for (int64_t j = 0; j < set(i).count; ++j) at_[i].push_back(impl.map.find(set(i).ids[j]));
  }

  // One mask a segment; null where all of the snapshot may be returned.
  const std::vector<LiveMask>* masks(const Snapshot& s) {
    if (!options_.allow.set() && !options_.deny.set()) return nullptr;
    masks_.resize(s.size());
    for (size_t i = 0; i < s.size(); ++i) {
      const size_t words = s[i].n / kBlockRows + 1;
      if (listed(options_.allow))
        masks_[i].assign(words, 0);
      else if (s[i].live)
        masks_[i].assign(s[i].live->begin(),
                         s[i].live->begin() + static_cast<std::ptrdiff_t>(words));
      else
        masks_[i].assign(words, 0xffff);
    }
    for (int i = 0; i < 2; ++i)
      for (int64_t j = 0; listed(set(i)) && j < set(i).count; ++j)
        put(mapped_ ? at_[i][static_cast<size_t>(j)] : bisect(s, set(i).ids[j]), i == 0);
    if (options_.allow.bits || options_.deny.bits)
      for (size_t i = 0; i < s.size(); ++i)
        for (uint32_t row = 0; row < s[i].n; ++row) {
          const int64_t id = s[i].id(row);
          if ((options_.allow.bits && !has(options_.allow, id)) ||
              (options_.deny.bits && has(options_.deny, id)))
            put(static_cast<uint64_t>(i) << 32 | row, false);
        }
    return &masks_;
  }

 private:
  static bool listed(const IdSet& set) { return set.set() && !set.bits; }
  static bool has(const IdSet& set, int64_t id) {
    return id / 8 < set.count && (set.bits[id / 8] >> (id % 8) & 1);
  }
  const IdSet& set(int i) const { return i == 0 ? options_.allow : options_.deny; }

  void put(uint64_t at, bool in) {
    if (at == IdMap::kMissing) return;
    const uint32_t row = static_cast<uint32_t>(at);
    uint16_t& word = masks_[at >> 32][row / kBlockRows];
    const auto bit = static_cast<uint16_t>(1u << row % kBlockRows);
    word = static_cast<uint16_t>(in ? word | bit : word & ~bit);
  }

  const SearchOptions& options_;
  const bool mapped_;
  std::vector<uint64_t> at_[2];  // of listed ids, from the map
  std::vector<LiveMask> masks_;
};

void check_set(const IdSet& set, const char* name) {
  if (set.count < 0 ? set.ids || set.bits : set.count && !set.ids && !set.bits)
    refuse(std::string(name) + ": count must be that of its ids, or of its bitset's bytes");
  if (set.ids && set.bits) refuse(std::string(name) + ": ids or bits, not both");
}

}  // namespace

Index::Index(int64_t dim, Metric metric, Scan scan) : impl_(new Impl) {
  if (dim < 1 || dim > kMaxDim)
    refuse("dim must be 1 to " + std::to_string(kMaxDim) + ", got " + std::to_string(dim));
  impl_->dim = dim;
  impl_->metric = metric;
  impl_->scan = scan;
}
Index::Index(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Index::~Index() = default;
Index::Index(Index&&) noexcept = default;
Index& Index::operator=(Index&&) noexcept = default;

// One search of the rows that are there now: run(task, stats).
template <class Run>
static void search_now(const Index::Impl& impl, const void* queries, DType dtype, int64_t m,
                       const SearchOptions& options, int64_t stride, Run run) {
  const ExactFloats exact;
  const float* floats = query_floats(queries, dtype, m, impl.dim, stride);
  check_set(options.allow, "allow");
  check_set(options.deny, "deny");
  std::shared_lock<std::shared_mutex> state(impl.state);
  const std::shared_ptr<const Snapshot> snapshot = impl.current;
  Filter filter(impl, options);
  state.unlock();
  Stats stats;
  run(SearchTask{snapshot.get(), filter.masks(*snapshot), floats, m, impl.dim, impl.metric,
                 impl.scan, &impl.doubt},
      stats);
  std::lock_guard<std::mutex> lock(impl.stats_mutex);
  impl.stats += stats;
}

void Index::search(const void* queries, DType dtype, int64_t m, int64_t k, float* scores,
                   int64_t* ids, const SearchOptions& options, int64_t stride,
                   double* exact) const {
  if (k < 1 || k > INT32_MAX)
    refuse("k must be 1 to " + std::to_string(INT32_MAX) + ", got " + std::to_string(k));
  search_now(*impl_, queries, dtype, m, options, stride, [&](const SearchTask& task, Stats& stats) {
    search_topk(task, k, scores, ids, exact, stats);
  });
}

RangeResult Index::range_search(const void* queries, DType dtype, int64_t m, double radius,
                                const SearchOptions& options, int64_t stride) const {
  if (std::isnan(radius)) refuse("radius must be a number, got NaN");
  RangeResult found;
  search_now(*impl_, queries, dtype, m, options, stride, [&](const SearchTask& task, Stats& stats) {
    found = search_range(task, radius, stats);
  });
  return found;
}

void Index::vectors(const int64_t* ids, int64_t n, uint16_t* out) const {
  const size_t bytes = static_cast<size_t>(impl_->dim) * 2;
  std::shared_lock<std::shared_mutex> lock(impl_->state);
  const std::shared_ptr<const Snapshot> snapshot = impl_->current;
  std::vector<uint64_t> at(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    at[static_cast<size_t>(i)] = impl_->find(*snapshot, ids[i]);
    if (at[static_cast<size_t>(i)] == IdMap::kMissing)
      refuse("ids: " + std::to_string(ids[i]) + " is not in the index");
  }
  lock.unlock();
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t a = at[static_cast<size_t>(i)];
    const uint16_t* x = (*snapshot)[a >> 32].segment->rows.as<uint16_t>();
    std::memcpy(out + i * impl_->dim,
                x + static_cast<int64_t>(static_cast<uint32_t>(a)) * impl_->dim, bytes);
  }
}

std::vector<int64_t> Index::ids() const {
  const std::shared_ptr<const Snapshot> snapshot = impl_->snapshot();
  std::vector<int64_t> out;
  for (const SegmentView& s : *snapshot)
    for (uint32_t r = 0; r < s.n; ++r)
      if (s.alive(r)) out.push_back(s.id(r));
  return out;
}

int64_t Index::each_piece(const Piece& take) const {
  std::shared_ptr<const Snapshot> snapshot;
  int64_t next_id;
  {
    std::shared_lock<std::shared_mutex> lock(impl_->state);
    snapshot = impl_->current;
    next_id = impl_->next_id;
  }
  const int64_t dim = impl_->dim;
  const size_t piece = static_cast<size_t>(std::max<int64_t>(1, (int64_t{128} << 20) / dim));
  std::vector<int64_t> ids;
  std::vector<uint16_t> rows;
  auto hand = [&] {
    if (!ids.empty()) take(ids.data(), rows.data(), static_cast<int64_t>(ids.size()));
    ids.clear();
    rows.clear();
  };
  for (const SegmentView& s : *snapshot)
    for (uint32_t r = 0; r < s.n; ++r) {
      if (!s.alive(r)) continue;
      const uint16_t* x = s.segment->rows.as<uint16_t>() + static_cast<int64_t>(r) * dim;
      ids.push_back(s.id(r));
      rows.insert(rows.end(), x, x + dim);
      if (ids.size() == piece) hand();
    }
  hand();
  return next_id;
}

int64_t Index::dim() const { return impl_->dim; }
Metric Index::metric() const { return impl_->metric; }
Scan Index::scan() const { return impl_->scan; }

int64_t Index::size() const {
  std::shared_lock<std::shared_mutex> lock(impl_->state);
  return impl_->live;
}

int64_t Index::nbytes() const {
  std::shared_lock<std::shared_mutex> lock(impl_->state);
  int64_t total = impl_->map.nbytes();
  const Rotation* rotated = nullptr;  // one for all segments
  for (const SegmentView& s : *impl_->current) {
    const int64_t n = s.n, coded = static_cast<int64_t>(s.blocks()) * kBlockRows;
    total += n * impl_->dim * 2 + n * 4 + (s.ids ? n * 8 : 0);
    if (s.codes)
      total += coded * code_groups(impl_->dim) * kBlockDims + coded * 12 + impl_->dim * 4;
    if (s.live) total += static_cast<int64_t>(s.live->size()) * 2;
    if (s.codes && s.codes->rotation) rotated = s.codes->rotation.get();
  }
  if (rotated) total += static_cast<int64_t>(rotated->panels.size()) * 4;
  return total;
}

Stats Index::stats() const {
  std::lock_guard<std::mutex> lock(impl_->stats_mutex);
  return impl_->stats;
}

}  // namespace knnfast
