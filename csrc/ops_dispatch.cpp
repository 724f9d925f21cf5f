// SPDX-License-Identifier: Apache-2.0
// Chooses the row kernels once, at first use.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops_kernels.h"

namespace knnfast {

namespace portable {
extern const OpsKernels kTable;
}
#ifdef KNNFAST_X86
namespace avx2 {
extern const OpsKernels kTable;
}
namespace avx512 {
extern const OpsKernels kTable;
}
#endif

static const OpsKernels& choose() {
  const char* wanted = std::getenv("KNNFAST_ISA");
  auto asked = [&](const char* name) {
    return !wanted || std::strncmp(wanted, name, std::strlen(name)) == 0;
  };
#ifdef KNNFAST_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // "avx512", "avx512vnni" and "amx" of the search kernels all mean AVX-512 here.
  if (has_avx512 && (asked("avx512") || std::strcmp(wanted, "amx") == 0)) return avx512::kTable;
  if (has_avx2 && asked("avx2")) return avx2::kTable;
#endif
  if (asked("portable")) return portable::kTable;
  throw std::runtime_error(std::string("KNNFAST_ISA=") + wanted + " does not run on this machine");
}

const OpsKernels& ops_kernels() {
  static const OpsKernels& table = choose();
  return table;
}

}  // namespace knnfast
