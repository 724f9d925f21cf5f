// SPDX-License-Identifier: Apache-2.0
// AVX-512 without VNNI (F, BW, DQ, VL).
#include "isa/avx512.h"

namespace knnfast {
extern const Kernels kAvx512 = {
    "avx512",
    0,            // window
    kTiledBatch,  // tile_batch
    0,            // matrix_batch
    kStopGroups,  // stop_groups
    kGroup,       // stop_batch
    scan_int8<false>,
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
