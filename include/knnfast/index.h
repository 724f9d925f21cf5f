// SPDX-License-Identifier: Apache-2.0
// knnfast::Index: exact top-k over resident FP16 rows. The whole C++ API.
//
//   knnfast::Index ix(512, knnfast::Metric::ip);
//   ix.add(rows, knnfast::DType::f32, n);
//   ix.search(queries, knnfast::DType::f32, m, k, scores, ids);
//
// The answer is a function of the data alone: the k rows with the best *canonical score* (FP64, 32
// lanes, fixed tree; ties go to the lower id), whatever the scan, batch, thread count or machine.
// Any number of threads may search while one writes; a search sees one snapshot.
// Errors: std::invalid_argument (a bad argument), DamagedFile (a bad file), std::system_error.
// Limits: dim 1 to 65,536; ids unique, 0 to 2^63 - 2; k 1 to 2^31 - 1. Rows are kept as FP16: NaN
// and values beyond ±65,504 are refused, and so are queries with NaN or infinity.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define KNNFAST_API __attribute__((visibility("default")))
#else
#define KNNFAST_API
#endif

namespace knnfast {

enum class Metric { ip, cosine, l2 };
enum class Scan { fp16, int8, automatic };
enum class DType { f16, bf16, f32 };

// A file of an index that is damaged, truncated or hostile; what() names its path and the reason.
struct KNNFAST_API DamagedFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which rows a search may return: ids (any order, repeats allowed) or a packed little-endian bitset
// over ids (bit i of byte i/8). One of nothing (count 0, whatever the pointers) is a restriction,
// too; no restriction is a count below 0.
struct IdSet {
  const int64_t* ids = nullptr;
  const uint8_t* bits = nullptr;
  int64_t count = -1;  // ids, or bytes of the bitset
  bool set() const { return count >= 0; }
};

struct SearchOptions {
  IdSet allow, deny;
};

struct Stats {
  int64_t searches = 0;          // calls
  int64_t searches_joined = 0;   // of these, answered by another that came before
  int64_t queries = 0;           // queries in them
  int64_t queries_repeated = 0;  // searches of one again (docs/search.md), counted below, too
  int64_t rows_scanned = 0;   // (row, query) pairs that met a bound, or a canonical score at once
  int64_t rows_stopped = 0;   // of these, left after a part of their codes
  int64_t rows_opened = 0;    // pairs whose bound reached the threshold
  int64_t rows_rescored = 0;  // pairs that got a canonical score
  int64_t chunks_int8 = 0, chunks_fp16 = 0, chunks_canonical = 0;  // how chunks were scanned
};

struct RangeResult {
  std::vector<int64_t> lims;  // query i owns [lims[i], lims[i+1])
  std::vector<float> scores;  // best first
  std::vector<int64_t> ids;
};

class KNNFAST_API Index {
 public:
  Index(int64_t dim, Metric metric = Metric::ip, Scan scan = Scan::automatic);
  ~Index();
  Index(Index&&) noexcept;
  Index& operator=(Index&&) noexcept;

  // Appends n rows (row i at vectors + i * stride elements; stride 0 means dim). ids null:
  // automatic. The ids in use go to ids_out when it is given. A rejected call changes nothing.
  void add(const void* vectors, DType dtype, int64_t n, const int64_t* ids = nullptr,
           int64_t* ids_out = nullptr, int64_t stride = 0);

  // The k best rows of each of m queries: [m, k] scores and ids, best first; missing: id -1 with
  // -inf (l2: +inf). `exact`: [m, k] scores before they are rounded to FP32, or null; they decide
  // the order, so answers of several indexes can be merged by them. stride: elements from query to
  // query; 0 means dim. Calls that wait for one another are answered together where k and the rows
  // that filters leave are the same.
  void search(const void* queries, DType dtype, int64_t m, int64_t k, float* scores, int64_t* ids,
              const SearchOptions& options = {}, int64_t stride = 0, double* exact = nullptr) const;

  // All rows scoring above `radius` (l2: nearer than it), strictly, as FAISS means it.
  RangeResult range_search(const void* queries, DType dtype, int64_t m, double radius,
                           const SearchOptions& options = {}, int64_t stride = 0) const;

  // The stored FP16 rows of these ids, [n, dim]. std::invalid_argument names one that is missing.
  void vectors(const int64_t* ids, int64_t n, uint16_t* out) const;
  bool contains(int64_t id) const;
  std::vector<int64_t> ids() const;               // live ids, in row order
  int64_t remove(const int64_t* ids, int64_t n);  // how many were found; others are passed over
  void compact();                                 // forget the removed rows

  // For a copy: hands the live rows (ids [n], FP16 rows [n, dim]) of one snapshot to `take`, in row
  // order and in pieces; returns the id that the next row would get, for the copy's `skip_ids`.
  using Piece = std::function<void(const int64_t* ids, const uint16_t* rows, int64_t n)>;
  int64_t each_piece(const Piece& take) const;
  void skip_ids(int64_t next);  // automatic ids go on from there

  int64_t dim() const;
  Metric metric() const;
  Scan scan() const;
  int64_t size() const;    // live rows
  int64_t nbytes() const;  // bytes in use
  bool joins() const;      // so large that searches that wait are answered together
  Stats stats() const;

  // Atomic: a kill leaves the old or the new index. A folder of other files and no index is
  // refused.
  void save(const std::string& folder) const;
  // mmap: rows stay in the files until they are touched, and are not checked: call verify().
  static Index open(const std::string& folder, bool mmap = true);
  // Checks every payload; the paths of the damaged ones. Empty for an index that was never saved.
  // std::system_error (ENOENT) where the folder was saved anew since, and they are gone.
  std::vector<std::string> verify() const;

  struct Impl;

 private:
  explicit Index(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

KNNFAST_API void set_num_threads(int64_t n);  // of a search, an add or an op, 1 to 1024
KNNFAST_API int num_threads();
KNNFAST_API const char* isa();  // the instruction set in use: portable|avx2|avx512|avx512vnni|amx

}  // namespace knnfast
