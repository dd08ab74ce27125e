// WGMMA with dequantised weights in registers and activations in shared memory.
#pragma once

#include <cstdint>

#include "native/wgmma_instruction.cuh"

namespace w4a16::native {

// WGMMA's descriptor of a K-major operand with 128-byte swizzle (PTX ISA, "Matrix Descriptor Format"). Address and
// stride are in units of 16 bytes; groups of 8 rows are 1024 bytes apart. Adding to the low word moves the address.
__device__ inline uint32_t descriptor_low(uint32_t address) { return (address >> 4 & 0x3fff) | 1 << 16; }

__device__ inline uint64_t descriptor(uint32_t low) {
  constexpr uint32_t kHigh = 64 | 1 << 30;
  return uint64_t{kHigh} << 32 | low;
}

// sum[64 channels, Tokens] = adds * sum + A[64, 16] (registers) x B[16, Tokens] (shared memory). `adds` is 0 or 1.
template <int Tokens>
__device__ inline void wgmma(float (&sum)[Tokens / 2], const uint32_t (&a)[4], uint64_t b, int adds) {
  WgmmaInstruction<Tokens>::run(sum, a, b, adds);
}

// The A fragments of 64 channels x 64 k, one per k16 step.
using Fragments = uint32_t[4][4];

// Moves a descriptor forward by `by` times 16 bytes.
template <bool Add64>
__device__ inline uint64_t advance_descriptor(uint64_t from, int by) {
  if constexpr (Add64) return from + static_cast<uint32_t>(by);
  return descriptor(static_cast<uint32_t>(from) + by);
}

// Issues the WGMMAs of 64 channels x 64 k with the activations of a descriptor. They overwrite sums if `adds` is 0.
template <int Tokens, bool Add64>
__device__ inline void multiply(float (&sum)[Tokens / 2], const Fragments& fragments, uint64_t activations,
                                int adds = 1) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t b = advance_descriptor<Add64>(activations, step * 2);  // 32 bytes
    wgmma<Tokens>(sum, fragments[step], b, step == 0 ? adds : 1);
  }
  wgmma_commit();
}

}  // namespace w4a16::native
