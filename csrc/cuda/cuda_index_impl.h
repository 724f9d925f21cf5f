// SPDX-License-Identifier: Apache-2.0
// Between cuda_index.cu (who owns the rows) and cuda_search.cu (who reads them): the runtime's
// calls with their errors, memory of a stream, segments and snapshots.
#pragma once
#include <algorithm>

#include "cuda/cuda_device.cuh"
#include "cuda/cuda_index.h"

namespace knnfast {
namespace cuda {

inline void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  const cudaError_t e = static_cast<cudaError_t>(error);
  cudaGetLastError();  // an error that stays would be the next launch's
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(e) + " (" + cudaGetErrorString(e) +
                  ")");
}

// Whether a call succeeded, for those whose failure nobody can help.
inline bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// Lets this thread take and give back memory in a scope while somebody captures a graph, which by
// default forbids it to all threads. What is captured is none of this.
class AsideOfCaptures {
 public:
  AsideOfCaptures() : is_(succeeded(cudaThreadExchangeStreamCaptureMode(&mode_))) {}
  ~AsideOfCaptures() {
    if (is_) succeeded(cudaThreadExchangeStreamCaptureMode(&mode_));
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
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (before == device) return;
    check(enter_device(device), "making the index's device current");
    entered_ = true;
  }
  ~Current() {
    if (entered_) leave_device();
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const AsideOfCaptures aside_;
  bool entered_ = false;
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
    if (data_) succeeded(cudaFreeAsync(data_, as_stream(stream_)));
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

constexpr size_t kWorkspace = size_t{2} << 30;  // most a search takes; larger batches make rounds

// A graph would outlive the rows that it reads, and what waits for the device breaks a capture.
inline void refuse_capture(void* stream, const char* what) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(as_stream(stream), &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone)
    throw std::invalid_argument(std::string(what) +
                                ": a CUDA graph cannot hold it; capture index.plan() instead");
}

// What searches take for a while: what one gives back stays in the pool, so the next finds it
// there. What a large range search took beyond that goes back to the device.
struct CudaIndex::Pool {
  cudaMemPool_t handle = nullptr;
  explicit Pool(int device) {
    cudaMemPoolProps props{};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device;
    check(cudaMemPoolCreate(&handle, &props), "cudaMemPoolCreate");
    uint64_t keep = kWorkspace;
    check(cudaMemPoolSetAttribute(handle, cudaMemPoolAttrReleaseThreshold, &keep),
          "cudaMemPoolSetAttribute");
  }
  ~Pool() {
    const AsideOfCaptures aside;
    succeeded(cudaMemPoolDestroy(handle));
  }
};

// For what no stream of the caller's orders: what comes from the host or goes there. The legacy
// stream would wait for others' blocking streams, and break their captures.
struct CudaIndex::Stream {
  cudaStream_t handle = nullptr;
  Stream() {
    check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~Stream() {
    const AsideOfCaptures aside;
    succeeded(cudaStreamDestroy(handle));
  }
};

// Written only for rows that no snapshot shows. A new centre (codes) and a removal (alive) change a
// copy of it; snapshots keep theirs.
struct CudaIndex::Segment {
  std::shared_ptr<Memory> half, half_terms, ids, codes, code_terms, alive;
  std::vector<uint32_t> alive_bits;  // alive, on the host; not for searches

  SegmentView view(int64_t first_id, bool listed) const {
    return {half->as<unsigned char>(),
            codes ? codes->as<unsigned char>() : nullptr,
            half_terms->as<HalfTerm>(),
            codes ? code_terms->as<CodeTerm>() : nullptr,
            alive->as<uint32_t>(),
            listed ? ids->as<int64_t>() : nullptr,
            first_id};
  }
};

// What a search sees. It owns what it points to.
struct Snapshot {
  IndexView view{};
  Memory table;
  std::vector<std::shared_ptr<const void>> owners;
};

}  // namespace cuda
}  // namespace knnfast
