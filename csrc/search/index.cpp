// SPDX-License-Identifier: Apache-2.0
// Making and reading an index. index_search.cpp searches one; index_write.cpp changes it;
// index_save.cpp and index_open.cpp keep it in files.
#include <algorithm>
#include <cstring>
#include <string>

#include "search/index_impl.h"
#include "search/input.h"
#include "search/rotation.h"

namespace knnfast {

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

uint64_t bisect(const Snapshot& s, int64_t id) {
  // The last segment that does not begin after `id`.
  auto after =
      std::partition_point(s.begin(), s.end(), [&](const SegmentView& v) { return v.id(0) <= id; });
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

bool Index::contains(int64_t id) const {
  std::shared_lock<std::shared_mutex> lock(impl_->state);
  return impl_->find(*impl_->current, id) != IdMap::kMissing;
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

bool Index::joins() const { return worth_sharing(*impl_->snapshot(), nullptr, impl_->dim, 1); }

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
  if (rotated) total += rotated->bytes();
  return total;
}

Stats Index::stats() const {
  std::lock_guard<std::mutex> lock(impl_->stats_mutex);
  return impl_->stats;
}

}  // namespace knnfast
