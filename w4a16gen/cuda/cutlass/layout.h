// Layout `kmajor_s4_v1` of target `cutlass`: the sections of a packed weight, each aligned to 128 bytes.
//
// - nibbles [n, k rounded up to 32], k contiguous, lower nibble first. A nibble is q XOR 8: as a signed value, q - 8.
// - scales, fp16 [k / group_size, n], n contiguous.
// - zeros, fp16 [k / group_size, n], in the mode that has them.
// w4a16gen/weights/layouts/kmajor.py writes this layout; tests compare their sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "w4a16.h"

namespace w4a16::cutlass_target {

constexpr char kLayout[] = "kmajor_s4_v1";

struct PackedLayout {
  int64_t row_values;  // nibbles from one channel's row to the next
  size_t scales_offset;
  size_t zeros_offset;
  size_t bytes;

  PackedLayout(const w4a16_problem& problem, bool has_zeros) {
    const auto align = [](size_t bytes) { return (bytes + 127) / 128 * 128; };
    row_values = (problem.k + 31) / 32 * 32;  // TMA needs row strides of a multiple of 16 bytes
    const size_t scale_bytes =
        align(static_cast<size_t>(problem.k / problem.group_size) * static_cast<size_t>(problem.n) * 2);
    scales_offset = align(static_cast<size_t>(problem.n) * static_cast<size_t>(row_values) / 2);
    zeros_offset = scales_offset + scale_bytes;
    bytes = zeros_offset + (has_zeros ? scale_bytes : 0);
  }
};

}  // namespace w4a16::cutlass_target
