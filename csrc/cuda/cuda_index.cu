// SPDX-License-Identifier: Apache-2.0
// Where rows live on the device, and who may see them; cuda_search.cu searches them.
// Never run on a GPU yet: tests run it on the emulator's runtime.
#include <numeric>

#include "cuda/cuda_index_impl.h"

namespace knnfast {
namespace cuda {

constexpr int64_t kMaxId = INT64_MAX - 1;

int device_count() {
  int count = 0;
  return succeeded(cudaGetDeviceCount(&count)) ? count : 0;
}

Memory::Memory(int device, size_t bytes) : bytes_(bytes), device_(device) {
  const Current current(device);
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)),
        ("cudaMalloc of " + std::to_string(bytes) + " bytes").c_str());
}

Memory::~Memory() {
  if (!data_) return;
  try {
    const Current current(device_);
    succeeded(cudaFree(data_));  // waits for kernels that still read it
  } catch (const CudaError&) {   // no device any more: the process ends
  }
}

// Memory of zeros: scans read whole tiles, the rows that are not there yet included, and leave them
// out afterwards.
static std::shared_ptr<Memory> zeros(int device, size_t bytes, void* stream) {
  auto memory = std::make_shared<Memory>(device, bytes);
  check(cudaMemsetAsync(memory->as<void>(), 0, bytes, as_stream(stream)), "cudaMemsetAsync");
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
  int pools = 0;
  check(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device),
        "cudaDeviceGetAttribute");
  if (!pools)
    throw CudaError("CUDA device " + std::to_string(device) +
                    " has no memory pools (cudaDevAttrMemoryPoolsSupported), which searches need");
  int64_t most = 4096;
  while (most * 2 * half_slices(dim) * kSlice <= int64_t{256} << 20) most *= 2;
  if (segment_rows < 1 || segment_rows > most) segment_rows_ = most;
  segment_rows_ = (segment_rows_ + kTileRows - 1) / kTileRows * kTileRows;
  pool_ = std::make_unique<Pool>(device);
  stream_ = std::make_unique<Stream>();
  snapshot_ = snapshot_of(segments_, mean_, 0, false);
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
    for (const auto& part : {s->half, s->half_terms, s->ids, s->codes, s->code_terms, s->alive})
      bytes += part ? part->bytes() : 0;
  return static_cast<int64_t>(bytes);
}

std::shared_ptr<const Snapshot> CudaIndex::snapshot() const {
  const std::shared_lock lock(mutex_);
  return snapshot_;
}

std::shared_ptr<const Snapshot> CudaIndex::snapshot_of(const Segments& segments,
                                                       const std::shared_ptr<Memory>& mean,
                                                       int64_t rows, bool listed) const {
  auto next = std::make_shared<Snapshot>();
  std::vector<SegmentView> views;
  for (size_t i = 0; i < segments.size(); ++i) {
    views.push_back(segments[i]->view(static_cast<int64_t>(i) * segment_rows_, listed));
    next->owners.push_back(segments[i]);
  }
  if (mean) next->owners.push_back(mean);
  next->table = Memory(device_, views.size() * sizeof(SegmentView));
  if (!views.empty())
    upload(next->table.as<void>(), views.data(), views.size() * sizeof(SegmentView),
           stream_->handle);
  wait(stream_->handle);
  next->view = {next->table.as<SegmentView>(),
                mean ? mean->as<float>() : nullptr,
                nullptr,
                rows,
                segment_rows_,
                dim_,
                metric_,
                mean ? scan_ : kFp16};  // no codes before the first rows
  return next;
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

// From "position = id" to a list of ids: the same rows and ids, also where the caller fails later.
void CudaIndex::own_ids() {
  if (listed_) return;
  std::vector<int64_t> all(static_cast<size_t>(rows_));
  std::iota(all.begin(), all.end(), 0);
  std::unordered_map<int64_t, int64_t> positions;
  for (int64_t p = 0; p < rows_; ++p)
    if (alive_at(p)) positions.emplace(p, p);
  const size_t bytes = static_cast<size_t>(segment_rows_) * sizeof(int64_t);
  for (size_t s = 0; s < segments_.size(); ++s) {
    auto ids = std::make_shared<Memory>(device_, bytes);
    const size_t begin = s * static_cast<size_t>(segment_rows_);
    const size_t n = std::min(all.size() - begin, static_cast<size_t>(segment_rows_));
    upload(ids->as<void>(), all.data() + begin, n * sizeof(int64_t), stream_->handle);
    const std::unique_lock lock(mutex_);
    segments_[s]->ids = std::move(ids);
  }
  wait(stream_->handle);
  const std::unique_lock lock(mutex_);
  id_of_ = std::move(all);
  position_ = std::move(positions);
  listed_ = true;
}

// Codes of rows [begin, end), which no snapshot shows, about a centre.
void CudaIndex::quantize(const Segments& segments, const Memory& mean, int64_t begin, int64_t end,
                         void* stream) const {
  const size_t cap = static_cast<size_t>(segment_rows_);
  for (int64_t at = begin; at < end;) {
    const int64_t row = at % segment_rows_, n = std::min(end - at, segment_rows_ - row);
    const auto& s = segments[static_cast<size_t>(at / segment_rows_)];
    if (!s->codes) {
      s->codes = zeros(device_, cap * code_slices(dim_) * kSlice, stream);
      s->code_terms = zeros(device_, cap * sizeof(CodeTerm), stream);
    }
    check(launch_quantize({s->view(0, false), mean.as<float>(), s->codes->as<unsigned char>(),
                           s->code_terms->as<CodeTerm>(), row, n, dim_, metric_},
                          stream),
          "topk_quantize_kernel");
    at += n;
  }
  wait(stream);
}

// A new centre, and all codes about it in copies of the segments: searches still read the others.
std::shared_ptr<Memory> CudaIndex::recentre(Segments& segments, int64_t rows, void* stream) const {
  auto mean = std::make_shared<Memory>(device_, sizeof(float) * 128 * code_slices(dim_));
  check(launch_mean(segments[0]->view(0, false), std::min(rows, segment_rows_), dim_, metric_,
                    mean->as<float>(), stream),
        "topk_mean_kernel");
  for (auto& s : segments) {
    s = std::make_shared<Segment>(*s);
    s->codes = s->code_terms = nullptr;
  }
  quantize(segments, *mean, 0, rows, stream);
  return mean;
}

std::vector<int64_t> CudaIndex::add(const void* rows, DType dtype, int64_t n, int64_t stride,
                                    const int64_t* own, bool on_device, void* stream) {
  const std::lock_guard<std::mutex> writer(writer_);
  const Current current(device_);
  if (!on_device) stream = stream_->handle;
  refuse_capture(stream, "add");
  const int64_t before = rows_, after = rows_ + n;
  std::vector<int64_t> used(static_cast<size_t>(n));
  std::unordered_map<int64_t, int64_t> positions;  // of the new ids, where ids are listed
  if (own) {
    for (int64_t i = 0; i < n; ++i) {
      if (own[i] < 0 || own[i] > kMaxId)
        throw std::invalid_argument("ids must be 0 to 2^63 - 2, got " + std::to_string(own[i]));
      if (find(own[i]) >= 0 || !positions.emplace(own[i], before + i).second)
        throw std::invalid_argument("id " + std::to_string(own[i]) + " is taken");
      used[static_cast<size_t>(i)] = own[i];
    }
  } else {
    if (next_id_ > kMaxId - n + 1) throw std::invalid_argument("automatic ids are used up");
    std::iota(used.begin(), used.end(), next_id_);
  }
  if (n == 0) return used;

  // Everything goes to rows that no snapshot shows; a refusal or a failure leaves only junk there.
  const size_t element = dtype == kF32 ? 4 : 2;
  Memory bad(device_, sizeof(int));
  check(cudaMemsetAsync(bad.as<void>(), 0, sizeof(int), as_stream(stream)), "cudaMemsetAsync");
  const size_t cap = static_cast<size_t>(segment_rows_);
  auto segments = segments_;
  Memory staged;
  const int64_t piece_rows = std::max<int64_t>(
      1, (int64_t{64} << 20) / static_cast<int64_t>(element * static_cast<size_t>(dim_)));
  for (int64_t at = 0; at < n;) {
    const int64_t position = before + at, row = position % segment_rows_;
    const size_t index = static_cast<size_t>(position / segment_rows_);
    if (index == segments.size()) {
      auto s = std::make_shared<Segment>();
      s->half = zeros(device_, cap * half_slices(dim_) * kSlice, stream);
      s->half_terms = zeros(device_, cap * sizeof(HalfTerm), stream);
      s->alive = zeros(device_, cap / 8, stream);
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
    check(launch_pack({from, dtype, from_stride, count, s->half->as<unsigned char>(),
                       s->half_terms->as<HalfTerm>(), s->alive->as<uint32_t>(), row, dim_, metric_,
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
    if (!own)
      for (int64_t i = 0; i < n; ++i) positions.emplace(used[static_cast<size_t>(i)], before + i);
    for (int64_t at = 0; at < n;) {
      const int64_t position = before + at, row = position % segment_rows_;
      const int64_t count = std::min(n - at, segment_rows_ - row);
      const auto& s = segments[static_cast<size_t>(position / segment_rows_)];
      if (!s->ids) s->ids = std::make_shared<Memory>(device_, cap * sizeof(int64_t));
      upload(s->ids->as<int64_t>() + row, used.data() + at,
             static_cast<size_t>(count) * sizeof(int64_t), stream);
      at += count;
    }
    wait(stream);
  }
  auto mean = mean_;
  int64_t mean_rows = mean_rows_;
  if (scan_ != kFp16) {
    // The first rows may be no fair sample: look again as the index grows, then leave it.
    if (!mean || (mean_rows < 65536 && after >= 4 * mean_rows)) {
      mean = recentre(segments, after, stream);
      mean_rows = after;
    } else {
      quantize(segments, *mean, before, after, stream);
    }
  }
  auto next = snapshot_of(segments, mean, after, listed_);
  // What these locals take over from the index dies after the lock.
  const std::unique_lock lock(mutex_);
  if (listed_) {  // the last that may fail, and nothing counts yet
    id_of_.resize(static_cast<size_t>(before));
    id_of_.insert(id_of_.end(), used.begin(), used.end());
    position_.merge(positions);
  }
  for (int64_t p = before; p < after; ++p) {
    const auto& s = segments[static_cast<size_t>(p / segment_rows_)];
    const int64_t row = p % segment_rows_;
    s->alive_bits[static_cast<size_t>(row / 32)] |= 1u << (row % 32);
  }
  segments_.swap(segments);
  mean_.swap(mean);
  snapshot_.swap(next);
  mean_rows_ = mean_rows;
  rows_ = after;
  live_ += n;
  for (const int64_t id : used) next_id_ = std::max(next_id_, id + 1);
  return used;
}

int64_t CudaIndex::remove(const int64_t* ids, int64_t n) {
  const std::lock_guard<std::mutex> writer(writer_);
  const Current current(device_);
  // Copies of the segments with new bits, on the device too; then they and the ids change together.
  auto segments = segments_;
  std::vector<int64_t> gone;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = find(ids[i]);
    if (p < 0) continue;
    const auto s = static_cast<size_t>(p / segment_rows_);
    const int64_t row = p % segment_rows_;
    if (segments[s] == segments_[s]) segments[s] = std::make_shared<Segment>(*segments_[s]);
    uint32_t& word = segments[s]->alive_bits[static_cast<size_t>(row / 32)];
    if (word >> (row % 32) & 1) gone.push_back(ids[i]);  // else: given twice
    word &= ~(1u << (row % 32));
  }
  if (gone.empty()) return 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto& s = segments[i];
    if (s == segments_[i]) continue;
    const size_t bytes = s->alive_bits.size() * sizeof(uint32_t);
    s->alive = std::make_shared<Memory>(device_, bytes);
    upload(s->alive->as<void>(), s->alive_bits.data(), bytes, stream_->handle);
  }
  wait(stream_->handle);
  auto next = snapshot_of(segments, mean_, rows_, listed_);
  const std::unique_lock lock(mutex_);
  segments_.swap(segments);
  snapshot_.swap(next);
  if (listed_)
    for (const int64_t id : gone) position_.erase(id);
  live_ -= static_cast<int64_t>(gone.size());
  return static_cast<int64_t>(gone.size());
}

bool CudaIndex::contains(int64_t id) const {
  const std::lock_guard<std::mutex> writer(writer_);
  return find(id) >= 0;
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
  // A second index beside this one, filled in pieces; then they change places, and it dies.
  CudaIndex other(dim_, metric_, scan_, device_, segment_rows_);
  const Current current(device_);
  const size_t piece = static_cast<size_t>(segment_rows_);
  for (size_t at = 0; at < keep.size(); at += piece) {
    const size_t n = std::min(piece, keep.size() - at);
    const Memory rows(device_, n * static_cast<size_t>(dim_) * sizeof(uint16_t));
    gather(keep.data() + at, static_cast<int64_t>(n), rows.as<uint16_t>(), true, stream_->handle);
    other.add(rows.as<void>(), kF16, static_cast<int64_t>(n), dim_, keep.data() + at, true,
              stream_->handle);
  }
  const std::unique_lock lock(mutex_);
  segments_.swap(other.segments_);
  mean_.swap(other.mean_);
  snapshot_.swap(other.snapshot_);
  mean_rows_ = other.mean_rows_;
  rows_ = other.rows_;
  live_ = other.live_;
  id_of_.swap(other.id_of_);
  position_.swap(other.position_);
  listed_ = true;
}

}  // namespace cuda
}  // namespace knnfast
