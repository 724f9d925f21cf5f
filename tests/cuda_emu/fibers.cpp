// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

extern "C" void emu_switch(void** save_sp, void* to_sp);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {
namespace {

constexpr size_t kStack = 128 << 10;
uint64_t seed_value = 1;
FaultHandler handler = nullptr;
Block the_block;

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void fiber_main() {
  Block& b = the_block;
  b.body();
  Fiber& me = *b.current;
  me.done = true;
  me.copies.clear();
  if (!me.matmuls.empty()) fault("a thread ended with matrix products in flight");
  --b.live;
  void* unused;
  emu_switch(&unused, b.scheduler_sp);
  std::abort();
}

void start(Fiber& f, unsigned index) {
  if (!f.stack) {
    f.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f.stack == MAP_FAILED) fault("no memory for a fiber's stack");
  }
  f.index = index;
  f.done = false;
  f.ready = nullptr;
  f.copies.clear();
  f.matmuls.clear();
  f.copy_groups.clear();
  f.matmul_groups.clear();
  f.matmul_open = false;
  auto** sp = reinterpret_cast<void**>(static_cast<char*>(f.stack) + kStack - 64);
  *--sp = nullptr;  // keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
  f.sp = sp;
}

void land_one(Block& b) {
  size_t i = rng()() % b.bulk.size();
  auto land = std::move(b.bulk[i].land);
  b.bulk.erase(b.bulk.begin() + static_cast<long>(i));
  land();
}

void run_block(Block& b) {
  unsigned n = static_cast<unsigned>(b.fibers.size());
  b.live = n;
  b.at_barrier = 0;
  b.bulk.clear();
  for (auto& warp : b.warps) warp.clear();
  for (size_t i = 0; i < b.shared.bytes; ++i)
    b.shared.begin[i] = static_cast<unsigned char>(0xA5 ^ (i * 37));
  for (unsigned i = 0; i < n; ++i) start(b.fibers[i], i);
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  // Warps stall for random spells, so that they drift apart as far as the barriers let them.
  std::vector<unsigned> stall(b.warps.size());
  for (unsigned& s : stall) s = coin() ? 0 : static_cast<unsigned>(rng()() % 64);
  while (b.live) {
    bool progress = false, stalled = false;
    std::shuffle(order.begin(), order.end(), rng());
    for (unsigned& s : stall) {
      if (s) {
        --s;
      } else if (rng()() % 32 == 0) {
        s = static_cast<unsigned>(rng()() % 64);
      }
    }
    for (unsigned i : order) {
      Fiber& f = b.fibers[i];
      if (f.done || (f.ready && !f.ready(f.ready_arg))) continue;
      if (stall[i / 32]) {
        stalled = true;
        continue;
      }
      f.ready = nullptr;
      progress = true;
      b.current = &f;
      emu_switch(&b.scheduler_sp, f.sp);
      if (!b.bulk.empty() && coin()) land_one(b);
    }
    if (!progress && stalled) {
      std::fill(stall.begin(), stall.end(), 0u);
    } else if (!progress && !b.bulk.empty()) {
      land_one(b);
    } else if (!progress && b.live) {
      std::string where;
      for (auto& f : b.fibers)
        if (!f.done && where.find(f.waits_at) == std::string::npos)
          where += std::string(" thread ") + std::to_string(f.index) + " at " + f.waits_at + ";";
      fault("deadlock:" + where);
    }
  }
  if (!b.bulk.empty()) fault("a block ended with bulk copies in flight");
}

}  // namespace

void on_fault(FaultHandler h) { handler = h; }

void fault(const std::string& what) {
  if (handler) handler(what);
  std::fprintf(stderr, "cuda_emu: %s\n", what.c_str());
  std::abort();
}

void set_seed(uint64_t seed) {
  seed_value = seed;
  rng().seed(seed);
}

std::mt19937_64& rng() {
  static std::mt19937_64 engine(seed_value);
  return engine;
}

Guarded::Guarded(size_t size, size_t align) {
  if (!size) return;
  bytes = (size + align - 1) / align * align;
  map_bytes = (bytes + page() - 1) / page() * page() + page();
  void* p = mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) fault("no memory for a guarded buffer");
  map = static_cast<unsigned char*>(p);
  mprotect(map + map_bytes - page(), page(), PROT_NONE);
  begin = map + map_bytes - page() - bytes;
}

Guarded::~Guarded() {
  if (map) munmap(map, map_bytes);
}

void Guarded::swap(Guarded& other) noexcept {
  std::swap(map, other.map);
  std::swap(begin, other.begin);
  std::swap(map_bytes, other.map_bytes);
  std::swap(bytes, other.bytes);
}

Block& block() { return the_block; }

void park(bool (*ready)(const void*), const void* arg, const char* where) {
  Block& b = the_block;
  Fiber& me = *b.current;
  me.ready = ready;
  me.ready_arg = arg;
  me.waits_at = where;
  emu_switch(&me.sp, b.scheduler_sp);
}

int barrier(int vote, const char* where) {
  Block& b = the_block;
  uint64_t turn = b.barrier_turn;
  if (b.at_barrier == 0) b.votes = 0;
  b.votes += vote != 0;
  if (++b.at_barrier == b.fibers.size()) {  // a thread that has exited never arrives: a deadlock
    b.vote_result[turn & 1] = b.votes;
    b.at_barrier = 0;
    ++b.barrier_turn;
  }
  wait_until([&b, turn] { return b.barrier_turn != turn; }, where);
  return b.vote_result[turn & 1];
}

void run_grid(dim3 grid, dim3 threads, size_t shared, std::function<void()> body) {
  // One grid at a time: there is one block, and host threads may launch side by side.
  static std::mutex running;
  const std::lock_guard<std::mutex> alone(running);
  Block& b = the_block;
  size_t n = static_cast<size_t>(threads.x) * threads.y * threads.z;
  if (n == 0 || n > 1024) fault("a block of " + std::to_string(n) + " threads");
  for (size_t i = n; i < b.fibers.size(); ++i) munmap(b.fibers[i].stack, kStack);
  b.fibers.resize(n);
  b.warps.assign((n + 31) / 32, {});
  b.shared = Guarded(shared, 128);
  b.threads = threads;
  b.grid = grid;
  b.body = std::move(body);
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  std::shuffle(blocks.begin(), blocks.end(), rng());
  for (const uint3& index : blocks) {
    b.index = index;
    run_block(b);
  }
}

}  // namespace emu
