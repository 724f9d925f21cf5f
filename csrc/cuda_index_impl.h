// SPDX-License-Identifier: Apache-2.0
// Between cuda_index.cu (who owns the rows) and cuda_search.cu (who reads them): the runtime's
// calls with their errors, memory of a stream, segments and snapshots.
#pragma once
#include <algorithm>
#include <limits>

#include "cuda_device.cuh"
#include "cuda_index.h"

namespace knnfast {
namespace cuda {

inline void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  const cudaError_t e = static_cast<cudaError_t>(error);
  cudaGetLastError();  // a sticky state of this thread must not fail the next call
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(e) + " (" + cudaGetErrorString(e) +
                  ")");
}

// Lets this thread take and give back memory in a scope while somebody captures a graph, which by
// default forbids it to all threads. What is captured is none of this.
class AsideOfCaptures {
 public:
  AsideOfCaptures() : is_(cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess) {}
  ~AsideOfCaptures() {
    if (is_) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  AsideOfCaptures(const AsideOfCaptures&) = delete;
  AsideOfCaptures& operator=(const AsideOfCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then what it was before
  bool is_;
};

// Makes a device current for a scope.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  const AsideOfCaptures aside_;
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

inline void upload(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, as_stream(stream)), "upload");
}
inline void download(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, as_stream(stream)), "download");
}
inline void wait(void* stream) {
  check(cudaStreamSynchronize(as_stream(stream)), "cudaStreamSynchronize");
}

// Memory that belongs to a stream: taken and given back in its order.
class StreamMemory {
 public:
  StreamMemory(cudaMemPool_t pool, size_t bytes, void* stream) : stream_(stream) {
    check(cudaMallocFromPoolAsync(&data_, std::max<size_t>(bytes, 1), pool, as_stream(stream)),
          ("cudaMallocFromPoolAsync of " + std::to_string(bytes) + " bytes").c_str());
  }
  ~StreamMemory() {
    if (data_ && cudaFreeAsync(data_, as_stream(stream_)) != cudaSuccess) cudaGetLastError();
  }
  StreamMemory(StreamMemory&& o) noexcept : data_(o.data_), stream_(o.stream_) {
    o.data_ = nullptr;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  void* stream_;
};

// What searches take for a while: freed memory stays in the pool, so the next search finds it
// there.
struct CudaIndex::Pool {
  cudaMemPool_t handle = nullptr;
  explicit Pool(int device) {
    cudaMemPoolProps props{};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device;
    check(cudaMemPoolCreate(&handle, &props), "cudaMemPoolCreate");
    uint64_t keep = std::numeric_limits<uint64_t>::max();
    check(cudaMemPoolSetAttribute(handle, cudaMemPoolAttrReleaseThreshold, &keep),
          "cudaMemPoolSetAttribute");
  }
  ~Pool() {
    const AsideOfCaptures aside;
    cudaMemPoolDestroy(handle);
  }
};

struct CudaIndex::Segment {
  Memory half, half_terms, ids;
  // Written only for rows that no snapshot shows; replaced, with older snapshots keeping theirs,
  // by a new centre (codes) and by a removal (alive).
  std::shared_ptr<Memory> codes, code_terms, alive;
  std::vector<uint32_t> alive_bits;  // alive, on the host

  SegmentView view(int64_t first_id, bool listed) const {
    return {half.as<unsigned char>(),
            codes ? codes->as<unsigned char>() : nullptr,
            half_terms.as<HalfTerm>(),
            codes ? code_terms->as<CodeTerm>() : nullptr,
            alive->as<uint32_t>(),
            listed ? ids.as<int64_t>() : nullptr,
            first_id};
  }
};

// What a search sees. It owns what it points to.
struct Snapshot {
  IndexView view{};
  uint64_t version = 0;
  Memory table;
  std::vector<std::shared_ptr<void>> owners;
};

}  // namespace cuda
}  // namespace knnfast
