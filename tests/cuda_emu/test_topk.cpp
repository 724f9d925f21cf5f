// SPDX-License-Identifier: Apache-2.0
// The top-k kernels on the emulator against a plain reference: the same ids and the same bits.
//
//   test_topk                        all cases, one seed
//   test_topk SEED [NAME]            another order of threads; only cases whose name holds NAME
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cuda/topk_canonical.cuh"
#include "cuda/topk_cuda.h"
#include "cuda/topk_launch.h"
#include "cuda_emu.h"

using namespace knnfast::cuda;

namespace {

// --- data

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  double normal() { return std::normal_distribution<double>()(engine); }
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
};

struct Case {
  std::string name;
  int n, dim, batch, k;
  Metric metric = kIp;
  Scan scan = kFp16;
  int kernel = -1;              // -1: the plan's choice
  std::string data = "normal";  // what `value` knows
  bool own_ids = false;
  std::string filter = "none";  // none | remove | allow | deny_bits | nothing
  DType dtype = kF32;
  int64_t segment = 512;
  size_t memory = size_t{1} << 30;
  int shared = 227 * 1024;
  int multiprocessors = 5;
};

// Row 0 is the best by its many small addends, each of which a tensor core cuts off where it takes
// 2^-24 for 2^-14; row 32, in the next bin, keeps its one. The subnormals are the rows' or, once
// the query has its unit, the query's.
float subnormals(bool in_rows, int row, int j, bool query) {
  const float large = j == 0 ? 127.0f : j < 15 ? 63 * 0x1p-15f : j == 15 ? 0x1p-6f : 0.0f;
  const bool there = row == 0 ? j < 15 : row == 32 && (j == 0 || j >= 15);
  if (in_rows) return query ? large : there ? 0x1p-24f : 0.0f;
  return query ? 0x1p-88f : there ? large : 0.0f;
}

float value(const Case& c, Random& r, int row, int j, bool query) {
  if (c.data == "ties") return static_cast<float>(r.below(3) - 1);
  if (c.data == "equal")
    return query ? static_cast<float>(r.normal()) : static_cast<float>(j % 5) - 2;
  if (c.data == "mean") return static_cast<float>(40.0 + (j % 7) + 0.5 * r.normal());
  if (c.data == "scales")
    return static_cast<float>(r.normal() * std::ldexp(1.0, query ? row % 60 - 30 : row % 27 - 16));
  if (c.data == "spike") return static_cast<float>(j == 0 ? 5e4 : r.normal());
  if (c.data == "zero") return row % 3 == 0 ? 0.0f : static_cast<float>(r.normal());
  if (c.data == "near") return static_cast<float>((j % 3) + (r.below(64) == 0 ? 0x1p-9 : 0.0));
  if (c.data == "subnormal" || c.data == "faint")
    return subnormals(c.data == "subnormal", row, j, query);
  if (c.data == "huge")
    return query ? static_cast<float>(r.normal() * 1e36) : static_cast<float>(r.normal());
  return static_cast<float>(r.normal());
}

template <class T>
struct DeviceArray {
  emu::Guarded memory;
  explicit DeviceArray(size_t n = 0, size_t align = 16)
      : memory(std::max<size_t>(n * sizeof(T), 1), align) {
    std::memset(memory.begin, 0xCD, memory.bytes);  // uninitialised memory is never zero
  }
  explicit DeviceArray(const std::vector<T>& v) : DeviceArray(v.size()) {
    std::copy(v.begin(), v.end(), get());
  }
  T* get() const { return reinterpret_cast<T*>(memory.begin); }
};

// --- the definition

double canonical(const uint16_t* x, const float* q, int dim, Metric metric) {
  double sum[32] = {}, xx[32] = {}, qq[32] = {};
  for (int j = 0; j < dim; ++j) {
    const double a = half_bits_to_float(x[j]), b = q[j];
    const double t = b - a;
    sum[j % 32] += metric == kL2 ? t * t : a * b;
    xx[j % 32] += a * a;
    qq[j % 32] += b * b;
  }
  auto tree = [](double* v) {
    for (int w = 16; w; w /= 2)
      for (int i = 0; i < w; ++i) v[i] += v[i + w];
    return v[0];
  };
  const double s = tree(sum);
  if (metric != kCosine) return s;
  const double nx = std::sqrt(tree(xx)), nq = std::sqrt(tree(qq));
  return nx == 0 || nq == 0 ? 0.0 : s / (nx * nq);
}

struct Answer {
  double score;
  int64_t id;
};

std::vector<Answer> reference(const std::vector<uint16_t>& rows, const std::vector<int64_t>& ids,
                              const std::vector<bool>& found, const float* q, int dim,
                              Metric metric) {
  std::vector<Answer> all;
  for (size_t i = 0; i < ids.size(); ++i)
    if (found[i])
      all.push_back({canonical(&rows[i * static_cast<size_t>(dim)], q, dim, metric), ids[i]});
  std::sort(all.begin(), all.end(), [&](const Answer& a, const Answer& b) {
    if (a.score != b.score) return metric == kL2 ? a.score < b.score : a.score > b.score;
    return a.id < b.id;
  });
  return all;
}

// --- one case: build an index on the "device", search, compare

int check(int error) {
  if (error) emu::fault("a launch returned error " + std::to_string(error));
  return error;
}

uint16_t to_bf16(float f) { return static_cast<uint16_t>(emu::bits<uint32_t>(f) >> 16); }

bool run(const Case& c, std::string& why) {
  Random random(emu::rng()());
  const auto n = static_cast<size_t>(c.n), d = static_cast<size_t>(c.dim);
  std::vector<float> values(n * d), queries(static_cast<size_t>(c.batch) * d);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = value(c, random, static_cast<int>(i / d), static_cast<int>(i % d), false);
  for (size_t i = 0; i < queries.size(); ++i)
    queries[i] = value(c, random, static_cast<int>(i / d), static_cast<int>(i % d), true);
  if (c.data == "zero") std::fill(queries.begin(), queries.begin() + c.dim, 0.0f);
  std::vector<uint16_t> rows(n * d);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = float_to_half_bits(values[i]);
  std::vector<int64_t> ids(n);
  for (size_t i = 0; i < n; ++i)
    ids[i] = c.own_ids ? static_cast<int64_t>((i * 7919) % 100003) : static_cast<int64_t>(i);

  // Rows in, in two uneven pieces per segment.
  const int64_t capacity = c.segment;
  const size_t segments = n / static_cast<size_t>(capacity) + 1;
  std::vector<DeviceArray<unsigned char>> half, codes;
  std::vector<DeviceArray<HalfTerm>> half_terms;
  std::vector<DeviceArray<CodeTerm>> code_terms;
  std::vector<DeviceArray<uint32_t>> alive;
  std::vector<DeviceArray<int64_t>> own;
  std::vector<SegmentView> views;
  DeviceArray<float> device_rows(values), mean(static_cast<size_t>(code_slices(c.dim)) * 128);
  DeviceArray<int> bad(std::vector<int>{0});
  for (size_t s = 0; s < segments; ++s) {
    const int64_t begin = static_cast<int64_t>(s) * capacity;
    const int64_t count = std::max<int64_t>(0, std::min<int64_t>(capacity, c.n - begin));
    half.emplace_back(static_cast<size_t>(capacity * half_slices(c.dim) * kSlice));
    codes.emplace_back(static_cast<size_t>(capacity * code_slices(c.dim) * kSlice));
    half_terms.emplace_back(static_cast<size_t>(capacity));
    code_terms.emplace_back(static_cast<size_t>(capacity));
    alive.emplace_back(std::vector<uint32_t>(static_cast<size_t>(capacity / 32), 0));
    own.emplace_back(std::vector<int64_t>(ids.begin() + begin, ids.begin() + begin + count));
    SegmentView view{half[s].get(),
                     codes[s].get(),
                     half_terms[s].get(),
                     code_terms[s].get(),
                     alive[s].get(),
                     c.own_ids ? own[s].get() : nullptr,
                     begin};
    for (int64_t at = 0, piece; at < count; at += piece) {
      piece = std::min<int64_t>(count - at, at ? count : (count + 1) / 3 + 1);
      check(
          launch_pack({device_rows.get() + (begin + at) * c.dim, kF32, c.dim, piece, half[s].get(),
                       half_terms[s].get(), alive[s].get(), at, c.dim, c.metric, bad.get()},
                      nullptr));
    }
    if (s == 0) check(launch_mean(view, count, c.dim, c.metric, mean.get(), nullptr));
    check(launch_quantize(
        {view, mean.get(), codes[s].get(), code_terms[s].get(), 0, count, c.dim, c.metric},
        nullptr));
    views.push_back(view);
  }
  if (*bad.get()) {
    why = "finite rows were called bad";
    return false;
  }

  // Removals and filters.
  std::vector<bool> found(n, true);
  DeviceArray<SegmentView> device_views(views);
  IndexView index{device_views.get(), mean.get(), nullptr, c.n, capacity, c.dim, c.metric, c.scan};
  DeviceArray<uint32_t> filter((n + kTileRows - 1) / kTileRows * (kTileRows / 32));
  std::vector<int64_t> some;
  std::vector<uint8_t> bitset(13000, 0);
  for (size_t i = 0; i < n; ++i) {
    if (c.filter == "none") continue;
    const bool chosen = c.filter == "nothing" ? false : random.below(3) == 0;
    if (c.filter == "remove" && chosen) {
      alive[i / static_cast<size_t>(capacity)].get()[i % static_cast<size_t>(capacity) / 32] &=
          ~(1u << (i % 32));
      found[i] = false;
    } else if (c.filter == "allow" || c.filter == "nothing") {
      found[i] = chosen;
      if (chosen) some.push_back(ids[i]);
    } else if (c.filter == "deny_bits" && chosen) {
      found[i] = false;
      bitset[static_cast<size_t>(ids[i] / 8)] |= static_cast<uint8_t>(1 << (ids[i] % 8));
    }
  }
  std::sort(some.begin(), some.end());
  if (some.empty()) some.push_back(-1);
  DeviceArray<int64_t> device_some(some);
  DeviceArray<uint8_t> device_bits(bitset);
  if (c.filter == "allow" || c.filter == "nothing" || c.filter == "deny_bits") {
    const bool bits = c.filter == "deny_bits";
    check(launch_filter(
        index,
        {bits ? nullptr : device_some.get(), nullptr, bits ? 0 : static_cast<int64_t>(some.size())},
        {nullptr, bits ? device_bits.get() : nullptr,
         bits ? static_cast<int64_t>(bitset.size()) : 0},
        filter.get(), nullptr));
    index.filter = filter.get();
  }

  // Search.
  const Device device{c.multiprocessors, c.shared, 90};
  const TopkPlan plan = plan_topk(index, c.batch, c.k, device, c.memory, c.kernel);
  if (!plan.workspace_bytes) {
    why = "no plan";
    return false;
  }
  DeviceArray<unsigned char> workspace(plan.workspace_bytes, 256);
  const auto results = static_cast<size_t>(c.batch) * static_cast<size_t>(c.k);
  DeviceArray<float> scores(results);
  DeviceArray<int64_t> out_ids(results);
  DeviceArray<double> exact(results);
  std::vector<uint16_t> small(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    if (c.dtype == kF32) continue;
    small[i] = c.dtype == kF16 ? float_to_half_bits(queries[i]) : to_bf16(queries[i]);
    queries[i] = c.dtype == kF16 ? half_bits_to_float(small[i])
                                 : emu::bits<float>(static_cast<uint32_t>(small[i]) << 16);
  }
  const bool poison = c.batch > 2;  // one query with a NaN
  if (poison && c.dtype == kF32) queries[d + d / 2] = std::numeric_limits<float>::quiet_NaN();
  DeviceArray<float> device_queries(queries);
  DeviceArray<uint16_t> device_small(small);
  const void* query_pointer =
      c.dtype == kF32 ? static_cast<const void*>(device_queries.get()) : device_small.get();
  check(launch_topk(plan,
                    {index, query_pointer, c.dtype, c.dim, scores.get(), out_ids.get(), exact.get(),
                     workspace.get()},
                    nullptr));

  for (int m = 0; m < c.batch; ++m) {
    const float* q = &queries[static_cast<size_t>(m) * d];
    const bool bad_query = poison && c.dtype == kF32 && m == 1;
    const auto want =
        bad_query ? std::vector<Answer>() : reference(rows, ids, found, q, c.dim, c.metric);
    for (int i = 0; i < c.k; ++i) {
      const size_t at = static_cast<size_t>(m) * static_cast<size_t>(c.k) + static_cast<size_t>(i);
      const bool real = static_cast<size_t>(i) < want.size();
      const float missing = bad_query         ? std::numeric_limits<float>::quiet_NaN()
                            : c.metric == kL2 ? std::numeric_limits<float>::infinity()
                                              : -std::numeric_limits<float>::infinity();
      const int64_t id = real ? want[static_cast<size_t>(i)].id : -1;
      const double score = real ? want[static_cast<size_t>(i)].score : missing;
      const float rounded = static_cast<float>(score), got = scores.get()[at];
      const bool same = bad_query ? std::isnan(got) : got == rounded && exact.get()[at] == score;
      if (out_ids.get()[at] != id || !same) {
        char text[200];
        std::snprintf(text, sizeof text,
                      "query %d, place %d: id %lld score %.9g, want id %lld score %.9g", m, i,
                      static_cast<long long>(out_ids.get()[at]), static_cast<double>(got),
                      static_cast<long long>(id), static_cast<double>(rounded));
        why = text;
        return false;
      }
    }
  }

  // Rows come back as they went in.
  std::vector<int64_t> positions;
  for (int i = 0; i < 20 && c.n > 0; ++i) positions.push_back(random.below(c.n));
  positions.push_back(-1);
  DeviceArray<int64_t> device_positions(positions);
  DeviceArray<uint16_t> gathered(positions.size() * d);
  check(launch_gather(index, device_positions.get(), static_cast<int64_t>(positions.size()),
                      gathered.get(), nullptr));
  for (size_t i = 0; i < positions.size() * d; ++i) {
    const int64_t p = positions[i / d];
    if (gathered.get()[i] != (p < 0 ? 0 : rows[static_cast<size_t>(p) * d + i % d])) {
      why = "gather";
      return false;
    }
  }
  return true;
}

bool refuses(std::string& why) {
  DeviceArray<float> row(std::vector<float>{1.0f, 7e4f, 2.0f});
  DeviceArray<unsigned char> half(static_cast<size_t>(256 * kSlice));
  DeviceArray<HalfTerm> terms(256);
  DeviceArray<uint32_t> alive(std::vector<uint32_t>(8, 0));
  DeviceArray<int> bad(std::vector<int>{0});
  check(launch_pack(
      {row.get(), kF32, 3, 1, half.get(), terms.get(), alive.get(), 0, 3, kIp, bad.get()},
      nullptr));
  if (!*bad.get()) {
    why = "a value beyond 65504 was taken";
    return false;
  }
  IndexView index{nullptr, nullptr, nullptr, 100, 256, 8, kIp, kFp16};
  const Device device{132, 227 * 1024, 90};
  if (plan_topk(index, 1, kMaxK + 1, device, size_t{1} << 30).workspace_bytes) {
    why = "k beyond the limit";
    return false;
  }
  index.dim = kMaxDim + 1;
  if (plan_topk(index, 1, 1, device, size_t{1} << 30).workspace_bytes) {
    why = "dim beyond the limit";
    return false;
  }
  return true;
}

// Every plan of the shapes people use fits its device, copies deep enough, and is the kernel meant.
bool plans(std::string& why) {
  const Device devices[] = {
      {108, 163 * 1024, 80}, {128, 99 * 1024, 89}, {132, 227 * 1024, 90}, {148, 227 * 1024, 100}};
  for (const Device& device : devices)
    for (Scan scan : {kFp16, kInt8})
      for (int dim : {3, 64, 384, 512, 768, 1000, 1024, 4096, kMaxDim})
        for (int batch : {1, 8, 16, 33, 64, 65, 1024, 100000}) {
          const IndexView index{nullptr, nullptr, nullptr, 10000000, 262144, dim, kIp, scan};
          const size_t memory = size_t{2} << 30;
          const TopkPlan plan = plan_topk(index, batch, 100, device, memory);
          const bool int8 = scan == kInt8;
          const int slices = int8 ? code_slices(dim) : half_slices(dim);
          const auto limit = static_cast<size_t>(device.shared_bytes);
          auto shared = [&](int stages) {
            return plan.kernel == Kernel::kStream
                       ? stream_shared_bytes(int8, plan.columns * plan.planes, slices, plan.columns,
                                             stages)
                   : plan.kernel == Kernel::kTiled
                       ? tiled_shared_bytes(int8, stages)
                       : sm90_shared_bytes(int8, slices, stages, plan.resident != 0);
          };
          const Kernel large = device.capability == 90 ? Kernel::kSm90 : Kernel::kTiled;
          const char* fault = nullptr;
          if (!plan.workspace_bytes) fault = "none";
          if (plan.workspace_bytes > memory) fault = "too much workspace";
          if (shared(plan.stages) > limit) fault = "too much shared memory";
          if (open_shared_bytes(dim, 100) > limit) fault = "no room to open bins";
          const size_t deep = size_t{device.capability == 89 ? 32u : 48u} << 10;
          if (shared(plan.stages) - shared(1) < deep) fault = "a shallow ring";
          const int few = device.capability == 90 && !int8 ? 32 : 64;
          if (batch <= few && dim <= 1024 && plan.kernel != Kernel::kStream) fault = "wrong kernel";
          if (batch > few && plan.kernel != large) fault = "wrong kernel";
          if (!fault) continue;
          why = "plan for cc " + std::to_string(device.capability) + ", scan " +
                std::to_string(scan) + ", dim " + std::to_string(dim) + ", batch " +
                std::to_string(batch) + ": " + fault;
          return false;
        }

  if (open_shared_bytes(kMaxDim, kMaxK) > 99 * 1024 || merge_shared_bytes(kMaxK) > 99 * 1024) {
    why = "no room to open bins at the limits";
    return false;
  }

  // Rounds of panels that leave few multiprocessors idle; blocks enough to open a query's bins.
  const auto planned = [&](int64_t rows, int batch) {
    const IndexView index{nullptr, nullptr, nullptr, rows, 262144, 512, kIp, kFp16};
    return plan_topk(index, batch, 10, devices[2], size_t{8} << 30);
  };
  const struct {
    int64_t rows;
    int panels, round;
  } rounds[] = {{1000000, 3, 3},   {1000000, 66, 66},   {1000000, 67, 66},
                {1000000, 90, 66}, {1000000, 133, 132}, {1000, 67, 67},
                {1000, 250, 250},  {1000000, 8, 8},     {10000000, 8, 6}};
  for (const auto& r : rounds) {
    if (planned(r.rows, r.panels * 128).chunk == r.round * 128) continue;
    why = "the round of " + std::to_string(r.panels) + " panels";
    return false;
  }
  if (planned(1000000, 1).shares < 2 * 132 || planned(1000000, 528).shares != 2 ||
      planned(0, 1).shares != 1 || planned(4000, 528).shares != 2) {
    why = "shares";
    return false;
  }
  return true;
}

// The threshold is the k-th largest maximum of groups: never above the k-th largest bound.
bool thresholds(std::string& why) {
  constexpr int kGroups = 8192, kBatch = 2;
  Random random(emu::rng()());
  for (int count : {0, 8, 511, 8191, 8192, 8193, 20000})
    for (int k : {1, 9, 2000}) {
      TopkPlan plan{};
      plan.bins = count;
      plan.k = k;
      std::vector<float> lower(static_cast<size_t>(count * kBatch));
      for (float& v : lower)
        v = random.below(50) ? static_cast<float>(random.below(40) - 20) / 3
                             : static_cast<float>(random.normal() * 1e30);
      if (count) lower.back() = 1e32f;  // the last one counts
      DeviceArray<float> bounds(lower), threshold(kBatch);
      DeviceArray<int> counts(kBatch);
      Workspace w{};
      w.lower = bounds.get();
      w.threshold = threshold.get();
      w.counts = counts.get();
      check(launch_threshold(plan, w, kBatch, nullptr));
      for (int m = 0; m < kBatch; ++m) {
        std::vector<float> best(kGroups, -std::numeric_limits<float>::infinity());
        for (int i = 0; i < count; ++i) {
          float& group = best[static_cast<size_t>(i % kGroups)];
          group = std::max(group, lower[static_cast<size_t>(m * count + i)]);
        }
        std::sort(best.begin(), best.end(), std::greater<float>());
        if (threshold.get()[m] == best[static_cast<size_t>(k - 1)] && counts.get()[m] == 0)
          continue;
        why = "threshold of " + std::to_string(count) + " bounds, k=" + std::to_string(k);
        return false;
      }
    }
  return true;
}

// Opening and merging alone, with bins declared open: lists that overflow, buffers that fill,
// shares with and without candidates. All segments are the same rows under other ids.
bool opens(std::string& why) {
  constexpr int kDim = 3, kRows = 256, kBins = 10248, kBatch = 2, kAll = kBins * 32;
  Random random(emu::rng()());
  std::vector<float> values(kRows * kDim), queries(kBatch * kDim);
  for (float& v : values) v = static_cast<float>(random.below(3) - 1);
  for (float& v : queries) v = static_cast<float>(random.normal());
  DeviceArray<float> device_rows(values), device_queries(queries);
  DeviceArray<unsigned char> half(static_cast<size_t>(kRows * kSlice));
  DeviceArray<HalfTerm> terms(kRows);
  DeviceArray<uint32_t> alive(std::vector<uint32_t>(kRows / 32, 0));
  DeviceArray<int> bad(std::vector<int>{0});
  check(launch_pack({device_rows.get(), kF32, kDim, kRows, half.get(), terms.get(), alive.get(), 0,
                     kDim, kIp, bad.get()},
                    nullptr));
  std::vector<SegmentView> views;
  std::vector<uint16_t> rows;
  std::vector<int64_t> ids;
  for (int first = 0; first < kAll; first += kRows) {
    views.push_back({half.get(), nullptr, terms.get(), nullptr, alive.get(), nullptr, first});
    for (float v : values) rows.push_back(float_to_half_bits(v));
    for (int i = 0; i < kRows; ++i) ids.push_back(first + i);
  }
  DeviceArray<SegmentView> device_views(views);
  const IndexView index{device_views.get(), nullptr, nullptr, kAll, kRows, kDim, kIp, kFp16};

  const struct {
    const char* name;
    std::function<bool(int)> open;
  } patterns[] = {{"none", [](int) { return false; }},
                  {"the last", [](int b) { return b == kBins - 1; }},
                  {"every 300th", [](int b) { return b % 300 == 0; }},
                  {"a run", [](int b) { return b >= 4000 && b < 4700; }}};
  const struct {
    int k, shares;
  } sizes[] = {{1, 1}, {300, 7}, {2000, 3}, {5, 600}};
  for (const auto& pattern : patterns)
    for (const auto& size : sizes) {
      TopkPlan plan = plan_topk(index, kBatch, size.k, {5, 227 * 1024, 90}, size_t{1} << 30);
      plan.shares = size.shares;
      const auto results = static_cast<size_t>(kBatch * size.k);
      DeviceArray<float> scores(results);
      DeviceArray<int64_t> out_ids(results);
      carve(plan, index, nullptr, &plan.workspace_bytes);
      DeviceArray<unsigned char> workspace(plan.workspace_bytes, 256);
      const TopkParams params{index,        device_queries.get(), kF32,    kDim,
                              scores.get(), out_ids.get(),        nullptr, workspace.get()};
      const Workspace w = carve(plan, index, workspace.get(), nullptr);
      const float inf = std::numeric_limits<float>::infinity();
      std::vector<bool> found(kAll, false);
      for (int i = 0; i < kBatch * kBins; ++i) {
        w.upper[i] = pattern.open(i % kBins) ? inf : -inf;
        w.lower[i] = -inf;
      }
      for (int i = 0; i < kAll; ++i) found[static_cast<size_t>(i)] = pattern.open(i / 32);
      check(launch_prepare(plan, params, w, 0, kBatch, nullptr));
      check(launch_threshold(plan, w, kBatch, nullptr));
      check(launch_open(plan, params, w, kBatch, nullptr));
      check(launch_merge(plan, params, w, 0, kBatch, nullptr));
      for (int m = 0; m < kBatch; ++m) {
        const auto want =
            reference(rows, ids, found, &queries[static_cast<size_t>(m * kDim)], kDim, kIp);
        for (int i = 0; i < size.k; ++i) {
          const bool real = static_cast<size_t>(i) < want.size();
          const auto at = static_cast<size_t>(m * size.k + i);
          const int64_t id = real ? want[static_cast<size_t>(i)].id : -1;
          const double score = real ? want[static_cast<size_t>(i)].score : -inf;
          if (out_ids.get()[at] == id && scores.get()[at] == static_cast<float>(score)) continue;
          why = std::string("open bins: ") + pattern.name + ", k=" + std::to_string(size.k) +
                ", shares=" + std::to_string(size.shares) + ", place " + std::to_string(i);
          return false;
        }
      }
    }
  return true;
}

// A canonical score as a bound: never above what bounds its row from above, nor below what bounds
// it from below but for its own rounding.
bool score_bounds(std::string& why) {
  constexpr int kRows = 64, kDim = 40;
  Random random(emu::rng()());
  for (Metric metric : {kIp, kCosine, kL2})
    for (Scan scan : {kFp16, kInt8})
      for (const char* data : {"normal", "mean", "scales", "spike", "zero"}) {
        Case c{"", kRows, kDim, 1, 1};
        c.data = data;
        std::vector<float> values(kRows * kDim), query(kDim);
        for (int i = 0; i < kRows * kDim; ++i)
          values[static_cast<size_t>(i)] = value(c, random, i / kDim, i % kDim, false);
        for (int j = 0; j < kDim; ++j) query[static_cast<size_t>(j)] = value(c, random, 7, j, true);
        DeviceArray<float> rows(values), q(query), mean(128);
        DeviceArray<unsigned char> half(256 * kSlice), codes(256 * kSlice);
        DeviceArray<HalfTerm> half_terms(256);
        DeviceArray<CodeTerm> code_terms(256);
        DeviceArray<uint32_t> alive(std::vector<uint32_t>(8, 0));
        DeviceArray<int> bad(std::vector<int>{0});
        const SegmentView view{
            half.get(), codes.get(), half_terms.get(), code_terms.get(), alive.get(), nullptr, 0};
        check(launch_pack({rows.get(), kF32, kDim, kRows, half.get(), half_terms.get(), alive.get(),
                           0, kDim, metric, bad.get()},
                          nullptr));
        check(launch_mean(view, kRows, kDim, metric, mean.get(), nullptr));
        check(launch_quantize(
            {view, mean.get(), codes.get(), code_terms.get(), 0, kRows, kDim, metric}, nullptr));
        const IndexView index{&view, mean.get(), nullptr, kRows, 256, kDim, metric, scan};
        TopkPlan plan = plan_topk(index, 1, 1, {5, 227 * 1024, 90}, size_t{1} << 30);
        DeviceArray<unsigned char> workspace(plan.workspace_bytes, 256);
        const Workspace w = carve(plan, index, workspace.get(), nullptr);
        const TopkParams params{index, q.get(), kF32, kDim, nullptr, nullptr, nullptr, nullptr};
        check(launch_prepare(plan, params, w, 0, 1, nullptr));
        QueryState state = w.states[0];
        state.err_row = state.open_row;
        state.err_code = state.open_code;
        state.scale = 1;
        for (int row = 0; row < kRows; ++row) {
          std::vector<uint16_t> x;
          float sum = 0;
          for (int j = 0; j < kDim; ++j) {
            const float v = values[static_cast<size_t>(row * kDim + j)];
            x.push_back(float_to_half_bits(v));
            const auto code = static_cast<int8_t>(codes.get()[unit_offset(row, j / 16) + j % 16]);
            sum += w.values[j] * (scan == kInt8 ? code : half_bits_to_float(x.back()));
          }
          const double score = canonical(x.data(), query.data(), kDim, metric);
          const float bound = score_bound(score, state, kDim, metric);
          const Bounds b = scan == kInt8
                               ? CodeScan::bounds(sum, code_terms.get()[row], state, metric)
                               : HalfScan::bounds(sum, half_terms.get()[row], state, metric);
          const float least = b.lower - (std::abs(b.lower) * 0x1p-20f + 0x1p-78f);
          const float room = metric == kL2 ? static_cast<float>(state.norm * 0x1p-40) : 0.0f;
          if (bound <= b.upper && bound >= least - room) continue;
          char text[200];
          std::snprintf(text, sizeof text,
                        "score bound, scan %d, metric %d, %s, row %d: %.9g of [%.9g, %.9g]", scan,
                        metric, data, row, static_cast<double>(bound), static_cast<double>(b.lower),
                        static_cast<double>(b.upper));
          why = text;
          return false;
        }
      }
  return true;
}

std::vector<Case> cases() {
  const Metric metrics[] = {kIp, kCosine, kL2};
  std::vector<Case> all;
  auto add = [&](Case c) {
    c.name = std::string(c.scan == kInt8 ? "int8" : "fp16") + " " +
             (c.metric == kIp   ? "ip"
              : c.metric == kL2 ? "l2"
                                : "cosine") +
             " " +
             (c.kernel < 0    ? "auto"
              : c.kernel == 0 ? "stream"
              : c.kernel == 1 ? "tiled"
                              : "sm90") +
             " " + c.data + " filter=" + c.filter + " n=" + std::to_string(c.n) +
             " d=" + std::to_string(c.dim) + " batch=" + std::to_string(c.batch) +
             " k=" + std::to_string(c.k);
    all.push_back(c);
  };
  int turn = 0;
  auto next = [&](int n) { return turn++ % n; };
  for (Scan scan : {kFp16, kInt8}) {
    // Every kernel and data set, metrics in turn.
    for (int kernel : {0, 1, 2})
      for (const char* data :
           {"normal", "ties", "equal", "mean", "scales", "spike", "zero", "near", "huge"}) {
        Case c{"", 300, 40, kernel == 0 ? 5 : 9, 7};
        c.scan = scan;
        c.kernel = kernel;
        c.data = data;
        c.metric = metrics[next(3)];
        add(c);
      }
    // Sums that tensor cores cut most. The cosine's rows need equal norms: more dimensions.
    for (int kernel : {0, 1, 2})
      for (const auto& [data, metric, dim] :
           {std::tuple("subnormal", kIp, 16), std::tuple("subnormal", kCosine, 29),
            std::tuple("faint", kIp, 16)}) {
        Case c{"", 64, dim, 1, 1};
        c.scan = scan;
        c.kernel = kernel;
        c.data = data;
        c.metric = metric;
        c.dtype = c.data == "subnormal" ? kF16 : kF32;
        add(c);
      }
    // Every metric on the hardest data, small batch.
    for (Metric metric : metrics)
      for (const char* data : {"mean", "zero", "near", "huge"}) {
        Case c{"", 520, 24, 4, 9};
        c.scan = scan;
        c.data = data;
        c.metric = metric;
        add(c);
      }
    // Odd dimensions and sizes, filters, id forms, query types, segments.
    const char* filters[] = {"none", "remove", "allow", "deny_bits", "nothing"};
    for (int dim : {1, 3, 31, 64, 100, 129, 384}) {
      Case c{"", dim > 128 ? 260 : 700, dim, 1 + next(3), 10};
      c.scan = scan;
      c.metric = metrics[next(3)];
      c.filter = filters[next(5)];
      c.own_ids = next(2) == 0;
      c.segment = 256;
      c.dtype = static_cast<DType>(next(3));
      add(c);
    }
    for (int n : {0, 1, 9, 255, 256, 257, 1100}) {
      Case c{"", n, 17, 2, 10};
      c.scan = scan;
      c.metric = metrics[next(3)];
      c.filter = filters[next(4)];
      c.own_ids = next(2) == 1;
      add(c);
    }
    for (const char* filter : filters) {
      Case c{"", 600, 33, 3, 12};
      c.scan = scan;
      c.filter = filter;
      c.own_ids = true;
      c.metric = metrics[next(3)];
      add(c);
    }
    // Batches through every panel width and kernel; k from one to beyond the rows.
    for (int batch : {1, 8, 9, 16, 17, 33, 64, 65, 130}) {
      Case c{"", 270, 20, batch, 5};
      c.scan = scan;
      c.metric = metrics[next(3)];
      add(c);
    }
    for (int k : {1, 100, 500, 1000, 2000}) {
      Case c{"", 1500, 12, 2, k};
      c.scan = scan;
      c.metric = metrics[next(3)];
      c.data = k == 500 ? "ties" : "normal";
      c.multiprocessors = 1;
      add(c);
    }
    // Rings that wrap: several slices and several tiles a block.
    for (int kernel : {0, 1, 2}) {
      Case c{"", 1100, 300, kernel == 0 ? 3 : 10, 6};
      c.scan = scan;
      c.kernel = kernel;
      c.metric = metrics[next(3)];
      c.multiprocessors = 1;
      add(c);
      c.shared = 99 * 1024;
      if (kernel == 1) add(c);  // two stages
    }
    {  // all rows tie, over several shares
      Case c{"", 4600, 8, 1, 40};
      c.scan = scan;
      c.data = "equal";
      c.own_ids = true;
      c.metric = metrics[next(3)];
      add(c);
    }
    // Coarse lower bounds, several rounds, streamed and resident panels, a small ring.
    for (int kernel : {1, 2}) {
      Case c{"", 4600, 8, 3, 1};
      c.scan = scan;
      c.kernel = kernel;
      c.metric = metrics[next(3)];
      c.multiprocessors = 3;
      add(c);
    }
    {
      Case c{"", 300, 70, 140, 4};
      c.scan = scan;
      c.memory = 1;
      c.segment = 256;
      c.filter = "remove";
      add(c);
      c.batch = 20;
      c.kernel = 0;
      c.shared = 80 * 1024;
      add(c);
      c.kernel = 2;
      c.shared = 176 * 1024;
      c.dim = scan == kInt8 ? 500 : 250;
      c.n = 260;
      c.filter = "none";
      add(c);  // the panel does not fit: its slices travel
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  emu::set_seed(argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 1);
  const std::string only = argc > 2 ? argv[2] : "";
  int failures = 0, count = 0;
  std::string why;
  if (!refuses(why)) {
    std::printf("FAIL refusals: %s\n", why.c_str());
    ++failures;
  }
  for (const auto part : {plans, thresholds, score_bounds, opens}) {
    if (part(why)) continue;
    std::printf("FAIL %s\n", why.c_str());
    ++failures;
  }
  for (const Case& c : cases()) {
    if (c.name.find(only) == std::string::npos) continue;
    if (std::getenv("VERBOSE")) std::fprintf(stderr, "%s\n", c.name.c_str());
    ++count;
    why.clear();
    if (run(c, why)) continue;
    std::printf("FAIL %s: %s\n", c.name.c_str(), why.c_str());
    std::fflush(stdout);
    ++failures;
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures != 0;
}
