// Dequantisation: a word of eight nibbles to the eight fp16 weights of one A fragment.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "native/layout.h"

#if defined(__CUDACC__)
#define W4A16_UNROLL _Pragma("unroll")
#else
#define W4A16_UNROLL
#endif

namespace w4a16::native {

W4A16_HOST_DEVICE inline uint32_t rotate_right(uint32_t word, int bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(word, word, bits);
#else
  return word >> bits | word << (32 - bits);
#endif
}

W4A16_HOST_DEVICE inline half2 as_half2(uint32_t bits) {
  half2 value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return value;
}

W4A16_HOST_DEVICE inline uint32_t as_bits(half2 value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Returns a * b + c, rounded once. The host version, for tests, uses double, which holds the exact result.
W4A16_HOST_DEVICE inline half2 multiply_add(half2 a, half2 b, half2 c) {
#if defined(__CUDA_ARCH__)
  return __hfma2(a, b, c);
#else
  const auto once = [](half x, half y, half z) {
    return __double2half(static_cast<double>(__half2float(x)) * __half2float(y) + __half2float(z));
  };
  return half2(once(a.x, b.x, c.x), once(a.y, b.y, c.y));
#endif
}

W4A16_HOST_DEVICE inline half2 add(half2 a, half2 b) {
#if defined(__CUDA_ARCH__)
  return __hadd2(a, b);
#else
  return multiply_add(a, as_half2(0x3c003c00), b);
#endif
}

constexpr uint32_t kLowNibbles = 0x00780078;   // bits 3 to 6 of both halves
constexpr uint32_t kHighNibbles = 0x07800780;  // bits 7 to 10

// -8 units as fp16, for the implicit zero point of 8: for the channel, and for the channel + 8.
W4A16_HOST_DEVICE constexpr uint16_t minus_eight_units(int upper) { return upper == 0 ? 0x8040 : 0x8400; }
W4A16_HOST_DEVICE constexpr uint16_t minus_eight_large_units(int upper) { return upper == 0 ? 0xb000 : 0xc000; }
constexpr uint16_t kLargeUnit = 0x7800;  // 2^15, the ratio of a unit to a large unit

W4A16_HOST_DEVICE inline half2 splat(uint16_t bits) { return as_half2(bits * 0x10001u); }

// Returns -8 * scale of a pair of channels, exactly, from packed scales.
W4A16_HOST_DEVICE inline half2 offset_of(half2 packed_scales) {
  const half2 minus_eight = as_half2(minus_eight_units(0) | static_cast<uint32_t>(minus_eight_units(1)) << 16);
  return multiply_add(packed_scales, minus_eight, as_half2(0x80008000));  // adding -0 changes no product
}

// Dequantises one thread's eight nibbles of one m64k16 step. `scales` and `addends` each hold a value for the channel
// and one for the channel + 8. The addends are offset_of(scales), or the zeros.
//
// Masking the word gives q * unit. A fused multiply-add with the packed scale then gives (q - 8) * scale, rounded once.
// With zeros, q - 8 is computed first, exactly. Without scales the result is q - 8 in units; the channel's factor
// contains the scale.
template <bool Scales, bool Zeros>
W4A16_HOST_DEVICE inline void dequantize(uint32_t word, half2 scales, half2 addends, uint32_t (&fragment)[4]) {
  const uint32_t rotated = rotate_right(word, 8);
  const uint32_t nibbles[4] = {word & kLowNibbles, word & kHighNibbles, rotated & kLowNibbles, rotated & kHighNibbles};
  const half2 scale[2] = {__low2half2(scales), __high2half2(scales)};
  const half2 addend[2] = {__low2half2(addends), __high2half2(addends)};
  W4A16_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int upper = i % 2;
    half2 value = as_half2(nibbles[i]);
    if constexpr (Zeros) value = multiply_add(value, splat(kLargeUnit), splat(minus_eight_large_units(upper)));
    if constexpr (Scales) {
      value = multiply_add(value, scale[upper], addend[upper]);
    } else {
      value = add(value, splat(minus_eight_units(upper)));
    }
    fragment[i] = as_bits(value);
  }
}

}  // namespace w4a16::native
