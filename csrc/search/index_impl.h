// SPDX-License-Identifier: Apache-2.0
// What Index holds. One writer at a time, who may read all of it, changes it under `state`;
// searches take the snapshot under it, and where ids lie in it, and then hold nothing.
#pragma once

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "knnfast/index.h"
#include "search/id_map.h"
#include "search/search.h"
#include "search/segment.h"

namespace knnfast {

constexpr int64_t kMaxDim = 65536;  // 255·127·65536 < 2³¹

struct FileEntry {  // of a saved index
  std::string name;
  uint64_t bytes = 0;
  uint32_t crc = 0;
};

struct Index::Impl {
  int64_t dim;
  Metric metric;
  Scan scan;

  mutable std::mutex writer;        // one writer at a time
  mutable std::shared_mutex state;  // guards the rest
  std::shared_ptr<const Snapshot> current = std::make_shared<Snapshot>();
  bool ascending = true;  // ids ascend in row order: found by bisection, and `map` is empty
  IdMap map;
  int64_t next_id = 0, last_id = -1, live = 0;
  std::string folder;            // where it was opened from or saved to last
  std::vector<FileEntry> files;  // its payloads there

  mutable Doubts doubts;
  mutable std::mutex stats_mutex;
  mutable Stats stats;

  bool coded() const {  // codes of very short rows would be longer than the rows are worth
    return scan == Scan::int8 || (scan == Scan::automatic && dim >= 16);
  }
  std::shared_ptr<const Snapshot> snapshot() const {
    std::shared_lock<std::shared_mutex> lock(state);
    return current;
  }
  // segment << 32 | row of a live id, or IdMap::kMissing; by the writer or under `state`.
  uint64_t find(const Snapshot& s, int64_t id) const;
};

// Where a live id is in a snapshot whose ids ascend, as `find` says it.
uint64_t bisect(const Snapshot& s, int64_t id);

}  // namespace knnfast
