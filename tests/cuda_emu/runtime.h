// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that csrc/cuda/cuda_index.cu and cuda_search.cu call, on host
// memory. Work on a stream runs at once; allocations are guarded like every device array of the
// tests, and counted.
#pragma once
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "fibers.h"

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMemoryPoolsSupported
};

namespace emu {
inline std::map<void*, Guarded>& allocations() {
  static std::map<void*, Guarded> all;
  return all;
}
inline std::mutex& allocating() {  // host threads allocate side by side
  static std::mutex mutex;
  return mutex;
}
}  // namespace emu

// An error stays until somebody asks for it, as on a device.
namespace emu {
inline cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}
inline cudaError_t fails(cudaError_t error) { return last_error() = error; }
}  // namespace emu
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error(), cudaSuccess); }

// Whether another thread captures a graph on a blocking stream: memory is then refused to threads
// that are not relaxed, the legacy stream to all. `captured` is that stream.
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
constexpr unsigned cudaStreamNonBlocking = 1;
namespace emu {
inline bool& capturing() {
  static bool is = false;
  return is;
}
inline cudaStream_t captured() {
  static char stream;
  return &stream;
}
inline bool usable(cudaStream_t stream) { return stream || !capturing(); }
inline cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}
inline bool refused() { return capturing() && capture_mode() != cudaStreamCaptureModeRelaxed; }
}  // namespace emu
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emu::capture_mode());
  return cudaSuccess;
}

// The devices that a thread has entered, the current one last, its own first.
namespace emu {
inline std::vector<int>& devices() {
  thread_local std::vector<int> entered{0};
  return entered;
}
}  // namespace emu
inline cudaError_t enter_device(int device) {
  emu::devices().push_back(device);
  return cudaSuccess;
}
inline void leave_device() { emu::devices().pop_back(); }

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emu::devices().back();
  return cudaSuccess;
}
namespace emu {
inline bool& has_pools() {
  static bool has = true;
  return has;
}
}  // namespace emu
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount            ? 3
           : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
           : what == cudaDevAttrComputeCapabilityMajor       ? 9
           : what == cudaDevAttrMemoryPoolsSupported         ? emu::has_pools()
                                                             : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 30;
  return cudaSuccess;
}
namespace emu {
// Allocations until one fails; negative: none does.
inline int& allocations_left() {
  static int left = -1;
  return left;
}
}  // namespace emu
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (emu::refused()) return emu::fails(cudaErrorStreamCaptureUnsupported);
  if (emu::allocations_left() == 0) return emu::fails(cudaErrorMemoryAllocation);
  if (emu::allocations_left() > 0) --emu::allocations_left();
  if (emu::devices().back() != 0) emu::fault("memory of another device than the index's");
  emu::Guarded g(bytes ? bytes : 1, 256);
  std::memset(g.begin, 0xCD, g.bytes);
  *p = g.begin;
  const std::lock_guard<std::mutex> alone(emu::allocating());
  emu::allocations().emplace(*p, std::move(g));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  if (emu::refused()) return emu::fails(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard<std::mutex> alone(emu::allocating());
  if (p && !emu::allocations().erase(p)) emu::fault("cudaFree of what was not allocated");
  return cudaSuccess;
}
using cudaMemPool_t = void*;
enum cudaMemAllocationType { cudaMemAllocationTypePinned };
enum cudaMemLocationType { cudaMemLocationTypeDevice };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  struct {
    cudaMemLocationType type;
    int id;
  } location;
};
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return cudaMalloc(pool, 1);
}
inline cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return cudaFree(pool); }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
inline cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(p, bytes);
}
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaMalloc(stream, 1);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaFree(stream); }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (!emu::usable(stream)) return emu::fails(cudaErrorStreamCaptureImplicit);
  *status = emu::capturing() && stream == emu::captured() ? cudaStreamCaptureStatusActive
                                                          : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  if (!emu::usable(stream)) return emu::fails(cudaErrorStreamCaptureImplicit);
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t rows, cudaMemcpyKind,
                                     cudaStream_t stream) {
  if (!emu::usable(stream)) return emu::fails(cudaErrorStreamCaptureImplicit);
  for (size_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch,
                static_cast<const char*>(from) + i * from_pitch, width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (!emu::usable(stream)) return emu::fails(cudaErrorStreamCaptureImplicit);
  if (bytes) std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!emu::usable(stream)) return emu::fails(cudaErrorStreamCaptureImplicit);
  if (emu::capturing() && stream == emu::captured())
    return emu::fails(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
