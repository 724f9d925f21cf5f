// SPDX-License-Identifier: Apache-2.0
// A saved index: a folder with manifest.json and, per segment, raw little-endian arrays:
//
//   GENERATION-NNNN.rows.f16     [n, dim] FP16, row-major: what numpy.fromfile reads
//   GENERATION-NNNN.ids.i64      [n], only with own ids
//   GENERATION-NNNN.live.u16     a bit a row, only after removals
//   GENERATION-NNNN.terms.f32    row norms [n]; with codes also mean [dim], scale, bounds, norm
//   GENERATION-NNNN.codes.u8     the blocks of segment.h, 1 KiB of zeros behind them
//   GENERATION-NNNN.rotation.f32 [dim, dim] and its error (rotation.h), where codes have one; one
//                                for all segments that name it
//
// manifest.json is {"crc32c": N, "index": {...}}, the checksum covering the text of "index".
#pragma once

#include <cstdint>
#include <string>

namespace knnfast {

constexpr const char* kManifest = "manifest.json";
// 1: residuals as floats in the place of bounds; 2: stops after 3/8 and 5/8 of the groups; 3: no
// rotations.
constexpr int64_t kFormatVersion = 4;
// As the enumerations of knnfast/index.h count them.
constexpr const char* kMetricNames[] = {"ip", "cosine", "l2"};
constexpr const char* kScanNames[] = {"fp16", "int8", "auto"};

// Whether a file of a folder bears a payload's name, as above (index_save.cpp).
bool payload_name(const std::string& name);

}  // namespace knnfast
