// SPDX-License-Identifier: Apache-2.0
// One search over one snapshot: scan, threshold, open, rescore.
#pragma once

#include <memory>
#include <vector>

#include "knnfast/index.h"
#include "segment.h"

namespace knnfast {

struct SearchTask {
  const Snapshot* snapshot;
  const std::vector<LiveMask>* filter;  // one mask a segment, or null: the segments' own
  const float* queries;                 // [m, dim], finite
  int64_t m, dim;
  Metric metric;
  Scan scan;
};

// Buffers that one search leaves for the next. Not for two threads at once.
struct Scratch;
struct ScratchDeleter {
  void operator()(Scratch*) const;
};
using ScratchPtr = std::unique_ptr<Scratch, ScratchDeleter>;
ScratchPtr make_scratch();

void search_topk(const SearchTask& task, int64_t k, float* scores, int64_t* ids, Scratch& scratch,
                 Stats& stats);
RangeResult search_range(const SearchTask& task, double radius, Scratch& scratch, Stats& stats);

}  // namespace knnfast
