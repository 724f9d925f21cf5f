// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ on the CPU, for tests: every CUDA thread is a fiber, every block runs by itself.
//
// What it models: barriers, shuffles, votes, atomics, dynamic shared memory (poisoned before each
// block, guarded by inaccessible pages), ldmatrix, mma.sync, wgmma, cp.async, bulk copies with
// mbarriers. Asynchronous work lands at a random moment between its issue and its wait, blocks and
// threads run in random order, so a missing wait or barrier gives wrong answers for most seeds.
// What it does not model: memory ordering between threads without a barrier (fences do nothing),
// the proxy fences of the copy engine, bank conflicts, time.
// No CUDA header is needed.
#pragma once
#define KNN_EMU 1

#include <atomic>

#include "async_copy.h"
#include "fibers.h"
#include "intrinsics.h"
#include "runtime.h"
#include "tensor_core.h"
#include "types.h"
#include "warp.h"

#define KNN_DYN_SMEM(name) unsigned char* name = ::emu::block().shared.begin
#define KNN_LAUNCH(kernel, grid, threads, shared, stream, ...)                       \
  (::emu::usable(stream) ? ::emu::launch(kernel, grid, threads, shared, __VA_ARGS__) \
                         : ::emu::fails(cudaErrorStreamCaptureImplicit))
// Asks for more shared memory than the default on a device, and for registers; any goes here.
template <class Kernel>
cudaError_t allow_shared(Kernel, std::atomic<uint64_t>&, bool = false, int = 0) {
  return cudaSuccess;
}
