// SPDX-License-Identifier: Apache-2.0
// Warp-wide operations: shuffles, votes, __syncwarp.
#pragma once
#include "fibers.h"

namespace emu {

// Leaves this lane's value, waits for the other lanes of `mask`, returns everybody's values.
template <class T>
struct Lanes {
  const unsigned char (*slot)[32];
  T operator[](unsigned l) const {
    T v;
    std::memcpy(&v, slot[l], sizeof v);
    return v;
  }
};

template <class T>
Lanes<T> exchange(uint32_t mask, const T& value, const char* where) {
  static_assert(sizeof(T) <= 32);
  Block& b = block();
  unsigned me = lane(), first = b.current->index & ~31u;
  if (!(mask >> me & 1)) fault(std::string("a lane outside its own mask at ") + where);
  auto& gates = b.warps[first >> 5];
  if (gates.capacity() == 0) gates.reserve(64);  // references below stay valid
  size_t g = 0;
  while (g < gates.size() && gates[g].mask != mask) ++g;
  if (g == gates.size()) {
    if (g == gates.capacity()) fault("more than 64 different masks in one warp");
    gates.emplace_back();
    gates.back().mask = mask;
  }
  WarpGate& gate = gates[g];
  uint64_t turn = gate.turn;
  std::memcpy(gate.slot[turn & 1][me], &value, sizeof value);
  gate.arrived |= 1u << me;
  unsigned n = std::min<unsigned>(32, static_cast<unsigned>(b.fibers.size()) - first);
  uint32_t present = n == 32 ? ~0u : (1u << n) - 1;
  if (gate.arrived == (mask & present)) {
    gate.arrived = 0;
    ++gate.turn;
  } else {
    wait_until([&gate, turn] { return gate.turn != turn; }, where);
  }
  return {gate.slot[turn & 1]};
}

}  // namespace emu

inline void __syncwarp(unsigned mask = ~0u) { emu::exchange(mask, 0, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  auto all = emu::exchange(mask, v, "__shfl_sync");
  unsigned w = static_cast<unsigned>(width);
  return all[(emu::lane() & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1))];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  auto all = emu::exchange(mask, v, "__shfl_xor_sync");
  unsigned me = emu::lane(), w = static_cast<unsigned>(width), s = me ^ static_cast<unsigned>(x);
  return all[s < (me & ~(w - 1)) + w ? s : me];
}

template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  auto all = emu::exchange(mask, v, "__shfl_up_sync");
  unsigned me = emu::lane(), w = static_cast<unsigned>(width);
  return all[(me & (w - 1)) >= delta ? me - delta : me];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto all = emu::exchange(mask, predicate != 0 ? 1u : 0u, "__ballot_sync");
  auto n = static_cast<unsigned>(emu::block().fibers.size()) - (emu::self().index & ~31u);
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32 && l < n; ++l)
    if (mask >> l & 1) ballot |= all[l] << l;
  return ballot;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
