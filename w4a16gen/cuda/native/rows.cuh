// Rows of fp16 activations, and the copies of hidden states in the order of experts.
#pragma once

#include <cuda_fp16.h>

#include "native/ptx.cuh"
#include "native/shape.h"

namespace w4a16::native {

constexpr int kVector = 8;         // fp16 values of 16 bytes
constexpr int kVectorsAtOnce = 4;  // of a row that a lane reads before it writes

struct alignas(16) Halves {
  half value[kVector];
};

// The hidden states of tokens, copied to the rows of their routes, perhaps times the routing weight.
struct Gathered {
  const Halves* hidden;  // [tokens, columns]
  const float* weights;  // [routes], or null
  Halves* rows;          // [routes, columns], written as far as there are rows
  int slots;
  int vectors;  // of a row
};

// Copies this CTA's share of the rows, a warp for each row.
template <int Threads>
__device__ inline void gather_rows_of(const Gathered& p, const int32_t* routes_of_rows, int rows) {
  constexpr int kWarps = Threads / kWarp;
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const int first = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / kWarp);
  for (int row = first; row < rows; row += static_cast<int>(gridDim.x) * kWarps) {
    const int route = routes_of_rows[row];
    const float weight = p.weights != nullptr ? p.weights[route] : 1.f;
    const Halves* const from = p.hidden + static_cast<int64_t>(route / p.slots) * p.vectors;
    Halves* const to = p.rows + static_cast<int64_t>(row) * p.vectors;
    for (int begin = lane; begin < p.vectors; begin += kWarp * kVectorsAtOnce) {
      Halves values[kVectorsAtOnce];
#pragma unroll
      for (int i = 0; i < kVectorsAtOnce; ++i) {
        if (begin + i * kWarp < p.vectors) values[i] = from[begin + i * kWarp];
      }
#pragma unroll
      for (int i = 0; i < kVectorsAtOnce; ++i) {
        if (begin + i * kWarp >= p.vectors) break;
        if (p.weights != nullptr) {
#pragma unroll
          for (half& value : values[i].value) value = __float2half_rn(__half2float(value) * weight);
        }
        to[begin + i * kWarp] = values[i];
      }
    }
  }
}

}  // namespace w4a16::native
