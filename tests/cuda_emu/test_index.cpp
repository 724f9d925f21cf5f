// SPDX-License-Identifier: Apache-2.0
// CudaIndex on the emulator's runtime: what it answers after adds, removals, compaction, with given
// ids and filters, equals the same kernels' answer for an index built at once, also while somebody
// captures a graph and from another device; refusals and failures change nothing; every device
// allocation is given back.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <set>

#include "cuda/cuda_index.h"
#include "cuda_emu.h"

using namespace knnfast::cuda;

namespace {

int failures = 0;
void* stream = nullptr;  // of the caller's
void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAIL %s\n", what);
  ++failures;
}
template <class Call>
bool refuses(Call call, const char* part) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return std::string(e.what()).find(part) != std::string::npos;
  }
  return false;
}

struct Found {
  std::vector<float> scores;
  std::vector<int64_t> ids;
  bool operator==(const Found& o) const { return scores == o.scores && ids == o.ids; }
};

Found search(const CudaIndex& index, const std::vector<float>& queries, int batch, int k,
             const HostIds& allow = {}, const HostIds& deny = {}) {
  Found f{std::vector<float>(static_cast<size_t>(batch * k)),
          std::vector<int64_t>(static_cast<size_t>(batch * k))};
  index.search({queries.data(), kF32, index.dim()}, batch, k, allow, deny,
               {f.scores.data(), f.ids.data(), nullptr}, stream);
  return f;
}

std::vector<float> normal(size_t n) {
  std::vector<float> v(n);
  std::normal_distribution<float> d;
  for (float& x : v) x = d(emu::rng());
  return v;
}

// The rows that a reference index holds: whatever is live, with its id.
struct Model {
  std::vector<float> rows;
  std::vector<int64_t> ids;
};

void compare(const CudaIndex& index, const Model& model, Metric metric, const char* what) {
  const int dim = index.dim(), k = 7, batch = 3;
  CudaIndex plain(dim, metric, kFp16, 0, 1024);
  plain.add(model.rows.data(), kF32, static_cast<int64_t>(model.ids.size()), dim, model.ids.data(),
            false, nullptr);
  const auto queries = normal(static_cast<size_t>(batch * dim));
  expect(search(index, queries, batch, k) == search(plain, queries, batch, k), what);
  expect(index.size() == static_cast<int64_t>(model.ids.size()), what);
  const auto ids = index.ids();
  expect(std::set<int64_t>(ids.begin(), ids.end()) ==
             std::set<int64_t>(model.ids.begin(), model.ids.end()),
         what);
  if (model.ids.empty()) return;
  std::vector<uint16_t> row(static_cast<size_t>(dim));
  const size_t at = emu::rng()() % model.ids.size();
  index.vectors(&model.ids[at], 1, row.data(), false, nullptr);
  for (size_t j = 0; j < row.size(); ++j)
    expect(row[j] == float_to_half_bits(model.rows[at * row.size() + j]), what);
}

void life(Metric metric, Scan scan, bool own) {
  const int dim = 20;
  const auto d = static_cast<size_t>(dim);
  auto index = std::make_shared<CudaIndex>(dim, metric, scan, 0, 256);
  Model model;
  compare(*index, model, metric, "empty");
  CudaIndex::Plan plan(index, 3, 7);
  for (int n : {1, 5, 300, 0, 256, 20}) {
    const auto rows = normal(static_cast<size_t>(n) * d);
    std::vector<int64_t> given;
    for (int i = 0; i < n; ++i)
      given.push_back(static_cast<int64_t>(model.ids.size()) * 3 + i * 3 + 1);
    const auto used =
        index->add(rows.data(), kF32, n, dim, own ? given.data() : nullptr, n % 2 == 0, stream);
    expect(!own || used == given, "ids of add");
    model.rows.insert(model.rows.end(), rows.begin(), rows.end());
    model.ids.insert(model.ids.end(), used.begin(), used.end());
    compare(*index, model, metric, "after add");
  }

  // Refusals change nothing.
  auto bad = normal(10 * d);
  bad[57] = 7e4f;
  expect(refuses([&] { index->add(bad.data(), kF32, 10, dim, nullptr, false, nullptr); }, "65504"),
         "a value beyond FP16");
  const int64_t taken[] = {100000, model.ids[3]};
  expect(refuses([&] { index->add(bad.data(), kF32, 2, dim, taken, false, nullptr); }, "taken"),
         "a taken id");
  expect(refuses([&] { search(*index, normal(d), 1, kMaxK + 1); }, "k must be"), "k too large");
  compare(*index, model, metric, "after refusals");

  // Removal, of unknown and repeated ids too; the plan follows.
  std::vector<int64_t> out{-5, 999999};
  Model kept;
  for (size_t i = 0; i < model.ids.size(); ++i) {
    if (emu::rng()() % 3 == 0) {
      out.push_back(model.ids[i]);
      out.push_back(model.ids[i]);
    } else {
      kept.ids.push_back(model.ids[i]);
      kept.rows.insert(kept.rows.end(), model.rows.begin() + static_cast<long>(i * d),
                       model.rows.begin() + static_cast<long>((i + 1) * d));
    }
  }
  const auto removed = index->remove(out.data(), static_cast<int64_t>(out.size()));
  expect(removed == static_cast<int64_t>(model.ids.size() - kept.ids.size()), "removed count");
  compare(*index, kept, metric, "after remove");
  const auto queries = normal(3 * d);
  plan.run({queries.data(), kF32, dim}, stream);
  const Found planned{{plan.results().scores, plan.results().scores + 21},
                      {plan.results().ids, plan.results().ids + 21}};
  expect(planned == search(*index, queries, 3, 7), "plan");

  // A filter: every second live id, given unsorted, and its complement as a bitset.
  std::vector<int64_t> allow;
  std::vector<uint8_t> deny(4000);
  for (size_t i = 0; i < kept.ids.size(); ++i) {
    if (i % 2) {
      allow.insert(allow.begin(), kept.ids[i]);
    } else {
      deny[static_cast<size_t>(kept.ids[i] / 8)] |= static_cast<uint8_t>(1 << kept.ids[i] % 8);
    }
  }
  const Found by_allow =
      search(*index, queries, 3, 7, {allow.data(), nullptr, static_cast<int64_t>(allow.size())});
  expect(by_allow == search(*index, queries, 3, 7, {},
                            {nullptr, deny.data(), static_cast<int64_t>(deny.size())}),
         "allow equals deny of the rest");
  for (int64_t id : by_allow.ids)
    expect(std::find(allow.begin(), allow.end(), id) != allow.end(), "allowed only");

  // A range search finds what a search for every row ranks above the radius, in its order.
  const int all = static_cast<int>(allow.size());
  const HostIds allowed{allow.data(), nullptr, all};
  const Found ranked = search(*index, queries, 3, all, allowed);
  const double radius = static_cast<double>(ranked.scores[5]) * (1 + 1e-7);
  const Ranges found =
      index->range_search({queries.data(), kF32, dim}, false, 3, radius, allowed, {}, nullptr);
  size_t at = 0;
  for (int m = 0; m < 3; ++m)
    for (int i = 0; i < all; ++i) {
      const size_t from = static_cast<size_t>(m * all + i);
      const double score = static_cast<double>(ranked.scores[from]);
      if (!(metric == kL2 ? score < radius : score > radius)) continue;
      expect(at < found.ids.size() && found.ids[at] == ranked.ids[from] &&
                 found.scores[at] == ranked.scores[from],
             "range search");
      ++at;
    }
  expect(at > 3 && at == found.ids.size() && found.lims[3] == static_cast<int64_t>(at) &&
             found.lims[0] == 0,
         "range search's sizes");

  index->compact();
  compare(*index, kept, metric, "after compact");
  const auto more = normal(40 * d);
  const auto used = index->add(more.data(), kF32, 40, dim, nullptr, false, nullptr);
  for (int64_t id : used)
    expect(std::find(model.ids.begin(), model.ids.end(), id) == model.ids.end(), "ids not reused");
  kept.rows.insert(kept.rows.end(), more.begin(), more.end());
  kept.ids.insert(kept.ids.end(), used.begin(), used.end());
  compare(*index, kept, metric, "after add to a compacted index");
}

// Wherever memory runs out, nothing has changed, and the same change succeeds later.
void out_of_memory(Scan scan) {
  const int dim = 20;
  const auto d = static_cast<size_t>(dim);
  CudaIndex index(dim, kIp, scan, 0, 256);
  Model model;
  auto change = [&](const std::function<void()>& make) {
    for (int left = 0;; ++left) {
      emu::allocations_left() = left;
      bool made = true;
      try {
        make();
      } catch (const CudaError&) {
        made = false;
      }
      emu::allocations_left() = -1;
      if (made) return;
      expect(cudaGetLastError() == cudaSuccess, "an error stays");
      compare(index, model, kIp, "after memory ran out");
    }
  };
  auto add = [&](int n, int64_t first) {
    const auto rows = normal(static_cast<size_t>(n) * d);
    std::vector<int64_t> ids(static_cast<size_t>(n));
    std::iota(ids.begin(), ids.end(), first);
    const bool own = !model.ids.empty() && first != model.ids.back() + 1;
    change(
        [&] { index.add(rows.data(), kF32, n, dim, own ? ids.data() : nullptr, false, nullptr); });
    model.rows.insert(model.rows.end(), rows.begin(), rows.end());
    model.ids.insert(model.ids.end(), ids.begin(), ids.end());
    compare(index, model, kIp, "after memory came back");
  };
  add(60, 0);
  add(240, 60);  // about a new centre
  add(20, 1000);
  change([&] { index.remove(&model.ids[40], 240); });
  model.ids.erase(model.ids.begin() + 40, model.ids.begin() + 280);
  model.rows.erase(model.rows.begin() + 40 * dim, model.rows.begin() + 280 * dim);
  change([&] { index.compact(); });
  add(10, 1020);
}

// A graph may capture a plan's run, nothing else: it would not keep the rows, and cannot wait.
void capture() {
  const int dim = 20;
  auto index = std::make_shared<CudaIndex>(dim, kIp, kInt8, 0, 256);
  const auto rows = normal(static_cast<size_t>(40 * dim)), q = normal(static_cast<size_t>(dim));
  index->add(rows.data(), kF32, 40, dim, nullptr, false, nullptr);
  const Found want = search(*index, q, 1, 3);
  CudaIndex::Plan plan(index, 1, 3);
  emu::capturing() = true;
  stream = emu::captured();
  expect(refuses([&] { search(*index, q, 1, 3); }, "capture index.plan()"), "a captured search");
  const auto refused = [&](auto call, const char* what) { expect(refuses(call, what), what); };
  refused([&] { index->add(rows.data(), kF32, 1, dim, nullptr, true, stream); },
          "add: a CUDA graph");
  refused([&] { index->range_search({q.data(), kF32, dim}, true, 1, 0, {}, {}, stream); },
          "range_search: a CUDA graph");
  std::vector<uint16_t> copy(static_cast<size_t>(dim));
  const int64_t id = 0;
  refused([&] { index->vectors(&id, 1, copy.data(), true, stream); }, "vectors: a CUDA graph");
  plan.run({q.data(), kF32, dim}, stream);
  Found aside{std::vector<float>(3), std::vector<int64_t>(3)};
  index->search_host({q.data(), kF32, dim}, 1, 3, {}, {}, aside.scores.data(), aside.ids.data());
  stream = nullptr;
  emu::capturing() = false;
  expect(aside == want, "a search aside of a capture");
  expect(Found{{plan.results().scores, plan.results().scores + 3},
               {plan.results().ids, plan.results().ids + 3}} == want,
         "a captured plan");
}

// An index with codes scans the rows instead where that is cheaper, unless it is told what to scan;
// the answers are the same.
void chosen_scan() {
  expect(choose_scan(1000000, 1024, 20) == kInt8 && choose_scan(1000000, 1024, 21) == kFp16 &&
             choose_scan(1000000, 32, 2000) == kInt8 && choose_scan(0, 33, 1) == kFp16,
         "the rule");
  const int dim = 20, batch = 33, k = 7;
  const auto rows = normal(static_cast<size_t>(300 * dim));
  const auto queries = normal(static_cast<size_t>(batch * dim));
  std::vector<Found> found;
  for (Scan scan : {kFp16, kInt8, kAuto}) {
    auto index = std::make_shared<CudaIndex>(dim, kIp, scan, 0, 256);
    const Scan few = scan == kAuto ? kInt8 : scan, many = scan == kAuto ? kFp16 : scan;
    CudaIndex::Plan plan(index, batch, k);
    expect(plan.scan() == kFp16, "no codes yet");
    index->add(rows.data(), kF32, 300, dim, nullptr, false, nullptr);
    plan.run({queries.data(), kF32, dim}, stream);
    expect(plan.scan() == many && CudaIndex::Plan(index, 32, k).scan() == few, "what is scanned");
    const auto& planned = plan.results();
    found.push_back(
        {{planned.scores, planned.scores + batch * k}, {planned.ids, planned.ids + batch * k}});
    found.push_back(search(*index, queries, batch, k));
  }
  for (const Found& f : found) expect(f == found.front(), "the same answer from every scan");
}

void no_pools() {
  emu::has_pools() = false;
  std::string said;
  try {
    CudaIndex index(3, kIp, kFp16, 0);
  } catch (const CudaError& e) {
    said = e.what();
  }
  emu::has_pools() = true;
  expect(said.find("no memory pools") != std::string::npos, "a device without memory pools");
}

void segment_sizes() {
  const auto rows = normal(300);
  CudaIndex index(1, kIp, kFp16, 0, 300);
  index.add(rows.data(), kF32, 300, 1, nullptr, false, nullptr);
  const int64_t row = kSlice + sizeof(HalfTerm), bits = 512 / 8;
  expect(index.nbytes() == 512 * row + bits, "segments of the rows there are, in whole tiles");
}

}  // namespace

int main(int argc, char** argv) {
  emu::set_seed(argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 1);
  for (Metric metric : {kIp, kCosine, kL2})
    for (Scan scan : {kFp16, kInt8, kAuto}) life(metric, scan, metric != kCosine);
  emu::capturing() = true;  // by another thread
  stream = &failures;
  life(kIp, kInt8, true);
  stream = nullptr;
  emu::capturing() = false;
  emu::devices().front() = 1;  // current for this thread, and left alone
  life(kL2, kInt8, true);
  expect(emu::devices() == std::vector<int>{1}, "the thread's own device");
  emu::devices().front() = 0;
  for (Scan scan : {kFp16, kInt8}) out_of_memory(scan);
  capture();
  chosen_scan();
  no_pools();
  segment_sizes();
  expect(cudaGetLastError() == cudaSuccess, "no error stays");
  expect(refuses([] { CudaIndex(kMaxDim + 1, kIp, kFp16, 0); }, "dim must be"), "dim too large");
  expect(emu::allocations().empty(), "every allocation is given back");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
