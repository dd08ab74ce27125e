// What a mixture of experts does between its products: gathers rows, applies the gated activation, and combines.
#pragma once

#include <cuda_fp16.h>

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
  int slots;
  int vectors;  // of a row
};

__global__ void __launch_bounds__(kRowThreads) gather_rows(const __grid_constant__ GatherParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  const int rows = *p.row_count;
  for (auto row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const int route = p.routes_of_rows[row];
    const Halves* const from = p.hidden + static_cast<int64_t>(route / p.slots) * p.vectors;
    Halves* const to = p.rows + static_cast<int64_t>(row) * p.vectors;
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += kRowThreads) {
      Halves values = from[i];
      if (p.weights != nullptr) {
#pragma unroll
        for (half& value : values.value) value = __float2half_rn(__half2float(value) * p.weights[route]);
      }
      to[i] = values;
    }
  }
}

enum class Gate { kSilu, kGeluTanh, kGelu };

__device__ inline float gated(Gate gate, float x) {
  switch (gate) {
    case Gate::kSilu:
      return x / (1.f + expf(-x));
    case Gate::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    default:
      return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
  }
}

// act(gate) * up, of rows that hold all gates and then all ups.
struct ActivationParameters {
  const Halves* gate_up;     // [rows, 2 * columns]
  const int32_t* row_count;  // on the device
  Halves* rows;              // [rows, columns], written as far as there are rows
  int vectors;               // of a row that is written
  Gate gate;
};

__global__ void __launch_bounds__(kRowThreads) activate_rows(const __grid_constant__ ActivationParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  const int rows = *p.row_count;
  for (auto row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const Halves* const from = p.gate_up + static_cast<int64_t>(row) * 2 * p.vectors;
    Halves* const to = p.rows + static_cast<int64_t>(row) * p.vectors;
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += kRowThreads) {
      const Halves gates = from[i];
      const Halves ups = from[p.vectors + i];
      Halves values;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        values.value[j] = __float2half_rn(gated(p.gate, __half2float(gates.value[j])) * __half2float(ups.value[j]));
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

__global__ void __launch_bounds__(kRowThreads) combine_rows(const __grid_constant__ CombineParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  for (auto token = static_cast<int>(blockIdx.x); token < p.tokens; token += static_cast<int>(gridDim.x)) {
    for (auto i = static_cast<int>(threadIdx.x); i < p.vectors; i += kRowThreads) {
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
