// SPDX-License-Identifier: Apache-2.0
// Adding, removing and compacting: what one writer at a time does to an index.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "common/thread_pool.h"
#include "search/index_impl.h"
#include "search/input.h"
#include "search/rotation.h"

namespace knnfast {
namespace {

constexpr int64_t kMaxId = INT64_MAX - 1;

// Rows [0, n) of `from` into rows [at, at + n) of the segment, with their norms. Returns the first
// row that does not fit in FP16, or -1.
int64_t store_rows(const Segment& segment, int64_t dim, int64_t at, const void* from, DType dtype,
                   int64_t first, int64_t n, int64_t stride) {
  constexpr int64_t kTask = 512;
  const Kernels& k = kernels();
  std::atomic<int64_t> bad{INT64_MAX};
  parallel_for((n + kTask - 1) / kTask, [&](int, int64_t task) {
    std::vector<float> floats(static_cast<size_t>(dim));
    for (int64_t i = task * kTask; i < std::min(n, (task + 1) * kTask); ++i) {
      uint16_t* x = segment.rows.as<uint16_t>() + (at + i) * dim;
      const int64_t source = (first + i) * stride;
      bool ok = true;
      if (dtype == DType::f16) {
        std::memcpy(x, static_cast<const uint16_t*>(from) + source, static_cast<size_t>(dim) * 2);
        unsigned beyond = 0;  // bit 15 of the sum: an exponent of ones, infinity or NaN
        for (int64_t j = 0; j < dim; ++j) beyond |= (x[j] & 0x7c00u) + 0x400u;
        ok = !(beyond & 0x8000u);
      } else if (dtype == DType::f32) {
        ok = k.to_half(static_cast<const float*>(from) + source, x, dim);
      } else {
        to_floats(from, dtype, source, dim, floats.data());
        ok = k.to_half(floats.data(), x, dim);
      }
      if (!ok) {
        int64_t seen = bad.load();
        while (first + i < seen && !bad.compare_exchange_weak(seen, first + i)) {
        }
      }
      const double norm2 = k.norm2_row(x, nullptr, static_cast<int>(dim));
      segment.row_norm.as<float>()[at + i] = static_cast<float>(std::sqrt(norm2));
    }
  });
  return bad.load() == INT64_MAX ? -1 : bad.load();
}

// Codes for the whole blocks of segment `s` that have none; young ones are made anew as the segment
// fills. A rotation is found once and passed on.
void extend_codes(Snapshot& snapshot, size_t s, uint32_t old_n, int64_t dim, bool cosine) {
  SegmentView& view = snapshot[s];
  uint32_t begin = old_n / kBlockRows;
  const uint32_t end = view.blocks();
  if (begin == end) return;
  const int64_t n = view.n, settled = settled_rows(dim);
  const bool young = view.codes && view.codes->mean_rows < settled &&
                     (n >= settled || n >= 4 * view.codes->mean_rows);
  if (!view.codes || young) {
    std::shared_ptr<const Rotation> rotation;
    for (size_t i = 0; i < s && !rotation; ++i)
      if (snapshot[i].codes) rotation = snapshot[i].codes->rotation;
    view.codes = make_codes(*view.segment, dim, view.n, cosine, std::move(rotation));
    begin = 0;
  }
  quantize_blocks(*view.segment, *view.codes, dim, begin, end, cosine);
}

// The live rows' ids, with room for n more.
IdMap map_of(const Snapshot& snapshot, int64_t n) {
  size_t rows = static_cast<size_t>(n);
  for (const SegmentView& v : snapshot) rows += v.n;
  IdMap map = IdMap().with_room(rows);
  for (size_t s = 0; s < snapshot.size(); ++s)
    for (uint32_t r = 0; r < snapshot[s].n; ++r)
      if (snapshot[s].alive(r)) map.insert(snapshot[s].id(r), uint64_t{s} << 32 | r);
  return map;
}

}  // namespace

void Index::add(const void* vectors, DType dtype, int64_t n, const int64_t* ids, int64_t* ids_out,
                int64_t stride) {
  Impl& m = *impl_;
  if (n < 0) refuse("vectors: a negative number of rows");
  if (n == 0) return;
  if (!vectors) refuse("vectors: no data");
  if (stride == 0) stride = m.dim;
  const ExactFloats exact;
  std::lock_guard<std::mutex> one(m.writer);
  Snapshot next = *m.current;

  if (ids) {
    for (int64_t i = 0; i < n; ++i)
      if (ids[i] < 0 || ids[i] > kMaxId)
        refuse("ids: " + std::to_string(ids[i]) + " at row " + std::to_string(i) +
               " (ids are 0 to 2^63 - 2)");
  } else if (m.next_id > kMaxId - n + 1) {
    refuse("ids: no automatic ids are left above " + std::to_string(m.next_id - 1));
  }
  bool ascending = m.ascending;
  for (int64_t i = 0; ids && ascending && i < n; ++i)
    ascending = ids[i] > (i ? ids[i - 1] : m.last_id);

  // Rows go behind the published ones, where no reader looks.
  struct Piece {
    size_t segment;
    uint32_t at;
    int64_t first, n;
  };
  std::vector<Piece> pieces;
  const int64_t capacity = segment_capacity(m.dim);
  for (int64_t first = 0; first < n;) {
    if (next.empty() || next.back().sealed || next.back().n == next.back().segment->capacity) {
      SegmentView v;
      v.segment = make_segment(m.dim, capacity);
      v.first_id = ids ? 0 : m.next_id + first;
      next.push_back(v);
    }
    SegmentView& v = next.back();
    const int64_t count = std::min(n - first, v.segment->capacity - v.n);
    const int64_t bad = store_rows(*v.segment, m.dim, v.n, vectors, dtype, first, count, stride);
    if (bad >= 0)
      refuse("vectors: row " + std::to_string(bad) +
             " holds NaN, infinity or a value beyond FP16's 65504");
    const bool runs_on = !ids && !v.ids && v.first_id + v.n == m.next_id + first;
    if (!runs_on) {  // ids one by one from here on; those so far are written out
      if (!v.ids) {
        auto own =
            std::make_shared<Buffer>(Buffer::reserve(static_cast<size_t>(v.segment->capacity) * 8));
        for (uint32_t r = 0; r < v.n; ++r) own->as<int64_t>()[r] = v.first_id + r;
        v.ids = own;
      }
      int64_t* out = v.ids->as<int64_t>() + v.n;
      for (int64_t i = 0; i < count; ++i) out[i] = ids ? ids[first + i] : m.next_id + first + i;
    }
    pieces.push_back({next.size() - 1, v.n, first, count});
    const uint32_t old_n = v.n;
    v.n += static_cast<uint32_t>(count);
    if (m.coded()) extend_codes(next, next.size() - 1, old_n, m.dim, m.metric == Metric::cosine);
    first += count;
  }

  // What may fail comes before the lock: then everything changes, or nothing.
  auto id_at = [&](int64_t i) { return ids ? ids[i] : m.next_id + i; };
  auto insert_all = [&](IdMap& map) {
    for (const Piece& p : pieces)
      for (int64_t i = 0; i < p.n; ++i)
        if (!map.insert(id_at(p.first + i),
                        uint64_t{p.segment} << 32 | (p.at + static_cast<uint64_t>(i))))
          return p.first + i;
    return int64_t{-1};
  };
  int64_t taken = -1, highest = id_at(n - 1);
  for (int64_t i = 0; ids && i < n; ++i) highest = std::max(highest, ids[i]);
  auto published = std::make_shared<const Snapshot>(std::move(next));
  IdMap map;
  const bool remap = !ascending && (m.ascending || !m.map.has_room(static_cast<size_t>(n)));
  if (remap) {
    map = m.ascending ? map_of(*m.current, n) : m.map.with_room(static_cast<size_t>(n));
    taken = insert_all(map);
  }
  std::unique_lock<std::shared_mutex> lock(m.state);
  if (!ascending && !remap) {
    taken = insert_all(m.map);
    for (int64_t done = 0; done < taken; ++done) m.map.erase(id_at(done));
  }
  if (taken >= 0) refuse("ids: " + std::to_string(id_at(taken)) + " is taken already");
  if (remap) std::swap(m.map, map);
  m.ascending = ascending;
  m.last_id = std::max(m.last_id, highest);
  m.next_id = std::max(m.next_id, highest + 1);
  m.live += n;
  for (int64_t i = 0; ids_out && i < n; ++i) ids_out[i] = ids ? ids[i] : m.next_id - n + i;
  m.current.swap(published);
}

void Index::skip_ids(int64_t next) {
  std::lock_guard<std::mutex> one(impl_->writer);
  std::unique_lock<std::shared_mutex> lock(impl_->state);
  impl_->next_id = std::max(impl_->next_id, next);
}

int64_t Index::remove(const int64_t* ids, int64_t n) {
  Impl& m = *impl_;
  std::lock_guard<std::mutex> one(m.writer);
  Snapshot next = *m.current;
  std::vector<std::shared_ptr<LiveMask>> masks(next.size());
  std::vector<int64_t> found;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t at = m.find(*m.current, ids[i]);
    if (at == IdMap::kMissing) continue;
    const size_t s = at >> 32;
    const uint32_t row = static_cast<uint32_t>(at);
    if (!masks[s]) {
      const size_t words = static_cast<size_t>(next[s].segment->capacity) / kBlockRows + 1;
      masks[s] = next[s].live ? std::make_shared<LiveMask>(*next[s].live)
                              : std::make_shared<LiveMask>(words, 0xffff);
      next[s].live = masks[s];
    }
    uint16_t& word = (*masks[s])[row / kBlockRows];
    const uint16_t bit = static_cast<uint16_t>(1u << row % kBlockRows);
    if (!(word & bit)) continue;  // given twice
    word = static_cast<uint16_t>(word & ~bit);
    found.push_back(ids[i]);
  }
  auto published = std::make_shared<const Snapshot>(std::move(next));
  std::unique_lock<std::shared_mutex> lock(m.state);
  if (!m.ascending)
    for (int64_t id : found) m.map.erase(id);
  m.live -= static_cast<int64_t>(found.size());
  m.current.swap(published);
  return static_cast<int64_t>(found.size());
}

void Index::compact() {
  Impl& m = *impl_;
  const ExactFloats exact;
  std::lock_guard<std::mutex> one(m.writer);
  const std::shared_ptr<const Snapshot> old = m.current;
  const int64_t capacity = segment_capacity(m.dim);
  Snapshot next;
  size_t kept = 0;  // full segments without a removed row stay as they are
  while (kept < old->size() && !(*old)[kept].live &&
         (kept + 1 == old->size() || static_cast<int64_t>((*old)[kept].n) == capacity))
    next.push_back((*old)[kept++]);
  for (size_t s = kept; s < old->size(); ++s) {
    const SegmentView& from = (*old)[s];
    for (uint32_t r = 0; r < from.n; ++r) {
      if (!from.alive(r)) continue;
      if (next.size() == kept || next.back().n == next.back().segment->capacity) {
        SegmentView v;
        v.segment = make_segment(m.dim, capacity);
        v.first_id = from.id(r);
        next.push_back(v);
      }
      SegmentView& to = next.back();
      if (!to.ids && from.id(r) != to.first_id + to.n) {
        to.ids = std::make_shared<Buffer>(Buffer::reserve(static_cast<size_t>(capacity) * 8));
        for (uint32_t i = 0; i < to.n; ++i) to.ids->as<int64_t>()[i] = to.first_id + i;
      }
      if (to.ids) to.ids->as<int64_t>()[to.n] = from.id(r);
      std::memcpy(to.segment->rows.as<uint16_t>() + static_cast<int64_t>(to.n) * m.dim,
                  from.segment->rows.as<uint16_t>() + static_cast<int64_t>(r) * m.dim,
                  static_cast<size_t>(m.dim) * 2);
      to.segment->row_norm.as<float>()[to.n] = from.segment->row_norm.as<float>()[r];
      ++to.n;
    }
  }
  if (m.coded())
    for (size_t s = kept; s < next.size(); ++s)
      extend_codes(next, s, 0, m.dim, m.metric == Metric::cosine);
  IdMap map;
  if (!m.ascending) map = map_of(next, 0);
  auto published = std::make_shared<const Snapshot>(std::move(next));
  std::unique_lock<std::shared_mutex> lock(m.state);
  std::swap(m.map, map);
  m.current.swap(published);
}

}  // namespace knnfast
