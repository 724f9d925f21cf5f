// SPDX-License-Identifier: Apache-2.0
#include "search/search.h"

#include <algorithm>
#include <mutex>

#include "common/thread_pool.h"
#include "search/group_search.h"

namespace knnfast {
namespace {

constexpr int64_t kGroupWhileOthersWait = 64;  // nearly as fast as kGroup

int64_t rows_of(const Snapshot& snapshot, const Filter* filter) {
  int64_t rows = 0;
  if (filter && filter->listed)
    for (const Filter::Part& part : filter->parts) rows += static_cast<int64_t>(part.rows.size());
  else
    for (const SegmentView& s : snapshot) rows += s.n;
  return rows;
}

// Every group of queries in turn: threads share the rows, or, where the rows are few, the groups.
template <class Emit>
void for_groups(const SearchTask& task, size_t k, const double* radius, Stats& stats, Emit emit) {
  const int threads = num_threads();
  const bool small = !worth_sharing(*task.snapshot, task.filter, task.dim, task.m);
  Doubts& doubts = *task.doubts;
  if (!radius)
    for (Doubt* doubt : {&doubts.errors, &doubts.order}) doubt->start_search();
  auto run = [&](int64_t first, int64_t size, int with, Stats& into) {
    const int64_t count = std::min(size, task.m - first);
    Trust trust;
    if (!radius) trust = {!doubts.errors.doubted(), !doubts.order.doubted()};
    // Returns the queries whose answers do not stand.
    const auto answer = [&](const SearchTask& part, int64_t begin, int64_t n, auto query) {
      GroupSearch search(part, begin, n, with);
      search.run(k, radius, trust);
      search.add_stats(into);
      std::vector<int64_t> again;
      for (int64_t q = 0; q < n; ++q)
        if (search.certain(q) || !trust.any())
          emit(search, q, query(q));
        else
          again.push_back(query(q));
      return again;
    };
    std::vector<int64_t> again = answer(task, first, count, [&](int64_t q) { return first + q; });
    into.queries += count;
    while (!again.empty()) {
      // An order is likelier to be at fault; it was where an answer stands without it.
      Doubt& doubt = trust.order ? doubts.order : doubts.errors;
      (trust.order ? trust.order : trust.errors) = false;
      std::vector<float> queries;
      for (const int64_t query : again) {
        const float* at = task.queries + query * task.dim;
        queries.insert(queries.end(), at, at + task.dim);
      }
      SearchTask rest = task;
      rest.queries = queries.data();
      rest.m = static_cast<int64_t>(again.size());
      into.queries_repeated += rest.m;
      again = answer(rest, 0, rest.m, [&](int64_t q) { return again[static_cast<size_t>(q)]; });
      if (static_cast<int64_t>(again.size()) < rest.m) doubt.wrong();
    }
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
  for (int64_t first = 0, size = kGroup; first < task.m; first += size) {
    if (first) size = task.turn->give_way() ? kGroupWhileOthersWait : kGroup;
    run(first, size, small ? 1 : threads, stats);
  }
}

double score_of(Metric metric, double key) { return metric == Metric::l2 ? -key : key; }

}  // namespace

bool worth_sharing(const Snapshot& snapshot, const Filter* filter, int64_t dim, int64_t m) {
  // A scan reads rows once for all queries; listed rows are scored for each.
  const int64_t scored = filter && filter->listed ? std::clamp<int64_t>(m, 1, 64) : 1;
  return rows_of(snapshot, filter) * dim * scored >= int64_t{1} << 20;
}

bool sparse(int64_t rows, int64_t blocks, int64_t m) {
  // Measured, a middle: rows without structure would have more, and where scans stop early fewer.
  const int matrix_batch = kernels().matrix_batch;
  if (matrix_batch && m >= matrix_batch) return m <= 16 && m * rows <= (m + 5) * blocks;
  return m <= 64 && 4 * rows <= (m < kQuarterBatch ? 12 : m < 16 ? 8 : 5) * blocks;
}

void search_topk(const SearchTask& task, int64_t k, const Answers* answers, Stats& stats) {
  const float missing = task.metric == Metric::l2 ? -kNoThreshold : kNoThreshold;
  const size_t wanted =
      static_cast<size_t>(std::min(k, std::max<int64_t>(rows_of(*task.snapshot, task.filter), 1)));
  for_groups(task, wanted, nullptr, stats, [&](GroupSearch& search, int64_t q, int64_t query) {
    const Answers* part = answers;
    for (; query >= part->m; ++part) query -= part->m;
    const std::vector<Found>& found = search.found(q);
    const int64_t at = query * k, n = static_cast<int64_t>(found.size());
    for (int64_t i = 0; i < k; ++i) {
      const Found* f = i < n ? &found[static_cast<size_t>(i)] : nullptr;
      const double score = f ? score_of(task.metric, f->key) : static_cast<double>(missing);
      part->scores[at + i] = static_cast<float>(score);
      part->ids[at + i] = f ? f->id : -1;
      if (part->exact) part->exact[at + i] = score;
    }
  });
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
  return r;
}

}  // namespace knnfast
