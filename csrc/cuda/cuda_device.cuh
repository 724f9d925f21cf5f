// SPDX-License-Identifier: Apache-2.0
// The instructions the kernels use, one function each, and what their host code needs beside the
// runtime. tests/cuda_emu/ gives every one of them a CPU body under the same name, so that the
// kernels run without a GPU.
#pragma once
#if defined(KNN_EMU_BUILD)
#include "cuda_emu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdint.h>

#include <atomic>

#define KNN_DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define KNN_LAUNCH(kernel, grid, threads, shared, stream, ...)                        \
  (kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   cudaGetLastError())

// As much shared memory as the device gives, whatever this launch needs: the attribute belongs to
// the kernel, and a smaller one set beside it would make another thread's launch fail. Rings take
// all of it from the L1 cache, which their copies pass by. A kernel that needs `registers` a thread
// from the start is refused where the compiler gave it fewer: setmaxnreg.inc waits for ever for
// some that are not there. Once for a kernel and a device: `done` is the kernel's, a bit a device.
template <class Kernel>
inline cudaError_t allow_shared(Kernel kernel, std::atomic<uint64_t>& done, bool ring = false,
                                int registers = 0) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done & bit) return cudaSuccess;
  cudaFuncAttributes attributes{};
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.numRegs < registers) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  if (error == cudaSuccess && ring)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) done |= bit;
  return error;
}

// Makes a device current until `leave_device`, by the driver's stack of contexts: cudaSetDevice
// back to a device that this thread has never used would create a context there. The runtime has
// loaded the driver; its errors have the runtime's numbers.
inline void* driver_call(const char* name) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  return driver ? dlsym(driver, name) : nullptr;
}
inline cudaError_t enter_device(int device) {
  static const auto retain =
      reinterpret_cast<int (*)(void**, int)>(driver_call("cuDevicePrimaryCtxRetain"));
  static const auto push = reinterpret_cast<int (*)(void*)>(driver_call("cuCtxPushCurrent_v2"));
  if (!retain || !push) return cudaErrorInsufficientDriver;
  void* context = nullptr;  // kept to the end of the process, as the runtime keeps it
  const int error = retain(&context, device);
  return static_cast<cudaError_t>(error ? error : push(context));
}
inline void leave_device() {
  static const auto pop = reinterpret_cast<int (*)(void**)>(driver_call("cuCtxPopCurrent_v2"));
  void* context;
  pop(&context);
}

__device__ __forceinline__ float half_bits_to_float(uint16_t h) {
  return __half2float(__ushort_as_half(h));
}
__device__ __forceinline__ uint16_t float_to_half_bits(float f) {
  return __half_as_ushort(__float2half_rn(f));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- cp.async (sm_80)
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// --- ldmatrix and mma.sync (sm_80)
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// --- mbarriers and bulk copies (sm_90)
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
}
// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Orders this thread's reads and writes of shared memory before copies that it lets start.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes,
                                          uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// --- registers of a warpgroup (sm_90a)
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// --- wgmma (sm_90a): 64 rows of A by 256 of B, both K-major slices of 128 bytes a row in the
// 128-byte swizzle, 32 bytes of K starting at byte k. `a` and `b` are 1024-byte aligned.
__device__ __forceinline__ uint64_t slice_descriptor(const unsigned char* slice, unsigned k) {
  const uint64_t address = shared_address(slice) + k;
  // start address / 16, leading offset 1 (unused here), 1024 bytes between groups of eight rows,
  // 128-byte swizzle
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving uses of the accumulators across a fence or a wait.
__device__ __forceinline__ void wgmma_pin(float (&c)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
__device__ __forceinline__ void wgmma_pin(int (&c)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+r"(c[i])::"memory");
}

#define KNN_ACC8(t, i) \
  t(c[i]), t(c[i + 1]), t(c[i + 2]), t(c[i + 3]), t(c[i + 4]), t(c[i + 5]), t(c[i + 6]), t(c[i + 7])
#define KNN_ACC32(t, i) KNN_ACC8(t, i), KNN_ACC8(t, i + 8), KNN_ACC8(t, i + 16), KNN_ACC8(t, i + 24)
#define KNN_ACC128(t) KNN_ACC32(t, 0), KNN_ACC32(t, 32), KNN_ACC32(t, 64), KNN_ACC32(t, 96)
#define KNN_D128                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
  "%127}"
#define KNN_FLOAT(x) "+f"(x)
#define KNN_INT(x) "+r"(x)

__device__ __forceinline__ void wgmma_f16(float (&c)[128], unsigned char* a, unsigned char* b,
                                          unsigned k) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " KNN_D128
               ", %128, %129, 1, 1, 1, 0, 0;"
               : KNN_ACC128(KNN_FLOAT)
               : "l"(slice_descriptor(a, k)), "l"(slice_descriptor(b, k)));
}
__device__ __forceinline__ void wgmma_s8(int (&c)[128], unsigned char* a, unsigned char* b,
                                         unsigned k) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 " KNN_D128 ", %128, %129, 1;"
               : KNN_ACC128(KNN_INT)
               : "l"(slice_descriptor(a, k)), "l"(slice_descriptor(b, k)));
}
#endif
#endif  // KNN_EMU_BUILD
