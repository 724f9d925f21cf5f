// SPDX-License-Identifier: Apache-2.0
// id -> row, for indexes whose own ids do not ascend. Open addressing, 16 bytes a slot.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace knnfast {

class IdMap {
 public:
  static constexpr uint64_t kMissing = ~uint64_t{0};

  bool has_room(size_t n) const { return (used_ + n) * 20 <= slots_.size() * 17; }

  // A copy without what was erased, with room for n ids more, or an eighth more where that is more:
  // so ids that come one by one cost little. Three quarters of its slots are taken then.
  IdMap with_room(size_t n) const {
    IdMap copy;
    const size_t most = size_ + std::max(n, size_ / 8);
    copy.slots_.assign(std::max<size_t>(64, most * 4 / 3 + 1), Slot{kEmpty, 0});
    for (const Slot& s : slots_)
      if (s.id >= 0) copy.insert(s.id, s.row);
    return copy;
  }

  // Needs room for it. False when it is there already.
  bool insert(int64_t id, uint64_t row) {
    size_t i = start(id);
    for (; slots_[i].id != kEmpty; i = next(i))
      if (slots_[i].id == id) return false;
    slots_[i] = {id, row};
    ++used_;
    ++size_;
    return true;
  }

  uint64_t find(int64_t id) const {
    if (id < 0 || slots_.empty()) return kMissing;
    for (size_t i = start(id); slots_[i].id != kEmpty; i = next(i))
      if (slots_[i].id == id) return slots_[i].row;
    return kMissing;
  }

  void erase(int64_t id) {
    if (id < 0 || slots_.empty()) return;
    for (size_t i = start(id); slots_[i].id != kEmpty; i = next(i))
      if (slots_[i].id == id) {
        slots_[i].id = kErased;
        --size_;
        return;
      }
  }

  int64_t nbytes() const { return static_cast<int64_t>(slots_.size() * sizeof(Slot)); }

 private:
  static constexpr int64_t kEmpty = -1, kErased = -2;
  struct Slot {
    int64_t id;
    uint64_t row;
  };

  size_t start(int64_t id) const {
    uint64_t h = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    return static_cast<size_t>(static_cast<unsigned __int128>(h) * slots_.size() >> 64);
  }
  size_t next(size_t i) const { return i + 1 == slots_.size() ? 0 : i + 1; }

  std::vector<Slot> slots_;
  size_t used_ = 0, size_ = 0;  // used counts the erased too
};

}  // namespace knnfast
