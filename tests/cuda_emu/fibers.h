// SPDX-License-Identifier: Apache-2.0
// Blocks and threads: one fiber per CUDA thread, resumed in random order, and __syncthreads.
#pragma once
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace emu {

// What a kernel did that no device would forgive: a deadlock, a barrier missed by part of a block,
// a write past the shared memory. Tests catch it by `on_fault`; by default it prints and aborts.
using FaultHandler = void (*)(const std::string& what);
void on_fault(FaultHandler handler);
[[noreturn]] void fault(const std::string& what);

// Seeds the order of blocks, threads and asynchronous work of every launch that follows.
void set_seed(uint64_t seed);
std::mt19937_64& rng();
inline bool coin() { return rng()() & 1; }

// Memory whose end touches an inaccessible page, so that a read or write past it stops at once.
struct Guarded {
  unsigned char *map = nullptr, *begin = nullptr;
  size_t map_bytes = 0, bytes = 0;
  explicit Guarded(size_t size = 0, size_t align = 16);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  void swap(Guarded& other) noexcept;
};

struct Fiber {
  void *sp = nullptr, *stack = nullptr;
  unsigned index = 0;  // linear thread index in its block
  bool done = true;
  bool (*ready)(const void*) = nullptr;  // what it waits for, none when it can run
  const void* ready_arg = nullptr;
  const char* waits_at = "";
  std::vector<std::function<void()>> copies, matmuls;  // issued, not yet landed
  std::vector<size_t> copy_groups, matmul_groups;      // delayed pieces of each committed group
  bool matmul_open = false;                            // products issued since the last commit
};

// One warp-wide exchange: every lane leaves up to 32 bytes, the last one opens the gate for all.
struct WarpGate {
  uint32_t mask = 0, arrived = 0;
  uint64_t turn = 0;
  unsigned char slot[2][32][32];
};

struct PendingBulk {
  std::function<void()> land;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::vector<WarpGate>> warps;
  std::vector<PendingBulk> bulk;
  Guarded shared;
  std::function<void()> body;
  uint3 index{};
  dim3 threads, grid;
  Fiber* current = nullptr;
  void* scheduler_sp = nullptr;
  unsigned live = 0, at_barrier = 0;
  uint64_t barrier_turn = 0;
  int votes = 0, vote_result[2] = {};
};

Block& block();
inline Fiber& self() { return *block().current; }
inline unsigned lane() { return self().index & 31; }

// Parks the running fiber until `condition` holds; also a point where others get their turn.
void park(bool (*ready)(const void*), const void* arg, const char* where);
template <class Condition>
void wait_until(const Condition& condition, const char* where) {
  park([](const void* c) { return (*static_cast<const Condition*>(c))(); }, &condition, where);
}

int barrier(int vote, const char* where);  // returns the number of threads that voted
void run_grid(dim3 grid, dim3 threads, size_t shared, std::function<void()> body);

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared, Args... args) {
  run_grid(grid, threads, shared, [=] { kernel(args...); });
  return cudaSuccess;
}

inline uint3 thread_index() {
  const Block& b = block();
  unsigned i = b.current->index;
  return {i % b.threads.x, i / b.threads.x % b.threads.y, i / (b.threads.x * b.threads.y)};
}

}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block().index)
#define blockDim (::emu::block().threads)
#define gridDim (::emu::block().grid)

inline void __syncthreads() { emu::barrier(0, "__syncthreads"); }
inline int __syncthreads_count(int p) { return emu::barrier(p, "__syncthreads_count"); }
inline int __syncthreads_or(int p) { return emu::barrier(p, "__syncthreads_or") > 0; }
inline int __syncthreads_and(int p) { return emu::barrier(!p, "__syncthreads_and") == 0; }
