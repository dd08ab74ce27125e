// What a mixture of experts does between its products: gathers rows, applies the gated activation, and combines.
#pragma once

#include "native/activation.h"
#include "native/routing.cuh"

namespace w4a16::native {

constexpr int kRowThreads = 256;
constexpr int kSlotsAtOnce = 8;  // rows that a thread reads before it adds them

struct GatherParameters {
  Gathered gathered;
  const int32_t* row_count;       // on the device
  const int32_t* routes_of_rows;  // [rows]
  int routes;
};

template <int Threads>
__global__ void __launch_bounds__(Threads) gather_rows(const __grid_constant__ GatherParameters p) {
  wait_for_prerequisites();
  launch_dependents();
  gather_rows_of<Threads>(p.gathered, p.routes_of_rows, min(*p.row_count, p.routes));
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
  const int64_t vectors = int64_t{rows} * p.vectors;
  const int64_t first = int64_t{blockIdx.x} * Threads + threadIdx.x;
  for (int64_t vector = first; vector < vectors; vector += int64_t{gridDim.x} * Threads) {
    const int64_t row = vector / p.vectors;
    const Halves gates = p.gates_and_factors[row * p.vectors + vector];  // rows are twice as long there
    const Halves factors = p.gates_and_factors[(row + 1) * p.vectors + vector];
    Halves values;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float gate = sigmoid_activation<false>(p.activation, __half2float(gates.value[j]), exp2_approximate,
                                                   reciprocal_approximate);
      values.value[j] = __float2half_rn(gate * __half2float(factors.value[j]));
    }
    p.output[vector] = values;
  }
}

// Adds the rows of each token's routes, in the order of its slots, times their weights. A token without rows gets 0.
struct CombineParameters {
  const Halves* rows;             // [rows, columns]
  const int32_t* rows_of_routes;  // [tokens, slots], or null
  Ids ids;                        // without rows of routes: of unsorted routes
  const float* weights;           // [tokens, slots], or null for 1
  Halves* output;                 // [tokens, columns]
  int tokens;
  int slots;
  int vectors;  // of a row
};

template <int Threads>
__global__ void __launch_bounds__(Threads) combine_rows(const __grid_constant__ CombineParameters p) {
  const bool is_unsorted = p.rows_of_routes == nullptr;
  // The products waited for the ids, so that these are there before the last of them ends.
  const Choices choices(is_unsorted ? p.ids : Ids{});
  wait_for_prerequisites();
  launch_dependents();
  // A CTA for each piece of a token, so that few tokens are many CTAs.
  const int pieces = (p.vectors + Threads - 1) / Threads;
  for (auto item = int64_t{blockIdx.x}; item < int64_t{p.tokens} * pieces; item += gridDim.x) {
    const int64_t token = item / pieces;
    const int i = static_cast<int>(item - token * pieces) * Threads + static_cast<int>(threadIdx.x);
    float sums[kVector] = {};
    for (int begin = 0; begin < p.slots; begin += kSlotsAtOnce) {
      int rows[kSlotsAtOnce];
      float weights[kSlotsAtOnce];
      Halves values[kSlotsAtOnce];
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        const int64_t route = token * p.slots + begin + j;
        const bool is_route = begin + j < p.slots;
        if (is_unsorted) {
          const int number = choices.number_of_route(is_route ? static_cast<int>(route) : 0);
          const int row = number * kUnsortedTokens + static_cast<int>(token);
          rows[j] = is_route && number != kNoExpert ? row : kNoExpert;
        } else {
          rows[j] = is_route ? p.rows_of_routes[route] : kNoExpert;
        }
        weights[j] = begin + j < p.slots && p.weights != nullptr ? p.weights[route] : 1.f;
      }
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (rows[j] != kNoExpert && i < p.vectors) values[j] = p.rows[int64_t{rows[j]} * p.vectors + i];
      }
#pragma unroll
      for (int j = 0; j < kSlotsAtOnce; ++j) {
        if (rows[j] == kNoExpert) continue;
#pragma unroll
        for (int k = 0; k < kVector; ++k) sums[k] = fmaf(weights[j], __half2float(values[j].value[k]), sums[k]);
      }
    }
    if (i >= p.vectors) continue;
    Halves result;
#pragma unroll
    for (int k = 0; k < kVector; ++k) result.value[k] = __float2half_rn(sums[k]);
    p.output[token * p.vectors + i] = result;
  }
}

}  // namespace w4a16::native
