// SPDX-License-Identifier: Apache-2.0
#include "search.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "collector.h"
#include "query_codes.h"
#include "stop_choice.h"
#include "thread_pool.h"
#include "trace.h"

namespace knnfast {
namespace {

constexpr size_t kChunkBytes = 256 << 10;  // of codes, handed to a thread at a time
constexpr int64_t kWarmUp = 32;            // times k rows, before a scan is judged
constexpr int64_t kOpening = 8;            // times k are opened of as many rows as went before
constexpr int kDoubt = 256;       // searches without trust after one that had to be repeated
constexpr double kSpeck = 1e-30;  // over everything that underflows in a scan

enum Level { kInt8, kFp16, kCanonical };

struct Chunk {
  uint32_t segment, begin, end;  // blocks
};

// Σ q·q in the canonical order.
double canonical_norm2(const double* q, int64_t dim) {
  double lanes[32] = {};
  for (int64_t j = 0; j < dim; ++j) lanes[j % 32] += q[j] * q[j];
  for (int stride = 16; stride > 0; stride /= 2)
    for (int l = 0; l < stride; ++l) lanes[l] += lanes[l + stride];
  return lanes[0];
}

struct Worker : Sink {
  std::vector<ScanQuery> int8, fp16;   // the group's queries for `segment`
  CodedQueries centred;                // l2: less its mean
  const Rotation* rotation = nullptr;  // of its codes
  AlignedVector<double> wide;          // rows as doubles
  int64_t segment = -1;
  const ScanQuery* queries = nullptr;  // of the scan that runs, and what their errors multiply
  const uint32_t* bounds = nullptr;    // of codes
  const float *errors = nullptr, *norms = nullptr;
  float trust = 0;  // so much of the bounds' distance is kept
  std::vector<Collector> collectors;
  uint32_t chunk_segment = 0;
  int64_t opened = 0;  // in these blocks, by queries that had a threshold
  int64_t seen = 0;    // rows
  int level = kInt8, hold = 0, patience = 8;
  StopChoice stop;      // the first one that is tested
  bool trusted = true;  // the level has paid since it was taken
  Stats stats;
};

struct Scratch {
  AlignedVector<double> q;      // [group, padded], as given
  CodedQueries coded, rotated;  // v: as scanned; the rest for ip and cosine
  AlignedVector<float> values;  // v as float
  std::unique_ptr<Query[]> queries;
  int64_t capacity = 0;
  std::vector<Worker> workers;
  std::vector<Chunk> chunks;
};

// Buffers that one search leaves for the next one of its thread.
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
  const float spread = 2 * (q.err * error + q.err_norm * n + q.slack - 0x1p-18f * q.sq * n * n);
  const float floor = upper - w.trust * spread * (1 + 0x1p-20f);
  return floor - std::fabs(floor) * 0x1p-22f;
}

float on_hit(Sink* sink, int query, uint32_t block, const float* upper, uint32_t mask) {
  Worker& w = *static_cast<Worker*>(sink);
  Collector& c = w.collectors[static_cast<size_t>(query)];
  const int count = __builtin_popcount(mask);
  c.opened += count;
  if (c.tau() > kNoThreshold) w.opened += count;
  for (; mask; mask &= mask - 1) {
    const int r = __builtin_ctz(mask);
    const uint32_t row = block * kBlockRows + static_cast<uint32_t>(r);
    if (upper[r] >= c.tau())
      c.add(floor_of(w, query, row, upper[r]), upper[r], w.chunk_segment, row);
  }
  return c.tau();
}

// Runs one group of queries.
class GroupSearch {
 public:
  GroupSearch(const SearchTask& task, int64_t first, int64_t count, int threads)
      : task_(task),
        n_(count),
        dim_(task.dim),
        threads_(threads),
        pad_(padded(task.dim)),
        s_(scratch()),
        kernels_(kernels()),
        tiles_(kernels_.tiles && count >= kTileBatch),
        windows_(kernels_.window ? pad_ / (static_cast<size_t>(kernels_.window) * kBlockDims) : 0),
        keys_{&kernels_, task.metric, static_cast<int>(task.dim), pad_} {
    prepare(task.queries + first * dim_);
  }

  // `trust`: floors may be taken that are no bounds.
  void run(size_t k, const double* radius, bool trust) {
    k_ = static_cast<int64_t>(k);
    trust_ = trust ? trusted_share(dim_) : 1;
    plan_chunks();
    const int64_t work = static_cast<int64_t>(s_.chunks.size());
    if (work < 2) threads_ = 1;
    if (static_cast<int>(s_.workers.size()) < threads_)
      s_.workers.resize(static_cast<size_t>(threads_));
    for (int64_t q = 0; q < n_; ++q) s_.queries[static_cast<size_t>(q)].start(k);
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
    for (size_t i = 0; i < snapshot.size(); ++i)
      canonical_rows(first, static_cast<uint32_t>(i), snapshot[i].blocks() * kBlockRows,
                     snapshot[i].n);
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

  const std::vector<Found>& found(int64_t q) {
    return s_.workers[0].collectors[static_cast<size_t>(q)].result();
  }
  // Whether no row can be missing in it.
  bool certain(int64_t q) const {
    return s_.workers[0].collectors[static_cast<size_t>(q)].certain();
  }

  void add_stats(Stats& total) const {
    for (int64_t q = 0; q < n_; ++q) {
      const Collector& c = s_.workers[0].collectors[static_cast<size_t>(q)];
      total.rows_opened += c.opened;
      total.rows_rescored += c.rescored;
    }
    for (int t = 0; t < threads_; ++t) total += s_.workers[static_cast<size_t>(t)].stats;
  }

 private:
  void prepare(const float* queries) {
    const size_t total = static_cast<size_t>((n_ + 15) / 16 * 16) * pad_;
    if (s_.capacity < n_) {
      s_.queries.reset(new Query[static_cast<size_t>(n_)]);
      s_.capacity = n_;
    }
    s_.q.assign(total, 0);
    s_.coded.v.assign(total, 0);
    s_.values.assign(total, 0);
    for (int64_t i = 0; i < n_; ++i) {
      double* q = s_.q.data() + i * pad_;
      double* v = s_.coded.v.data() + i * pad_;
      double top = 0;
      for (int64_t j = 0; j < dim_; ++j) {
        q[j] = static_cast<double>(queries[i * dim_ + j]);
        top = std::max(top, std::fabs(q[j]));
      }
      Query& query = s_.queries[static_cast<size_t>(i)];
      query.q = q;
      query.norm = std::sqrt(canonical_norm2(q, dim_));
      int exponent = 0;
      std::frexp(top, &exponent);
      if (task_.metric == Metric::ip) {
        query.scale = query.key_scale = top > 0 ? std::ldexp(1.0, -exponent) : 1.0;
      } else if (task_.metric == Metric::cosine) {
        query.scale = query.norm > 0 ? 1 / query.norm : 0.0;
        query.key_scale = 1;
      } else {  // -s/2, scaled only where float would overflow
        query.scale = std::ldexp(1.0, -std::max(0, exponent - 20));
        query.key_scale = query.scale * query.scale / 2;
      }
      for (int64_t j = 0; j < dim_; ++j) {
        v[j] = q[j] * query.scale;
        s_.values[static_cast<size_t>(i) * pad_ + static_cast<size_t>(j)] =
            static_cast<float>(v[j]);
      }
    }
    const Rotation* rotation = nullptr;  // there is one at most
    bool straight = false;
    for (const SegmentView& view : *task_.snapshot) {
      if (!view.codes) continue;
      if (view.codes->rotation)
        rotation = view.codes->rotation.get();
      else
        straight = true;
    }
    if (straight && task_.metric != Metric::l2)
      s_.coded.code(n_, dim_, kernels_.window, tiles_, nullptr, threads_);
    if (!rotation) return;
    s_.rotated.v.assign(s_.coded.v.begin(), s_.coded.v.end());
    s_.rotated.code(n_, dim_, kernels_.window, tiles_, rotation, threads_);
  }

  // The queries for a segment's codes.
  const CodedQueries& coded_for(Worker& w, const Codes& codes) {
    if (task_.metric != Metric::l2) return codes.rotation ? s_.rotated : s_.coded;
    w.centred.code_centred(s_.coded.v, s_.rotated, codes, s_.queries.get(), n_, dim_,
                           kernels_.window, tiles_);
    return w.centred;
  }

  void plan_chunks() {
    const size_t block_bytes = static_cast<size_t>(code_groups(dim_)) * 64;
    const uint32_t step = chunk_blocks_ =
        static_cast<uint32_t>(std::max<size_t>(2, kChunkBytes / block_bytes / 2 * 2));
    s_.chunks.clear();
    for (uint32_t i = 0; i < task_.snapshot->size(); ++i) {
      const uint32_t blocks = (*task_.snapshot)[i].blocks();
      for (uint32_t b = 0; b < blocks; b += step)
        s_.chunks.push_back({i, b, std::min(blocks, b + step)});
    }
  }

  void start(Worker& w, size_t k, const double* radius) {
    w.hit = on_hit;
    w.segment = -1;
    w.rotation = nullptr;
    w.level = task_.scan == Scan::fp16 ? kFp16 : kInt8;
    w.hold = 0;
    w.patience = 8;
    w.stop.start();
    w.trusted = true;
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

  // The bounds of segment.h for every query of the group.
  void fill_queries(Worker& w, uint32_t segment) {
    const SegmentView& view = (*task_.snapshot)[segment];
    w.segment = segment;
    const Rotation* rotation = view.codes ? view.codes->rotation.get() : nullptr;
    if (w.rotation != rotation) w.stop.start();  // other codes stop elsewhere
    w.rotation = rotation;
    w.int8.resize(static_cast<size_t>(n_));
    w.fp16.resize(static_cast<size_t>(n_));
    const double float_sum = static_cast<double>(dim_) * 0x1p-23;   // a float dot product's error
    const double exact = static_cast<double>(dim_ + 64) * 0x1p-51;  // the canonical one's
    const double two_scales = 1 - 0x1p-20;  // sq·norm² is an upper bound for it
    for (int64_t i = 0; i < n_; ++i) {
      const Query& query = s_.queries[static_cast<size_t>(i)];
      const double* v = s_.coded.v.data() + i * pad_;
      double norm2 = 0;
      for (int64_t j = 0; j < dim_; ++j) norm2 += v[j] * v[j];
      const double norm = std::sqrt(norm2) * (1 + 1e-9);
      const bool l2 = task_.metric == Metric::l2;
      const double row_scale = l2 ? query.scale : 1;
      ScanQuery& f = w.fp16[static_cast<size_t>(i)];
      f.codes = f.tiles = nullptr;
      f.values = s_.values.data() + i * pad_;
      f.offset = 0;
      f.offsets = nullptr;
      std::fill_n(f.rest, kStops, 0);
      std::fill_n(f.left, kStops, 0.0f);
      f.mul = static_cast<float>(row_scale);
      f.err = round_up((float_sum + 0x1p-20) * norm * row_scale);
      f.err_norm = 0;
      f.sq = l2 ? static_cast<float>(-0.5 * row_scale * row_scale * two_scales) : 0;
      f.base = round_up((l2 ? -0.5 * norm2 * (1 - 0x1p-20) : 0) + kSpeck);
      f.slack = round_up((l2 ? 0x1p-19 * norm2 : 0) + kSpeck);
    }
    if (view.codes) fill_int8(w, *view.codes, exact, two_scales);
  }

  void fill_int8(Worker& w, const Codes& codes, double exact, double two_scales) {
    const bool l2 = task_.metric == Metric::l2;
    const CodedQueries& coded = coded_for(w, codes);
    for (int64_t i = 0; i < n_; ++i) {
      const size_t at = static_cast<size_t>(i);
      const Query& query = s_.queries[at];
      const QueryCodes& c = coded.quantized[at];
      double base = 0;
      if (l2) {
        base = -0.5 * c.norm * c.norm;
      } else {
        for (int64_t j = 0; j < dim_; ++j)
          base += s_.coded.v[at * pad_ + static_cast<size_t>(j)] *
                  static_cast<double>(codes.mean[static_cast<size_t>(j)]);
      }
      const double row_scale = l2 ? query.scale : 1;
      const double arithmetic = 0x1p-18 * (c.norm + c.error);
      ScanQuery& q = w.int8[at];
      q.codes = coded.codes.data() + at * pad_;
      q.tiles = coded.tiles.data() + (tiles_ ? at / kTileQueries * kTileQueries * pad_ : 0);
      q.values = nullptr;
      q.offset = c.offset;
      q.offsets = windows_ ? coded.offsets.data() + at * windows_ : nullptr;
      fill_stops(q, coded.v.data() + at * pad_, dim_, c.slack, row_scale);
      q.mul = static_cast<float>(c.step * row_scale);
      q.err = round_up((c.norm + c.error + arithmetic) * row_scale);
      q.err_norm = round_up((c.error + arithmetic) * row_scale);
      q.sq = l2 ? static_cast<float>(-0.5 * row_scale * row_scale * two_scales) : 0;
      const double rounding = exact * c.norm * (c.norm + codes.mean_norm * row_scale) + kSpeck;
      q.base = round_up(base + 0x1p-20 * std::fabs(base) + rounding);
      q.slack = round_up(0x1p-19 * std::fabs(base) + rounding);
    }
  }

  const uint16_t* live(uint32_t segment) const {
    if (task_.filter) return (*task_.filter)[segment].data();
    const SegmentView& view = (*task_.snapshot)[segment];
    return view.live ? view.live->data() : nullptr;
  }

  // A scan that has failed before is tried on a few blocks first.
  void scan_chunk(Worker& w, const Chunk& chunk) {
    constexpr uint32_t kTrial = 4;
    if (w.segment != chunk.segment) fill_queries(w, chunk.segment);
    w.chunk_segment = chunk.segment;
    if (w.hold > 0 && --w.hold == 0) {
      w.level = kInt8;
      w.trusted = false;
    }
    for (uint32_t begin = chunk.begin, end; begin < chunk.end; begin = end) {
      end = w.trusted ? chunk.end : std::min(chunk.end, begin + kTrial);
      scan_blocks(w, begin, end);
    }
  }

  void scan_blocks(Worker& w, uint32_t begin, uint32_t end) {
    const SegmentView& view = (*task_.snapshot)[w.chunk_segment];
    w.opened = 0;
    const int64_t pairs = static_cast<int64_t>(end - begin) * kBlockRows * n_;
    w.stats.rows_scanned += pairs;
    const int lowest = task_.scan == Scan::fp16 || !view.codes ? kFp16 : kInt8;
    const int level = task_.scan == Scan::automatic ? std::max(w.level, lowest) : lowest;
    ScanRows rows{};
    rows.rows = view.segment->rows.as<uint16_t>();
    rows.row_norm = view.segment->row_norm.as<float>();
    rows.live = live(w.chunk_segment);
    rows.dim = static_cast<int>(dim_);
    rows.groups = code_groups(dim_);
    const bool l2 = task_.metric == Metric::l2;
    if (level == kCanonical) {
      ++w.stats.chunks_canonical;
      canonical_rows(w, w.chunk_segment, begin * kBlockRows, end * kBlockRows);
      return;
    }
    std::vector<ScanQuery>& queries = level == kInt8 ? w.int8 : w.fp16;
    for (int64_t q = 0; q < n_; ++q) {
      w.collectors[static_cast<size_t>(q)].refresh();
      queries[static_cast<size_t>(q)].tau = w.collectors[static_cast<size_t>(q)].tau();
    }
    w.queries = queries.data();
    if (level == kInt8) {
      ++w.stats.chunks_int8;
      rows.codes = view.codes->codes.as<uint8_t>();
      rows.scale = view.codes->scale.as<float>();
      rows.bounds = view.codes->bounds.as<uint32_t>();
      rows.norm = view.codes->norm.as<float>();
      const bool stops = stop_group(rows.groups, 0) > 0;
      rows.stop = stops ? w.stop.next() : kStops;
      w.bounds = rows.bounds;
      w.norms = rows.norm;
      int64_t stopped[kStops] = {};
      const auto began = std::chrono::steady_clock::now();
      kernels_.scan_int8(rows, begin, end, queries.data(), static_cast<int>(n_), l2, &w, stopped);
      w.stats.rows_stopped += stopped[0] + stopped[1];
      if (stops && end - begin >= chunk_blocks_ / 2) {
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
        w.stop.judge(taken.count() / (end - begin), stopped, pairs);
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
    w.seen += (end - begin) * kBlockRows;
    if (task_.scan != Scan::automatic || w.seen < kWarmUp * k_) return;
    const double share = static_cast<double>(w.opened) / static_cast<double>(pairs) -
                         static_cast<double>(kOpening * k_) / static_cast<double>(w.seen);
    w.trusted = share <= (level == kFp16 ? 0.5 : n_ < 4 ? 0.2 : 0.08);
    if (!w.trusted) {
      w.level = level + 1;
      w.trusted = w.level == kCanonical;
      w.hold = w.patience;
      w.patience = std::min(w.patience * 2, 256);
    }
  }

  // A few rows, as doubles, lie in the nearest cache while they meet all queries. Of a run of equal
  // rows (where nothing came, all zeros) the first one is summed for all.
  void canonical_rows(Worker& w, uint32_t segment, uint32_t begin, uint32_t end) {
    constexpr int kRuns = 6;
    const SegmentView& view = (*task_.snapshot)[segment];
    const size_t bytes = static_cast<size_t>(dim_) * 2;
    const char* rows = view.segment->rows.as<char>();
    const uint16_t* mask = live(segment);
    const auto alive = [mask](uint32_t row) {
      return !mask || (mask[row / kBlockRows] >> (row % kBlockRows) & 1);
    };
    w.wide.resize(kRuns * pad_);
    uint32_t run[kRuns + 1];
    double keys[kRuns * kGroup];
    for (uint32_t row = begin; row < end;) {
      int count = 0;
      while (count < kRuns && row < end) {
        if (!alive(row)) {
          ++row;
          continue;
        }
        const char* x = rows + row * bytes;
        kernels_.widen(reinterpret_cast<const uint16_t*>(x), static_cast<int>(dim_),
                       w.wide.data() + static_cast<size_t>(count) * pad_);
        run[count++] = row++;
        while (row < end && std::memcmp(x, rows + row * bytes, bytes) == 0) ++row;
      }
      run[count] = row;
      keys_(w.wide.data(), count, s_.queries.get(), static_cast<int>(n_), keys);
      for (int64_t q = 0; q < n_; ++q) {
        Collector& c = w.collectors[static_cast<size_t>(q)];
        for (int r = 0; r < count; ++r)
          for (uint32_t i = run[r]; i < run[r + 1]; ++i)
            if (alive(i)) c.offer(keys[r * n_ + q], [&] { return view.id(i); });
      }
    }
    for (int64_t q = 0; q < n_; ++q) w.collectors[static_cast<size_t>(q)].raise();
  }

  const SearchTask& task_;
  const int64_t n_, dim_;
  int threads_;
  const size_t pad_;
  Scratch& s_;
  const Kernels& kernels_;
  const bool tiles_;      // of the queries' codes
  const size_t windows_;  // of a query's codes
  const CanonicalKeys keys_;
  int64_t k_ = 0;
  float trust_ = 1;
  uint32_t chunk_blocks_ = 0;
};

// Every group of queries in turn: threads share the rows, or, where the rows are few, the groups.
template <class Emit>
void for_groups(const SearchTask& task, size_t k, const double* radius, Stats& stats, Emit emit) {
  int64_t rows = 0;
  for (const SegmentView& s : *task.snapshot) rows += s.n;
  const int threads = num_threads();
  const bool small = rows * task.dim < (int64_t{1} << 20);  // too little to share
  const auto doubted = [&] { return task.doubt->load(std::memory_order_relaxed) > 0; };
  if (doubted()) task.doubt->fetch_sub(1, std::memory_order_relaxed);
  auto run = [&](int64_t first, int64_t size, int with, Stats& into) {
    const int64_t count = std::min(size, task.m - first);
    GroupSearch search(task, first, count, with);
    search.run(k, radius, !radius && !doubted());
    search.add_stats(into);
    into.queries += count;
    std::vector<int64_t> again;
    std::vector<float> queries;
    for (int64_t q = 0; q < count; ++q) {
      emit(search, q, first + q);
      if (search.certain(q)) continue;
      const float* at = task.queries + (first + q) * task.dim;
      again.push_back(first + q);
      queries.insert(queries.end(), at, at + task.dim);
    }
    if (again.empty()) return;
    task.doubt->store(kDoubt + 1, std::memory_order_relaxed);  // a search takes one off first
    SearchTask rest = task;
    rest.queries = queries.data();
    rest.m = static_cast<int64_t>(again.size());
    GroupSearch second(rest, 0, rest.m, with);
    second.run(k, radius, false);
    second.add_stats(into);
    into.queries_repeated += rest.m;
    for (int64_t q = 0; q < rest.m; ++q) emit(second, q, again[static_cast<size_t>(q)]);
  };
  if (small && task.m > 16 && threads > 1) {
    const int64_t size = std::min<int64_t>(kGroup, (task.m + threads - 1) / threads);
    std::mutex adding;
    parallel_for((task.m + size - 1) / size, [&](int, int64_t g) {
      Stats part;
      run(g * size, size, 1, part);
      const std::lock_guard<std::mutex> lock(adding);
      stats += part;
    });
    return;
  }
  const Turn turn(!small && threads > 1);
  for (int64_t first = 0; first < task.m; first += kGroup)
    run(first, kGroup, small ? 1 : threads, stats);
}

double score_of(Metric metric, double key) { return metric == Metric::l2 ? -key : key; }

}  // namespace

void search_topk(const SearchTask& task, int64_t k, float* scores, int64_t* ids, double* exact,
                 Stats& stats) {
  const float missing = task.metric == Metric::l2 ? -kNoThreshold : kNoThreshold;
  int64_t rows = 0;
  for (const SegmentView& s : *task.snapshot) rows += s.n;
  const size_t wanted = static_cast<size_t>(std::min(k, std::max<int64_t>(rows, 1)));
  for_groups(task, wanted, nullptr, stats, [&](GroupSearch& search, int64_t q, int64_t query) {
    const std::vector<Found>& found = search.found(q);
    const int64_t at = query * k, n = static_cast<int64_t>(found.size());
    for (int64_t i = 0; i < k; ++i) {
      const Found* f = i < n ? &found[static_cast<size_t>(i)] : nullptr;
      const double score = f ? score_of(task.metric, f->key) : static_cast<double>(missing);
      scores[at + i] = static_cast<float>(score);
      ids[at + i] = f ? f->id : -1;
      if (exact) exact[at + i] = score;
    }
  });
  ++stats.searches;
}

RangeResult search_range(const SearchTask& task, double radius, Stats& stats) {
  std::vector<std::vector<Found>> all(static_cast<size_t>(task.m));
  for_groups(task, 0, &radius, stats, [&](GroupSearch& search, int64_t q, int64_t query) {
    all[static_cast<size_t>(query)] = search.found(q);
  });
  RangeResult r;
  r.lims.push_back(0);
  for (const std::vector<Found>& found : all) {
    for (const Found& f : found) {
      r.scores.push_back(static_cast<float>(score_of(task.metric, f.key)));
      r.ids.push_back(f.id);
    }
    r.lims.push_back(static_cast<int64_t>(r.ids.size()));
  }
  ++stats.searches;
  return r;
}

}  // namespace knnfast
