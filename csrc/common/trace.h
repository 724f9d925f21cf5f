// SPDX-License-Identifier: Apache-2.0
// NVTX ranges round the phases of a search, for Nsight: scan, select, rescore, merge. Nothing where
// NVTX's headers were not found; a load and a branch while no tool listens.
#pragma once

#ifdef KNNFAST_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

namespace knnfast {

class TraceRange {
 public:
#ifdef KNNFAST_NVTX
  explicit TraceRange(const char* name) { nvtxRangePushA(name); }
  ~TraceRange() { nvtxRangePop(); }
#else
  explicit TraceRange(const char*) {}
  ~TraceRange() {}  // a user-given one, so that no compiler calls the object unused
#endif
  TraceRange(const TraceRange&) = delete;
};

}  // namespace knnfast
