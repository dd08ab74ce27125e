// Stands in for native/mma_sync.cuh, for the emulation.
#pragma once

#include "native/ptx.cuh"

namespace w4a16::native {

inline float half_at(uint32_t word, int upper) {
  const auto bits = static_cast<uint16_t>(upper ? word >> 16 : word);
  half value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return __half2float(value);
}

inline void load_matrices(uint32_t row, uint32_t (&matrices)[4]) {
  MatrixLane<4> lane{row, {}};
  emulation::meet_as("ldmatrix", 32, lane, [](MatrixLane<4>* const* all) {
    for (int m = 0; m < 4; ++m) {
      for (int i = 0; i < 32; ++i) {
        all[i]->values[m] = load_at<uint32_t>(all[m * 8 + i / 4]->row + static_cast<uint32_t>(i % 4 * 4));
      }
    }
  });
  std::copy(lane.values, lane.values + 4, matrices);
}

// The element of an A fragment (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of 16 channels and 16 k.
inline float weight_at(const uint32_t* const* fragments, int channel, int k) {
  const int lane = channel % 8 * 4 + k % 8 / 2;
  return half_at(fragments[lane][channel / 8 + k / 8 * 2], k % 2);
}

inline void multiply_by_warp(float (&sum)[4], const uint32_t (&weights)[4], uint32_t lower_k, uint32_t upper_k) {
  struct Lane {
    float* sum;
    const uint32_t* weights;
    uint32_t activations[2];
  } mine{sum, weights, {lower_k, upper_k}};
  emulation::meet_as("mma", 32, mine, [](Lane* const* all) {
    const uint32_t* fragments[32];
    for (int i = 0; i < 32; ++i) fragments[i] = all[i]->weights;
    float activations[8][16];
    for (int token = 0; token < 8; ++token) {
      for (int k = 0; k < 16; ++k) {
        activations[token][k] = half_at(all[token * 4 + k % 8 / 2]->activations[k / 8], k % 2);
      }
    }
    for (int channel = 0; channel < 16; ++channel) {
      float weights_of_channel[16];
      for (int k = 0; k < 16; ++k) weights_of_channel[k] = weight_at(fragments, channel, k);
      for (int token = 0; token < 8; ++token) {
        double exact = 0;
        for (int k = 0; k < 16; ++k) {
          exact += static_cast<double>(weights_of_channel[k]) * activations[token][k];
        }
        float& to = all[channel % 8 * 4 + token / 2]->sum[channel / 8 * 2 + token % 2];
        to = static_cast<float>(to + exact);
      }
    }
  });
}

}  // namespace w4a16::native
