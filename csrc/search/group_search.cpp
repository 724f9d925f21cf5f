// SPDX-License-Identifier: Apache-2.0
#include "search/group_search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "common/thread_pool.h"
#include "common/trace.h"
#include "search/rows_ahead.h"

namespace knnfast {
namespace {

// Codes are handed to a thread in chunks: small ones, so that none is left with the last for long
// while the others wait, of a large index larger ones, as each has a beginning.
constexpr size_t kLeastChunk = 256 << 10, kMostChunk = 1 << 20;  // bytes
constexpr size_t kChunks = 64;                                   // a thread's, between these
constexpr int64_t kWarmUp = 32;    // times k rows, before a scan is judged
constexpr int64_t kOpening = 8;    // times k are opened of as many rows as went before
constexpr uint32_t kDeadRun = 2;   // blocks without a live row in a row, which end a scan
constexpr size_t kFew = 64 << 10;  // bytes of live rows, to which chunks are joined

size_t few_rows(int64_t dim) { return std::max<size_t>(1, kFew / (static_cast<size_t>(dim) * 2)); }

Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

// How far below its upper bound a row's floor is taken, as a share of the bounds' distance. 1 is
// the lower bound. But that is for rows whose code's error is parallel to the query; in `dim`
// dimensions errors are about 1/sqrt(dim) of that, and nearly all scores lie close to the middle.
float trusted_share(int64_t dim) {
  const double margin = std::max(0.125, 4 / std::sqrt(static_cast<double>(dim)));
  return static_cast<float>(0.5 + 0.5 * std::min(1.0, margin));
}

// A row's floor from its upper bound (kernels.h). All terms are of one sign, so that where all of
// the distance is kept a float's rounding is within these margins.
float floor_of(const Worker& w, int query, size_t row, float upper) {
  const ScanQuery& q = w.queries[query];
  const float n = w.norms[row];
  const float error = w.bounds ? residual_of(w.bounds[row]) : w.errors ? w.errors[row] : 1;
  const float spread =
      2 * (q.err[kStops] * error + q.err_norm[kStops] * n + q.slack - 0x1p-18f * q.sq * n * n);
  const float floor = upper - w.trust * spread * (1 + 0x1p-20f);
  return floor - std::fabs(floor) * 0x1p-22f;
}

// Counts a chunk's live rows and their blocks: without branches, and without an instruction that
// counts bits, which not every processor has, this is a few vectors.
void count_live(const uint16_t* mask, Chunk& chunk) {
  uint32_t rows = 0, blocks = 0;
  for (uint32_t block = chunk.begin; block < chunk.end; ++block) {
    uint16_t v = mask[block];
    blocks += v != 0;
    v = static_cast<uint16_t>(v - (v >> 1 & 0x5555));
    v = static_cast<uint16_t>((v & 0x3333) + (v >> 2 & 0x3333));
    v = static_cast<uint16_t>((v + (v >> 4)) & 0x0f0f);
    rows += (v + (v >> 8)) & 0x1f;
  }
  chunk.rows = rows;
  chunk.blocks = blocks;
}

// Moves `begin` to the next block with a live row, and returns where the scan from there may end:
// before the next long run without one.
uint32_t live_run(const uint16_t* mask, uint32_t& begin, uint32_t end) {
  while (begin < end && !mask[begin]) ++begin;
  uint32_t last = begin;
  for (uint32_t block = begin; block < end && block < last + kDeadRun; ++block)
    if (mask[block]) last = block + 1;
  return last;
}

float on_hit(Sink* sink, int query, uint32_t block, const float* upper, uint32_t mask) {
  Worker& w = *static_cast<Worker*>(sink);
  Collector& c = w.collectors[static_cast<size_t>(query)];
  const bool judged = c.tau() > kNoThreshold;
  int count = 0;  // counting bits would be a call
  for (; mask; mask &= mask - 1, ++count) {
    const int r = __builtin_ctz(mask);
    const uint32_t row = block * kBlockRows + static_cast<uint32_t>(r);
    if (upper[r] >= c.tau())
      c.add(floor_of(w, query, row, upper[r]), upper[r], w.chunk_segment, row);
  }
  c.opened += count;
  if (judged) w.opened += count;
  return c.tau();
}

}  // namespace

GroupSearch::GroupSearch(const SearchTask& task, int64_t first, int64_t count, int threads)
    : task_(task),
      n_(count),
      dim_(task.dim),
      threads_(threads),
      pad_(padded(task.dim)),
      s_(scratch()),
      kernels_(kernels()),
      tiles_(kernels_.tile_batch && count >= kernels_.tile_batch),
      stops_(code_groups(dim_) >= kernels_.stop_groups && count <= kernels_.stop_batch),
      windows_(kernels_.window ? pad_ / (static_cast<size_t>(kernels_.window) * kBlockDims) : 0),
      keys_{&kernels_, task.metric, static_cast<int>(task.dim), pad_} {
  prepare(task.queries + first * dim_);
}

void GroupSearch::run(size_t k, const double* radius, Trust& trust) {
  k_ = static_cast<int64_t>(k);
  trust_ = trust.errors ? trusted_share(dim_) : 1;
  listed() ? plan_listed() : plan_chunks();
  int64_t rows = 0;
  for (const Chunk& chunk : s_.chunks) rows += rows_of(chunk);
  const int64_t chunk = s_.chunks.empty() ? 0 : rows_of(s_.chunks.front());
  trust.order = rank_.start(k, rows, chunk, trust.order);
  const int64_t work = static_cast<int64_t>(s_.chunks.size());
  if (work < 2) threads_ = 1;
  if (static_cast<int>(s_.workers.size()) < threads_)
    s_.workers.resize(static_cast<size_t>(threads_));
  for (int64_t q = 0; q < n_; ++q) s_.queries[static_cast<size_t>(q)].start(k, &rank_);
  for (int t = 0; t < threads_; ++t) start(s_.workers[static_cast<size_t>(t)], k, radius);
  {
    const TraceRange range("knnfast.scan");
    parallel_for(
        work,
        [&](int t, int64_t i) {
          scan_chunk(s_.workers[static_cast<size_t>(t)], s_.chunks[static_cast<size_t>(i)]);
        },
        threads_);
  }
  // The rows after the last whole block of each segment.
  Worker& first = s_.workers[0];
  const Snapshot& snapshot = *task_.snapshot;
  for (uint32_t i = 0; !listed() && i < snapshot.size(); ++i)
    if (allowed(i).end > snapshot[i].blocks())
      canonical_rows(first, i, snapshot[i].blocks() * kBlockRows, snapshot[i].n);
  const TraceRange range("knnfast.merge");
  parallel_for(
      n_,
      [&](int, int64_t q) {
        Collector& c = first.collectors[static_cast<size_t>(q)];
        for (int t = 1; t < threads_; ++t)
          c.take(s_.workers[static_cast<size_t>(t)].collectors[static_cast<size_t>(q)]);
        c.finish();
      },
      n_ < 2 * threads_ ? 1 : threads_);
}

void GroupSearch::add_stats(Stats& total) const {
  for (int64_t q = 0; q < n_; ++q) {
    const Collector& c = s_.workers[0].collectors[static_cast<size_t>(q)];
    total.rows_opened += c.opened;
    total.rows_rescored += c.rescored;
  }
  for (int t = 0; t < threads_; ++t) total += s_.workers[static_cast<size_t>(t)].stats;
}

void GroupSearch::plan_chunks() {
  const size_t block_bytes = static_cast<size_t>(code_groups(dim_)) * 64;
  size_t bytes = 0;
  for (uint32_t i = 0; i < task_.snapshot->size(); ++i) {
    const Chunk all = allowed(i);
    bytes += (all.end - all.begin) * block_bytes;
  }
  // Up to three queries take its four quarters side by side: not too far apart
  // (isa/avx512_int8.h).
  const size_t most = n_ < kQuarterBatch ? kLeastChunk : kMostChunk;
  bytes = std::clamp(bytes / (kChunks * static_cast<size_t>(threads_)), kLeastChunk, most);
  const uint32_t step = chunk_blocks_ =
      static_cast<uint32_t>(std::max<size_t>(2, bytes / block_bytes / 2 * 2));
  s_.chunks.clear();
  for (uint32_t i = 0; i < task_.snapshot->size(); ++i) {
    const Chunk all = allowed(i);
    const uint32_t end = std::min(all.end, (*task_.snapshot)[i].blocks());
    const uint16_t* mask = live(i);
    bool joins = false;  // the next chunk with the last one
    for (uint32_t b = all.begin; b < end; b += step) {
      Chunk chunk{i, b, std::min(end, b + step)};
      if (mask) {
        count_live(mask, chunk);
        if (chunk.rows == 0) continue;
        if (joins && s_.chunks.back().rows + chunk.rows <= few_rows(dim_)) {
          Chunk& last = s_.chunks.back();
          last.end = chunk.end;
          last.rows += chunk.rows;
          last.blocks += chunk.blocks;
          continue;
        }
        joins = true;
      }
      s_.chunks.push_back(chunk);
    }
  }
}

void GroupSearch::plan_listed() {
  const size_t few = few_rows(dim_);
  s_.chunks.clear();
  for (uint32_t i = 0; i < task_.snapshot->size(); ++i) {
    const size_t rows = task_.filter->parts[i].rows.size();
    for (size_t at = 0; at < rows; at += few)
      s_.chunks.push_back(
          {i, static_cast<uint32_t>(at), static_cast<uint32_t>(std::min(rows, at + few))});
  }
}

void GroupSearch::start(Worker& w, size_t k, const double* radius) {
  w.hit = on_hit;
  w.segment = -1;
  w.rotation = nullptr;
  w.level = task_.scan == Scan::fp16 ? kFp16 : kInt8;
  w.hold = 0;
  w.patience = 8;
  w.stop.start();
  w.pays = true;
  w.trust = trust_;
  w.seen = 0;
  w.stats = Stats();
  if (w.collectors.size() < static_cast<size_t>(n_)) w.collectors.resize(static_cast<size_t>(n_));
  for (int64_t q = 0; q < n_; ++q) {
    Collector& c = w.collectors[static_cast<size_t>(q)];
    Query* query = &s_.queries[static_cast<size_t>(q)];
    const SegmentView* segments = task_.snapshot->data();
    if (radius)
      c.start_range(segments, keys_, query, task_.metric == Metric::l2 ? -*radius : *radius);
    else
      c.start(segments, keys_, query, k);
  }
}

// All blocks of a segment in which rows may be returned, with one that is not whole.
Chunk GroupSearch::allowed(uint32_t segment) const {
  if (!task_.filter) return {segment, 0, (*task_.snapshot)[segment].n / kBlockRows + 1};
  const Filter::Part& part = task_.filter->parts[segment];
  return {segment, part.first, part.first + static_cast<uint32_t>(part.mask.size())};
}

// A bit a row of these blocks (where there are none nothing is asked for), or null: all are live.
const uint16_t* GroupSearch::live(uint32_t segment) const {
  if (task_.filter) {
    const Filter::Part& part = task_.filter->parts[segment];
    return part.mask.data() - part.first;
  }
  const SegmentView& view = (*task_.snapshot)[segment];
  return view.live ? view.live->data() : nullptr;
}

// In which rows may be returned.
int64_t GroupSearch::rows_of(const Chunk& chunk) const {
  if (listed()) return chunk.end - chunk.begin;
  return live(chunk.segment) ? chunk.rows : int64_t{chunk.end - chunk.begin} * kBlockRows;
}

// A scan that has failed before is tried on a few blocks first.
void GroupSearch::scan_chunk(Worker& w, const Chunk& chunk) {
  constexpr uint32_t kTrial = 4;
  rank_.begin(rows_of(chunk));
  if (listed()) {
    ++w.stats.chunks_canonical;
    w.stats.rows_scanned += int64_t{chunk.end - chunk.begin} * n_;
    const uint32_t* rows = task_.filter->parts[chunk.segment].rows.data();
    return score(w, chunk.segment, rows + chunk.begin, chunk.end - chunk.begin);
  }
  const uint16_t* mask = live(chunk.segment);
  if (mask && task_.scan == Scan::automatic && sparse(chunk.rows, chunk.blocks, n_)) {
    ++w.stats.chunks_canonical;
    w.stats.rows_scanned += int64_t{chunk.rows} * n_;
    return canonical_rows(w, chunk.segment, chunk.begin * kBlockRows, chunk.end * kBlockRows);
  }
  if (w.segment != chunk.segment) fill_queries(w, chunk.segment);
  w.chunk_segment = chunk.segment;
  if (w.hold > 0 && --w.hold == 0) {
    w.level = kInt8;
    w.pays = false;
  }
  for (uint32_t begin = chunk.begin, end; begin < chunk.end; begin = end) {
    end = w.pays ? chunk.end : std::min(chunk.end, begin + kTrial);
    if (mask && n_ < kQuarterBatch) end = live_run(mask, begin, end);
    if (begin < end) scan_blocks(w, begin, end);
  }
}

void GroupSearch::scan_blocks(Worker& w, uint32_t begin, uint32_t end) {
  const SegmentView& view = (*task_.snapshot)[w.chunk_segment];
  const uint16_t* mask = live(w.chunk_segment);
  // Scans step over dead blocks, but not those that take quarters side by side.
  const bool steps = mask && n_ >= kQuarterBatch;
  const auto dead = steps ? std::count(mask + begin, mask + end, 0) : 0;
  const int64_t blocks = int64_t{end - begin} - dead;
  if (blocks == 0) return;
  w.opened = 0;
  const int64_t pairs = blocks * kBlockRows * n_;
  w.stats.rows_scanned += pairs;
  const int lowest = task_.scan == Scan::fp16 || !view.codes ? kFp16 : kInt8;
  const int level = task_.scan == Scan::automatic ? std::max(w.level, lowest) : lowest;
  if (level == kCanonical) {
    ++w.stats.chunks_canonical;
    canonical_rows(w, w.chunk_segment, begin * kBlockRows, end * kBlockRows);
    return;
  }
  ScanRows rows{};
  rows.rows = view.segment->rows.as<uint16_t>();
  rows.row_norm = view.segment->row_norm.as<float>();
  rows.live = mask;
  rows.dim = static_cast<int>(dim_);
  rows.groups = code_groups(dim_);
  const bool l2 = task_.metric == Metric::l2;
  const size_t rank = rank_.now();
  std::vector<ScanQuery>& queries = level == kInt8 ? w.int8 : w.fp16;
  for (int64_t q = 0; q < n_; ++q) {
    Collector& c = w.collectors[static_cast<size_t>(q)];
    c.start_scan(rank);
    queries[static_cast<size_t>(q)].tau = c.tau();
  }
  w.queries = queries.data();
  if (level == kInt8) {
    ++w.stats.chunks_int8;
    rows.codes = view.codes->codes.as<uint8_t>();
    rows.scale = view.codes->scale.as<float>();
    rows.bounds = view.codes->bounds.as<uint32_t>();
    rows.norm = view.codes->norm.as<float>();
    rows.stop = stops_ ? w.stop.next() : kStops;
    w.bounds = rows.bounds;
    w.norms = rows.norm;
    int64_t stopped[kStops] = {};
    const auto began = std::chrono::steady_clock::now();
    kernels_.scan_int8(rows, begin, end, queries.data(), static_cast<int>(n_), l2, &w, stopped);
    w.stats.rows_stopped += stopped[0] + stopped[1];
    if (stops_) {
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
      w.stop.add(taken.count(), blocks, stopped, pairs);
      if (w.stop.blocks() >= chunk_blocks_ / 2) w.stop.judge();
    }
  } else {
    ++w.stats.chunks_fp16;
    w.bounds = nullptr;
    w.errors = task_.metric == Metric::cosine ? nullptr : rows.row_norm;
    w.norms = rows.row_norm;
    kernels_.scan_fp16(rows, begin, end, queries.data(), static_cast<int>(n_), l2,
                       task_.metric == Metric::cosine, &w);
  }
  // A scan that opens most of what it reads does not pay: take the next finer one for a while.
  // Only the first rows cannot be judged: most of them are among the k best so far. For long
  // after, of as many rows as have been seen, a few times k are.
  w.seen += blocks * kBlockRows;
  if (task_.scan != Scan::automatic || w.seen < kWarmUp * k_) return;
  const double share = static_cast<double>(w.opened) / static_cast<double>(pairs) -
                       static_cast<double>(kOpening * k_) / static_cast<double>(w.seen);
  w.pays = share <= (level == kFp16 ? 0.5 : n_ < 4 ? 0.2 : 0.08);
  if (!w.pays) {
    w.level = level + 1;
    w.pays = w.level == kCanonical;
    w.hold = w.patience;
    w.patience = std::min(w.patience * 2, 256);
  }
}

// The live rows from `begin` to `end`.
void GroupSearch::canonical_rows(Worker& w, uint32_t segment, uint32_t begin, uint32_t end) {
  const uint16_t* mask = live(segment);
  std::vector<uint32_t>& alive = w.alive;
  alive.clear();
  for (uint32_t first = begin; first < end; first += kBlockRows) {
    constexpr uint32_t kFour = 4 * kBlockRows;
    uint64_t four;
    if (mask && end - first >= kFour) {
      std::memcpy(&four, mask + first / kBlockRows, sizeof(four));
      if (!four) {
        first += kFour - kBlockRows;
        continue;
      }
    }
    for (uint32_t bits = mask ? mask[first / kBlockRows] : 0xffff; bits; bits &= bits - 1) {
      const uint32_t row = first + static_cast<uint32_t>(__builtin_ctz(bits));
      if (row < end) alive.push_back(row);
    }
  }
  score(w, segment, alive.data(), alive.size());
}

// One query meets rows as they lie; for more, a few rows lie in the nearest cache as doubles. Of a
// run of equal rows (where nothing came, all zeros) the first one is summed for all.
void GroupSearch::score(Worker& w, uint32_t segment, const uint32_t* rows, size_t total) {
  constexpr int kRuns = 6;
  const SegmentView& view = (*task_.snapshot)[segment];
  const size_t bytes = static_cast<size_t>(dim_) * 2;
  const char* all = view.segment->rows.as<char>();
  if (n_ > 1) w.wide.resize(kRuns * pad_);
  RowsAhead ahead(total, bytes, [&](size_t i) { return all + rows[i] * bytes; });
  size_t run[kRuns + 1];
  double keys[kRuns * kGroup];
  for (size_t i = 0; i < total;) {
    int count = 0;
    while (count < kRuns && i < total) {
      ahead.before(i);
      const char* x = all + rows[i] * bytes;
      const auto* row = reinterpret_cast<const uint16_t*>(x);
      if (n_ == 1)
        keys[count] = keys_(row, s_.queries[0]);
      else
        kernels_.widen(row, static_cast<int>(dim_),
                       w.wide.data() + static_cast<size_t>(count) * pad_);
      run[count++] = i++;
      while (i < total && std::memcmp(x, all + rows[i] * bytes, bytes) == 0) ++i;
    }
    run[count] = i;
    if (n_ > 1) keys_(w.wide.data(), count, s_.queries.get(), static_cast<int>(n_), keys);
    for (int64_t q = 0; q < n_; ++q) {
      Collector& c = w.collectors[static_cast<size_t>(q)];
      for (int r = 0; r < count; ++r)
        for (size_t j = run[r]; j < run[r + 1]; ++j)
          c.offer(keys[r * n_ + q], [&] { return view.id(rows[j]); });
    }
  }
  for (int64_t q = 0; q < n_; ++q) w.collectors[static_cast<size_t>(q)].raise();
}

}  // namespace knnfast
