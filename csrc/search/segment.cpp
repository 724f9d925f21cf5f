// SPDX-License-Identifier: Apache-2.0
#include "search/segment.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <system_error>

#include "common/thread_pool.h"
#include "search/query_codes.h"
#include "search/rotation.h"

namespace knnfast {

Buffer::~Buffer() {
  if (data_) munmap(data_, size_);
}

Buffer Buffer::reserve(size_t bytes) {
  Buffer b;
  bytes = std::max<size_t>(bytes, 1);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  b.data_ = p;
  b.size_ = bytes;
#ifdef MADV_HUGEPAGE
  // Large pages past the first 2 MiB: a small index stays small.
  constexpr size_t kHuge = size_t{2} << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + 2 * kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = reinterpret_cast<uintptr_t>(p) + bytes;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  return b;
}

Buffer Buffer::map_file(int fd, size_t bytes) {
  Buffer b;
  if (bytes == 0) return reserve(1);
  void* p = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  b.data_ = p;
  b.size_ = bytes;
  return b;
}

int64_t segment_capacity(int64_t dim) {
  int64_t rows = 1 << 20;
  while (rows > 16384 && rows * dim * 2 > (int64_t{256} << 20)) rows /= 2;
  return rows;
}

std::shared_ptr<Segment> make_segment(int64_t dim, int64_t capacity) {
  auto s = std::make_shared<Segment>();
  s->capacity = capacity;
  s->rows = Buffer::reserve(static_cast<size_t>(capacity * dim) * 2 + 64);
  s->row_norm = Buffer::reserve(static_cast<size_t>(capacity) * 4);
  return s;
}

// What a row is multiplied by before the mean is taken off: 1 (cosine: 1/‖x‖).
static float row_factor(const Segment& segment, int64_t row, bool cosine) {
  if (!cosine) return 1;
  const float norm = segment.row_norm.as<float>()[row];
  return norm > 0 ? 1 / norm : 0;
}

void Codes::rotate_mean() {
  if (!rotation) return;
  AlignedVector<float> straight(padded(rotation->dim));
  std::copy(mean.begin(), mean.end(), straight.begin());
  turned_mean.resize(straight.size());
  rotate(*rotation, straight.data(), 1, turned_mean.data());
}

std::shared_ptr<Codes> make_codes(const Segment& segment, int64_t dim, int64_t n, bool cosine,
                                  std::shared_ptr<const Rotation> rotation) {
  auto c = std::make_shared<Codes>();
  const size_t rows = static_cast<size_t>(segment.capacity), pad = padded(dim);
  c->codes =
      Buffer::reserve(rows * static_cast<size_t>(code_groups(dim)) * kBlockDims + kCodesSlack);
  c->scale = Buffer::reserve(rows * 4);
  c->bounds = Buffer::reserve(rows * 4);
  c->norm = Buffer::reserve(rows * 4);
  c->mean_rows = n;
  c->mean.resize(static_cast<size_t>(dim));
  constexpr int64_t kSample = 4096;
  const int64_t step = std::max<int64_t>(1, n / kSample), count = (n + step - 1) / step;
  std::vector<double> sum(static_cast<size_t>(dim));
  AlignedVector<float> y(pad);
  // One of each `step` rows, not always the first: rows may come in turns. The mean is 0 at first.
  const auto centre = [&](int64_t i, float* out) {
    const int64_t row = std::min(n - 1, i * step + (i * 40503 >> 4) % step);
    kernels().centre_row(segment.rows.as<uint16_t>() + row * dim, row_factor(segment, row, cosine),
                         c->mean.data(), static_cast<int>(dim), out);
  };
  for (int64_t i = 0; i < count; ++i) {
    centre(i, y.data());
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += static_cast<double>(y[j]);
  }
  double square = 0;
  for (size_t j = 0; j < sum.size(); ++j) {
    c->mean[j] = count ? static_cast<float>(sum[j] / static_cast<double>(count)) : 0;
    square += static_cast<double>(c->mean[j]) * c->mean[j];
  }
  c->mean_norm = std::sqrt(square);
  if (!rotation && n >= settled_rows(dim)) {
    AlignedVector<float> sample(static_cast<size_t>(count) * pad);
    for (int64_t i = 0; i < count; ++i) centre(i, sample.data() + static_cast<size_t>(i) * pad);
    rotation = find_rotation(sample.data(), count, dim);
  }
  c->rotation = std::move(rotation);
  c->rotate_mean();
  return c;
}

// A row's word of bounds. y itself is off by up to `error`, and by the 2^-23 of it that floats
// lose, which rounding up covers here (with a rotation, RotatedRows does).
static uint32_t bounds_of(double residual, double error, float norm, const float* y, int64_t dim) {
  const float above = round_up(residual);
  uint32_t word;
  std::memcpy(&word, &above, 4);
  word = residual_up(word);
  double square = 0;
  int64_t end = dim;
  for (int stop = kStops - 1; stop >= 0; --stop) {
    const int64_t begin = stop_group(code_groups(dim), stop) * kBlockDims;
    square += kernels().squares(y + begin, static_cast<int>(end - begin));
    end = begin;
    const double rest = (std::sqrt(square) + error) * (1 + 1e-6);
    const double share = norm > 0 ? std::ceil(255 * rest / static_cast<double>(norm)) : 255;
    word |= static_cast<uint32_t>(std::min(share, 255.0)) << (8 * (kStops - 1 - stop));
  }
  return word;
}

void quantize_blocks(const Segment& segment, Codes& codes, int64_t dim, uint32_t begin,
                     uint32_t end, bool cosine) {
  constexpr uint32_t kTask = 8;
  const Kernels& k = kernels();
  const size_t block_bytes = static_cast<size_t>(code_groups(dim)) * 64, pad = padded(dim);
  const Rotation* rotation = codes.rotation.get();
  if (rotation) rotation->whole();  // made by all threads, before each of them needs it
  // A cosine row's own normalisation in float is within 2^-21 of x/‖x‖.
  const double slack = cosine ? 1e-6 : 0;
  parallel_for((end - begin + kTask - 1) / kTask, [&](int, int64_t task) {
    const uint32_t first = begin + static_cast<uint32_t>(task) * kTask;
    const uint32_t rows = (std::min(end, first + kTask) - first) * kBlockRows;
    const int64_t first_row = static_cast<int64_t>(first) * kBlockRows;
    AlignedVector<float> y(pad);
    double norms[kTask * kBlockRows];
    const auto centre = [&](uint32_t r) {
      k.centre_row(segment.rows.as<uint16_t>() + (first_row + r) * dim,
                   row_factor(segment, first_row + r, cosine), codes.mean.data(),
                   static_cast<int>(dim), y.data());
      return y.data();
    };
    std::optional<RotatedRows> rotated;
    if (rotation) {
      rotated.emplace(*rotation, rows);
      for (uint32_t r = 0; r < rows; ++r) {
        norms[r] = std::sqrt(k.squares(centre(r), static_cast<int>(dim)));
        rotated->put(r, y.data(), norms[r]);
      }
      rotated->rotate();
    }
    for (uint32_t r = 0; r < rows; ++r) {
      const float* from = rotation ? rotated->take(r) : centre(r);
      const size_t row = static_cast<size_t>(first_row + r);
      float* norm = codes.norm.as<float>() + row;
      float residual = 0;
      k.quantize_row(from, static_cast<int>(dim),
                     codes.codes.as<uint8_t>() + row / kBlockRows * block_bytes +
                         row % kBlockRows * kBlockDims,
                     codes.scale.as<float>() + row, &residual, norm);
      double error = slack;
      if (rotation) {
        *norm = static_cast<float>(norms[r]);
        error += rotated->off(r);
      }
      codes.bounds.as<uint32_t>()[row] =
          bounds_of((static_cast<double>(residual) + error) * (1 + 1e-9), error, *norm, from, dim);
    }
  });
}

}  // namespace knnfast
