// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels once: the best this machine has, or the ones KNNFAST_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa/kernels.h"
#include "knnfast/index.h"

#ifdef KNNFAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace knnfast {

extern const Kernels kPortable;
#ifdef KNNFAST_X86
extern const Kernels kAvx2, kAvx512, kAvx512Vnni, kAmx;

namespace {

// The processor has the tiles, and Linux lets this process use them.
bool amx_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

static const Kernels& choose() {
  const char* wanted = std::getenv("KNNFAST_ISA");
  const std::string name = wanted ? wanted : "";
  const Kernels* best = nullptr;
  std::string there;
  auto offer = [&](const Kernels& k, bool usable) {
    if (!best && usable && (name.empty() || name == k.name)) best = &k;
    if (usable) there += (there.empty() ? "" : ", ") + std::string(k.name);
  };
#ifdef KNNFAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  offer(kAmx, vnni && (name.empty() || name == "amx") && amx_granted());
  offer(kAvx512Vnni, vnni);
  offer(kAvx512, avx512);
  offer(kAvx2, avx2);
#endif
  offer(kPortable, true);
  if (!best)
    throw std::invalid_argument("KNNFAST_ISA=" + name +
                                ": this machine or build has no such kernels, but " + there);
  return *best;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa() { return kernels().name; }

}  // namespace knnfast
