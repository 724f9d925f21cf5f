// SPDX-License-Identifier: Apache-2.0
// One search of up to kGroup queries: prepared, scanned by all threads, merged.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "isa/kernels.h"
#include "search/collector.h"
#include "search/query_codes.h"
#include "search/search.h"
#include "search/segment.h"
#include "search/stop_choice.h"

namespace knnfast {

enum Level { kInt8, kFp16, kCanonical };  // of a scan, the coarsest first

struct Chunk {
  uint32_t segment, begin, end;   // blocks; of listed rows: places in the list
  uint32_t rows = 0, blocks = 0;  // with a mask: live ones, and the blocks they lie in
};

// What a thread of a search has of its own.
struct Worker : Sink {
  std::vector<ScanQuery> int8, fp16;   // the group's queries for `segment`
  CodedQueries centred;                // l2: less its mean
  const Rotation* rotation = nullptr;  // of its codes
  AlignedVector<double> wide;          // rows as doubles
  std::vector<uint32_t> alive;         // rows that are scored canonically
  int64_t segment = -1;
  const ScanQuery* queries = nullptr;  // of the scan that runs, and what their errors multiply
  const uint32_t* bounds = nullptr;    // of codes
  const float *errors = nullptr, *norms = nullptr;
  float trust = 0;  // so much of the bounds' distance is kept by floors
  std::vector<Collector> collectors;
  uint32_t chunk_segment = 0;
  int64_t opened = 0;  // in these blocks, by queries that had a threshold
  int64_t seen = 0;    // rows
  int level = kInt8, hold = 0, patience = 8;
  StopChoice stop;   // the first one that is tested
  bool pays = true;  // the level has paid since it was taken
  Stats stats;
};

// Buffers that one search leaves for the next one of its thread.
struct Scratch {
  AlignedVector<double> q;      // [group, padded], as given
  CodedQueries coded, rotated;  // v: as scanned; the rest for ip and cosine
  AlignedVector<float> values;  // v as float
  std::unique_ptr<Query[]> queries;
  int64_t capacity = 0;
  std::vector<Worker> workers;
  std::vector<Chunk> chunks;
};

class GroupSearch {
 public:
  GroupSearch(const SearchTask& task, int64_t first, int64_t count, int threads);

  // `trust`: so thresholds may be taken that are no bounds. Leaves in it what made a difference.
  void run(size_t k, const double* radius, Trust& trust);

  const std::vector<Found>& found(int64_t q) {
    return s_.workers[0].collectors[static_cast<size_t>(q)].result();
  }
  // Whether no row can be missing in it.
  bool certain(int64_t q) const {
    return s_.workers[0].collectors[static_cast<size_t>(q)].certain();
  }
  void add_stats(Stats& total) const;

 private:
  // Queries (group_queries.cpp): scaled and, for a scan, coded once, and for each segment what its
  // bounds need.
  void prepare(const float* queries);
  void code_queries();
  const CodedQueries& coded_for(Worker& w, const Codes& codes);
  void fill_queries(Worker& w, uint32_t segment);
  void fill_int8(Worker& w, const Codes& codes, double exact, double two_scales);

  void plan_chunks();
  void plan_listed();
  void start(Worker& w, size_t k, const double* radius);
  bool listed() const { return task_.filter && task_.filter->listed; }
  const uint16_t* live(uint32_t segment) const;
  int64_t rows_of(const Chunk& chunk) const;
  Chunk allowed(uint32_t segment) const;
  void scan_chunk(Worker& w, const Chunk& chunk);
  void scan_blocks(Worker& w, uint32_t begin, uint32_t end);
  void canonical_rows(Worker& w, uint32_t segment, uint32_t begin, uint32_t end);
  void score(Worker& w, uint32_t segment, const uint32_t* rows, size_t count);

  const SearchTask& task_;
  const int64_t n_, dim_;
  int threads_;
  const size_t pad_;
  Scratch& s_;
  const Kernels& kernels_;
  const bool tiles_;      // of the queries' codes
  const bool stops_;      // are tested
  const size_t windows_;  // of a query's codes
  const CanonicalKeys keys_;
  int64_t k_ = 0;
  float trust_ = 1;
  Rank rank_;
  uint32_t chunk_blocks_ = 0;
};

}  // namespace knnfast
