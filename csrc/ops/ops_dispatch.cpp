// SPDX-License-Identifier: Apache-2.0
// Chooses the row kernels once, at first use.
#include <string>

#include "isa/kernels.h"
#include "ops/ops_kernels.h"

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

// What the search chose (csrc/isa/dispatch.cpp); all of its AVX-512 sets mean AVX-512 here.
static const OpsKernels& choose() {
#ifdef KNNFAST_X86
  const std::string isa = kernels().name;
  if (isa == "amx" || isa.rfind("avx512", 0) == 0) return avx512::kTable;
  if (isa == "avx2") return avx2::kTable;
#endif
  return portable::kTable;
}

const OpsKernels& ops_kernels() {
  static const OpsKernels& table = choose();
  return table;
}

}  // namespace knnfast
