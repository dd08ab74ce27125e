// From a word of eight nibbles to the eight fp16 weights of one A fragment.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "native_layout.h"

#if defined(__CUDACC__)
#define W4A16_UNROLL _Pragma("unroll")
#else
#define W4A16_UNROLL
#endif

namespace w4a16::native {

// The scales (and zeros) of one thread's two channels, each twice.
struct ChannelScales {
  half2 scale[2];
  half2 zero[2];
};

// (word & mask) | bits, in one instruction.
W4A16_HOST_DEVICE inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
#else
  return (word & mask) | bits;
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

// a * b + c, rounded once. On the host, where tests walk the layout, through double, which holds the exact result.
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

W4A16_HOST_DEVICE inline half2 multiply(half2 a, half2 b) {
#if defined(__CUDA_ARCH__)
  return __hmul2(a, b);
#else
  return multiply_add(a, b, as_half2(0x80008000));  // -0 changes no product
#endif
}

W4A16_HOST_DEVICE inline half2 add(half2 a, half2 b) {
#if defined(__CUDA_ARCH__)
  return __hadd2(a, b);
#else
  return multiply_add(a, as_half2(0x3c003c00), b);
#endif
}

// An fp16 of exponent 2^10 has a unit of 1 in its last place: putting v there gives 1024 + v, and four bits higher 1024
// + 16 v. Subtracting 1032, and multiplying by 1/16 and subtracting 72, leave v - 8, both exactly. Then the scale
// rounds once: a product, or a fused multiply-add with the zero.
template <bool Scales, bool Zeros>
W4A16_HOST_DEVICE inline void dequantize(uint32_t word, const ChannelScales& scales, uint32_t (&fragment)[4]) {
  constexpr uint32_t kThousand = 0x64006400;
  const half2 low_offset = as_half2(0xe408e408);   // -1032
  const half2 sixteenth = as_half2(0x2c002c00);    // 1 / 16
  const half2 high_offset = as_half2(0xd480d480);  // -72
  const uint32_t upper = word >> 8;
  half2 value[4] = {
      add(as_half2(and_or(word, 0x000f000f, kThousand)), low_offset),
      multiply_add(as_half2(and_or(word, 0x00f000f0, kThousand)), sixteenth, high_offset),
      add(as_half2(and_or(upper, 0x000f000f, kThousand)), low_offset),
      multiply_add(as_half2(and_or(upper, 0x00f000f0, kThousand)), sixteenth, high_offset),
  };
  W4A16_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (Zeros) {
      value[i] = multiply_add(value[i], scales.scale[i & 1], scales.zero[i & 1]);
    } else if constexpr (Scales) {
      value[i] = multiply(value[i], scales.scale[i & 1]);
    }
    fragment[i] = as_bits(value[i]);
  }
}

}  // namespace w4a16::native
