// SPDX-License-Identifier: Apache-2.0
// Tests of the emulator itself: right kernels give right answers for every seed, and each planted
// error is caught (a fault, a stop at a guard page, or a wrong answer) within a few seeds.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_emu.h"

namespace {

constexpr int kThreads = 128;
using Case = bool (*)(uint64_t seed);  // true: the answer was right

template <class T>
T* guarded(emu::Guarded& g, const std::vector<T>& values) {
  g = emu::Guarded(values.size() * sizeof(T));
  std::memcpy(g.begin, values.data(), values.size() * sizeof(T));
  return reinterpret_cast<T*>(g.begin);
}

std::vector<int> counting(int n) {
  std::vector<int> v(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) v[static_cast<size_t>(i)] = i;
  return v;
}

// --- Barriers and shared memory: each thread reads what another one wrote.
template <bool Barrier>
void reverse_kernel(int* out) {
  KNN_DYN_SMEM(raw);
  int* shared = reinterpret_cast<int*>(raw);
  int t = static_cast<int>(threadIdx.x);
  shared[t] = t;
  if (Barrier) __syncthreads();
  out[t] = shared[kThreads - 1 - t];
}
template <bool Barrier>
bool reverse(uint64_t) {
  std::vector<int> out(kThreads);
  KNN_LAUNCH(reverse_kernel<Barrier>, 1, kThreads, kThreads * 4, nullptr, out.data());
  for (int i = 0; i < kThreads; ++i)
    if (out[static_cast<size_t>(i)] != kThreads - 1 - i) return false;
  return true;
}

void divergent_barrier_kernel(unsigned threads) {
  if (threadIdx.x < threads) __syncthreads();
}
bool divergent_barrier(uint64_t) {
  KNN_LAUNCH(divergent_barrier_kernel, 1, 64, 0, nullptr, 40u);
  return true;
}

void shared_overflow_kernel(unsigned at) {
  KNN_DYN_SMEM(raw);
  raw[at + threadIdx.x] = 1;
}
bool shared_overflow(uint64_t) {
  KNN_LAUNCH(shared_overflow_kernel, 1, 32, 512, nullptr, 512u);
  return true;
}

void global_overread_kernel(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
bool global_overread(uint64_t) {
  emu::Guarded a, b;
  int* in = guarded(a, counting(32));
  int* out = guarded(b, counting(32));
  KNN_LAUNCH(global_overread_kernel, 1, 32, 0, nullptr, in, out);
  return true;
}

void foreign_mask_kernel(unsigned mask) { __shfl_sync(mask, 1, 0); }
bool foreign_mask(uint64_t) {
  KNN_LAUNCH(foreign_mask_kernel, 1, 32, 0, nullptr, 0xffffu);
  return true;
}

// --- Warps: a butterfly sum, and a prefix by votes.
void warp_kernel(int* out) {
  int t = static_cast<int>(threadIdx.x), sum = t;
  for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
  unsigned odd = __ballot_sync(~0u, t & 1);
  int prefix = t;
  for (int d = 1; d < 32; d <<= 1) {
    int other = __shfl_up_sync(~0u, prefix, static_cast<unsigned>(d));
    if (t % 32 >= d) prefix += other;
  }
  out[t] = sum + __popc(odd) + __shfl_sync(~0u, prefix, 31);
}
bool warp_operations(uint64_t) {
  std::vector<int> out(64);
  KNN_LAUNCH(warp_kernel, 1, 64, 0, nullptr, out.data());
  for (int t = 0; t < 64; ++t)
    if (out[static_cast<size_t>(t)] != 2 * (t < 32 ? 496 : 496 + 1024) + 16) return false;
  return true;
}

// --- cp.async: a ring of two stages; `Mode` leaves one step out.
enum class Plant { kNone, kNoWait, kNoBarrier };
template <Plant Mode>
void ring_kernel(const uint4* in, unsigned* out, int steps) {
  KNN_DYN_SMEM(raw);
  auto* stage = reinterpret_cast<uint4*>(raw);
  unsigned t = threadIdx.x, n = blockDim.x, sum = 0;
  auto load = [&](int s) {
    if (s < steps)
      cp_async16(&stage[s % 2 * static_cast<int>(n) + static_cast<int>(t)],
                 &in[static_cast<unsigned>(s) * n + t]);
    cp_async_commit();
  };
  load(0);
  for (int s = 0; s < steps; ++s) {
    load(s + 1);
    if (Mode != Plant::kNoWait) cp_async_wait<1>();
    __syncthreads();
    sum += stage[s % 2 * static_cast<int>(n) + static_cast<int>(n - 1 - t)].x;
    if (Mode != Plant::kNoBarrier) __syncthreads();
  }
  out[t] = sum;
}
template <Plant Mode>
bool ring(uint64_t) {
  const int steps = 7, n = 64;
  std::vector<uint4> in(steps * n);
  for (unsigned i = 0; i < in.size(); ++i) in[i] = {i * i, 0, 0, 0};
  std::vector<unsigned> out(n);
  KNN_LAUNCH(ring_kernel<Mode>, 1, n, 2 * n * 16, nullptr, in.data(), out.data(), steps);
  for (unsigned t = 0; t < n; ++t) {
    unsigned want = 0;
    for (unsigned s = 0; s < steps; ++s) want += in[s * n + n - 1 - t].x;
    if (out[t] != want) return false;
  }
  return true;
}

// --- Bulk copies: one producer warp, one consumer warp, a ring guarded by full and empty barriers.
template <Plant Mode>
void bulk_kernel(const int* in, int* out, int steps) {
  KNN_DYN_SMEM(raw);
  auto* full = reinterpret_cast<uint64_t*>(raw);
  uint64_t* empty = full + 2;
  int* stage = reinterpret_cast<int*>(raw + 128);
  int t = static_cast<int>(threadIdx.x);
  if (t == 0)
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 32);
    }
  __syncthreads();
  if (t == 0) {
    for (int s = 0; s < steps; ++s) {
      unsigned lap = static_cast<unsigned>(s) / 2;
      if (Mode != Plant::kNoBarrier && lap) mbarrier_wait(&empty[s % 2], (lap - 1) & 1);
      mbarrier_arrive_expect(&full[s % 2], 128);
      bulk_copy(stage + s % 2 * 32, in + s * 32, 128, &full[s % 2]);
    }
  } else if (t >= 32) {
    int sum = 0;
    for (int s = 0; s < steps; ++s) {
      unsigned lap = static_cast<unsigned>(s) / 2;
      if (Mode != Plant::kNoWait) mbarrier_wait(&full[s % 2], lap & 1);
      sum += stage[s % 2 * 32 + 63 - t] * (s + 1);
      mbarrier_arrive(&empty[s % 2]);
    }
    out[t - 32] = sum;
  }
}
template <Plant Mode>
bool bulk(uint64_t) {
  const int steps = 9;
  auto in = counting(steps * 32);
  std::vector<int> out(32);
  KNN_LAUNCH(bulk_kernel<Mode>, 1, 64, 128 + 256, nullptr, in.data(), out.data(), steps);
  for (int t = 0; t < 32; ++t) {
    int want = 0;
    for (int s = 0; s < steps; ++s) want += in[static_cast<size_t>(s * 32 + 31 - t)] * (s + 1);
    if (out[static_cast<size_t>(t)] != want) return false;
  }
  return true;
}

// --- Matrix instructions on small integers, where every sum is exact.
int value(int i, int j) { return (i * 7 + j * 3) % 11 - 5; }

void mma_kernel(const unsigned char* a, const unsigned char* b, float* c, int* ci) {
  unsigned l = threadIdx.x;
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, a + l % 16 * 32 + l / 16 * 16);
  ldmatrix_x4(fb, b + l % 8 * 32 + l / 8 % 2 * 16);
  float acc[4] = {};
  int iacc[4] = {};
  if (c) mma_f16(acc, fa, fb);
  if (ci) mma_s8(iacc, fa, fb);
  for (unsigned i = 0; i < 4; ++i) {
    unsigned at = (l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2;
    if (c) c[at] = acc[i];
    if (ci) ci[at] = iacc[i];
  }
}
bool mma(uint64_t) {
  for (bool half : {true, false}) {
    const int K = half ? 16 : 32;
    std::vector<unsigned char> a(16 * 32), b(8 * 32);
    auto put = [&](std::vector<unsigned char>& m, int row, int k, int v) {
      if (half) {
        uint16_t h = float_to_half_bits(static_cast<float>(v));
        std::memcpy(&m[static_cast<size_t>(row * 32 + 2 * k)], &h, 2);
      } else {
        m[static_cast<size_t>(row * 32 + k)] = static_cast<unsigned char>(static_cast<int8_t>(v));
      }
    };
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < K; ++k) put(a, i, k, value(i, k));
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < K; ++k) put(b, j, k, value(j + 3, k));
    std::vector<float> c(128);
    std::vector<int> ci(128);
    float* no_float = nullptr;
    int* no_int = nullptr;
    KNN_LAUNCH(mma_kernel, 1, 32, 0, nullptr, a.data(), b.data(), half ? c.data() : no_float,
               half ? no_int : ci.data());
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        int want = 0;
        for (int k = 0; k < K; ++k) want += value(i, k) * value(j + 3, k);
        auto at = static_cast<size_t>(i * 8 + j);
        if (half ? c[at] != static_cast<float>(want) : ci[at] != want) return false;
      }
  }
  return true;
}

template <bool Wait>
void wgmma_kernel(float* c) {
  KNN_DYN_SMEM(raw);
  unsigned t = threadIdx.x;
  for (unsigned row = t; row < 64 + 256; row += 128)
    for (unsigned k = 0; k < 64; ++k) {
      bool is_a = row < 64;
      unsigned r = is_a ? row : row - 64;
      uint16_t h = float_to_half_bits(
          static_cast<float>(value(static_cast<int>(is_a ? r : r + 3), static_cast<int>(k))));
      std::memcpy(emu::swizzled(raw + (is_a ? 0 : 8192), r, 2 * k), &h, 2);
    }
  __syncthreads();
  float acc[128] = {};
  wgmma_fence();
  for (unsigned k = 0; k < 128; k += 32) wgmma_f16(acc, raw, raw + 8192, k);
  wgmma_commit();
  float early = acc[5];
  wgmma_wait<0>();
  if (!Wait) acc[5] = early;
  for (unsigned i = 0; i < 128; ++i)
    c[(t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8) * 256 + i / 4 * 8 + t % 4 * 2 + (i & 1)] =
        acc[i];
}
template <bool Wait>
bool wgmma(uint64_t) {
  std::vector<float> c(64 * 256);
  KNN_LAUNCH(wgmma_kernel<Wait>, 1, 128, 8192 + 32768, nullptr, c.data());
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 256; ++j) {
      int want = 0;
      for (int k = 0; k < 64; ++k) want += value(i, k) * value(j + 3, k);
      if (c[static_cast<size_t>(i * 256 + j)] != static_cast<float>(want)) return false;
    }
  return true;
}

// --- The runner: each seed in a process of its own, since planted errors end it.
bool passes(Case run, uint64_t seed) {
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(2);
    emu::set_seed(seed);
    _exit(run(seed) ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main() {
  const struct {
    const char* name;
    Case run;
    bool sound;
  } cases[] = {
      {"barrier", reverse<true>, true},
      {"warp operations", warp_operations, true},
      {"cp.async ring", ring<Plant::kNone>, true},
      {"bulk copy ring", bulk<Plant::kNone>, true},
      {"mma.sync", mma, true},
      {"wgmma", wgmma<true>, true},
      {"planted: no barrier between write and read", reverse<false>, false},
      {"planted: barrier in a divergent branch", divergent_barrier, false},
      {"planted: write past the shared memory", shared_overflow, false},
      {"planted: read past a global buffer", global_overread, false},
      {"planted: lane outside its mask", foreign_mask, false},
      {"planted: cp.async not waited for", ring<Plant::kNoWait>, false},
      {"planted: stage refilled while others read it", ring<Plant::kNoBarrier>, false},
      {"planted: bulk copy not waited for", bulk<Plant::kNoWait>, false},
      {"planted: bulk copy into a stage still in use", bulk<Plant::kNoBarrier>, false},
      {"planted: accumulators read before the wait", wgmma<false>, false},
  };
  const int seeds = 8;
  int failures = 0;
  for (const auto& c : cases) {
    int passed = 0;
    for (uint64_t seed = 1; seed <= seeds; ++seed) passed += passes(c.run, seed);
    bool ok = c.sound ? passed == seeds : passed < seeds;
    failures += !ok;
    std::printf("%s %s (%d of %d seeds right)\n", ok ? "ok  " : "FAIL", c.name, passed, seeds);
  }
  return failures != 0;
}
