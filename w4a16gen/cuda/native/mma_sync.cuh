// Tensor core instructions of a single warp: ldmatrix and mma.sync.
#pragma once

#include <cstdint>

namespace w4a16::native {

// Loads four 8x8 matrices. Each lane has the address of one row, in matrix lane / 8.
__device__ inline void load_matrices(uint32_t row, uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

// sum[16 channels, 8 tokens] += weights[16, 16] x activations[16, 8].
__device__ inline void multiply_by_warp(float (&sum)[4], const uint32_t (&weights)[4], uint32_t lower_k,
                                        uint32_t upper_k) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(lower_k), "r"(upper_k));
}

}  // namespace w4a16::native
