// The shapes that an activation gives the output, for the library and for kernel families.
// w4a16gen/kernels/epilogue.py states the same; a test compares the two.
#pragma once

#include <cstdint>

#include "w4a16.h"

namespace w4a16 {

constexpr int64_t kGatedMultiple = 16;  // 8 gates and their 8 factors are packed side by side

constexpr bool is_gated(int32_t activation) { return activation >= W4A16_SWIGLU && activation <= W4A16_GEGLU_ERF; }

// Output channels of a product with n channels.
constexpr int64_t output_channels(int64_t n, int32_t activation) { return is_gated(activation) ? n / 2 : n; }

}  // namespace w4a16
