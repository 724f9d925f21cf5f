// SPDX-License-Identifier: Apache-2.0
// AVX-512 without VNNI (F, BW, DQ, VL).
#include "isa/avx512.h"

namespace knnfast {
extern const Kernels kAvx512 = {"avx512",
                                0,
                                kTiledBatch,
                                0,
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
                                matmul,
                                matmul};
}  // namespace knnfast
