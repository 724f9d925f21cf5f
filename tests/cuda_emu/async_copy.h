// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies: cp.async with its groups, mbarriers, bulk copies. A copy lands at a random
// moment between its issue and the wait that covers it.
#pragma once
#include "fibers.h"

inline void cp_async16(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emu::fault("cp.async of 16 bytes at an unaligned address");
  auto land = [=] { std::memcpy(shared, global, 16); };
  if (emu::coin()) {
    land();
  } else {
    emu::self().copies.push_back(land);
  }
}

inline void cp_async_commit() {
  emu::Fiber& f = emu::self();
  size_t earlier = 0;
  for (size_t n : f.copy_groups) earlier += n;
  f.copy_groups.push_back(f.copies.size() - earlier);
}

// Waits until at most `Pending` of the latest committed groups are in flight.
template <int Pending>
inline void cp_async_wait() {
  emu::Fiber& f = emu::self();
  while (f.copy_groups.size() > Pending) {
    auto end = f.copies.begin() + static_cast<long>(f.copy_groups.front());
    for (auto it = f.copies.begin(); it != end; ++it) (*it)();
    f.copies.erase(f.copies.begin(), end);
    f.copy_groups.erase(f.copy_groups.begin());
  }
}

namespace emu {
struct Mbarrier {
  uint8_t phase, expected, pending, spare;
  int32_t bytes;
  void settle() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = expected;
    }
  }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
inline Mbarrier& as_mbarrier(uint64_t* p) { return *reinterpret_cast<Mbarrier*>(p); }
}  // namespace emu

inline void mbarrier_init(uint64_t* bar, unsigned arrivals) {
  auto n = static_cast<uint8_t>(arrivals);
  emu::as_mbarrier(bar) = {0, n, n, 0, 0};
}
inline void mbarrier_fence_init() {}
inline void async_proxy_fence() {}

inline void mbarrier_arrive(uint64_t* bar) {
  auto& b = emu::as_mbarrier(bar);
  if (b.pending == 0) emu::fault("more arrivals at an mbarrier than it expects");
  --b.pending;
  b.settle();
}

inline void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes) {
  emu::as_mbarrier(bar).bytes += static_cast<int32_t>(bytes);
  mbarrier_arrive(bar);
}

// Returns when the phase of this parity has completed.
inline void mbarrier_wait(uint64_t* bar, unsigned parity) {
  auto& b = emu::as_mbarrier(bar);
  emu::wait_until([&b, parity] { return (b.phase & 1u) != parity; }, "mbarrier");
}

inline void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 ||
      bytes % 16)
    emu::fault("a bulk copy at an unaligned address, or of an odd size");
  emu::block().bulk.push_back({[=] {
    std::memcpy(shared, global, bytes);
    auto& b = emu::as_mbarrier(bar);
    b.bytes -= static_cast<int32_t>(bytes);
    b.settle();
  }});
}
