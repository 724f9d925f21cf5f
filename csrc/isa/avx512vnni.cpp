// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI: vpdpbusd takes unsigned codes and a signed, broadcast query word.
#include "isa/avx512.h"

namespace knnfast {
extern const Kernels kAvx512Vnni = {
    "avx512vnni",
    0,            // window
    kTiledBatch,  // tile_batch
    0,            // matrix_batch
    kStopGroups,  // stop_groups
    kGroup,       // stop_batch
    scan_int8<true>,
    scan_fp16,
    canonical<false>,
    canonical<true>,
    widen,
    row_sum<kDot>,
    row_sum<kL2>,
    row_sum<kNorm2>,
    to_half,
    to_float,
    centre_row,
    quantize_row,
    squares,
    round_row,
    scale_row,
    matmul,
    matmul,
    nullptr,
};
}  // namespace knnfast
