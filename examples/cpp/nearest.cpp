// SPDX-License-Identifier: Apache-2.0
// Embeds knnfast: indexes random unit rows, saves and opens the index, and searches it.
//
//   FLAGS="-DKNNFAST_INSTALL=ON -DKNNFAST_CUDA=OFF -DCMAKE_BUILD_TYPE=Release"
//   cmake -S . -B build/cpp $FLAGS -DCMAKE_INSTALL_PREFIX=$PWD/out/prefix  # of the repository
//   cmake --build build/cpp --target knnfast -j && cmake --install build/cpp
//   cmake -S examples/cpp -B build/nearest -DCMAKE_PREFIX_PATH=$PWD/out/prefix
//   cmake --build build/nearest && build/nearest/nearest out/nearest.index
#include <knnfast/index.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

int main(int argc, char** argv) {
  const char* folder = argc > 1 ? argv[1] : "nearest.index";
  constexpr int64_t n = 10000, dim = 64, k = 3;
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> rows(n * dim);
  for (float& x : rows) x = normal(random);

  knnfast::Index index(dim, knnfast::Metric::cosine);
  index.add(rows.data(), knnfast::DType::f32, n);
  index.save(folder);

  const knnfast::Index opened = knnfast::Index::open(folder);
  if (!opened.verify().empty()) return 1;
  std::vector<float> scores(k);
  std::vector<int64_t> ids(k);
  opened.search(rows.data() + 42 * dim, knnfast::DType::f32, 1, k, scores.data(), ids.data());
  std::printf("%s:", knnfast::isa());
  for (int64_t i = 0; i < k; ++i) std::printf(" %lld (%.4f)", (long long)ids[i], scores[i]);
  std::printf("\n");
  if (ids[0] != 42) return 1;

  // Only rows that a caller may see; an empty list permits none.
  std::vector<int64_t> permitted = {7, 8, 9};
  for (size_t count : {size_t{3}, size_t{0}}) {
    permitted.resize(count);
    permitted.shrink_to_fit();
    knnfast::SearchOptions options;
    options.allow = {permitted.data(), nullptr, static_cast<int64_t>(count)};
    opened.search(rows.data() + 8 * dim, knnfast::DType::f32, 1, k, scores.data(), ids.data(),
                  options);
    if (ids[0] != (count ? 8 : -1)) return 1;
  }
  return 0;
}
