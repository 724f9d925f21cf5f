// SPDX-License-Identifier: Apache-2.0
// How rows lie in memory. Read this to mirror an index elsewhere (the CUDA side does).
//
// An index is a list of fixed-capacity *segments*. Rows are only ever appended to the last one and
// never move; a *snapshot* (the list of SegmentViews) is immutable and is what a search sees.
//
//   rows      FP16, row-major, [n][dim], no padding
//   row_norm  float, ‖x‖ rounded to nearest
//   ids       int64 [n], or none: then the id of row i is first_id + i
//   live      16 bits a block of 16 rows, cleared when a row is removed; none while all live
//
// *Codes* cover the first n/16*16 rows (the whole blocks); the tail is scored canonically. With
// μ = mean (float), y = x - μ (cosine: y = x/‖x‖ - μ, a zero row counting as x/‖x‖ = 0), and R
// orthogonal, for rows that lie near a few directions (rotation.h), or 1:
//
//   codes     uint8, [block][group][16 rows][4 dims], c + 128 with c in [-127, 127]; the last group
//             is filled with 128. Blocks follow each other; 1 KiB may be read past the last.
//   scale     float a, so that Ry ≈ a·c
//   bounds    uint32: the upper half is ρ >= ‖Ry - a·c‖ + ‖RᵀR - 1‖·ν as bfloat16, rounded up;
//             bytes 1 and 0 are the shares of ν behind the first and the second stop, in 255ths,
//             rounded up, all of it at most
//   norm      float ν, ‖y‖ to 2^-20 relative (rounding of the float sum included), cosine: or 2^-21
//
// Bound. With a query q (scaled by a power of two; cosine: q/‖q‖; l2: q - μ) and its own int8 form
// Rq = b·p + w, δ = ‖w‖:   q·y = a·b·(c·p) + err,   |err| <= (‖q‖+δ)·ρ + δ·ν + arithmetic,
// and   ip, cosine: s = q·μ + q·y,    l2: -s/2 = q·y - ν²/2 - ‖q‖²/2.
// A row whose upper bound lies below a certified threshold is proved out; all others are rescored.
// At a stop (kernels.h) c·p runs over the groups so far: ‖q‖ and δ are those of the dimensions
// before it, and the rest is at most ‖Rq_rest‖·‖Ry_rest‖.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "isa/kernels.h"

namespace knnfast {

// A vector that begins at a cache line: a load that straddles two lines costs the double.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const CacheLineAllocator&) const { return true; }
  bool operator!=(const CacheLineAllocator&) const { return false; }
};
template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

// Bytes from the system: reserved address space that costs memory only where it was written, or a
// read-only file mapping.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(Buffer&& o) noexcept { swap(o); }
  Buffer& operator=(Buffer&& o) noexcept {
    swap(o);
    return *this;
  }
  static Buffer reserve(size_t bytes);
  static Buffer map_file(int fd, size_t bytes);  // throws std::system_error
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(Buffer& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

constexpr size_t kCodesSlack = 1024;  // readable bytes after the last block

struct Rotation;  // rotation.h

struct Codes {
  std::vector<float> mean;                   // [dim]
  double mean_norm = 0;                      // ‖μ‖
  int64_t mean_rows = 0;                     // rows in the segment when μ was taken
  Buffer codes;                              // uint8
  Buffer scale, norm;                        // float
  Buffer bounds;                             // uint32
  std::shared_ptr<const Rotation> rotation;  // or null
  std::vector<float> turned_mean;            // Rμ

  void rotate_mean();
};

struct Segment {
  int64_t capacity = 0;
  Buffer rows;      // uint16
  Buffer row_norm;  // float
};

using LiveMask = std::vector<uint16_t>;

struct SegmentView {
  std::shared_ptr<Segment> segment;
  std::shared_ptr<Codes> codes;  // null with scan="fp16"
  std::shared_ptr<Buffer> ids;   // null: first_id + row
  std::shared_ptr<const LiveMask> live;
  int64_t first_id = 0;
  uint32_t n = 0;       // rows
  bool sealed = false;  // nothing may be appended (a file's rows)

  uint32_t blocks() const { return n / kBlockRows; }
  int64_t id(uint32_t row) const {
    return ids ? ids->as<int64_t>()[row] : first_id + static_cast<int64_t>(row);
  }
  bool alive(uint32_t row) const {
    return !live || ((*live)[row / kBlockRows] >> (row % kBlockRows) & 1);
  }
};

using Snapshot = std::vector<SegmentView>;

inline int code_groups(int64_t dim) {
  return static_cast<int>((dim + kBlockDims - 1) / kBlockDims);
}
int64_t segment_capacity(int64_t dim);  // 2^14 to 2^20 rows: as many as 256 MiB of FP16 hold

std::shared_ptr<Segment> make_segment(int64_t dim, int64_t capacity);

// A new Codes object with the mean of the first n rows of `segment` (a sample of them), and
// `rotation`, or if that is null one of its own where they are enough and it pays.
std::shared_ptr<Codes> make_codes(const Segment& segment, int64_t dim, int64_t n, bool cosine,
                                  std::shared_ptr<const Rotation> rotation);

// Quantises whole blocks [begin, end) of a segment; on the pool.
void quantize_blocks(const Segment& segment, Codes& codes, int64_t dim, uint32_t begin,
                     uint32_t end, bool cosine);

}  // namespace knnfast
