// The shapes that an activation gives the output, for the library and for kernel families.
// w4a16gen/kernels/epilogue.py states the same; a test compares the two.
#pragma once

#include <cstdint>

#include "w4a16.h"

namespace w4a16 {

constexpr int64_t kGatedMultiple = 16;  // 8 gates and their 8 factors are packed side by side

constexpr bool is_gated(int32_t activation) { return activation >= W4A16_SWIGLU && activation <= W4A16_GEGLU; }

// The epilogue of the kernels that compute a call.
constexpr int32_t needed_epilogue(int32_t activation, bool has_residual) {
  if (is_gated(activation)) return W4A16_GATED;
  return activation == W4A16_NO_ACTIVATION && !has_residual ? W4A16_NO_EPILOGUE : W4A16_ELEMENTWISE;
}

// An epilogue as in kernel names and options.
constexpr const char* epilogue_name(int32_t epilogue) {
  return epilogue == W4A16_GATED ? "gated" : epilogue == W4A16_ELEMENTWISE ? "elementwise" : "none";
}

// Output channels of a product with n channels.
constexpr int64_t output_channels(int64_t n, int32_t activation) { return is_gated(activation) ? n / 2 : n; }

}  // namespace w4a16
