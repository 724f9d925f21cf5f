// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that csrc/cuda_index.cu and cuda_search.cu call, on host memory.
// Work on a stream runs at once; allocations are guarded like every device array of the tests, and
// counted.
#pragma once
#include <map>
#include <mutex>

#include "fibers.h"

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
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

// Whether another thread captures a graph: memory is then refused to threads that are not relaxed.
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
namespace emu {
inline bool& capturing() {
  static bool is = false;
  return is;
}
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

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount            ? 3
           : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
           : what == cudaDevAttrComputeCapabilityMajor       ? 9
                                                             : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (emu::refused()) return cudaErrorStreamCaptureUnsupported;
  emu::Guarded g(bytes ? bytes : 1, 256);
  std::memset(g.begin, 0xCD, g.bytes);
  *p = g.begin;
  const std::lock_guard<std::mutex> alone(emu::allocating());
  emu::allocations().emplace(*p, std::move(g));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  if (emu::refused()) return cudaErrorStreamCaptureUnsupported;
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
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t rows, cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch,
                static_cast<const char*>(from) + i * from_pitch, width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
