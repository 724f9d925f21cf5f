// SPDX-License-Identifier: Apache-2.0
// Searches of a CudaIndex: top-k at once or by a plan, range search, and rows by id.
// Never run on a GPU yet: tests run it on the emulator's runtime.
#include <numeric>

#include "cuda/cuda_index_impl.h"
#include "cuda/topk_launch.h"

namespace knnfast {
namespace cuda {
namespace {

// A restriction on the device; `ids` are sorted on the way.
IdSet upload_set(cudaMemPool_t pool, const HostIds& set, std::unique_ptr<StreamMemory>& memory,
                 void* stream) {
  IdSet out{};
  if (!set.set()) return out;
  out.count = set.count;
  const size_t bytes = static_cast<size_t>(set.count) * (set.ids ? sizeof(int64_t) : 1);
  memory = std::make_unique<StreamMemory>(pool, bytes, stream);
  if (set.ids) {
    std::vector<int64_t> sorted(set.ids, set.ids + set.count);
    std::sort(sorted.begin(), sorted.end());
    upload(memory->as<void>(), sorted.data(), bytes, stream);
    wait(stream);  // `sorted` ends here
    out.ids = memory->as<int64_t>();
  } else {
    upload(memory->as<void>(), set.bits, bytes, stream);
    wait(stream);
    out.bits = memory->as<uint8_t>();
  }
  return out;
}

// A view of the rows that a search may return, with the memory of its filter.
class Restricted {
 public:
  Restricted(const IndexView& all, cudaMemPool_t pool, const HostIds& allow, const HostIds& deny,
             void* stream)
      : view(all) {
    if (!allow.set() && !deny.set()) return;
    const IdSet a = upload_set(pool, allow, allowed_, stream),
                d = upload_set(pool, deny, denied_, stream);
    const size_t words =
        static_cast<size_t>((all.rows + kTileRows - 1) / kTileRows) * (kTileRows / 32);
    filter_ = std::make_unique<StreamMemory>(pool, words * sizeof(uint32_t), stream);
    check(launch_filter(all, a, d, filter_->as<uint32_t>(), stream), "topk_filter_kernel");
    view.filter = filter_->as<uint32_t>();
  }

  IndexView view;

 private:
  std::unique_ptr<StreamMemory> allowed_, denied_, filter_;
};

// Queries of host memory on the device, without the gaps between them.
StreamMemory upload_queries(cudaMemPool_t pool, const Queries& host, int batch, int dim,
                            void* stream) {
  const size_t element = host.dtype == kF32 ? 4 : 2, width = static_cast<size_t>(dim) * element;
  const size_t pitch = batch > 1 ? static_cast<size_t>(host.stride) * element : width;
  StreamMemory rows(pool, static_cast<size_t>(batch) * width, stream);
  check(cudaMemcpy2DAsync(rows.as<void>(), width, host.data, pitch, width,
                          static_cast<size_t>(batch), cudaMemcpyHostToDevice, as_stream(stream)),
        "upload");
  return rows;
}

// Settles what `view` scans.
TopkPlan checked_plan(IndexView& view, int batch, int k, const Device& device) {
  if (view.scan == kAuto) view.scan = choose_scan(view.rows, batch, k);
  const TopkPlan plan = plan_topk(view, batch, k, device, kWorkspace);
  if (plan.workspace_bytes) return plan;
  if (k < 1 || k > kMaxK)
    throw std::invalid_argument("k must be 1 to " + std::to_string(kMaxK) +
                                " on a CUDA device, got " + std::to_string(k));
  throw std::invalid_argument("dim: rows of " + std::to_string(view.dim) +
                              " do not fit the shared memory of this CUDA device");
}

}  // namespace

void CudaIndex::search(const Queries& queries, int batch, int k, const HostIds& allow,
                       const HostIds& deny, const Results& results, void* stream) const {
  if (batch == 0) return;
  const Current current(device_);
  refuse_capture(stream, "search");
  const auto seen = snapshot();
  Restricted rows(seen->view, pool_->handle, allow, deny, stream);
  const TopkPlan plan = checked_plan(rows.view, batch, k, limits_);
  const StreamMemory workspace(pool_->handle, plan.workspace_bytes, stream);
  check(launch_topk(plan,
                    {rows.view, queries.data, queries.dtype, queries.stride, results.scores,
                     results.ids, results.exact, workspace.as<void>()},
                    stream),
        "search");
}

void CudaIndex::search_host(const Queries& queries, int batch, int k, const HostIds& allow,
                            const HostIds& deny, float* scores, int64_t* ids) const {
  if (batch == 0) return;
  const Current current(device_);
  const size_t n = static_cast<size_t>(batch) * static_cast<size_t>(k);
  void* const stream = stream_->handle;
  const StreamMemory q = upload_queries(pool_->handle, queries, batch, dim_, stream);
  const StreamMemory out_scores(pool_->handle, n * sizeof(float), stream);
  const StreamMemory out_ids(pool_->handle, n * sizeof(int64_t), stream);
  search({q.as<void>(), queries.dtype, dim_}, batch, k, allow, deny,
         {out_scores.as<float>(), out_ids.as<int64_t>(), nullptr}, stream);
  download(scores, out_scores.as<void>(), n * sizeof(float), stream);
  download(ids, out_ids.as<void>(), n * sizeof(int64_t), stream);
  wait(stream);
}

Ranges CudaIndex::range_search(const Queries& queries, bool on_device, int batch, double radius,
                               const HostIds& allow, const HostIds& deny, void* stream) const {
  Ranges out;
  out.lims.assign(static_cast<size_t>(batch) + 1, 0);
  if (batch == 0) return out;
  const Current current(device_);
  if (!on_device) stream = stream_->handle;
  refuse_capture(stream, "range_search");
  const auto seen = snapshot();
  Restricted rows(seen->view, pool_->handle, allow, deny, stream);
  const TopkPlan plan = checked_plan(rows.view, batch, 1, limits_);
  const StreamMemory workspace(pool_->handle, plan.workspace_bytes, stream);
  std::unique_ptr<StreamMemory> uploaded;
  if (!on_device)
    uploaded =
        std::make_unique<StreamMemory>(upload_queries(pool_->handle, queries, batch, dim_, stream));
  const TopkParams params{rows.view,     uploaded ? uploaded->as<void>() : queries.data,
                          queries.dtype, uploaded ? dim_ : queries.stride,
                          nullptr,       nullptr,
                          nullptr,       workspace.as<void>()};
  struct Counters {
    unsigned long long count;
    int bad;
  };
  const StreamMemory counters(pool_->handle, sizeof(Counters), stream);
  std::vector<RangeHit> hits(1 << 16);
  for (int first = 0; first < batch; first += plan.chunk) {
    const int count = std::min(plan.chunk, batch - first);
    Counters found{};
    do {  // once more, with room for all, where there was too little
      hits.resize(std::max<size_t>(hits.size(), found.count));
      const StreamMemory room(pool_->handle, hits.size() * sizeof(RangeHit), stream);
      Counters* c = counters.as<Counters>();
      check(cudaMemsetAsync(c, 0, sizeof(Counters), as_stream(stream)), "cudaMemsetAsync");
      check(launch_range(plan, params, radius, first, count,
                         {room.as<RangeHit>(), hits.size(), &c->count, &c->bad}, stream),
            "topk_range_kernel");
      download(&found, c, sizeof(Counters), stream);
      wait(stream);
      if (found.bad) throw std::invalid_argument("queries hold NaN or infinity");
      download(hits.data(), room.as<void>(),
               std::min<size_t>(hits.size(), found.count) * sizeof(RangeHit), stream);
      wait(stream);
    } while (found.count > hits.size());
    const auto end = hits.begin() + static_cast<std::ptrdiff_t>(found.count);
    std::sort(hits.begin(), end, [&](const RangeHit& a, const RangeHit& b) {
      if (a.query != b.query) return a.query < b.query;
      if (a.score != b.score) return metric_ == kL2 ? a.score < b.score : a.score > b.score;
      return a.id < b.id;
    });
    for (auto hit = hits.begin(); hit != end; ++hit) {
      ++out.lims[static_cast<size_t>(first + hit->query) + 1];
      out.scores.push_back(static_cast<float>(hit->score));
      out.ids.push_back(hit->id);
    }
  }
  std::partial_sum(out.lims.begin(), out.lims.end(), out.lims.begin());
  return out;
}

void CudaIndex::vectors(const int64_t* ids, int64_t n, uint16_t* out, bool to_device,
                        void* stream) const {
  const std::lock_guard<std::mutex> writer(writer_);
  gather(ids, n, out, to_device, stream);
}

void CudaIndex::gather(const int64_t* ids, int64_t n, uint16_t* out, bool to_device,
                       void* stream) const {
  const Current current(device_);
  if (!to_device) stream = stream_->handle;
  refuse_capture(stream, "vectors");
  std::vector<int64_t> positions(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = find(ids[i]);
    if (p < 0) throw std::invalid_argument("id " + std::to_string(ids[i]) + " is not in the index");
    positions[static_cast<size_t>(i)] = p;
  }
  const StreamMemory device_positions(pool_->handle, positions.size() * sizeof(int64_t), stream);
  upload(device_positions.as<void>(), positions.data(), positions.size() * sizeof(int64_t), stream);
  const size_t bytes = static_cast<size_t>(n) * static_cast<size_t>(dim_) * sizeof(uint16_t);
  std::unique_ptr<StreamMemory> rows;
  if (!to_device) rows = std::make_unique<StreamMemory>(pool_->handle, bytes, stream);
  check(launch_gather(snapshot_->view, device_positions.as<int64_t>(), n,
                      to_device ? out : rows->as<uint16_t>(), stream),
        "topk_gather_kernel");
  if (!to_device) download(out, rows->as<void>(), bytes, stream);
  wait(stream);
}

CudaIndex::Plan::Plan(std::shared_ptr<const CudaIndex> index, int batch, int k)
    : index_(std::move(index)), batch_(batch), k_(k) {
  if (batch < 1 || k < 1)
    throw std::invalid_argument("batch and k must be at least 1, got " + std::to_string(batch) +
                                " and " + std::to_string(k));
  const size_t n = static_cast<size_t>(batch) * static_cast<size_t>(k);
  scores_ = Memory(index_->device_, n * sizeof(float));
  ids_ = Memory(index_->device_, n * sizeof(int64_t));
  results_ = {scores_.as<float>(), ids_.as<int64_t>(), nullptr};
  prepare();
}

void CudaIndex::Plan::prepare() {
  auto seen = index_->snapshot();
  if (seen == snapshot_) return;
  IndexView view = seen->view;
  const TopkPlan plan = checked_plan(view, batch_, k_, index_->limits_);
  if (workspace_.bytes() < plan.workspace_bytes)
    workspace_ = Memory(index_->device_, plan.workspace_bytes);
  view_ = view;
  plan_ = plan;
  snapshot_ = std::move(seen);
}

void CudaIndex::Plan::run(const Queries& queries, void* stream) {
  const Current current(index_->device_);
  prepare();
  check(launch_topk(plan_,
                    {view_, queries.data, queries.dtype, queries.stride, results_.scores,
                     results_.ids, nullptr, workspace_.as<void>()},
                    stream),
        "search");
}

}  // namespace cuda
}  // namespace knnfast
