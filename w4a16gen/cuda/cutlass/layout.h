// Layout `kmajor_s4_v1`, which target `cutlass` reads: where the parts of a packed weight lie.
//
// Three sections, each aligned to 128 bytes: the nibbles [n, k rounded up to 32], k contiguous, lower nibble first,
// each holding q XOR 8, which read as a signed 4-bit value is q - 8; the scales, fp16 [k / group_size, n], n
// contiguous; the zeros, the same shape, in the mode that has them. weights/layouts/kmajor.py writes the same layout.
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
    row_values = (problem.k + 31) / 32 * 32;  // TMA: 16-byte row strides
    const size_t scale_bytes =
        align(static_cast<size_t>(problem.k / problem.group_size) * static_cast<size_t>(problem.n) * 2);
    scales_offset = align(static_cast<size_t>(problem.n) * static_cast<size_t>(row_values) / 2);
    zeros_offset = scales_offset + scale_bytes;
    bytes = zeros_offset + (has_zeros ? scale_bytes : 0);
  }
};

}  // namespace w4a16::cutlass_target
