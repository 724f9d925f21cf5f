// SPDX-License-Identifier: Apache-2.0
// Rows that lie anywhere in memory, asked for before they are read.
#pragma once

#include <algorithm>
#include <cstddef>

namespace knnfast {

// A row's first kMost bytes are asked for kNear rows before its turn: for the second cache (2),
// since the first one has fewer lines on their way. One line of it is asked for kPages to
// 2 kPages - 1 rows before, as a processor retires nothing that comes after an instruction which
// waits for a page's address (a miss of the TLB); of kPages rows at once, whose addresses are then
// looked up side by side.
template <class Row>  // the first byte of the i-th row
class RowsAhead {
 public:
  RowsAhead(size_t count, size_t bytes, Row row) : row_(row), count_(count), bytes_(bytes) {}

  // Before the i-th row is read; i grows. Inlined always: it is a few instructions for most rows.
  __attribute__((always_inline)) void before(size_t i) {
    constexpr size_t kPages = 8, kNear = 4;  // rows
    constexpr size_t kMost = 4096;           // bytes
    pages_ = std::max(pages_, i);
    rows_ = std::max(rows_, i);
    while (pages_ < count_ && pages_ <= i + kPages)
      for (const size_t end = std::min(count_, pages_ + kPages); pages_ < end; ++pages_)
        __builtin_prefetch(row_(pages_), 0, 2);
    for (; rows_ < std::min(count_, i + kNear + 1); ++rows_) {
      const char* at = row_(rows_);
      for (size_t line = 0; line < std::min(bytes_, kMost); line += 64)
        __builtin_prefetch(at + line, 0, 2);
    }
  }

 private:
  const Row row_;
  const size_t count_, bytes_;
  size_t pages_ = 0, rows_ = 0;  // the next ones to ask for
};

}  // namespace knnfast
