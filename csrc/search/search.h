// SPDX-License-Identifier: Apache-2.0
// One search over one snapshot: scan, threshold, open, rescore.
#pragma once

#include <vector>

#include "knnfast/index.h"
#include "search/doubt.h"
#include "search/segment.h"
#include "search/turn.h"

namespace knnfast {

// The live rows that a search may return.
struct Filter {
  struct Part {  // of a segment
    uint32_t first = 0;
    LiveMask mask;  // from block `first` on; of others no row may be returned
    std::vector<uint32_t> rows;

    bool operator==(const Part& o) const {
      return first == o.first && mask == o.mask && rows == o.rows;
    }
  };
  std::vector<Part> parts;
  bool listed = false;  // in `rows`, ascending: they are few; or else in masks

  bool operator==(const Filter& o) const { return parts == o.parts; }
};

struct SearchTask {
  const Snapshot* snapshot;
  const Filter* filter;  // or null: all live rows
  const float* queries;  // [m, dim], finite
  int64_t m, dim;
  Metric metric;
  Scan scan;
  Doubts* doubts;  // the index's
  Turn* turn;      // gives way between groups of queries
};

inline Stats& operator+=(Stats& total, const Stats& s) {
  total.searches += s.searches;
  total.searches_joined += s.searches_joined;
  total.queries += s.queries;
  total.queries_repeated += s.queries_repeated;
  total.rows_scanned += s.rows_scanned;
  total.rows_stopped += s.rows_stopped;
  total.rows_opened += s.rows_opened;
  total.rows_rescored += s.rows_rescored;
  total.chunks_int8 += s.chunks_int8;
  total.chunks_fp16 += s.chunks_fp16;
  total.chunks_canonical += s.chunks_canonical;
  return total;
}

// Where the answers to m queries go: [m, k], best first.
struct Answers {
  int64_t m;
  float* scores;
  int64_t* ids;
  double* exact;  // FP64 scores too, or null
};

// Whether threads share the rows that a search of `m` queries looks at, and searches wait for their
// turn: below, a search is over before others have woken.
bool worth_sharing(const Snapshot& snapshot, const Filter* filter, int64_t dim, int64_t m);

// Whether `m` queries read and score so few live rows sooner than the blocks of codes that they lie
// in.
bool sparse(int64_t rows, int64_t blocks, int64_t m);

// Each thread keeps its buffers from one search to the next. `answers`: of all queries, in parts.
void search_topk(const SearchTask& task, int64_t k, const Answers* answers, Stats& stats);
RangeResult search_range(const SearchTask& task, double radius, Stats& stats);

}  // namespace knnfast
