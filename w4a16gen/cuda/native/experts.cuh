// What a mixture of experts does between its products: gathers rows, applies the gated activation, and combines.
#pragma once

#include <cuda_fp16.h>

#include "native/activation.h"
#include "native/routing.cuh"

namespace w4a16::native {

constexpr int kRowThreads = 256;
constexpr int kVector = 8;  // fp16 values of 16 bytes

struct alignas(16) Halves {
  half value[kVector];
};

// Copies the hidden states of tokens to the rows of their routes, perhaps times the routing weight.
struct GatherParameters {
  const Halves* hidden;           // [tokens, columns]
  const int32_t* row_count;       // on the device
  const int32_t* routes_of_rows;  // [rows]
  const float* weights;           // [routes], or null
  Halves* rows;                   // [routes, columns], written as far as there are rows
  int routes;
  int slots;
  int vectors;  // of a row
};

template <int Threads>
__global__ void __launch_bounds__(Threads) gather_rows(const __grid_constant__ GatherParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  const int rows = min(*p.row_count, p.routes);
  for (auto row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const int route = p.routes_of_rows[row];
    const Halves* const from = p.hidden + static_cast<int64_t>(route / p.slots) * p.vectors;
    Halves* const to = p.rows + static_cast<int64_t>(row) * p.vectors;
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += Threads) {
      Halves values = from[i];
      if (p.weights != nullptr) {
#pragma unroll
        for (half& value : values.value) value = __float2half_rn(__half2float(value) * p.weights[route]);
      }
      to[i] = values;
    }
  }
}

// activation(gate) * factor, of rows that hold all gates and then all factors.
struct ActivationParameters {
  const Halves* gates_and_factors;  // [rows, 2 * columns]
  const int32_t* row_count;         // on the device, or null for all
  Halves* output;                   // [rows, columns], written as far as there are rows
  int rows;
  int vectors;  // of a row that is written
  Activation activation;
};

template <int Threads>
__global__ void __launch_bounds__(Threads) activate_rows(const __grid_constant__ ActivationParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  const int rows = p.row_count != nullptr ? min(*p.row_count, p.rows) : p.rows;
  for (auto row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const Halves* const from = p.gates_and_factors + static_cast<int64_t>(row) * 2 * p.vectors;
    Halves* const to = p.output + static_cast<int64_t>(row) * p.vectors;
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += Threads) {
      const Halves gates = from[i];
      const Halves factors = from[p.vectors + i];
      Halves values;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float gate =
            sigmoid_activation(p.activation, __half2float(gates.value[j]), exp2_approximate, reciprocal_approximate);
        values.value[j] = __float2half_rn(gate * __half2float(factors.value[j]));
      }
      to[i] = values;
    }
  }
}

// Adds the rows of each token's routes, in the order of its slots, times their weights. A token without rows gets 0.
struct CombineParameters {
  const Halves* rows;             // [rows, columns]
  const int32_t* rows_of_routes;  // [tokens, slots]
  const float* weights;           // [tokens, slots], or null for 1
  Halves* output;                 // [tokens, columns]
  int tokens;
  int slots;
  int vectors;  // of a row
};

template <int Threads>
__global__ void __launch_bounds__(Threads) combine_rows(const __grid_constant__ CombineParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  for (auto token = static_cast<int>(blockIdx.x); token < p.tokens; token += static_cast<int>(gridDim.x)) {
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += Threads) {
      float sums[kVector] = {};
      for (int slot = 0; slot < p.slots; ++slot) {
        const int64_t route = static_cast<int64_t>(token) * p.slots + slot;
        const int row = p.rows_of_routes[route];
        if (row == kNoExpert) continue;
        const float weight = p.weights != nullptr ? p.weights[route] : 1.f;
        const Halves values = p.rows[static_cast<int64_t>(row) * p.vectors + i];
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[j] = fmaf(weight, __half2float(values.value[j]), sums[j]);
      }
      Halves result;
#pragma unroll
      for (int j = 0; j < kVector; ++j) result.value[j] = __float2half_rn(sums[j]);
      p.output[static_cast<int64_t>(token) * p.vectors + i] = result;
    }
  }
}

}  // namespace w4a16::native
