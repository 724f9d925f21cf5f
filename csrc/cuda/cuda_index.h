// SPDX-License-Identifier: Apache-2.0
// An index whose rows live on a CUDA device: the device half of knnfast::Index, same answers, same
// bits. No CUDA header is needed to use it; streams are cudaStream_t as void*.
//
// Threads: any number may search while one writes. A search sees one snapshot: the rows of finished
// adds, without those of finished removes. `add`, `remove`, `compact` and everything that returns
// host memory wait for the device; `search` and `Plan::run` only enqueue. `vectors`, `ids`,
// `contains` and `each_piece` wait for a writer, and it for them.
// Errors: std::invalid_argument (a bad argument), CudaError (the runtime's own, by name).
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/topk_cuda.h"

namespace knnfast {
namespace cuda {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int device_count();  // 0 without a driver, a device, or with a driver that fails

// Device memory, given back when the last owner goes.
class Memory {
 public:
  Memory() = default;
  Memory(int device, size_t bytes);
  ~Memory();
  Memory(Memory&& o) noexcept { swap(o); }
  Memory& operator=(Memory&& o) noexcept {
    swap(o);
    return *this;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Memory& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    std::swap(device_, o.device_);
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
  int device_ = 0;
};

struct Queries {  // device memory, or host memory where a function says so
  const void* data;
  DType dtype;
  int64_t stride;  // elements
};
struct Results {  // device memory
  float* scores;
  int64_t* ids;
  double* exact;  // or null
};
struct Ranges {               // host memory
  std::vector<int64_t> lims;  // query i owns [lims[i], lims[i+1])
  std::vector<float> scores;  // best first
  std::vector<int64_t> ids;
};
struct HostIds {  // host memory; neither pointer set: no restriction
  const int64_t* ids = nullptr;
  const uint8_t* bits = nullptr;
  int64_t count = 0;
  bool set() const { return ids || bits; }
};

class CudaIndex {
 public:
  // kAuto keeps codes and chooses for each search (choose_scan). Rows live in segments of
  // `segment_rows`, rounded up to whole tiles. 0: as many as fit into 256 MiB of FP16, which is
  // also the most.
  CudaIndex(int dim, Metric metric, Scan scan, int device, int64_t segment_rows = 0);
  ~CudaIndex();
  CudaIndex(const CudaIndex&) = delete;

  // Appends n rows that lie on the device or on the host, all or none; returns their ids. `own`:
  // host memory. `stream`, here and below: what orders memory on the device; unused for the host's.
  std::vector<int64_t> add(const void* rows, DType dtype, int64_t n, int64_t stride,
                           const int64_t* own, bool on_device, void* stream);
  // A stream that captures a graph is refused, here and by all else that is given one: the graph
  // would outlive the rows. Capture a plan's run.
  void search(const Queries& queries, int batch, int k, const HostIds& allow, const HostIds& deny,
              const Results& results, void* stream) const;
  // The same for queries and results on the host; waits. Queries: no NaN or infinity.
  void search_host(const Queries& queries, int batch, int k, const HostIds& allow,
                   const HostIds& deny, float* scores, int64_t* ids) const;
  // All rows better than `radius`, strictly, to the host; waits.
  Ranges range_search(const Queries& queries, bool on_device, int batch, double radius,
                      const HostIds& allow, const HostIds& deny, void* stream) const;
  int64_t remove(const int64_t* ids, int64_t n);
  void compact();
  // FP16 rows of these ids to device or host memory, [n, dim].
  void vectors(const int64_t* ids, int64_t n, uint16_t* out, bool to_device, void* stream) const;
  bool contains(int64_t id) const;
  std::vector<int64_t> ids() const;  // live ids in row order
  // As knnfast::Index's, by way of host memory.
  using Piece = std::function<void(const int64_t* ids, const uint16_t* rows, int64_t n)>;
  int64_t each_piece(const Piece& take) const;
  void skip_ids(int64_t next);

  int dim() const { return dim_; }
  Metric metric() const { return metric_; }
  Scan scan() const { return scan_; }
  int device() const { return device_; }
  int64_t size() const;
  int64_t nbytes() const;  // device memory

  // A search of fixed shape: its own workspace and results, no allocation, no synchronisation; the
  // launches may be captured in a CUDA graph. It follows the index: when that has changed, the next
  // run plans anew (and allocates if it must; capture again after a change).
  class Plan {
   public:
    Plan(std::shared_ptr<const CudaIndex> index, int batch, int k);
    void run(const Queries& queries, void* stream);
    const Results& results() const { return results_; }
    const TopkPlan& plan() const { return plan_; }
    Scan scan() const { return view_.scan; }  // of this shape

   private:
    void prepare();
    std::shared_ptr<const CudaIndex> index_;
    int batch_, k_;
    std::shared_ptr<const struct Snapshot> snapshot_;
    IndexView view_{};  // the snapshot's
    TopkPlan plan_{};
    Memory workspace_, scores_, ids_;
    Results results_{};
  };

 private:
  struct Segment;
  struct Pool;
  struct Stream;
  using Segments = std::vector<std::shared_ptr<Segment>>;
  std::shared_ptr<const Snapshot> snapshot() const;
  // What a change makes is all there, and the snapshot that shows it, before the change counts.
  std::shared_ptr<const Snapshot> snapshot_of(const Segments& segments,
                                              const std::shared_ptr<Memory>& mean, int64_t rows,
                                              bool listed) const;
  void quantize(const Segments& segments, const Memory& mean, int64_t begin, int64_t end,
                void* stream) const;
  std::shared_ptr<Memory> recentre(Segments& segments, int64_t rows, void* stream) const;
  // `ids` and `vectors` for who holds `writer_`.
  std::vector<int64_t> live_ids() const;
  void gather(const int64_t* ids, int64_t n, uint16_t* out, bool to_device, void* stream) const;
  int64_t find(int64_t id) const;  // position, or -1
  int64_t id_at(int64_t position) const;
  bool alive_at(int64_t position) const;
  void own_ids();

  const int dim_;
  const Metric metric_;
  const Scan scan_;
  const int device_;
  int64_t segment_rows_;
  Device limits_{};
  std::unique_ptr<Pool> pool_;
  std::unique_ptr<Stream> stream_;

  mutable std::shared_mutex mutex_;  // guards what follows
  mutable std::mutex writer_;        // one writer at a time
  Segments segments_;
  std::shared_ptr<Memory> mean_;
  std::shared_ptr<const Snapshot> snapshot_;
  int64_t rows_ = 0, live_ = 0, next_id_ = 0, mean_rows_ = 0;
  // Position = id until ids are given or skipped or rows are compacted; then every id is listed.
  bool listed_ = false;
  std::vector<int64_t> id_of_;                     // of every row, when listed
  std::unordered_map<int64_t, int64_t> position_;  // of every live id, when listed
};

}  // namespace cuda
}  // namespace knnfast
