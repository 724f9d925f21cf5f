// SPDX-License-Identifier: Apache-2.0
// Where rows live on the device, and who may see them; cuda_search.cu searches them.
// Never run on a GPU yet: tests run it on the emulator's runtime.
#include <numeric>

#include "cuda_index_impl.h"

namespace knnfast {
namespace cuda {

constexpr int64_t kMaxId = INT64_MAX - 1;

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Memory::Memory(int device, size_t bytes) : bytes_(bytes), device_(device) {
  const Current current(device);
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)),
        ("cudaMalloc of " + std::to_string(bytes) + " bytes").c_str());
}

Memory::~Memory() {
  if (!data_) return;
  const AsideOfCaptures aside;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  // It waits for kernels that still read it. An error that stays would be the next launch's.
  if (cudaFree(data_) != cudaSuccess) cudaGetLastError();
  cudaSetDevice(before);
}

// Memory of zeros: scans read whole tiles, the rows that are not there yet included, and leave them
// out afterwards.
static Memory zeros(int device, size_t bytes, void* stream) {
  Memory memory(device, bytes);
  check(cudaMemsetAsync(memory.as<void>(), 0, bytes, as_stream(stream)), "cudaMemsetAsync");
  return memory;
}

CudaIndex::CudaIndex(int dim, Metric metric, Scan scan, int device, int64_t segment_rows)
    : dim_(dim), metric_(metric), scan_(scan), device_(device), segment_rows_(segment_rows) {
  if (dim < 1 || dim > kMaxDim)
    throw std::invalid_argument("dim must be 1 to " + std::to_string(kMaxDim) +
                                " on a CUDA device, got " + std::to_string(dim));
  const int devices = device_count();
  if (device < 0 || device >= devices)
    throw std::invalid_argument("there is no CUDA device " + std::to_string(device) + ": " +
                                std::to_string(devices) + " found");
  const Current current(device);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&limits_.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits_.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  limits_.capability = major * 10 + minor;
  if (limits_.capability < 80)
    throw std::invalid_argument("CUDA device " + std::to_string(device) +
                                " has compute capability " + std::to_string(major) + "." +
                                std::to_string(minor) + "; 8.0 is the least");
  if (segment_rows_ == 0) {
    segment_rows_ = 4096;
    while (segment_rows_ * 2 * half_slices(dim) * kSlice <= int64_t{256} << 20) segment_rows_ *= 2;
  }
  if (segment_rows_ % kTileRows)
    throw std::invalid_argument("segment_rows must be a multiple of " + std::to_string(kTileRows));
  pool_ = std::make_unique<Pool>(device);
  publish();
}

CudaIndex::~CudaIndex() = default;

int64_t CudaIndex::size() const {
  const std::shared_lock lock(mutex_);
  return live_;
}

int64_t CudaIndex::nbytes() const {
  const std::shared_lock lock(mutex_);
  size_t bytes = mean_ ? mean_->bytes() : 0;
  for (const auto& s : segments_)
    bytes += s->half.bytes() + s->half_terms.bytes() + s->ids.bytes() + s->alive->bytes() +
             (s->codes ? s->codes->bytes() + s->code_terms->bytes() : 0);
  return static_cast<int64_t>(bytes);
}

std::shared_ptr<const Snapshot> CudaIndex::snapshot() const {
  const std::shared_lock lock(mutex_);
  return snapshot_;
}

// Makes the present state what searches see. The caller holds `writer_`, not `mutex_`.
void CudaIndex::publish() {
  auto next = std::make_shared<Snapshot>();
  std::vector<SegmentView> views;
  for (size_t i = 0; i < segments_.size(); ++i) {
    const auto& s = segments_[i];
    views.push_back(s->view(static_cast<int64_t>(i) * segment_rows_, listed_));
    for (const std::shared_ptr<void>& owned :
         {std::shared_ptr<void>(s), std::shared_ptr<void>(s->codes),
          std::shared_ptr<void>(s->code_terms), std::shared_ptr<void>(s->alive)})
      next->owners.push_back(owned);
  }
  if (mean_) next->owners.push_back(mean_);
  next->table = Memory(device_, views.size() * sizeof(SegmentView));
  const Current current(device_);
  if (!views.empty())
    upload(next->table.as<void>(), views.data(), views.size() * sizeof(SegmentView), nullptr);
  wait(nullptr);
  next->view = {next->table.as<SegmentView>(),
                mean_ ? mean_->as<float>() : nullptr,
                nullptr,
                rows_,
                segment_rows_,
                dim_,
                metric_,
                mean_ ? scan_ : kFp16};  // no codes before the first rows
  const std::unique_lock lock(mutex_);
  next->version = ++version_;
  snapshot_ = std::move(next);
}

int64_t CudaIndex::id_at(int64_t position) const {
  return listed_ ? id_of_[static_cast<size_t>(position)] : position;
}

bool CudaIndex::alive_at(int64_t position) const {
  const auto& s = segments_[static_cast<size_t>(position / segment_rows_)];
  const int64_t row = position % segment_rows_;
  return s->alive_bits[static_cast<size_t>(row / 32)] >> (row % 32) & 1;
}

int64_t CudaIndex::find(int64_t id) const {
  if (listed_) {
    const auto it = position_.find(id);
    return it == position_.end() ? -1 : it->second;
  }
  return id >= 0 && id < rows_ && alive_at(id) ? id : -1;
}

// From "position = id" to a list of ids. The caller publishes.
void CudaIndex::own_ids() {
  if (listed_) return;
  std::vector<int64_t> all(static_cast<size_t>(rows_));
  std::iota(all.begin(), all.end(), 0);
  std::unordered_map<int64_t, int64_t> positions;
  for (int64_t p = 0; p < rows_; ++p)
    if (alive_at(p)) positions.emplace(p, p);
  const size_t bytes = static_cast<size_t>(segment_rows_) * sizeof(int64_t);
  for (size_t s = 0; s < segments_.size(); ++s) {
    Memory ids(device_, bytes);
    const size_t begin = s * static_cast<size_t>(segment_rows_);
    const size_t n = std::min(all.size() - begin, static_cast<size_t>(segment_rows_));
    upload(ids.as<void>(), all.data() + begin, n * sizeof(int64_t), nullptr);
    const std::unique_lock lock(mutex_);
    segments_[s]->ids = std::move(ids);
  }
  wait(nullptr);
  const std::unique_lock lock(mutex_);
  id_of_ = std::move(all);
  position_ = std::move(positions);
  listed_ = true;
}

// Codes of rows [begin, end), about the centre that is there.
void CudaIndex::quantize(int64_t begin, int64_t end, void* stream) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at % segment_rows_, n = std::min(end - at, segment_rows_ - row);
    const auto& s = segments_[static_cast<size_t>(at / segment_rows_)];
    check(launch_quantize({s->view(0, false), mean_->as<float>(), s->codes->as<unsigned char>(),
                           s->code_terms->as<CodeTerm>(), row, n, dim_, metric_},
                          stream),
          "topk_quantize_kernel");
    at += n;
  }
  wait(stream);
}

// A new centre, and all codes about it, beside the ones that searches still read.
void CudaIndex::recentre(void* stream) {
  auto mean = std::make_shared<Memory>(device_, sizeof(float) * 128 * code_slices(dim_));
  check(launch_mean(segments_[0]->view(0, false), std::min(rows_, segment_rows_), dim_, metric_,
                    mean->as<float>(), stream),
        "topk_mean_kernel");
  std::vector<std::shared_ptr<Memory>> codes, terms;
  const size_t cap = static_cast<size_t>(segment_rows_);
  for (size_t i = 0; i < segments_.size(); ++i) {
    codes.push_back(
        std::make_shared<Memory>(zeros(device_, cap * code_slices(dim_) * kSlice, stream)));
    terms.push_back(std::make_shared<Memory>(zeros(device_, cap * sizeof(CodeTerm), stream)));
  }
  {
    const std::unique_lock lock(mutex_);
    for (size_t i = 0; i < segments_.size(); ++i) {
      segments_[i]->codes = std::move(codes[i]);
      segments_[i]->code_terms = std::move(terms[i]);
    }
    mean_ = std::move(mean);
    mean_rows_ = rows_;
  }
  quantize(0, rows_, stream);
}

std::vector<int64_t> CudaIndex::add(const void* rows, DType dtype, int64_t n, int64_t stride,
                                    const int64_t* own, bool on_device, void* stream) {
  const std::lock_guard<std::mutex> writer(writer_);
  const Current current(device_);
  std::vector<int64_t> used(static_cast<size_t>(n));
  if (own) {
    std::unordered_map<int64_t, int64_t> seen;
    for (int64_t i = 0; i < n; ++i) {
      if (own[i] < 0 || own[i] > kMaxId)
        throw std::invalid_argument("ids must be 0 to 2^63 - 2, got " + std::to_string(own[i]));
      if (find(own[i]) >= 0 || !seen.emplace(own[i], i).second)
        throw std::invalid_argument("id " + std::to_string(own[i]) + " is taken");
      used[static_cast<size_t>(i)] = own[i];
    }
  } else {
    if (next_id_ > kMaxId - n) throw std::invalid_argument("automatic ids are used up");
    std::iota(used.begin(), used.end(), next_id_);
  }
  if (n == 0) return used;

  // Everything goes to rows that no snapshot shows; a refusal leaves only junk there.
  const size_t element = dtype == kF32 ? 4 : 2;
  Memory bad(device_, sizeof(int));
  check(cudaMemsetAsync(bad.as<void>(), 0, sizeof(int), as_stream(stream)), "cudaMemsetAsync");
  const size_t cap = static_cast<size_t>(segment_rows_);
  auto segments = segments_;
  Memory staged;
  const int64_t piece_rows = std::max<int64_t>(
      1, (int64_t{64} << 20) / static_cast<int64_t>(element * static_cast<size_t>(dim_)));
  for (int64_t at = 0; at < n;) {
    const int64_t position = rows_ + at, row = position % segment_rows_;
    const size_t index = static_cast<size_t>(position / segment_rows_);
    if (index == segments.size()) {
      auto s = std::make_shared<Segment>();
      s->half = zeros(device_, cap * half_slices(dim_) * kSlice, stream);
      s->half_terms = zeros(device_, cap * sizeof(HalfTerm), stream);
      if (mean_) {
        s->codes =
            std::make_shared<Memory>(zeros(device_, cap * code_slices(dim_) * kSlice, stream));
        s->code_terms = std::make_shared<Memory>(zeros(device_, cap * sizeof(CodeTerm), stream));
      }
      s->alive = std::make_shared<Memory>(zeros(device_, cap / 8, stream));
      s->alive_bits.assign(cap / 32, 0);
      segments.push_back(std::move(s));
    }
    const auto& s = segments[index];
    int64_t count = std::min(n - at, segment_rows_ - row);
    const unsigned char* from =
        static_cast<const unsigned char*>(rows) + at * stride * static_cast<int64_t>(element);
    int64_t from_stride = stride;
    if (!on_device) {
      count = std::min(count, piece_rows);
      const size_t width = element * static_cast<size_t>(dim_);
      if (!staged.bytes())
        staged = Memory(device_, static_cast<size_t>(std::min(n, piece_rows)) * width);
      wait(stream);  // the piece before has been read
      if (stride == dim_) {
        upload(staged.as<void>(), from, static_cast<size_t>(count) * width, stream);
      } else {
        for (int64_t i = 0; i < count; ++i)
          upload(staged.as<unsigned char>() + static_cast<size_t>(i) * width,
                 from + i * stride * static_cast<int64_t>(element), width, stream);
      }
      from = staged.as<unsigned char>();
      from_stride = dim_;
    }
    check(launch_pack({from, dtype, from_stride, count, s->half.as<unsigned char>(),
                       s->half_terms.as<HalfTerm>(), s->alive->as<uint32_t>(), row, dim_, metric_,
                       bad.as<int>()},
                      stream),
          "topk_pack_kernel");
    at += count;
  }
  int refused = 0;
  download(&refused, bad.as<void>(), sizeof refused, stream);
  wait(stream);
  if (refused) throw std::invalid_argument("vectors must be finite and within ±65504 (FP16)");
  if (own || listed_ || next_id_ != rows_) {
    own_ids();
    for (const auto& segment : segments) {
      if (segment->ids.bytes()) continue;
      Memory ids(device_, cap * sizeof(int64_t));
      const std::unique_lock lock(mutex_);
      segment->ids = std::move(ids);
    }
    for (int64_t at = 0; at < n;) {
      const int64_t position = rows_ + at, row = position % segment_rows_;
      const int64_t count = std::min(n - at, segment_rows_ - row);
      upload(segments[static_cast<size_t>(position / segment_rows_)]->ids.as<int64_t>() + row,
             used.data() + at, static_cast<size_t>(count) * sizeof(int64_t), stream);
      at += count;
    }
    wait(stream);
  }
  const int64_t before = rows_;
  {
    const std::unique_lock lock(mutex_);
    segments_ = std::move(segments);
    for (int64_t p = before; p < before + n; ++p) {
      const auto& s = segments_[static_cast<size_t>(p / segment_rows_)];
      const int64_t row = p % segment_rows_;
      s->alive_bits[static_cast<size_t>(row / 32)] |= 1u << (row % 32);
    }
    if (listed_) {
      id_of_.insert(id_of_.end(), used.begin(), used.end());
      for (int64_t i = 0; i < n; ++i) position_.emplace(used[static_cast<size_t>(i)], before + i);
    }
    rows_ += n;
    live_ += n;
    for (const int64_t id : used) next_id_ = std::max(next_id_, id + 1);
  }
  if (scan_ == kInt8) {
    // The first rows may be no fair sample: look again as the index grows, then leave it.
    if (!mean_ || (mean_rows_ < 65536 && rows_ >= 4 * mean_rows_)) {
      recentre(stream);
    } else {
      quantize(before, rows_, stream);
    }
  }
  publish();
  return used;
}

int64_t CudaIndex::remove(const int64_t* ids, int64_t n) {
  const std::lock_guard<std::mutex> writer(writer_);
  const Current current(device_);
  // New bits on the device first; then they, the host's and the ids change together.
  std::unordered_map<size_t, std::vector<uint32_t>> bits;
  std::vector<int64_t> gone;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = find(ids[i]);
    if (p < 0) continue;
    const auto s = static_cast<size_t>(p / segment_rows_);
    const int64_t row = p % segment_rows_;
    auto& words = bits.emplace(s, segments_[s]->alive_bits).first->second;
    uint32_t& word = words[static_cast<size_t>(row / 32)];
    if (word >> (row % 32) & 1) gone.push_back(ids[i]);  // else: given twice
    word &= ~(1u << (row % 32));
  }
  if (gone.empty()) return 0;
  std::unordered_map<size_t, std::shared_ptr<Memory>> fresh;
  for (const auto& [s, words] : bits) {
    fresh[s] = std::make_shared<Memory>(device_, words.size() * sizeof(uint32_t));
    upload(fresh[s]->as<void>(), words.data(), words.size() * sizeof(uint32_t), nullptr);
  }
  wait(nullptr);
  {
    const std::unique_lock lock(mutex_);
    for (auto& [s, words] : bits) {
      segments_[s]->alive_bits = std::move(words);
      segments_[s]->alive = std::move(fresh[s]);
    }
    if (listed_)
      for (const int64_t id : gone) position_.erase(id);
    live_ -= static_cast<int64_t>(gone.size());
  }
  publish();
  return static_cast<int64_t>(gone.size());
}

std::vector<int64_t> CudaIndex::ids() const {
  const std::lock_guard<std::mutex> writer(writer_);
  return live_ids();
}

std::vector<int64_t> CudaIndex::live_ids() const {
  std::vector<int64_t> out;
  out.reserve(static_cast<size_t>(live_));
  for (int64_t p = 0; p < rows_; ++p)
    if (alive_at(p)) out.push_back(id_at(p));
  return out;
}

int64_t CudaIndex::each_piece(const Piece& take) const {
  const std::lock_guard<std::mutex> writer(writer_);
  const std::vector<int64_t> all = live_ids();
  const size_t piece = std::max<size_t>(1, (size_t{128} << 20) / static_cast<size_t>(dim_));
  std::vector<uint16_t> rows(std::min(piece, all.size()) * static_cast<size_t>(dim_));
  for (size_t at = 0; at < all.size(); at += piece) {
    const auto n = static_cast<int64_t>(std::min(piece, all.size() - at));
    gather(all.data() + at, n, rows.data(), false, nullptr);
    take(all.data() + at, rows.data(), n);
  }
  return next_id_;
}

void CudaIndex::skip_ids(int64_t next) {
  const std::lock_guard<std::mutex> writer(writer_);
  next_id_ = std::max(next_id_, next);
}

void CudaIndex::compact() {
  const std::lock_guard<std::mutex> writer(writer_);
  if (live_ == rows_) return;
  const std::vector<int64_t> keep = live_ids();
  // A second index beside this one, filled in pieces, then moved in.
  CudaIndex other(dim_, metric_, scan_, device_, segment_rows_);
  const Current current(device_);
  const size_t piece = static_cast<size_t>(segment_rows_);
  for (size_t at = 0; at < keep.size(); at += piece) {
    const size_t n = std::min(piece, keep.size() - at);
    const Memory rows(device_, n * static_cast<size_t>(dim_) * sizeof(uint16_t));
    gather(keep.data() + at, static_cast<int64_t>(n), rows.as<uint16_t>(), true, nullptr);
    other.add(rows.as<void>(), kF16, static_cast<int64_t>(n), dim_, keep.data() + at, true,
              nullptr);
  }
  {
    const std::unique_lock lock(mutex_);
    segments_ = std::move(other.segments_);
    mean_ = std::move(other.mean_);
    mean_rows_ = other.mean_rows_;
    rows_ = other.rows_;
    live_ = other.live_;
    id_of_ = std::move(other.id_of_);
    position_ = std::move(other.position_);
    listed_ = true;
  }
  publish();
}

}  // namespace cuda
}  // namespace knnfast
